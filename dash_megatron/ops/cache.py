"""The cache of decoding: keys, values and chunk summaries of a batch of sequences, contiguous or in pages."""

import torch
from torch import Tensor

from dash_megatron.ops.backend import pick_backend
from dash_megatron.ops.checks import (
    HALF_DTYPES,
    check_cache,
    check_queries,
    check_query_pool,
    check_routing_keys,
    check_size,
    describe,
    is_tensor,
    summary_dtype,
)


class DashCache:
    """Keys, values and chunk summaries of one layer for a batch of sequences of different lengths.

    Layouts. One pool of pages serves both; `page_size` is a multiple of `chunk_size`, P / C chunks fill a page:

    - `k`, `v`: [pages, P, Hkv, D]. They may be views of one allocation: strides are free, equal for both, with D dense.
    - `summary`: [pages, P / C, Hkv, D], one routing key a whole chunk; float16 beside half-precision keys, or else their
      dtype. A chunk's summary lies in the page of its tokens, so that pages can be shared and copied whole.
    - `lengths`: int32 [B], tokens of every sequence in the cache.
    - `page_table`: int32 [B, max_pages], contiguous rows: token t of sequence b lies in page `page_table[b, t // P]` at
      slot `t % P`. Entries of pages that a sequence does not reach yet may hold anything. None is the contiguous layout:
      the page of sequence b is b, and one page has the whole of it, so that k and v are [B, max_length, Hkv, D].
    - `queries`: [B, R, Hq, D] beside a router that pools `query_pool` queries, dense, with R of at least as many: the
      query of token t is at slot `t % R` until that of token t + R takes its place. None where none are pooled.
    - `routing_keys`: [B, S, Hkv, D] beside a router with projections of its own, of whose keys the summaries then are, dense, with
      S of at least C; the key of token t is at slot `t % S` as queries are, which are the router's own too and have Hkv heads.

    An engine gives pages out by writing to `page_table`, and starts a sequence anew by setting `lengths[b] = 0`. Both,
    and `append`, may happen inside and between replays of a CUDA graph. What a sequence has not reached is never read.
    Its last tokens are dropped by setting `lengths[b]` back; by at most R - `query_pool` and S - C in a row.

    On a GPU nothing waits to read lengths: a sequence longer than `capacity` keeps counting, is not written any more,
    and its output is NaN. `check` reads them.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        summary: Tensor,
        lengths: Tensor,
        chunk_size: int = 64,
        page_table: Tensor | None = None,
        queries: Tensor | None = None,
        query_pool: int = 1,
        routing_keys: Tensor | None = None,
    ) -> None:
        """Wrap tensors that exist, such as a serving engine's; see `contiguous` and `paged` to make them.

        `query_pool` is the router's.

        Raises:
            ValueError: a tensor does not fit the layout; the message names it, its value, the rule and the remedy.
        """
        check_cache(k, v, summary, lengths, page_table, chunk_size)
        check_queries(queries, k, len(lengths), query_pool)
        self.k, self.v, self.summary, self.lengths, self.page_table = k, v, summary, lengths, page_table
        check_routing_keys(routing_keys, k, len(lengths), chunk_size)
        self.chunk_size, self.queries, self.query_pool = chunk_size, queries, query_pool
        self.routing_keys = routing_keys
        self._arrived = torch.zeros_like(lengths)

    @classmethod
    def contiguous(
        cls,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        chunk_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        query_pool: int = 1,
        num_heads: int | None = None,
        spare_queries: int = 0,
        router_projections: bool = False,
    ) -> "DashCache":
        """Allocate an empty cache of `batch` sequences with room for `max_length` tokens each, rounded up to whole chunks.

        Where `query_pool` is above 1 it keeps `query_pool + spare_queries` queries of `num_heads` heads a sequence. With
        `router_projections` these are the router's own, of `num_kv_heads` heads, and there are `chunk_size + spare_queries`
        keys of the router.
        """
        check_size("max_length", max_length)
        check_size("chunk_size", chunk_size)
        page_size = -(-max_length // chunk_size) * chunk_size
        cache = cls._allocate(
            batch, page_size, num_kv_heads, head_dim, chunk_size, dtype, device, batch, None
        )
        return cache._with_queries(query_pool, num_heads, spare_queries, router_projections)

    @classmethod
    def paged(
        cls,
        num_pages: int,
        page_table: Tensor,
        num_kv_heads: int,
        head_dim: int,
        *,
        page_size: int = 64,
        chunk_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        query_pool: int = 1,
        num_heads: int | None = None,
        spare_queries: int = 0,
        router_projections: bool = False,
    ) -> "DashCache":
        """Allocate an empty pool of `num_pages` pages on the device of `page_table`, int32 [B, max_pages], which is kept.

        The last four arguments are those of `contiguous`.
        """
        if not isinstance(page_table, Tensor) or page_table.ndim != 2 or page_table.numel() == 0:
            raise ValueError(
                f"page_table={describe(page_table)} must be int32 [B, max_pages], not empty; "
                "try torch.zeros(B, max_pages, dtype=torch.int32)"
            )
        batch, device = len(page_table), page_table.device
        check_size("num_pages", num_pages)
        cache = cls._allocate(
            num_pages, page_size, num_kv_heads, head_dim, chunk_size, dtype, device, batch, page_table
        )
        return cache._with_queries(query_pool, num_heads, spare_queries, router_projections)

    @classmethod
    def _allocate(
        cls,
        pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        chunk_size: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
        batch: int,
        page_table: Tensor | None,
    ) -> "DashCache":
        sizes = {"batch": batch, "page_size": page_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in {**sizes, "chunk_size": chunk_size}.items():
            check_size(name, size)
        k = torch.empty(pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device)
        chunks = page_size // chunk_size
        summary = torch.empty(
            pages, chunks, num_kv_heads, head_dim, dtype=summary_dtype(dtype), device=device
        )
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        return cls(k, torch.empty_like(k), summary, lengths, chunk_size, page_table)

    def _with_queries(
        self, query_pool: int, num_heads: int | None, spare_queries: int, router_projections: bool
    ) -> "DashCache":
        check_query_pool(query_pool)
        heads, dim = self.k.shape[2:]

        def ring(rows: int, heads: int) -> Tensor:
            shape = self.batch, rows + spare_queries, heads, dim
            return torch.empty(shape, dtype=self.k.dtype, device=self.k.device)

        queries = routing_keys = None
        if router_projections:
            num_heads, routing_keys = heads, ring(self.chunk_size, heads)
        if query_pool > 1:
            if num_heads is None:
                raise ValueError(
                    f"num_heads=None must be given beside query_pool={query_pool}; pass the number of query heads"
                )
            queries = ring(query_pool, num_heads)
        tables = self.k, self.v, self.summary, self.lengths, self.chunk_size, self.page_table
        return type(self)(*tables, queries, query_pool, routing_keys)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Most tokens a sequence can have."""
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    @torch.no_grad()
    def append(
        self,
        k: Tensor,
        v: Tensor,
        summary_query: Tensor,
        active: Tensor | None = None,
        backend: str = "auto",
        q: Tensor | None = None,
        routing_k: Tensor | None = None,
    ) -> Tensor | None:
        """Add one token to every sequence, with the summary of each chunk that this completes.

        Args:
            k: keys after RoPE, [B, Hkv, D], the cache's dtype and device.
            v: values, the same.
            summary_query: [Hkv, D], the layer's; the cache's dtype, or float32 beside half precision.
            active: bool [B]: sequences that get a token; None for all. The others stay as they are.
            backend: as in `dash_attention`.
            q: queries after RoPE, [B, Hq, D], the cache's dtype and device; needed, and kept, where it pools queries. Those of
                a router with its own projections, [B, Hkv, D].
            routing_k: keys after RoPE of a router with its own projections, as k; needed where the cache is for such a one.

        Returns:
            The router's queries of the tokens, like `q`, which `dash_decode` wants, where the cache pools queries; those
            of sequences that are not active are their `q`. Where it pools none, `q` if the router has its own, and else None.

        Raises:
            ValueError: an argument is wrong or, on CPU, a sequence is full.
        """
        self._check_new(k, v, summary_query, [self.batch, *self.k.shape[2:]], "[B, Hkv, D]")
        if active is not None:
            self._check_table("active", active, torch.bool, [self.batch])
        return self._write(k, v, summary_query, None, active, backend, q, routing_k)

    @torch.no_grad()
    def prefill(
        self,
        k: Tensor,
        v: Tensor,
        summary_query: Tensor,
        cu_seqlens: Tensor,
        backend: str = "auto",
        q: Tensor | None = None,
        routing_k: Tensor | None = None,
    ) -> Tensor | None:
        """Add any number of tokens to every sequence, with the summaries of the chunks that they complete.

        Sequences go on where they are, so that a long prompt can come in several parts. Attention of the prompt itself is
        `dash_attention` with the same `cu_seqlens`.

        Args:
            k: keys after RoPE of all sequences, concatenated, [tokens, Hkv, D], the cache's dtype and device.
            v: values, the same.
            summary_query: as in `append`.
            cu_seqlens: int32 [B + 1], rising from 0 to the number of tokens: where the tokens of each sequence begin. A
                sequence may get none. Values are checked on CPU only.
            backend: as in `dash_attention`.
            q: queries after RoPE of all sequences, [tokens, Hq, D]; otherwise as in `append`.
            routing_k: as in `append`, [tokens, Hkv, D].

        Returns:
            As `append`, for all new tokens.

        Raises:
            ValueError: an argument is wrong or, on CPU, a sequence has no room.
        """
        self._check_new(k, v, summary_query, [len(k), *self.k.shape[2:]], "[tokens, Hkv, D]")
        self._check_table("cu_seqlens", cu_seqlens, torch.int32, [self.batch + 1])
        if self._values_are_readable():
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != len(k) or bounds != sorted(bounds):
                raise ValueError(
                    f"cu_seqlens={bounds} must rise from 0 to the {len(k)} tokens of k; cut k at its bounds"
                )
        return self._write(k, v, summary_query, cu_seqlens, None, backend, q, routing_k)

    def check(self) -> None:
        """Wait for the device and check that every sequence fits and has its pages.

        Raises:
            ValueError: a sequence is longer than `capacity`, or one of its pages is not in the pool.
        """
        lengths = self.lengths.tolist()
        self._check_room(lengths)
        if self.page_table is None:
            return
        for b, (length, pages) in enumerate(zip(lengths, self.page_table.tolist(), strict=True)):
            used = pages[: -(-length // self.k.shape[1])]
            wrong = [page for page in used if not 0 <= page < len(self.k)]
            if wrong:
                raise ValueError(
                    f"page_table[{b}] holds page {wrong[0]} among the {len(used)} pages of its {length} tokens, which must "
                    f"be at least 0 and below {len(self.k)}; give the sequence a page before its tokens"
                )

    def _values_are_readable(self) -> bool:
        """Whether lengths and bounds can be read without waiting for a device; a compiler cannot follow them."""
        return self.k.device.type == "cpu" and not torch.compiler.is_compiling()

    def _check_room(self, lengths: list[int]) -> None:
        longest = max(lengths)
        if longest > self.capacity:
            raise ValueError(
                f"lengths[{lengths.index(longest)}]={longest} must be at most the cache's capacity {self.capacity}; "
                "end the sequence, or allocate a larger cache"
            )

    def _check_new(self, k: Tensor, v: Tensor, summary_query: Tensor, shape: list[int], layout: str) -> None:
        dtype, device = self.k.dtype, self.k.device
        half = dtype in HALF_DTYPES
        for name, x, wanted, dtypes in (
            ("k", k, shape, (dtype,)),
            ("v", v, shape, (dtype,)),
            ("summary_query", summary_query, shape[1:], (dtype, torch.float32) if half else (dtype,)),
        ):
            if not any(is_tensor(x, allowed, wanted, device) for allowed in dtypes) or x.numel() == 0:
                raise ValueError(
                    f"{name}={describe(x)} must be {str(dtype).removeprefix('torch.')} {wanted} on {device}, "
                    f"{'[Hkv, D]' if name == 'summary_query' else layout} of the cache; reshape or cast {name}"
                )

    def _check_table(self, name: str, x: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
        if not is_tensor(x, dtype, shape, self.k.device):
            raise ValueError(
                f"{name}={describe(x)} must be {str(dtype).removeprefix('torch.')} {shape} on {self.k.device}; "
                f"build it with torch.tensor(..., dtype={dtype})"
            )

    def _check_routing_key(self, routing_k: Tensor | None, k: Tensor) -> None:
        if self.routing_keys is None and routing_k is None:
            return
        if self.routing_keys is None or not is_tensor(routing_k, k.dtype, list(k.shape), k.device):
            raise ValueError(
                f"routing_k={describe(routing_k)} must be {describe(k)}, as k, beside a cache with routing_keys, and otherwise "
                f"None; this one has routing_keys={describe(self.routing_keys)}"
            )

    def _write(
        self,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        cu_seqlens: Tensor | None,
        active: Tensor | None,
        backend: str,
        q: Tensor | None,
        routing_k: Tensor | None,
    ) -> Tensor | None:
        self._check_routing_key(routing_k, k)
        if self._values_are_readable():
            added = 1 if active is None else active.int()
            self._check_room((self.lengths + (added if cu_seqlens is None else cu_seqlens.diff())).tolist())
        tensors = k, v, w, routing_k, self.k, self.v, self.summary, self.routing_keys, self.lengths
        triton = pick_backend(backend, k) == "triton"
        # before the lengths move on
        pooled = self._pool(q, k, cu_seqlens, active, triton)
        if triton:
            from dash_megatron.ops.kernels.decode_cache import cache_write

            cache_write(*tensors, self._arrived, self.page_table, cu_seqlens, active, self.chunk_size)
        else:
            from dash_megatron.ops.decode_reference import cache_write_reference

            cache_write_reference(*tensors, self.page_table, cu_seqlens, active, self.chunk_size)
        return pooled

    def _pool(
        self, q: Tensor | None, k: Tensor, cu_seqlens: Tensor | None, active: Tensor | None, triton: bool
    ) -> Tensor | None:
        """Keep the queries of new tokens, and pool them with what is kept."""
        if self.queries is None:
            return None if self.routing_keys is None else q
        shape = [len(k), *self.queries.shape[2:]]
        if q is None or not is_tensor(q, k.dtype, shape, k.device):
            raise ValueError(
                f"q={describe(q)} must be {str(k.dtype).removeprefix('torch.')} {shape} on {k.device}, the queries of the "
                f"tokens that k is of, since query_pool={self.query_pool}; pass q"
            )
        tables = self.queries, self.lengths, cu_seqlens, active, self.query_pool
        if triton:
            from dash_megatron.ops.kernels.decode_pool import pool_and_keep

            return pool_and_keep(q, *tables)
        from dash_megatron.ops.decode_reference import pool_and_keep_reference

        return pool_and_keep_reference(q, *tables)
