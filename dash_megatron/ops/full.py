"""Full causal attention in torch for queries and keys that lie in different buffers, on any device.

For context parallelism: calls on buffers with different keys are merged through their log-sum-exp. Scores are made
block by block over queries and never kept.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dash_megatron.ops.reference import LOG2_E, MAX_BLOCK_SCORES, wide


def _blocks(
    q: Tensor, k: Tensor, q_token: Tensor, q_first: Tensor, k_token: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of q, these rows [H, G, T, D] scaled, and which keys each may see, bool [T, m]."""
    (n, Hq, D), (m, H) = q.shape, k.shape[:2]
    size = max(16, MAX_BLOCK_SCORES // (Hq * m))
    for start in range(0, n, size):
        rows = slice(start, start + size)
        seen_Tm = (k_token <= q_token[rows, None]) & (k_token >= q_first[rows, None])
        yield rows, q[rows].view(-1, H, Hq // H, D).permute(1, 2, 0, 3) * D**-0.5, seen_Tm


def _rows(x_HGTD: Tensor) -> Tensor:
    """[H, G, T, ...] as [T, H * G, ...]."""
    return x_HGTD.movedim(2, 0).flatten(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_token: Tensor, q_first: Tensor, k_token: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of each row's document up to the row itself.

    Args:
        q: [n, Hq, D].
        k, v: [m, Hkv, D].
        q_token, k_token: number of the token in the whole sequence, int64 [n] and [m].
        q_first: first token of the row's document, int64 [n].

    Returns:
        Output [n, Hq, D] and base-2 log-sum-exp [n, Hq] (float64); 0 and -inf for rows that see no key.
    """
    q, k, v = wide(q, k, v)
    out = torch.zeros_like(q)
    # rounded to float32, a large log-sum-exp would scale all weights of its row
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device=q.device)
    k_H1mD, v_H1mD = (x.transpose(0, 1)[:, None] for x in (k, v))
    for rows, q_HGTD, seen_Tm in _blocks(q, k, q_token, q_first, k_token):
        scores = (q_HGTD @ k_H1mD.mT).masked_fill_(~seen_Tm, -math.inf)
        part = scores.logsumexp(-1)
        weights = (scores - part.clamp_min(torch.finfo(q.dtype).min)[..., None]).exp()
        out[rows], lse[rows] = _rows(weights @ v_H1mD), _rows(part.double()) * LOG2_E
    return out, lse


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_token: Tensor, q_first: Tensor, k_token: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v through attention to these keys; `out` and `lse` are those of attention to all."""
    d_out, q, k, v, out = wide(d_out, q, k, v, out)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    (_, Hq, D), H = q.shape, k.shape[1]
    k_H1mD, v_H1mD = (x.transpose(0, 1)[:, None] for x in (k, v))
    delta = (d_out.double() * out).sum(-1).to(q.dtype)
    for rows, q_HGTD, seen_Tm in _blocks(q, k, q_token, q_first, k_token):
        lse_HGT, delta_HGT = (x[rows].view(-1, H, Hq // H).permute(1, 2, 0) for x in (lse / LOG2_E, delta))
        d_out_HGTD = d_out[rows].view(-1, H, Hq // H, D).permute(1, 2, 0, 3)
        scores = (q_HGTD @ k_H1mD.mT).masked_fill_(~seen_Tm, -math.inf)
        weights = (scores - lse_HGT[..., None]).exp().to(q.dtype)
        d_scores = weights * (d_out_HGTD @ v_H1mD.mT - delta_HGT[..., None])
        dq[rows] = _rows(d_scores @ k_H1mD) * D**-0.5
        dk += (d_scores.mT @ q_HGTD).sum(1).transpose(0, 1)
        dv += (weights.mT @ d_out_HGTD).sum(1).transpose(0, 1)
    return dq, dk, dv
