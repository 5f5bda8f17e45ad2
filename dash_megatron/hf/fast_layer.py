"""A layer of a transformers cache whose columns lie in a `DashCache`, without their padding.

Letters: B batch, H key/value heads, Hq query heads, T new columns of S, D head dim. Columns are those of transformers,
with padding at the start of a row; the cache holds tokens only, so that every row is a sequence of its own length.
"""

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from dash_megatron.ops import DashCache, dash_decode

# Columns that a cache which grows has room for beyond its prompt, before it doubles.
SPARE_COLUMNS = 256
# Columns whose queries, or keys of the router, a cache keeps beside those that the next token's router sees: so many can be
# dropped again.
SPARE_QUERIES = 64
# Routing scores of a piece of a prompt alive at once, in elements.
MAX_SCORES = 2**26


class FastLayer(CacheLayerMixin):
    """One layer of a transformers cache whose keys, values and summaries lie in a `DashCache`.

    It stands in for a dynamic or static layer of the model file, which it keeps, empty, to go back to. A dynamic one
    doubles when it is full. `keys` and `values` show the whole table, [B, H, capacity, D], each row from its first token.
    How many columns there are is known to the host; of a CUDA graph that is replayed, only `store.lengths` knows.

    Where the router sees means of queries, `store.queries` has those of each row's newest tokens, in a ring; where it has
    projections of its own, `store.routing_keys` has its keys.
    """

    is_sliding = False

    def __init__(self, plain: Any, chunk_size: int, query_pool: int, num_heads: int, own: bool) -> None:
        super().__init__()
        self.plain, self.chunk_size = plain, chunk_size
        self.query_pool, self.num_heads, self.own = query_pool, num_heads, own
        self.rings: dict[str, int] = {}
        """The rings that the store has, and how many tokens the router sees in each."""
        if query_pool > 1:
            self.rings["queries"] = query_pool
        if own:
            self.rings["routing_keys"] = chunk_size
        self.max_cache_len: int | None = getattr(plain, "max_cache_len", None)
        self.is_croppable = getattr(plain, "is_croppable", True)  # not in older releases of transformers
        self.start: Tensor | None = plain.start
        self.latest_start: int = plain.latest_start
        self.columns = 0
        self.known = dict.fromkeys(self.rings, 0)
        """Newest columns that are known to each ring, if it has room for them."""
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
            query_pool=self.query_pool, num_heads=self.num_heads, spare_queries=SPARE_QUERIES, router_projections=self.own,
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
        routing_k: Tensor | None = None,
    ) -> Tensor | None:
        """Write new columns k and v, [B, H, T, D], without their padding, and summaries of the chunks they complete.

        Args:
            q: their queries, [B, Hq, T, D]; or the router's own, [B, H, T, D].
            summary_query: [H, D].
            start: column of each row's first token, int64 [B].
            latest_start: the last of them.
            backend: as in `dash_attention`.
            routing_k: keys of a router that has its own, like k.

        Returns:
            Where the router sees means of queries, or has its own: those that it sees, like q.

        Raises:
            ValueError: a static cache has no room for them, or too many columns were cropped.
        """
        past, columns = self.columns, self.columns + k.shape[2]
        self._check_rings()
        self._make_room(k, v, columns)
        self.columns, self.known = columns, {ring: n + k.shape[2] for ring, n in self.known.items()}
        if k.shape[2] == 1 and latest_start <= past:
            new_q, new_k, new_v = (x[:, :, 0] for x in (q, k, v))
            own_k = None if routing_k is None else routing_k[:, :, 0]
            pooled = self.store.append(new_k, new_v, summary_query, None, backend, new_q, own_k)
            return None if pooled is None else pooled[:, :, None]
        tokens_B = (columns - start).clamp_min(0) - (past - start).clamp_min(0)
        bounds = F.pad(tokens_B.cumsum(0), (1, 0)).int()
        real = tokens_of(start, past, columns) if latest_start > past else None
        packed_q, packed_k, packed_v = (pack(x, real) for x in (q, k, v))
        packed_routing_k = None if routing_k is None else pack(routing_k, real)
        pooled = self.store.prefill(
            packed_k, packed_v, summary_query, bounds, backend, packed_q, packed_routing_k
        )
        return None if pooled is None else unpack(pooled, q, real)

    def _check_rings(self) -> None:
        for ring, seen in self.rings.items():
            needed, known = min(seen - 1, self.columns), min(self.known[ring], seen + SPARE_QUERIES)
            if known < needed:
                constant = "query_pool" if ring == "queries" else "chunk_size"
                raise ValueError(
                    f"the cache has {known} {ring.replace('_', ' ')} before column {self.columns}, but the router of {constant}="
                    f"{seen} sees {needed}: no more than {SPARE_QUERIES} columns can be cropped from a cache; begin with an "
                    "empty one"
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
        for ring in self.rings:
            getattr(new, ring).copy_(getattr(old, ring))
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
        queries = pack(q, None).split(size)
        routing = repeat(None) if routing_q is None else pack(routing_q, None).split(size)
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
            real = tokens_of(start, 0, self.columns)
            place = (torch.arange(self.columns, device=start.device) - start[:, None]).clamp_min(0)
            row = torch.arange(len(start), device=start.device)[:, None]
            # what stands for padding is never attended to, but must be finite
            tables = (
                x[row, place].masked_fill(~real[..., None, None], 0) for x in (self.store.k, self.store.v)
            )
            plain.update(*(x.transpose(1, 2) for x in tables))
            for name in self.rings:
                ring, known = getattr(self.store, name), min(self.known[name], self.columns)
                newest = slice(max(0, self.columns - min(known, ring.shape[1])), None)
                kept = ring[row, place[:, newest] % ring.shape[1]].masked_fill(
                    ~real[:, newest, None, None], 0
                )
                setattr(plain, name, kept.transpose(1, 2))
            if self.own:
                # what no key is kept of any more; chunks that are not whole have no summary yet
                chunks = torch.arange(self.columns // self.chunk_size, device=start.device)
                whole = chunks < (self.store.lengths // self.chunk_size)[:, None]
                summary = self.store.summary[:, : len(chunks)].masked_fill(~whole[..., None, None], 0)
                wide = torch.promote_types(self.dtype, torch.float32)
                plain.summary = summary.to(wide).transpose(1, 2)
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
        self.columns, self.known, self.start, self.latest_start = 0, dict.fromkeys(self.rings, 0), None, 0
        if self.max_cache_len is None:
            self._store = self.keys = self.values = None
            self.is_initialized = False
        elif self._store is not None:
            self._store.lengths.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest columns, whose number is given below zero; above it, as of older transformers, how many are left."""
        left = tokens_to_remove if tokens_to_remove > 0 else self.columns + tokens_to_remove
        dropped = self.columns - max(0, left)
        if dropped > 0:
            self.columns -= dropped
            for ring, seen in self.rings.items():
                self.known[ring] = max(0, min(self.known[ring], seen + SPARE_QUERIES) - dropped)
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
            queries, routing_keys = (
                None if ring is None else function(ring) for ring in (old.queries, old.routing_keys)
            )
            tables = k, v, summary, lengths, self.chunk_size, None
            self._hold(DashCache(*tables, queries, self.query_pool, routing_keys))
        if self.start is not None:
            self.start = function(self.start)


def tokens_of(start: Tensor, first: int, last: int) -> Tensor:
    """Which of the columns `first` to `last` are tokens, bool [B, last - first]."""
    return torch.arange(first, last, device=start.device) >= start[:, None]


def pack(x: Tensor, real: Tensor | None) -> Tensor:
    """The columns of x [B, heads, T, D], row after row, [tokens, heads, D]: those that are `real` [B, T], or all."""
    x = x.transpose(1, 2)
    return x.flatten(0, 1) if real is None else x[real]


def unpack(x: Tensor, like: Tensor, real: Tensor | None) -> Tensor:
    """What `pack` made, as [B, heads, T, D] like another tensor; zero where nothing is `real`."""
    B, heads, T, D = like.shape
    if real is None:
        return x.view(B, T, heads, D).transpose(1, 2)
    out = x.new_zeros(B, T, heads, D)
    out[real] = x
    return out.transpose(1, 2)
