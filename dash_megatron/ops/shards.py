"""DashAttention in stages, for context parallelism: what the stages are, and what they pass to each other.

A rank holds whole chunks of a packed sequence. It summarizes them, gets the summaries of all chunks, routes its own
queries, and then attends to keys and values wherever they lie, buffer by buffer. `Stages` is the interface of a backend;
`sharded_reference.py` and `kernels/sharded.py` have these functions, and `sharded.py` picks one. They compute forwards and
backwards and build no autograd graph.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from dash_megatron.ops.types import Router


class QueryChunks(NamedTuple):
    """Where the chunks of a rank's rows lie, in ascending order; int32 [local chunks] each."""

    start: Tensor
    """First row of the chunk in the rank's q, k and v."""
    end: Tensor
    """One past the last; equal to `start` for an empty padding entry."""
    number: Tensor
    """The chunk's number among all chunks of the whole packed sequence."""
    first: Tensor
    """Number of the first chunk of its document."""
    num_chunks: int
    """Chunks of the whole sequence."""
    list_bound: int
    """At least the number of pairs of a local chunk and a strictly past chunk of its document."""


class KeyBuffer(NamedTuple):
    """Which chunks' keys a buffer holds, and where; each head may hold other chunks, in another order."""

    row: Tensor
    """int32 [Hkv, chunks of the whole sequence]: first row of the chunk in the buffer."""
    length: Tensor
    """int32 [Hkv, chunks of the whole sequence]: its rows, 0 where the buffer does not hold it."""
    first: int
    """First chunk of the window: attention considers the chunks in it alone."""
    last: int
    """One past the last chunk of the window."""
    whole: bool = False
    """Whether nothing that any query attends to lies elsewhere, so that results need not be added to others."""


class Routed(NamedTuple):
    """What the router selected for the rows of q; tensors only, so that autograd can save them."""

    selected: Tensor
    """int32 [n, Hkv]: chunks selected, the own one included."""
    state: tuple[Tensor, ...]
    """What the backend that routed needs in its other stages."""


class RoutedQueries(NamedTuple):
    """A rank's queries and what was selected for them."""

    q: Tensor
    """[n, Hq, D], all rows in chunks."""
    chunks: QueryChunks
    router: Router
    routed: Routed
    pooled_q: Tensor | None = None
    """What the router saw instead of `q`: means of these, [n, Hq, D], or with `pool_heads`, and of a router of its own, [n, Hkv, D]."""

    @property
    def routing_q(self) -> Tensor:
        """The queries that the router saw."""
        return self.q if self.pooled_q is None else self.pooled_q


class Attended(NamedTuple):
    """Attention to some of the keys that were selected. Parts with different keys are merged by weights 2 ** lse."""

    out: Tensor
    """[n, Hq, D], float32 or wider, or of q's dtype if from a whole buffer; 0 for a row that sees no key."""
    lse: Tensor
    """[n, Hq], float32 or wider: base-2 log-sum-exp of the scores; -inf for a row that sees no key."""


class OutputGradient(NamedTuple):
    """What the backward of attention starts from; the same for all buffers of keys."""

    d_out: Tensor
    """[n, Hq, D]: gradient of the merged output."""
    merged: Attended
    """Attention to all buffers; its output may have been rounded to q's dtype."""
    d_prior: Tensor
    """Gradient of the log priors, as `Stages.new_d_prior` makes it; `attend_backward` fills it for the chunks in its
    window."""


class AttentionGradients(NamedTuple):
    """Gradients through attention, float32 or wider, but that of q of its dtype if from a whole buffer."""

    q: Tensor
    """[n, Hq, D]"""
    k: Tensor
    """[m, Hkv, D], zero in rows that nothing attends to; in rows of no chunk of a whole buffer anything."""
    v: Tensor
    """[m, Hkv, D], as those of k."""


class RouterGradients(NamedTuple):
    """Gradients through the router alone, float32 or wider, but that of `pooled_q` of its dtype: nothing is added to it."""

    q: Tensor
    """Gradient of `RoutedQueries.routing_q`, of its shape."""
    summary: Tensor
    """[Hkv, chunks of the whole sequence, D], from these rows of q."""
    scaling_factor: Tensor | None
    """[Hkv], from these rows of q; None where the router's is a number."""


class Stages(Protocol):
    """The stages of one backend, a module of these functions."""

    def summarize(self, k: Tensor, w: Tensor, chunks: QueryChunks, chunk_size: int) -> Tensor:
        """Compute the softmax-weighted mean key of every chunk.

        Args:
            k: keys [n, Hkv, D].
            w: summary queries [Hkv, D].
            chunks: where the chunks lie in k.
            chunk_size: the most rows that a chunk has.

        Returns:
            [Hkv, local chunks, D]; zero for empty chunks.
        """
        ...

    def summarize_backward(
        self,
        d_summary: Tensor,
        k: Tensor,
        w: Tensor,
        chunks: QueryChunks,
        chunk_size: int,
        more: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of k, all rows in chunks, in its dtype, and of w [Hkv, D], float32 or wider, from that of the summaries.

        That of k is added to `more` [parts, n, Hkv, D], summed over the parts, and rounded once.
        """
        ...

    def route(
        self,
        q: Tensor,
        summary: Tensor,
        chunks: QueryChunks,
        router: Router,
        pooled_q: Tensor | None = None,
    ) -> Routed:
        """Select chunks for every row of q.

        Args:
            q: attention's queries [n, Hq, D], all rows in chunks.
            summary: of all chunks of the whole sequence [Hkv, num_chunks, D], as `summarize` gives them.
            chunks: where the chunks of q lie.
            router: its constants.
            pooled_q: as in `RoutedQueries`. Where `router.query_pool` is above 1 these are of `pool_queries`, which the caller
                does: it may need rows of other ranks.
        """
        ...

    def listed(self, routed: Routed, num_chunks: int) -> Tensor:
        """Bool [Hkv, num_chunks]: past chunks that at least one row selected, local ones included."""
        ...

    def route_backward(self, d_prior: Tensor, queries: RoutedQueries, summary: Tensor) -> RouterGradients:
        """Gradients through the router from that of the log priors, filled for all chunks; other arguments as in `route`.

        That of the queries is of `queries.routing_q`, and carries nothing of attention.
        """
        ...

    def attend(self, queries: RoutedQueries, k: Tensor, v: Tensor, keys: KeyBuffer) -> Attended:
        """Attend to what of each row's own and selected chunks the buffer's window has.

        Args:
            queries: as `route` was given them, with what it returned.
            k, v: the buffer [m, Hkv, D], in q's dtype. Within the window it holds every past chunk that a row selected.
            keys: where the chunks lie in the buffer.
        """
        ...

    def new_d_prior(self, routed: Routed) -> Tensor:
        """Allocate what calls of `attend_backward` fill: the gradient of the log priors."""
        ...

    def attend_backward(
        self, gradient: OutputGradient, queries: RoutedQueries, k: Tensor, v: Tensor, keys: KeyBuffer
    ) -> AttentionGradients:
        """Gradients through attention to one buffer; `gradient.d_prior` is filled in place. Arguments as in `attend`."""
        ...
