"""The package's kernels under the exported model file: prompts, a cache for decoding, and attention against it.

Letters: B batch, H key/value heads, Hq query heads, T new columns of S, D head dim. Columns are those of transformers,
with padding at the start of a row; the cache holds tokens only, so that every row is a sequence of its own length.
"""

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dash_megatron.ops import DashCache, dash_attention, dash_decode
from dash_megatron.ops.backend import TRITON_CHUNK_SIZES, pick_backend

# Columns that a cache which grows has room for beyond its prompt, before it doubles.
SPARE_COLUMNS = 256
# Columns whose queries a cache keeps beside those that the next token's router sees: so many can be dropped again.
SPARE_QUERIES = 64
# Routing scores of a piece of a prompt alive at once, in elements.
MAX_SCORES = 2**26


class FastLayer(CacheLayerMixin):
    """One layer of a transformers cache whose keys, values and summaries lie in a `DashCache`.

    It stands in for a dynamic or static layer of the model file, which it keeps, empty, to go back to. A dynamic one
    doubles when it is full. `keys` and `values` show the whole table, [B, H, capacity, D], each row from its first token.
    How many columns there are is known to the host; of a CUDA graph that is replayed, only `store.lengths` knows.

    Where the router sees means of queries, `store.queries` has those of each row's newest tokens, in a ring.
    """

    is_sliding = False

    def __init__(self, plain: Any, chunk_size: int, query_pool: int, num_heads: int) -> None:
        super().__init__()
        self.plain, self.chunk_size = plain, chunk_size
        self.query_pool, self.num_heads = query_pool, num_heads
        self.max_cache_len: int | None = getattr(plain, "max_cache_len", None)
        self.is_croppable = getattr(plain, "is_croppable", True)  # not in older releases of transformers
        self.start: Tensor | None = plain.start
        self.latest_start: int = plain.latest_start
        self.columns = 0
        self.queried = 0
        """Newest columns whose queries are kept."""
        self._store: DashCache | None = None

    @property
    def store(self) -> DashCache:
        """Keys, values and summaries, once the first column has come."""
        assert self._store is not None
        return self._store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for rows, heads and dtype of keys [B, H, T, D]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads, columns, dim = key_states.shape
        self.max_batch_size = rows  # releases of transformers before 5.16 ask for it
        capacity = columns + SPARE_COLUMNS if self.max_cache_len is None else self.max_cache_len
        self._hold(self._new_store(rows, capacity, heads, dim))

    def _new_store(self, rows: int, capacity: int, heads: int, dim: int) -> DashCache:
        return DashCache.contiguous(
            rows, capacity, heads, dim, chunk_size=self.chunk_size, dtype=self.dtype, device=self.device,
            query_pool=self.query_pool, num_heads=self.num_heads, spare_queries=SPARE_QUERIES,
        )  # fmt: skip

    def _hold(self, store: DashCache) -> None:
        self._store = store
        self.keys, self.values = store.k.transpose(1, 2), store.v.transpose(1, 2)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new columns, [B, H, T, D]; further arguments are those of `write`. Gives back `keys` and `values`."""
        self.write(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def write(
        self,
        k: Tensor,
        v: Tensor,
        q: Tensor,
        summary_query: Tensor,
        start: Tensor,
        latest_start: int,
        backend: str,
    ) -> Tensor | None:
        """Write new columns k and v, [B, H, T, D], without their padding, and summaries of the chunks they complete.

        Args:
            q: their queries, [B, Hq, T, D].
            summary_query: [H, D].
            start: column of each row's first token, int64 [B].
            latest_start: the last of them.
            backend: as in `dash_attention`.

        Returns:
            Where the router sees means of queries: those, [B, Hq, T, D].

        Raises:
            ValueError: a static cache has no room for them, or too many columns were cropped.
        """
        past, columns = self.columns, self.columns + k.shape[2]
        self._check_queries()
        self._make_room(k, v, columns)
        self.columns, self.queried = columns, self.queried + k.shape[2]
        if k.shape[2] == 1 and latest_start <= past:
            pooled = self.store.append(k[:, :, 0], v[:, :, 0], summary_query, backend=backend, q=q[:, :, 0])
            return None if pooled is None else pooled[:, :, None]
        tokens_B = (columns - start).clamp_min(0) - (past - start).clamp_min(0)
        bounds = F.pad(tokens_B.cumsum(0), (1, 0)).int()
        real = _tokens(start, past, columns) if latest_start > past else None
        packed_q, packed_k, packed_v = (_pack(x, real) for x in (q, k, v))
        pooled = self.store.prefill(packed_k, packed_v, summary_query, bounds, backend, packed_q)
        return None if pooled is None else _unpack(pooled, q, real)

    def _check_queries(self) -> None:
        needed, known = (
            min(self.query_pool - 1, self.columns),
            min(self.queried, self.query_pool + SPARE_QUERIES),
        )
        if known < needed:
            raise ValueError(
                f"the cache has {known} queries before column {self.columns}, but the router of query_pool="
                f"{self.query_pool} sees {needed}: no more than {SPARE_QUERIES} columns can be cropped from a cache; begin "
                "with an empty one"
            )

    def _make_room(self, k: Tensor, v: Tensor, columns: int) -> None:
        if self.max_cache_len is not None and columns > self.max_cache_len:
            raise ValueError(
                f"max_cache_len={self.max_cache_len} of the static cache must be at least the {columns} columns now in "
                "use; make a larger cache, or leave out cache_implementation"
            )
        if self._store is None:
            self.lazy_initialization(k, v)
        old = self.store
        if columns <= old.capacity:
            return
        rows, _, heads, dim = old.k.shape
        new = self._new_store(rows, max(columns, 2 * old.capacity), heads, dim)
        for name in ("k", "v", "summary"):
            table = getattr(old, name)
            getattr(new, name)[:, : table.shape[1]] = table
        new.lengths.copy_(old.lengths)
        if new.queries is not None and old.queries is not None:
            new.queries.copy_(old.queries)
        self._hold(new)

    def attend(
        self, q: Tensor, routing_q: Tensor | None, start: Tensor, backend: str, **router: Any
    ) -> Tensor:
        """Attention of the last T columns, q [B, Hq, T, D], to all; zero for padding. `routing_q` is what `write` returned."""
        B, Hq, T, _ = q.shape
        if T == 1:
            routing_BHD = None if routing_q is None else routing_q[:, :, 0]
            out_BHD = dash_decode(q[:, :, 0], self.store, backend=backend, routing_q=routing_BHD, **router)
            return out_BHD[:, :, None]
        # every query is a sequence that ends with it, and shares its row's page
        column_T = torch.arange(self.columns - T, self.columns, device=q.device)
        length_n = (column_T + 1 - start[:, None]).clamp_min(0).int().flatten()
        page_n1 = torch.arange(B, dtype=torch.int32, device=q.device).repeat_interleave(T)[:, None]
        size = max(1, MAX_SCORES // (Hq * self.store.summary.shape[1]))
        queries = _pack(q, None).split(size)
        routing = repeat(None) if routing_q is None else _pack(routing_q, None).split(size)
        out = [
            dash_decode(q_nHD, self._share(length, page), backend=backend, routing_q=routing_nHD, **router)
            for q_nHD, routing_nHD, length, page in zip(
                queries, routing, length_n.split(size), page_n1.split(size), strict=False
            )
        ]
        return torch.cat(out).unflatten(0, (B, T)).transpose(1, 2)

    def _share(self, lengths: Tensor, page_table: Tensor) -> DashCache:
        store = self.store
        return DashCache(store.k, store.v, store.summary, lengths, self.chunk_size, page_table)

    def as_plain(self, start: Tensor) -> Any:
        """The layer of the model file with the same columns; this one is of no use any more."""
        plain: Any = self.plain
        plain.start, plain.latest_start = self.start, self.latest_start
        if self.columns:
            real = _tokens(start, 0, self.columns)
            place = (torch.arange(self.columns, device=start.device) - start[:, None]).clamp_min(0)
            row = torch.arange(len(start), device=start.device)[:, None]
            # what stands for padding is never attended to, but must be finite
            tables = (
                x[row, place].masked_fill(~real[..., None, None], 0) for x in (self.store.k, self.store.v)
            )
            plain.update(*(x.transpose(1, 2) for x in tables))
            if self.store.queries is not None:
                ring, known = self.store.queries, min(self.queried, self.columns)
                newest = slice(max(0, self.columns - min(known, ring.shape[1])), None)
                queries = ring[row, place[:, newest] % ring.shape[1]].masked_fill(
                    ~real[:, newest, None, None], 0
                )
                plain.queries = queries.transpose(1, 2)
        self._store = None
        return plain

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask for `query_length` more has, and the first of them."""
        return self.max_cache_len or self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """Most columns, or -1."""
        return self.max_cache_len or -1

    def get_max_cache_shape(self) -> int:
        """What older releases of transformers ask for instead of `get_max_length`."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget everything; a static cache keeps its place."""
        self.columns, self.queried, self.start, self.latest_start = 0, 0, None, 0
        if self.max_cache_len is None:
            self._store = self.keys = self.values = None
            self.is_initialized = False
        elif self._store is not None:
            self._store.lengths.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest columns, whose number is given below zero."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} must be negative: how many columns to drop"
            )
        dropped = min(-tokens_to_remove, self.columns)
        if dropped:
            self.columns -= dropped
            self.queried = max(0, min(self.queried, self.query_pool + SPARE_QUERIES) - dropped)
            # rows that start later than what is left have no token any more
            self.store.lengths.sub_(dropped).clamp_min_(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let rows continue other rows."""
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each_row(lambda x: x[indices])

    def _each_row(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._store is not None:
            old = self._store
            k, v, summary, lengths = (function(x) for x in (old.k, old.v, old.summary, old.lengths))
            queries = None if old.queries is None else function(old.queries)
            self._hold(DashCache(k, v, summary, lengths, self.chunk_size, None, queries, self.query_pool))
        if self.start is not None:
            self.start = function(self.start)


def _tokens(start: Tensor, first: int, last: int) -> Tensor:
    """Which of the columns `first` to `last` are tokens, bool [B, last - first]."""
    return torch.arange(first, last, device=start.device) >= start[:, None]


def _pack(x: Tensor, real: Tensor | None) -> Tensor:
    """The columns of x [B, heads, T, D], row after row, [tokens, heads, D]: those that are `real` [B, T], or all."""
    x = x.transpose(1, 2)
    return x.flatten(0, 1) if real is None else x[real]


def _unpack(x: Tensor, like: Tensor, real: Tensor | None) -> Tensor:
    """What `_pack` made, as [B, heads, T, D] like another tensor; zero where nothing is `real`."""
    B, heads, T, D = like.shape
    if real is None:
        return x.view(B, T, heads, D).transpose(1, 2)
    out = x.new_zeros(B, T, heads, D)
    out[real] = x
    return out.transpose(1, 2)


def _kernels_run(backend: str, q: Tensor, k: Tensor, chunk_size: int) -> bool:
    if backend == "auto":
        return q.is_cuda and pick_backend(backend, q) == "triton" and _kernels_take(q, k, chunk_size)
    return backend != "torch"


def _kernels_take(q: Tensor, k: Tensor, chunk_size: int) -> bool:
    """Whether the Triton kernels take queries and keys [B, heads, T, D] of such a shape."""
    from dash_megatron.ops.kernels.geometry import check_supported

    try:
        check_supported(q.transpose(1, 2), k.shape[1])
    except ValueError:
        return False
    return chunk_size in TRITON_CHUNK_SIZES


def fast_layer(
    cache: Cache, index: int, chunk_size: int, query_pool: int, q: Tensor, *places: Any
) -> FastLayer:
    """The cache's layer, which a layer of the model file is replaced by; `places` as in `FastLayer.write`.

    q has the dtype and the heads of the queries [B, Hq, T, D] that come next.
    """
    plain: Any = cache.layers[index]
    if isinstance(plain, FastLayer):
        return plain
    layer = FastLayer(plain, chunk_size, query_pool, q.shape[1])
    columns = int(plain.get_seq_length())
    if columns:
        # of columns before those whose queries are known, no router sees any
        queries: Any = getattr(plain, "queries", None)
        known = 0 if queries is None else queries.shape[2]
        past_q = q.new_zeros(q.shape[0], q.shape[1], columns, q.shape[3])
        if known:
            past_q[:, :, columns - known :] = queries
        layer.write(plain.keys[:, :, :columns], plain.values[:, :, :columns], past_q, *places)
        layer.queried = known
    plain.keys = plain.values = None
    plain.is_initialized = False
    plain.reset()
    cache.layers[index] = layer
    return layer


def _attend_prompt(
    q: Tensor, k: Tensor, v: Tensor, summary_query: Tensor, start: Tensor, latest_start: int, **options: Any
) -> Tensor:
    """Attention among all columns [B, heads, T, D], each row a document from its first token on; zero for padding."""
    if latest_start == 0:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return dash_attention(q, k, v, summary_query, **options).transpose(1, 2)
    T = q.shape[2]
    real = _tokens(start, 0, T)
    bounds = F.pad((T - start).cumsum(0), (1, 0)).int()
    q_1nHD, k_1nHD, v_1nHD = (_pack(x, real)[None] for x in (q, k, v))
    out = torch.zeros_like(q.transpose(1, 2))
    out[real] = dash_attention(q_1nHD, k_1nHD, v_1nHD, summary_query, cu_seqlens=bounds, **options)[0]
    return out.transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, summary_query: Tensor, start: Tensor, latest_start: int,
    cache: Cache | None, index: int, backend: str, chunk_size: int, query_pool: int = 1, **router: Any,
) -> Tensor | None:  # fmt: skip
    """DashAttention of new columns to themselves and what a cache holds, which they are added to.

    Decoding never waits for the device.

    Args:
        q: queries after RoPE, [B, Hq, T, D].
        k: keys after RoPE, [B, H, T, D].
        v: values, the same.
        summary_query: [H, D].
        start: column of each row's first token, int64 [B].
        latest_start: the last of them.
        cache: its layer `index` is one of the model file's or a `FastLayer`.
        backend: "auto" (Triton, on CUDA), "torch" (never), or that of `dash_attention`, wherever tensors are.
        chunk_size, query_pool, router: further arguments of `dash_attention`.

    Returns:
        Output [B, Hq, T, D] in q's dtype, zero for padding; or None where the model file must attend by itself, and then
        the cache is as it was.
    """
    if not _kernels_run(backend, q, k, chunk_size):
        return None
    # under autocast dtypes differ
    k, v, start = k.to(q.dtype), v.to(q.dtype), start.to(q.device)
    layer: Any = None if cache is None else cache.layers[index]
    past = 0 if layer is None else int(layer.get_seq_length())
    prompt = past == 0 and latest_start < q.shape[2]
    routing_q: Tensor | None = None
    if cache is not None:
        differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if cache.offloading or differentiable:
            if not prompt or isinstance(layer, FastLayer):
                return None
            cache.update(k, v, index)
            if query_pool > 1:
                layer.keep_queries(q, query_pool)
        else:
            places = (summary_query, start, latest_start, backend)
            layer = fast_layer(cache, index, chunk_size, query_pool, q, *places)
            routing_q = layer.write(k, v, q, *places)
    if not prompt:
        return layer.attend(q, routing_q, start, backend, query_pool=query_pool, **router)
    options = {"backend": backend, "chunk_size": chunk_size, "query_pool": query_pool, **router}
    return _attend_prompt(q, k, v, summary_query, start, latest_start, **options)
