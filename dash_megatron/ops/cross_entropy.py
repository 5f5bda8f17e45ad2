"""Cross entropy over a vocabulary that several processes may share, in two steps between which they add up what they have.

The second step leaves the gradient where the logits were, so that no more than one copy of them ever exists. The operations
run in Triton on a GPU and in torch elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dash_megatron.ops.reference import upcast


def score_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute for each row the log-sum-exp of its logits, and the logit of its label.

    Args:
        logits: [M, V], of the vocabulary or of this process's part of it.
        labels: int64 [M], counted from this part's first token; those that are not in it have logit 0.

    Returns:
        Both [M], float32, or float64 if the logits are. The loss is the first less the second.
    """
    if logits.is_cuda and logits.dtype != torch.float64:
        from dash_megatron.ops.kernels.cross_entropy import score_labels as score

        return score(logits, labels)
    scores = upcast(logits)[0]
    number, inside = _within(labels, logits.shape[1])
    label_logit = scores.gather(1, number[:, None])[:, 0]
    return scores.logsumexp(1), torch.where(inside, label_logit, 0.0)


def replace_by_gradient(logits: Tensor, labels: Tensor, lse: Tensor, weight: Tensor) -> None:
    """Overwrite logits with the gradient of the sum of `weight` times loss.

    Args:
        logits, labels: as for `score_labels`; the logits are contiguous.
        lse: [M], over the whole vocabulary.
        weight: of each row's loss, float32 [M].
    """
    if logits.is_cuda and logits.dtype != torch.float64:
        from dash_megatron.ops.kernels.cross_entropy import replace_by_gradient as replace

        return replace(logits, labels, lse, weight)
    number, inside = _within(labels, logits.shape[1])
    gradient = (upcast(logits)[0] - lse[:, None]).exp()
    gradient.scatter_add_(1, number[:, None], -inside[:, None].to(gradient.dtype))
    logits.copy_(gradient * weight[:, None])


def _within(labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Labels moved to the nearest token, and whether that is where they were."""
    number = labels.clamp(0, vocab_size - 1)
    return number, number == labels
