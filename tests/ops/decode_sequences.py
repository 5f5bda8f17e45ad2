"""Sequences and their caches for tests of decoding."""

import torch
import torch.nn.functional as F

from dash_megatron.ops import DashCache
from dash_megatron.ops.decode import decode_and_count
from dash_megatron.ops.types import Router
from tests.ops.kernels_under_test import CUDA, DEVICE

ROUTER = {"scaling_factor": 3.0, "sigma": 2.0, "estimate_diagonal": True, "alpha": 1.5}
C = 64 if CUDA else 16
BORDERS = (1, C - 1, C, C + 1, 2 * C, 2 * C + 1, 7 * C + 3)


class Sequences:
    """Random q, k, v of every sequence, and one summary query; what the shape does not say is small."""

    def __init__(self, lengths, Hq=4, Hkv=2, D=128 if CUDA else 16, dtype=torch.float32, seed=0, own=False):
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.lengths, self.shape = lengths, (Hkv, D)
        self.q, self.k, self.v = ([noise(n, H, D) for n in lengths] for H in (Hq, Hkv, Hkv))
        self.w = noise(Hkv, D)
        # a router's own queries and keys
        self.own = [[noise(n, Hkv, D) for n in lengths] for _ in range(2)] if own else None

    def cache(self, page_size=None, chunk_size=C, room=0, dtype=None, query_pool=1, spare_queries=0):
        """An empty cache, contiguous or with pages in no order."""
        dtype, longest = dtype or self.w.dtype, max(self.lengths) + room
        options = {
            "chunk_size": chunk_size,
            "dtype": dtype,
            "query_pool": query_pool,
            "num_heads": self.q[0].shape[1],
            "spare_queries": spare_queries,
            "router_projections": self.own is not None,
        }
        if page_size is None:
            return DashCache.contiguous(len(self.lengths), longest, *self.shape, **options, device=DEVICE)
        max_pages = -(-longest // page_size)
        pages = torch.randperm(len(self.lengths) * max_pages, generator=torch.Generator().manual_seed(0))
        table = pages.int().view(len(self.lengths), max_pages).to(DEVICE)
        return DashCache.paged(pages.numel(), table, *self.shape, page_size=page_size, **options)

    def prefill(self, cache, start, end, backend="triton"):
        """Add tokens start[b] up to end[b] of every sequence b; returns their router's queries, if they are pooled."""
        q, k, v, *routing_k = (
            torch.cat([x[i:j] for x, i, j in zip(xs, start, end, strict=True)]).to(cache.k.dtype)
            for xs in self._given()
        )
        counts = torch.tensor([j - i for i, j in zip(start, end, strict=True)])
        cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int().to(DEVICE)
        return cache.prefill(k, v, self.w.to(k.dtype), cu_seqlens, backend, q, *routing_k)

    def _given(self):
        """What a cache is given: the router's queries where it has its own, keys, values, and the router's own keys."""
        return (self.own[0], self.k, self.v, self.own[1]) if self.own else (self.q, self.k, self.v)

    def at(self, tokens, dtype=None):
        """q, k and v [B, heads, D] of one token of each sequence."""
        return tuple(
            torch.stack([x[t] for x, t in zip(xs, tokens, strict=True)]).to(dtype or self.w.dtype)
            for xs in (self.q, self.k, self.v)
        )

    def fill(self, cache, backend="triton"):
        """All tokens, the last one appended; returns its query and, if queries are pooled, the router's."""
        last = [n - 1 for n in self.lengths]
        if any(last):
            self.prefill(cache, [0] * len(last), last, backend)
        return self.append(cache, last, backend)

    def append(self, cache, tokens, backend="triton", active=None):
        """One token of each sequence; returns its query and, if queries are pooled or the router has its own, the router's."""
        q, k, v = self.at(tokens, cache.k.dtype)
        own = [torch.stack([x[t] for x, t in zip(xs, tokens, strict=True)]).to(q) for xs in self.own or ()]
        given_q, *routing_k = own or [q]
        return q, cache.append(k, v, self.w.to(k.dtype), active, backend, given_q, *routing_k)

    def expected(self, chunk_size=C, **router):
        """The float64 reference of decoding: output, and number of chunks selected."""
        router = Router(chunk_size, **{**ROUTER, **router})
        cache = self.cache(chunk_size=chunk_size, dtype=torch.float64, query_pool=router.query_pool)
        q, routing_q = self.fill(cache, "reference")
        return decode_and_count(q, cache, router, "reference", routing_q)
