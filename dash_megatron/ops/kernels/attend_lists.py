"""Attention to lists that were made without a router: the list-driven kernels of DashAttention, and nothing else of it.

Log priors are taken as they are: 0 where a token selected the chunk, -inf where it did not.
"""

from typing import Any

import torch
from torch import Tensor

from dash_megatron.ops.kernels.attend import attend_forward
from dash_megatron.ops.kernels.backward_kv import backward_kv
from dash_megatron.ops.kernels.backward_pairs import backward_pairs
from dash_megatron.ops.kernels.backward_q import backward_q
from dash_megatron.ops.kernels.configs import Launches
from dash_megatron.ops.kernels.geometry import Lists, Sizes


class _AttendLists(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chunks: Tensor, sizes: Sizes, launches: Launches, *lists: Tensor
    ) -> Tensor:  # fmt: skip
        # no prior is centred
        mean_log = torch.zeros(q.shape[0], k.shape[1], device=q.device)
        out, lse = attend_forward(
            q, k, v, Lists(*lists), mean_log, chunks, sizes, 1.0, launches.attend, by_pair=launches.attend_by_pair
        )  # fmt: skip
        ctx.sizes, ctx.launches = sizes, launches
        ctx.save_for_backward(q, k, v, out, lse, mean_log, chunks, *lists)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mean_log, chunks, *saved = ctx.saved_tensors
        lists, sizes, launches = Lists(*saved), ctx.sizes, ctx.launches
        d_out = gradients[0].contiguous()
        dq, delta, centred_lse, left, slabs = backward_q(
            q, k, v, out, d_out, lse, lists, mean_log, None, chunks, sizes, 1.0, launches.queries,
            by_pair=launches.backward_by_pair,
        )  # fmt: skip
        key_sums = backward_pairs(
            q, k, v, d_out, lse, delta, dq, None, lists, slabs, mean_log, chunks, sizes, 1.0
        )
        dk, dv, _ = backward_kv(
            q, k, v, d_out, centred_lse, delta, mean_log, left, chunks, sizes, 1.0, launches, key_sums
        )
        return dq, dk, dv, *(None,) * 7


def attend_lists(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, chunks: Tensor, sizes: Sizes, launches: Launches
) -> Tensor:
    """Softmax attention of every query tile to the chunks in its list and, causally, to its own; every bit is the same in every run.

    Args:
        q: [tokens, Hq, D] with dense D; float16, bfloat16 or float32, accumulated in float32.
        k, v: [tokens, Hkv, D], in q's dtype and in dense rows.
        lists: past chunks of every tile, with log priors.
        chunks: of `chunk_table`.
        sizes, launches: of these shapes.

    Returns:
        [tokens, Hq, D] in q's dtype, differentiable in q, k and v.
    """
    return _AttendLists.apply(q, k, v, chunks, sizes, launches, *lists)
