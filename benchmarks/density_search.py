"""Give an exported model with random weights the density of a trained one: scaling factors by bisection, layer by layer."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from dash_megatron.hf.fast_cache import FastLayer
from dash_megatron.hf.modeling_dash import DashForCausalLM, DashSelfAttention
from dash_megatron.ops import DashCache
from dash_megatron.ops.decode import decode_and_count
from dash_megatron.ops.types import Router

# Tokens, or places of a prompt, that a layer's density is measured on.
PROBES = 16
ROUNDS = 14
# Tokens that a cache has room for beyond its context: those of generate, and of the graph's replays.
SPARE_TOKENS = 256


def attention_layers(model: DashForCausalLM) -> list[DashSelfAttention]:
    """The attention of every layer."""
    return [layer.self_attn for layer in model.model.layers]


def random_tokens(model: DashForCausalLM, *shape: int) -> Tensor:
    """int64 of this shape."""
    return torch.randint(model.vocab_size, shape, device=model.device)


@contextmanager
def replaced(model: DashForCausalLM, name: str, make: Callable[[DashSelfAttention], Any]) -> Iterator[None]:
    """Replace a method of every layer's attention by what `make` gives for the layer."""
    for attention in attention_layers(model):
        setattr(attention, name, make(attention))
    try:
        yield
    finally:
        for attention in attention_layers(model):
            delattr(attention, name)


def shared_cache(cache: DashCache, lengths: Tensor) -> DashCache:
    """A cache of sequences of `lengths` tokens, int32 [n], that are all beginnings of the one in `cache`."""
    k, v, summary = (x.expand(len(lengths), -1, -1, -1) for x in (cache.k, cache.v, cache.summary))
    return DashCache(k, v, summary, lengths, cache.chunk_size)


def search_scaling_factor(
    attention: DashSelfAttention, q_nHD: Tensor, cache: DashCache, lengths: Tensor, target: float
) -> float:
    """Search the layer's scaling factor by bisection of its logarithm; gives the density that was reached.

    Args:
        q_nHD: queries, each a sequence of `lengths` tokens, int32 [n], of the one that `cache` holds.
    """
    shared = shared_cache(cache, lengths)
    available = (lengths - 1) // cache.chunk_size + 1
    router = Router(**attention.router._asdict())
    low, high, middle, density = 2.0**-4, 2.0**16, 1.0, 1.0
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        router = router._replace(scaling_factor=middle)
        _, selected = decode_and_count(q_nHD, shared, router, attention.backend)
        density = (selected / available[:, None]).mean().item()
        if density > target:
            low = middle
        else:
            high = middle
    attention.router = attention.router._replace(scaling_factor=middle)
    return density


def set_decoding_density(model: DashForCausalLM, cache: StaticCache, context: int, target: float) -> float:
    """Bring all layers to a density, on random tokens that each follow the cache's; gives the mean density."""
    densities: list[float] = []
    lengths = torch.full((PROBES,), context, dtype=torch.int32, device=model.device)

    def probe(attention: DashSelfAttention) -> Callable[..., Tensor]:
        def attend(q: Tensor, *_: Any) -> Tensor:
            layer, q_nHD = cache.layers[attention.index], q[:, :, 0]
            assert isinstance(layer, FastLayer)
            store = layer.store
            densities.append(search_scaling_factor(attention, q_nHD, store, lengths, target))
            router = Router(**attention.router._asdict())
            return decode_and_count(q_nHD, shared_cache(store, lengths), router, attention.backend)[0][
                :, :, None
            ]

        return attend

    tokens = random_tokens(model, PROBES, 1)
    with replaced(model, "_attend_with_kernels", probe):
        model(tokens, position_ids=torch.full_like(tokens, context), use_cache=False)
    return statistics.mean(densities)


def set_prefill_density(model: DashForCausalLM, prompt: Tensor, target: float) -> float:
    """Bring all layers to a density, in one forward pass over the prompt; gives the mean density."""
    densities: list[float] = []
    N = prompt.shape[1]

    def probe(attention: DashSelfAttention) -> Callable[..., Any]:
        def attend(q: Tensor, k: Tensor, v: Tensor, *places: Any) -> Any:
            H, D, C = attention.kv_heads, attention.head_dim, attention.router.chunk_size
            lengths = torch.linspace(N // PROBES, N, PROBES, device=q.device).int()
            # as large as a cache that decodes after it, so that the same kernels serve
            store = DashCache.contiguous(
                1, N + SPARE_TOKENS, H, D, chunk_size=C, dtype=q.dtype, device=q.device
            )
            bounds = torch.tensor([0, N], dtype=torch.int32, device=q.device)
            keys, values = (x[0].transpose(0, 1) for x in (k, v))
            store.prefill(keys, values, attention.indexer_q.view(H, D), bounds, attention.backend)
            q_nHD = q[0, :, lengths.long() - 1].transpose(0, 1).contiguous()
            densities.append(search_scaling_factor(attention, q_nHD, store, lengths, target))
            return DashSelfAttention._attend_with_kernels(attention, q, k, v, *places)

        return attend

    with replaced(model, "_attend_with_kernels", probe):
        model(prompt, use_cache=False, logits_to_keep=1)
    return statistics.mean(densities)
