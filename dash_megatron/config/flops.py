"""Floating-point operations that a model does per token, parameter counts, and the peak speed of devices."""

from __future__ import annotations

from dash_megatron.config import Config
from dash_megatron.gpus import GPUS


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second of a device whose name has that of one of `GPUS` in it; None for others."""
    return next((gpu.peak_flops for name, gpu in GPUS.items() if name in device_name), None)


def matmul_parameters(config: Config, vocab_size: int) -> int:
    """Weights that multiply every token: all but the embedding table, norms, biases and summary queries."""
    model = config.model
    attention = model.hidden_size * 2 * model.channels_per_head * (model.heads + model.kv_heads)
    feed_forward = 3 * model.hidden_size * model.ffn_hidden_size
    router = model.hidden_size * routing_rows(config)
    return model.layers * (attention + feed_forward) + router + model.hidden_size * vocab_size


def routing_rows(config: Config) -> int:
    """Rows of the router's own projections in all layers."""
    if not config.attention.router_projections:
        return 0
    model = config.model
    layers = sum(config.attention.has_router_projections(layer) for layer in range(model.layers))
    return layers * 2 * model.kv_heads * model.channels_per_head


def parameter_count(config: Config, vocab_size: int) -> int:
    """All weights of the model."""
    model = config.model
    core = len(config.attention.sparse_layers(model.layers)) * core_attention_parameters(config)
    qkv_rows = model.layers * model.channels_per_head * (model.heads + 2 * model.kv_heads)
    biases = (qkv_rows + routing_rows(config)) * model.qkv_bias
    embedding = 0 if model.tie_embeddings else model.hidden_size * vocab_size
    return matmul_parameters(config, vocab_size) + embedding + norm_parameters(config) + biases + core


def norm_parameters(config: Config) -> int:
    """Weights of all norms."""
    model = config.model
    in_heads = 2 * model.channels_per_head * model.layers if model.qk_norm else 0
    return model.hidden_size * (2 * model.layers + 1) + in_heads


def core_attention_parameters(config: Config) -> int:
    """Weights of one layer's core attention of `attention.kind`: summary queries and factors, or what compresses and gates."""
    model, D = config.model, config.model.channels_per_head
    match config.attention.kind:
        case "dash":
            return model.kv_heads * (D + (config.attention.learned_scaling > 0))
        case "nsa":
            return 2 * model.kv_heads * _compression_parameters(config) + 3 * model.heads * (D + 1)
        case "full" | "infllmv2":
            return 0


def _compression_parameters(config: Config) -> int:
    """Weights that compress the keys, or values, of one kv head."""
    D = config.model.channels_per_head
    return D * (config.attention.nsa.kernel_size + 2 * D)


def _selection_flops(config: Config, context: float) -> float:
    """Operations of one layer for one token, apart from attention to the chunks counted as selected."""
    model, attention = config.model, config.attention
    width, chunk = model.heads * model.channels_per_head, attention.chunk_size
    match attention.kind:
        case "dash":
            # one summary per available chunk is scored
            return 6 * width * context / chunk
        case "infllmv2":
            return 2 * width * context / attention.infllmv2.kernel_stride  # forward only
        case "nsa":
            stride = attention.nsa.kernel_stride
            compression = 6 * 2 * model.kv_heads * _compression_parameters(config) / stride
            # attention to pooled keys, and once more to the chunks that are both always on and in the window
            both = min(attention.nsa.local_blocks, attention.nsa.window // chunk + 1)
            return compression + 12 * width * (context / stride + min(context, (both - 0.5) * chunk))
        case "full":
            return 0.0


def training_flops_per_token(
    config: Config, vocab_size: int, context: float, chunks_selected: dict[int, float] | None = None
) -> float:
    """Operations of forward and backward for one token; recomputation is not counted.

    Args:
        config: the run.
        vocab_size: rows of the output projection.
        context: mean number of tokens that a token may attend to causally, itself included.
        chunks_selected: mean number of selected chunks per token by layer, as measured; None counts every layer as
            full attention (the dense equivalent).
    """
    model, chunk = config.model, config.attention.chunk_size
    width = model.heads * model.channels_per_head
    total = 6.0 * matmul_parameters(config, vocab_size)
    for layer in range(model.layers):
        selected = None if chunks_selected is None else chunks_selected.get(layer)
        if selected is None:
            total += 12 * width * context
        else:
            # on average a token sees half of its own chunk
            attended = min(context, (selected - 0.5) * chunk)
            total += 12 * width * attended + _selection_flops(config, context)
    return total
