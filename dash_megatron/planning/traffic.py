"""Bytes that one rank sends, by formula: context exchange, tensor parallelism and ZeRO.

Pure arithmetic without a process group. Every collective is counted as its ring sends it; all numbers are bytes
that leave one rank, and a rank receives as many unless a docstring says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ContextComm = Literal["all_gather", "p2p", "a2a", "sparse"]

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class PassBytes:
    """Bytes one rank sends for one layer and one micro-batch."""

    forward: float
    backward: float

    def __add__(self, other: PassBytes) -> PassBytes:
        return PassBytes(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class ContextShape:
    """What one context-parallel rank holds of one layer's attention."""

    context: int
    """Ranks that share the sequence, P."""
    tokens: int
    """Tokens of this rank, n."""
    heads: int
    """Query heads of this tensor-parallel rank, Hq."""
    kv_heads: int
    """Key/value heads of this tensor-parallel rank, Hkv."""
    head_dim: int
    """Width of a head, D."""
    chunk_size: int
    """Tokens of a chunk, C."""
    routing_heads: int = 0
    """Queries, and as many keys, that the router of this tensor-parallel rank has of its own: the key/value heads, or 0."""
    pool_heads: bool = False
    """The router sees means over the query heads of a group."""
    element_bytes: int = 2
    """Bytes of an element of q, k and v: 2 for bf16, 4 for fp32."""
    rows: int | None = None
    """Tokens after alignment, padded to the largest rank; None: `tokens`."""
    chunks: int | None = None
    """Chunks, padded to the largest rank; None: `rows / chunk_size`, rounded up."""

    @property
    def aligned_rows(self) -> int:
        """Tokens after alignment."""
        return self.tokens if self.rows is None else self.rows

    @property
    def num_chunks(self) -> int:
        """Chunks of the largest rank."""
        return -(-self.aligned_rows // self.chunk_size) if self.chunks is None else self.chunks

    @property
    def peers(self) -> int:
        """Other ranks."""
        return self.context - 1

    @property
    def pooled_heads(self) -> int:
        """Heads of the queries that the router sees."""
        return self.routing_heads or (self.kv_heads if self.pool_heads else self.heads)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one rank in the input dtype."""
        return 2 * self.aligned_rows * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def kv_float32_bytes(self) -> int:
        """Gradients of the keys and values of one rank in float32."""
        return 2 * self.aligned_rows * self.kv_heads * self.head_dim * 4

    @property
    def summary_bytes(self) -> int:
        """Chunk summaries of one rank: half precision beside half-precision inputs, else float32."""
        return self._summary_elements * (2 if self.element_bytes == 2 else 4)

    @property
    def summary_float32_bytes(self) -> int:
        """Gradients of the chunk summaries of one rank, always float32."""
        return self._summary_elements * 4

    @property
    def _summary_elements(self) -> int:
        return self.num_chunks * self.kv_heads * self.head_dim

    @property
    def request_bytes(self) -> int:
        """What one rank asks all peers for: a bit per key/value head and chunk of the peer, in bytes per peer."""
        return self.peers * -(-self.num_chunks * self.kv_heads // 8)


def all_gather_exchange(shape: ContextShape) -> PassBytes:
    """Keys, values and summaries of every rank go to every other.

    K and V are gathered again in the backward instead of kept; dK and dV go to their owners in the input dtype, and
    are added there in float32.
    """
    return PassBytes(
        forward=shape.peers * (shape.kv_bytes + shape.summary_bytes),
        backward=shape.peers * (2 * shape.kv_bytes + shape.summary_float32_bytes),
    )


def p2p_exchange(shape: ContextShape) -> PassBytes:
    """Keys and values travel round the ring, in the backward again, and dK and dV accumulate in float32 on their way
    home, from the first rank on that is not the owner."""
    return PassBytes(
        forward=shape.peers * (shape.kv_bytes + shape.summary_bytes),
        backward=shape.peers * (shape.kv_bytes + shape.kv_float32_bytes + shape.summary_float32_bytes),
    )


def a2a_exchange(shape: ContextShape) -> PassBytes:
    """Tokens are exchanged for heads: q, k and v, and the router's, there, the output back, and the same for their gradients.

    A rank then holds all tokens of `heads / context` heads and summarizes them itself.
    """
    heads = 2 * (shape.heads + shape.kv_heads + shape.routing_heads)
    one_way = shape.tokens * shape.head_dim * shape.element_bytes * heads * shape.peers / shape.context
    return PassBytes(forward=one_way, backward=one_way)


def sparse_exchange(shape: ContextShape, sent_chunks: float) -> PassBytes:
    """Only chunks that some query of a peer selected are sent to it; all summaries still are.

    The backward sends them again, and returns the gradients of those received, as many in the mean over ranks.

    Args:
        shape: the rank's share.
        sent_chunks: (key/value head, chunk, peer) triples that this rank serves.
    """
    block = 2 * shape.chunk_size * shape.head_dim * shape.element_bytes
    return PassBytes(
        forward=sent_chunks * block + shape.request_bytes + shape.peers * shape.summary_bytes,
        backward=2 * sent_chunks * block + shape.peers * shape.summary_float32_bytes,
    )


def context_exchange(kind: ContextComm, shape: ContextShape, sent_chunks: float | None = None) -> PassBytes:
    """Bytes one rank sends in the context exchange `kind`; zero where nobody shares the sequence.

    Raises:
        ValueError: `sparse` without `sent_chunks`, or an unknown exchange.
    """
    if kind == "sparse":
        if sent_chunks is None:
            raise ValueError("kind='sparse' needs sent_chunks: its bytes depend on what queries select")
        return sparse_exchange(shape, sent_chunks)
    exchanges = {"all_gather": all_gather_exchange, "p2p": p2p_exchange, "a2a": a2a_exchange}
    if kind not in exchanges:
        raise ValueError(f"kind={kind!r} must be all_gather, p2p, a2a or sparse")
    return exchanges[kind](shape)


def exchange_copies(kind: ContextComm, shape: ContextShape) -> PassBytes:
    """Bytes that one rank reads and writes in its own memory around an exchange, for one layer and one micro-batch.

    Gradients of keys and values are float32 until they are rounded; those that arrive are added up. But with `all_gather`, keys and
    values are laid out for others, and outputs are float32 until they are rounded, which the ring merges before: with `context` + 1
    parts that a rank's queries see, of two a rank. Products of a merge and sums are kernels each.
    """
    P, kv, out = (
        shape.context,
        shape.kv_bytes,
        shape.tokens * shape.heads * shape.head_dim * shape.element_bytes,
    )
    if P == 1:
        return PassBytes(0.0, 0.0)
    if kind == "a2a":
        # rows of all heads are cut or joined; all tokens of some heads are sent and filled where they are
        whole = 2 * a2a_exchange(shape).forward * P / (P - 1)
        return PassBytes(whole, whole)
    if kind == "p2p":
        return PassBytes(forward=(4 + 14 * P) * out + 3 * kv, backward=6 * P * out + (8 + 14 * P) * kv)
    if kind == "all_gather":
        # keys and values are sent as they are, unless they are padded to those of the largest rank
        return PassBytes(forward=0.0, backward=(1 + 4 * P) * kv)
    laid_out, fetched = 3 * kv, 4 * P * kv
    return PassBytes(forward=4 * out + laid_out + fetched, backward=(4 + 4 * P) * kv + laid_out + 2 * fetched)


def alignment(shape: ContextShape, tokens_sent: int, tokens_returned: int) -> PassBytes:
    """Tokens of chunks that straddle a border move, with packed documents, to the rank where their chunk begins.

    Args:
        shape: the rank's share.
        tokens_sent: tokens whose q, k and v, and the router's, this rank sends there; their gradients come back in the
            backward.
        tokens_returned: tokens of other ranks whose output this rank sends back.
    """
    row = shape.head_dim * shape.element_bytes
    inputs = (shape.heads + 2 * shape.kv_heads + 2 * shape.routing_heads) * row
    output = shape.heads * row
    return PassBytes(
        forward=tokens_sent * inputs + tokens_returned * output,
        # backward mirrors it: output gradients go where q, k and v went, and theirs come back
        backward=tokens_sent * output + tokens_returned * inputs,
    )


def query_halo(shape: ContextShape, queries_sent: int, queries_returned: int) -> PassBytes:
    """The last queries before a border go, where the router sees means of queries, to the rank behind it; gradients return.

    Args:
        shape: the rank's share.
        queries_sent: tokens of this rank whose queries other ranks need.
        queries_returned: tokens of other ranks whose queries this one needs.
    """
    row = shape.pooled_heads * shape.head_dim * shape.element_bytes
    return PassBytes(forward=queries_sent * row, backward=queries_returned * row)


def ring_all_gather(total_bytes: float, ranks: int) -> float:
    """Bytes one rank sends so that all hold `total_bytes`, of which each brought its share.

    A reduce-scatter of `total_bytes` sends as much.
    """
    return total_bytes * (ranks - 1) / ranks


def ring_all_reduce(total_bytes: float, ranks: int) -> float:
    """Bytes one rank sends to sum `total_bytes` over all: a reduce-scatter, then an all-gather."""
    return 2 * ring_all_gather(total_bytes, ranks)


def tensor_parallel_layer(
    tokens: int, hidden_size: int, tensor: int, *, sequence: bool, element_bytes: int = 2
) -> PassBytes:
    """Bytes one rank sends for one transformer layer under tensor parallelism.

    Attention and feed-forward each all-reduce their output in the forward and their input's gradient in the backward.
    With sequence parallelism each is an all-gather and a reduce-scatter, as many bytes, and the backward gathers the
    two inputs once more for the weights' gradients.

    Args:
        tokens: tokens of this context rank's micro-batch, all tensor ranks together.
        hidden_size: width of the residual stream.
        tensor: tensor-parallel ranks.
        sequence: sequence parallelism.
        element_bytes: bytes of an activation.
    """
    stream = tokens * hidden_size * element_bytes
    both = 2 * ring_all_reduce(stream, tensor)
    again = 2 * ring_all_gather(stream, tensor) if sequence else 0.0
    return PassBytes(forward=both, backward=both + again)


@dataclass(frozen=True)
class ZeroBytes:
    """Bytes one rank sends for ZeRO in one optimizer step."""

    gradients: float
    """Reductions of gradients."""
    parameters: float
    """All-gathers of parameters."""

    @property
    def total(self) -> float:
        """Bytes of gradients and parameters together."""
        return self.gradients + self.parameters


def zero_step(
    parameters: float,
    stage: int,
    ranks: int,
    *,
    micro_batches: int = 1,
    gathers: float = 2,
    element_bytes: int = 2,
) -> ZeroBytes:
    """Bytes one rank sends for ZeRO in one optimizer step.

    Gradients are reduced in float32, by stages 0 and 1 once a step, by 2 and 3 after every micro-batch, because no rank has
    room for the sum. Stages 0 to 2 all-reduce them, as DeepSpeed does by default, and 3 reduce-scatters. Stage 3 gathers
    parameters in every pass, 1 and 2 once after the update.

    Args:
        parameters: elements that this tensor-parallel rank's model shard has, before ZeRO.
        stage: 0 to 3.
        ranks: processes ZeRO shards over: data x context.
        micro_batches: forward and backward passes per step.
        gathers: times that stage 3 gathers each parameter per micro-batch: forward and backward, and once more where
            the backward recomputes layers.
        element_bytes: bytes of a parameter on the wire.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage={stage} must be 0, 1, 2 or 3")
    gathered = ring_all_gather(parameters * element_bytes, ranks)
    scattered = ring_all_gather(parameters * FLOAT32_BYTES, ranks)
    reduced = ring_all_reduce(parameters * FLOAT32_BYTES, ranks)
    if stage == 0:
        return ZeroBytes(gradients=reduced, parameters=0.0)
    if stage == 1:
        return ZeroBytes(gradients=reduced, parameters=gathered)
    if stage == 2:
        return ZeroBytes(gradients=micro_batches * reduced, parameters=gathered)
    return ZeroBytes(gradients=micro_batches * scattered, parameters=micro_batches * gathers * gathered)
