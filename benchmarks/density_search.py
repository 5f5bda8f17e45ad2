"""Give an exported model with random weights the density of a trained one: scaling factors by bisection, layer by layer."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from dash_megatron.hf.fast_layer import FastLayer
from dash_megatron.hf.modeling_dash import DashForCausalLM, DashSelfAttention, pool_queries
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


def set_kind(model: DashForCausalLM, kind: str) -> None:
    """Let all layers attend fully, without projections for a router, or none but those that always do."""
    for attention in attention_layers(model):
        attention.is_full = kind == "full" or not hasattr(attention, "indexer_q")
        attention.has_router_projections = hasattr(attention, "indexer_q_proj") and not attention.is_full


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


def measure(
    attention: DashSelfAttention, q_nHD: Tensor, cache: DashCache, lengths: Tensor, factor: float | None = None,
    routing_q: Tensor | None = None,
) -> float:  # fmt: skip
    """Chunks that the layer selects over those available.

    Args:
        q_nHD: queries, each a sequence of `lengths` tokens, int32 [n], of the one that `cache` holds.
        factor: scaling factor; None for the layer's own.
        routing_q: as in `decode_and_count`.
    """
    available = (lengths - 1) // cache.chunk_size + 1
    router = Router(**attention._router()._asdict())
    if factor is not None:
        router = router._replace(scaling_factor=factor)
    _, selected = decode_and_count(q_nHD, shared_cache(cache, lengths), router, attention.backend, routing_q)
    return (selected / available[:, None]).mean().item()


def search_scaling_factor(
    attention: DashSelfAttention, q_nHD: Tensor, cache: DashCache, lengths: Tensor, target: float,
    routing_q: Tensor | None = None,
) -> float:  # fmt: skip
    """Search the layer's scaling factor by bisection of its logarithm; gives the density that was reached.

    Arguments are those of `measure`.
    """
    low, high, middle, density = 2.0**-4, 2.0**16, 1.0, 1.0
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        density = measure(attention, q_nHD, cache, lengths, middle, routing_q)
        if density > target:
            low = middle
        else:
            high = middle
    attention.router = attention.router._replace(scaling_factor=middle)
    return density


def set_decoding_density(model: DashForCausalLM, cache: StaticCache, context: int, target: float) -> float:
    """Bring all layers with a router to a density, on random tokens that each follow the cache's; gives the mean density.

    A router that pools queries sees of each those of the random tokens before it too, which the cache keeps as its last.
    """
    densities: list[float] = []
    num_tokens = PROBES + getattr(model.config, "query_pool", 1) - 1
    lengths = torch.full((num_tokens,), context, dtype=torch.int32, device=model.device)

    def probe(attention: DashSelfAttention) -> Callable[..., Tensor | None]:
        def attend(q: Tensor, k: Tensor, v: Tensor, *places: Any) -> Tensor | None:
            if attention.is_full:
                return None
            layer, q_nHD = cache.layers[attention.index], q[:, :, 0]
            assert isinstance(layer, FastLayer)
            store, own = layer.store, _own(attention, places)
            seen, routing_q = own[0] if own else q, own[0][:, :, 0] if own else None
            if store.queries is not None:
                routing_q = _pooled(seen.transpose(0, 2), store.query_pool)[0].transpose(0, 1).contiguous()
                slot = torch.arange(store.queries.shape[1], device=q.device)
                store.queries[0] = seen[slot % num_tokens, :, 0]
            found = search_scaling_factor(
                attention, q_nHD[-PROBES:], store, lengths[-PROBES:], target,
                None if routing_q is None else routing_q[-PROBES:],
            )  # fmt: skip
            densities.append(found)
            router = Router(**attention.router._asdict())
            out = decode_and_count(q_nHD, shared_cache(store, lengths), router, attention.backend, routing_q)
            return out[0][:, :, None]

        return attend

    tokens = random_tokens(model, num_tokens, 1)
    with replaced(model, "_attend_with_kernels", probe):
        model(tokens, position_ids=torch.full_like(tokens, context), use_cache=False)
    return statistics.mean(densities) if densities else 1.0


def set_prefill_density(model: DashForCausalLM, prompt: Tensor, target: float | None) -> float:
    """Bring all layers to a density, if there is one, in one forward pass over the prompt; gives the mean density."""
    densities: list[float] = []

    def probe(attention: DashSelfAttention) -> Callable[..., Any]:
        def attend(q: Tensor, k: Tensor, v: Tensor, *places: Any) -> Any:
            if not attention.is_full:
                densities.append(probe_prompt(attention, q, k, v, target, *_own(attention, places)))
            return DashSelfAttention._attend_with_kernels(attention, q, k, v, *places)

        return attend

    with replaced(model, "_attend_with_kernels", probe):
        model(prompt, use_cache=False, logits_to_keep=1)
    return statistics.mean(densities) if densities else 1.0


def probe_prompt(
    attention: DashSelfAttention, q: Tensor, k: Tensor, v: Tensor, target: float | None,
    own_q: Tensor | None = None, own_k: Tensor | None = None,
) -> float:  # fmt: skip
    """Density of a layer at places spread over a prompt, q, k and v [1, heads, N, D]; `target` is searched for, if there is one.

    Beside `own_q` and `own_k`, the queries and keys of a router that has its own, these route.
    """
    H, D, N, router = attention.kv_heads, attention.head_dim, q.shape[2], attention.router
    lengths = torch.linspace(N // PROBES, N, PROBES, device=q.device).int()
    # as large as a cache that decodes after it, so that the same kernels serve
    store = DashCache.contiguous(
        1, N + SPARE_TOKENS, H, D, chunk_size=router.chunk_size, dtype=q.dtype, device=q.device
    )
    bounds = torch.tensor([0, N], dtype=torch.int32, device=q.device)
    # what is selected depends on no other keys than those that are summarized
    keys, values = (x[0].transpose(0, 1) for x in (k if own_k is None else own_k, v))
    store.prefill(keys, values, attention.indexer_q.view(H, D), bounds, attention.backend)

    def at_probes(x: Tensor) -> Tensor:
        return x[0, :, lengths.long() - 1].transpose(0, 1).contiguous().to(q.dtype)

    routing_q = None if own_q is None else at_probes(own_q)
    if router.query_pool > 1:
        routing_q = at_probes(_pooled(q if own_q is None else own_q, router.query_pool))
    if target is None:
        return measure(attention, at_probes(q), store, lengths, routing_q=routing_q)
    return search_scaling_factor(attention, at_probes(q), store, lengths, target, routing_q)


def _own(attention: DashSelfAttention, places: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The queries and keys of a router that has its own, the last that `_attend_with_kernels` is given."""
    return places[-2:] if attention.has_router_projections else ()


def _pooled(q: Tensor, query_pool: int) -> Tensor:
    """What the router sees of the tokens of one row, from their queries [1, heads, N, D]."""
    start = torch.zeros(1, dtype=torch.int64, device=q.device)
    return pool_queries(q.float(), None, 0, start, query_pool).to(q.dtype)
