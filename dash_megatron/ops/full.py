"""Causal softmax attention: over whole rows, and inside packed documents by the fastest implementation that is installed."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PREFERENCE = ("flash3", "flash2", "varlen", "each")
"""What `auto` takes: the first of these that can run. With torch 2.11 on an H200 flash2 takes 1
to 7% less time than varlen, which repeats key/value heads there."""

PackedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""The signature of an implementation, (q, k, v, cu_seqlens, longest), as `packed_attention` describes them."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of whole rows by torch: cuDNN or flash attention on CUDA, the CPU kernel elsewhere.

    Args:
        q: [B, N, Hq, D], of any floating dtype.
        k, v: [B, N, Hkv, D] in q's dtype; Hkv divides Hq.

    Returns:
        [B, N, Hq, D] in q's dtype.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, implementation: str = "auto"
) -> Tensor:
    """Causal attention inside each of the documents that make up a row.

    Args:
        q: [N, Hq, D], float16 or bfloat16 on CUDA for every implementation but "each".
        k, v: [N, Hkv, D] in q's dtype; Hkv divides Hq.
        cu_seqlens: where documents start, and N; int32 [documents + 1].
        longest: tokens of the longest document, or a bound on them.
        implementation: a name of `IMPLEMENTATIONS`, or "auto" for the first of `PREFERENCE` that can run.

    Returns:
        [N, Hq, D] in q's dtype.

    Raises:
        ValueError: there is no such implementation, or it cannot run here.
    """
    return IMPLEMENTATIONS[pick_implementation(q, implementation)](q, k, v, cu_seqlens, longest)


def pick_implementation(q: Tensor, implementation: str = "auto") -> str:
    """Name of the implementation that `packed_attention` runs; arguments and errors are described there."""
    if implementation == "auto":
        return next(name for name in PREFERENCE if why_unavailable(name, q) is None)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} must be one of {['auto', *IMPLEMENTATIONS]}; try 'auto'"
        )
    if reason := why_unavailable(implementation, q):
        raise ValueError(f"implementation={implementation!r} cannot run here: {reason}; try 'auto'")
    return implementation


def why_unavailable(name: str, q: Tensor) -> str | None:
    """Why an implementation cannot take such queries; None where it can."""
    if name == "each":
        return None
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {str(q.dtype).removeprefix('torch.')} on {q.device.type}, and must be float16 or bfloat16 on CUDA"
    if name == "flash3" and _flash3_function() is None:
        return f"no module {FLASH3_MODULE}, which is not part of torch"
    if name == "flash2" and not hasattr(torch.ops.aten, "_flash_attention_forward"):
        return "this torch has no such operator"
    if name == "flash3" and torch.cuda.get_device_capability(q.device)[0] != 9:
        return "the GPU is no Hopper"
    return None


FLASH3_MODULE = "flash_attn_interface"
"""A package beside torch, with a function `flash_attn_varlen_func`."""


@functools.cache
def _flash3_function() -> Callable[..., Any] | None:
    """The function of `FLASH3_MODULE`; None where that is not installed."""
    try:
        found: Callable[..., Any] = importlib.import_module(FLASH3_MODULE).flash_attn_varlen_func
        return found
    except (ImportError, AttributeError):
        return None


def _each(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """One call for each document, which waits for the device to learn their lengths."""
    lengths = cu_seqlens.diff().tolist()
    documents = zip(*(x.unsqueeze(0).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([causal_attention(*document) for document in documents], dim=1).squeeze(0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """FlashAttention-2 by torch's public function, with repeated key/value heads where it takes no fewer than query heads."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    # a flag in its first releases, a window in later ones
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    groups = q.shape[1] // k.shape[1]
    if "enable_gqa" in takes:
        causal["enable_gqa"] = groups > 1
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal)
    return out  # type: ignore[no-any-return]


def _flash2(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """FlashAttention-2 by torch's own operator, which repeats no heads."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False
    )[0]
    return out


def _flash3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """FlashAttention-3 from a package of its own."""
    attend = _flash3_function()
    assert attend is not None, "why_unavailable has looked"
    out = attend(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
    )  # fmt: skip
    # some releases also give the log-sum-exp
    attended: Tensor = out[0] if isinstance(out, tuple) else out
    return attended


IMPLEMENTATIONS: dict[str, PackedAttention] = {
    "flash3": _flash3,
    "flash2": _flash2,
    "varlen": _varlen,
    "each": _each,
}
"""Ways to compute `packed_attention`, by name; `benchmarks/full_attention.py` compares them. cuDNN's is none: its backward in
torch 2.11 takes the head dim for the longest document (pytorch pull request 186142), and gradients are wrong."""
