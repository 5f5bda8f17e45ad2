"""Text to batches: tokenizer, Megatron indexed datasets, packed documents.

Import from the modules themselves (`dash_megatron.data.dataset` and so on). Nothing is re-exported here,
because the CPU tools in `data_tools` need the tokenizer without paying for the import of torch and Megatron.
"""
