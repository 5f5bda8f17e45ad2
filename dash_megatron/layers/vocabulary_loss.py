"""Cross entropy of labels from the last hidden states: logits are made piece by piece, and no piece is kept.

With a weight for each label the loss is one number, whose gradient is made with it: a piece of logits becomes its own gradient,
is multiplied by the hidden states and the table, and is forgotten. Nothing is scored again in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from dash_megatron.layers.argmax import is_argmax
from dash_megatron.ops.cross_entropy import replace_by_gradient, score_labels

# Most logits of one process alive at once, in elements (1 GiB in bf16).
MAX_LOGITS = 2**29


class Table(NamedTuple):
    """This process's part of the output layer."""

    rows: Tensor
    """[rows of this tensor-parallel rank, hidden_size], a token each."""
    group: dist.ProcessGroup
    """The tensor-parallel ranks, in the order of their rows."""
    sequence_parallel: bool
    """Whether each of these ranks has the hidden states of other tokens."""


class VocabularyLoss(NamedTuple):
    """What the output layer is to compute in place of logits."""

    labels: Tensor
    """int64 [B, N], of the tokens of all tensor-parallel ranks."""
    weight: Tensor | None
    """Float32 [B, N]; None: the loss of every label, without a gradient."""
    vocab_size: int | None
    """Where every label is scored: tokens of the whole vocabulary, to also say whether it is the argmax; None: not to say."""


class OutputLayer(ColumnParallelLinear):
    """Megatron's output layer, which can give losses in place of logits.

    ZeRO 3 gathers a module's weights while the module is called, so the table is used inside that call only.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        loss: VocabularyLoss | None = None,
    ) -> Any:
        """As Megatron's without `loss`; with it the sum of weighted losses, or, where it has no weight, what `token_losses` gives."""
        if loss is None:
            return super().forward(input_, weight, runtime_gather_output)
        table = Table(self.weight if weight is None else weight, self.tp_group, self.sequence_parallel)
        if loss.weight is None:
            return token_losses(input_, table, loss)
        return _WeightedLoss.apply(input_, table.rows, table, loss, torch.is_grad_enabled())


class _Piece(NamedTuple):
    """Some of the tokens of every tensor-parallel rank, M in all: where ranks have different ones, the same of each."""

    hidden: Tensor
    """[M, hidden_size]."""
    logits: Tensor
    """[M, rows of this rank]."""
    labels: Tensor
    """Counted from this rank's first row, int64 [M]."""
    lse: Tensor
    """Log-sum-exp over the whole vocabulary, float32 or float64 [M]."""
    losses: Tensor
    """Cross entropy, as `lse`."""


def _slices(hidden_NBH: Tensor, table: Table) -> Iterator[slice]:
    """A rank's own tokens in pieces of about the same size."""
    tokens, batch, _ = hidden_NBH.shape
    shares = table.group.size() if table.sequence_parallel else 1
    most = max(1, MAX_LOGITS // (len(table.rows) * batch * shares))
    length = math.ceil(tokens / math.ceil(tokens / most))
    for start in range(0, tokens, length):
        yield slice(start, start + length)


def _score(hidden_NBH: Tensor, table: Table, labels_SNB: Tensor) -> _Piece:
    """Score one piece; collective over the tensor-parallel ranks."""
    hidden, labels = hidden_NBH.flatten(0, 1), labels_SNB.flatten() - table.group.rank() * len(table.rows)
    if table.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=table.group)
    logits = hidden @ table.rows.t()
    lse, label_logits = _over_ranks(*score_labels(logits, labels), table.group)
    return _Piece(hidden, logits, labels, lse, lse - label_logits)


def _by_share(x_BN: Tensor, own_tokens: int) -> Tensor:
    """[B, N] of all tokens -> [shares, a rank's own tokens, B]."""
    return x_BN.t().reshape(-1, own_tokens, len(x_BN))


