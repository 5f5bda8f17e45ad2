"""Kinds of attention as the context exchanges see them: which keys a buffer holds, and attention to them."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dash_megatron.ops.sharded import KeyBuffer
from dash_megatron.parallel.context.communication import ContextGroup
from dash_megatron.parallel.context.layout import ChunkLayout


class Queries(NamedTuple):
    """This rank's side of attention; all but `q` and `routed` only in the backward."""

    q: Tensor
    routed: Any = None
    """What the router chose, if there is one."""
    d_out: Any = None
    out: Any = None
    lse: Any = None
    d_prior: Any = None


class Side(Protocol):
    """A kind of attention as the exchanges see it; see `DashSide`."""

    @property
    def group(self) -> ContextGroup: ...

    @property
    def max_rows(self) -> int: ...

    def all_keys(self, k: Tensor) -> Any: ...

    def keys_of(self, owner: int, k: Tensor) -> list[Any]: ...

    def attend(self, queries: Queries, k: Tensor, v: Tensor, keys: Any) -> tuple[Tensor, Tensor]: ...

    def attend_backward(
        self, queries: Queries, k: Tensor, v: Tensor, keys: Any
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class DashSide(NamedTuple):
    """DashAttention as the exchanges see it: which keys a buffer holds, and attention to them."""

    stages: ModuleType
    """See `ops.sharded.stages`."""
    router: Any
    chunk_size: int
    chunks: ChunkLayout
    group: ContextGroup

    @property
    def max_rows(self) -> int:
        """Most rows of a rank."""
        return self.chunks.places.max_rows

    def all_keys(self, k: Tensor) -> KeyBuffer:
        """Keys of all ranks, each padded to `max_rows`, behind one another."""
        places = self.chunks.places
        row = (places.owner * places.max_rows).int() + places.row
        return KeyBuffer(per_head(row, k), per_head(places.length, k), 0, len(row))

    def keys_of(self, owner: int, k: Tensor) -> list[KeyBuffer]:
        """Keys of one rank that this rank's queries may attend to, piece by piece."""
        places = self.chunks.places
        row, length = per_head(places.row, k), per_head(places.length, k)
        return [KeyBuffer(row, length, *window) for window in self.chunks.windows[owner]]

    def attend(self, queries: Queries, k: Tensor, v: Tensor, keys: KeyBuffer) -> tuple[Tensor, Tensor]:
        """Output [n, Hq, D] and base-2 log-sum-exp [n, Hq] over the keys in a buffer."""
        return self.stages.attend(
            queries.q, k, v, queries.routed, self.chunks.queries, keys, self.router, self.chunk_size
        )

    def attend_backward(
        self, queries: Queries, k: Tensor, v: Tensor, keys: KeyBuffer
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v through these keys, in float32 or wider; those of `queries.d_prior` in place."""
        return self.stages.attend_backward(
            queries.d_out, queries.q, k, v, queries.out, queries.lse, queries.routed, self.chunks.queries, keys,
            self.router, self.chunk_size, queries.d_prior,
        )  # fmt: skip


def per_head(x: Tensor, k: Tensor) -> Tensor:
    """The same for all key/value heads of k: [Hkv, ...]."""
    return x.expand(k.shape[1], -1)
