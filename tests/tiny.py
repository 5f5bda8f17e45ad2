"""A corpus and a model small enough to train in a moment, for tests and for `python -m tests.chaos`."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "def",
    "return",
    "self",
    "value",
    "index",
    "for",
    "in",
    "range",
    "list",
    "print",
    "import",
    "class",
    "error",
    "token",
    "chunk",
    "query",
    "key",
]

# processes are forked from one that has imported what a run does, before its engine is made and then
FORKED_WITH = ["dash_megatron.training.trainer", "torch.distributed", "torch._dynamo"]
FORKED_WITH += ["deepspeed.module_inject.auto_ep_layer"]


def make_tiny_data(folder: Path) -> Path:
    """Fill a folder with tokenizer.model and train/valid .bin/.idx of 1500 random documents, a few to 300 tokens long."""
    from data_tools import tokenize_corpus, train_tokenizer

    generator = random.Random(0)
    documents = folder / "documents"
    documents.mkdir(parents=True)
    for number in range(1500):
        length = generator.choice([1, 4, 10, 60])
        text = " ".join(generator.choice(WORDS) + str(generator.randrange(10)) for _ in range(length))
        (documents / f"{number:04d}.txt").write_text(text)
    tokenizer = str(folder / "tokenizer.model")
    assert not train_tokenizer.main(["--input", str(documents), "--vocab-size", "320", "--output", tokenizer])
    tokenize = ["--input", str(documents), "--tokenizer", tokenizer, "--output", str(folder)]
    assert not tokenize_corpus.main([*tokenize, "--valid-fraction", "0.1", "--workers", "1"])
    return folder


def make_tiny_chats(folder: Path, tokenizer: Path) -> Path:
    """Fill a folder with train/valid files of 400 conversations of one to three questions, of which the answers are learnt."""
    from data_tools import tokenize_corpus

    generator = random.Random(1)
    lines = []
    for _ in range(400):
        messages = []
        for word in generator.choices(WORDS, k=generator.choice([1, 1, 2, 3])):
            messages.append({"role": "user", "content": f"what is {word}{generator.randrange(10)}?"})
            messages.append({"role": "assistant", "content": answer_about(word)})
        lines.append(json.dumps({"messages": messages}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chats.jsonl").write_text("".join(lines))
    arguments = [
        "--input",
        str(folder / "chats.jsonl"),
        "--tokenizer",
        str(tokenizer),
        "--output",
        str(folder),
    ]
    assert not tokenize_corpus.main(
        [*arguments, "--conversations", "--valid-fraction", "0.1", "--workers", "1"]
    )
    return folder


def answer_about(word: str) -> str:
    """What the tiny conversations answer to a question about a word."""
    return "a list in value" if WORDS.index(word) % 2 else "an error"


def tiny_tree(data: Path, run_dir: Path) -> dict[str, Any]:
    """A run of a 2-layer model on such data, as nested dictionaries to change and check."""
    return {
        "run_dir": str(run_dir),
        "model": {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 96},
        "attention": {"chunk_size": 16},
        "data": {
            "tokenizer": str(data / "tokenizer.model"),
            "train": [str(data / "train")],
            "valid": [str(data / "valid")],
            "seq_length": 128,
            "num_workers": 0,
        },
        "optimizer": {"lr": 1e-2},
        "training": {"steps": 4, "global_batch": 4, "micro_batch": 1, "precision": "fp32"},
        "logging": {"every": 1, "tensorboard": False},
    }