def _over_ranks(lse: Tensor, label_logits: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and labels' logits over the whole vocabulary, from those over each rank's rows; the same bits on every rank."""
    if group.size() == 1:
        return lse, label_logits
    own = torch.stack([lse, label_logits])
    all_ranks = own.new_empty(2 * group.size(), len(lse))
    dist.all_gather_into_tensor(all_ranks, own, group=group)
    return all_ranks[::2].logsumexp(0), all_ranks[1::2].sum(0)


@torch.no_grad()
def token_losses(hidden_NBH: Tensor, table: Table, loss: VocabularyLoss) -> Tensor:
    """Cross entropy of every label in nats, float32 or float64 [B, N], or beside 1 or 0 for an argmax or not, [B, N, 2]."""
    labels_SNB = _by_share(loss.labels, len(hidden_NBH))
    losses = [
        _piece_losses(hidden_NBH[tokens], table, labels_SNB[:, tokens], loss.vocab_size)
        for tokens in _slices(hidden_NBH, table)
    ]
    losses_BNK = torch.cat(losses, dim=1).flatten(0, 1).transpose(0, 1)
    return losses_BNK[..., 0] if loss.vocab_size is None else losses_BNK


def _piece_losses(hidden_NBH: Tensor, table: Table, labels_SNB: Tensor, vocab_size: int | None) -> Tensor:
    """[shares, N, B, 1 or 2]."""
    piece = _score(hidden_NBH, table, labels_SNB)
    values = [piece.losses]
    if vocab_size is not None:
        values += is_argmax(piece.logits[:, None], labels_SNB.reshape(1, -1), vocab_size, table.group)
    return torch.stack(values, dim=-1).view(*labels_SNB.shape, -1)


class _WeightedLoss(torch.autograd.Function):
    """The sum of weighted losses; gradients for hidden states and table are made with it, if they are wanted."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NBH: Tensor, rows: Tensor, table: Table, loss: VocabularyLoss, differentiate: bool
    ) -> Tensor:
        assert loss.weight is not None
        labels_SNB, weight_SNB = (_by_share(x, len(hidden_NBH)) for x in (loss.labels, loss.weight))
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        gradients = None
        if differentiate:
            gradients = torch.empty_like(hidden_NBH), torch.zeros_like(rows, dtype=wide)
            ctx.save_for_backward(*gradients)
            ctx.dtype = rows.dtype
        for tokens in _slices(hidden_NBH, table):
            total += _add_piece(hidden_NBH, table, labels_SNB, weight_SNB, tokens, gradients)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_rows = ctx.saved_tensors
        # one pass, which also rounds
        scaled = torch.mul(d_rows, d_total, out=torch.empty_like(d_rows, dtype=ctx.dtype))
        return d_hidden * d_total, scaled, None, None, None


def _add_piece(
    hidden_NBH: Tensor,
    table: Table,
    labels_SNB: Tensor,
    weight_SNB: Tensor,
    tokens: slice,
    gradients: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The sum of a piece's weighted losses, whose gradient is written for hidden states and added for the table.

    A function, so that the piece's logits are forgotten before the next one's are made.
    """
    piece = _score(hidden_NBH[tokens], table, labels_SNB[:, tokens])
    weight = weight_SNB[:, tokens].flatten()
    if gradients is not None:
        d_hidden, d_rows = gradients
        replace_by_gradient(piece.logits, piece.labels, piece.lse, weight)
        d_hidden[tokens] = _reduce(piece.logits @ table.rows, table).view_as(d_hidden[tokens])
        _add_product(d_rows, piece.logits.t(), piece.hidden)
    return (piece.losses * weight).sum()


def _reduce(d_hidden: Tensor, table: Table) -> Tensor:
    """Gradients of a rank's own hidden states, of which every rank has computed the part of its rows."""
    if table.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(d_hidden, group=table.group)
    return reduce_from_tensor_model_parallel_region(d_hidden, group=table.group)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total`; where the operands have fewer bits, they are summed in float32 by the product itself."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
