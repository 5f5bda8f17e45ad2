"""From text to training data, on a CPU: make_corpus, train_tokenizer, tokenize_corpus, write_sidecar."""
