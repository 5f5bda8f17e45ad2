"""The public attention call: argument checks, choice of backend, routing statistics."""

import logging
import math
import os
from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from dash_megatron.ops.derived import derived
from dash_megatron.ops.entmax import check_alpha
from dash_megatron.ops.reference import dash_attention_reference, document_positions
from dash_megatron.ops.types import Router, Routing

logger = logging.getLogger("dash_megatron")

BACKENDS = ("auto", "reference", "triton")
CHUNK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
# tl.dot needs 16 rows
TRITON_CHUNK_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_announced: set[str] = set()


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, summary_query: Tensor) -> None:
    named = {"q": q, "k": k, "v": v, "summary_query": summary_query}
    for name, x in named.items():
        dims, layout = (2, "[Hkv, D]") if name == "summary_query" else (4, "[B, N, heads, D]")
        if not isinstance(x, Tensor) or x.ndim != dims:
            seen = f"{name}.shape={list(x.shape)}" if isinstance(x, Tensor) else f"{name}={x!r}"
            raise ValueError(f"{seen} must be a tensor of {dims} dimensions, {layout}; reshape {name}")
    if q.dtype not in DTYPES:
        raise ValueError(
            f"q.dtype={q.dtype} must be one of {[str(d) for d in DTYPES]}; cast q, k and v to torch.bfloat16"
        )
    for name, x in named.items():
        if x.numel() == 0:
            raise ValueError(
                f"{name}.shape={list(x.shape)} must have no empty dimension; skip the call for empty input"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name}.device={x.device} must be q's device {q.device}; move {name} with .to(q.device)"
            )
        widened = (
            name == "summary_query"
            and x.dtype == torch.float32
            and q.dtype in (torch.float16, torch.bfloat16)
        )
        if x.dtype != q.dtype and not widened:
            raise ValueError(
                f"{name}.dtype={x.dtype} must be q's dtype {q.dtype} (summary_query may stay float32 beside half "
                f"precision); cast {name} with .to(q.dtype)"
            )
    _check_heads(q, k, v)
    num_kv_heads = k.shape[2]
    if list(summary_query.shape) != [num_kv_heads, q.shape[3]]:
        raise ValueError(
            f"summary_query.shape={list(summary_query.shape)} must be [Hkv, D] = {[num_kv_heads, q.shape[3]]}; "
            f"a flattened one needs .view({num_kv_heads}, {q.shape[3]})"
        )


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        expected = [q.shape[0], q.shape[1], k.shape[2], q.shape[3]]
        if list(x.shape) != expected:
            raise ValueError(
                f"{name}.shape={list(x.shape)} must be {expected}: [B, N, Hkv, D] with B, N and D of q "
                f"{list(q.shape)} and one Hkv for k and v; reshape {name}"
            )
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"q.shape={list(q.shape)} has {num_heads} heads, which must be a multiple of the {num_kv_heads} heads of k; "
            f"try {max(1, num_heads // num_kv_heads) * num_kv_heads}"
        )


def _check_positive(name: str, value: float, advice: str) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ValueError(f"{name}={value!r} must be a finite Python number above 0, not a tensor; {advice}")


def _check_scaling(scaling_factor: float | Tensor, num_kv_heads: int, device: torch.device) -> None:
    if not isinstance(scaling_factor, Tensor):
        _check_positive("scaling_factor", scaling_factor, "try 1.0")
        return
    x = scaling_factor
    if list(x.shape) != [num_kv_heads] or not x.is_floating_point() or x.device != device:
        raise ValueError(
            f"scaling_factor={x.dtype} {list(x.shape)} on {x.device} must be a number, or a floating tensor [Hkv] = "
            f"[{num_kv_heads}] on {device}; reshape or move it"
        )
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((x > 0).all()):
        raise ValueError(
            f"scaling_factor={x.tolist()} must be above 0 for every head; learn its logarithm, for example"
        )


def _check_length_scaling(value: float) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 <= value < math.inf:
        raise ValueError(f"length_scaling={value!r} must be a finite Python number of at least 0; try 0.0")


def _check_flag(name: str, value: bool) -> None:
    if value is not True and value is not False:
        raise ValueError(f"{name}={value!r} must be True or False; pass a bool")


def _check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor) -> None:
    if cu_seqlens is None:
        return
    B, N = q.shape[:2]
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
        seen = (
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, Tensor)
            else repr(cu_seqlens)
        )
        raise ValueError(
            f"cu_seqlens={seen} must be a one-dimensional int32 tensor, [documents + 1]; "
            "build it with torch.tensor(boundaries, dtype=torch.int32)"
        )
    if B != 1:
        raise ValueError(
            f"cu_seqlens with q.shape={list(q.shape)} must have batch size 1; concatenate the {B} rows along N, or pass None"
        )
    if len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens={cu_seqlens.tolist()} must hold at least two boundaries; one document is [0, {N}]"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens.device={cu_seqlens.device} must be q's device {q.device}; move it with .to(q.device)"
        )
    if cu_seqlens.device.type != "cpu":
        return  # reading the values would make the host wait for the device at every call
    first, last = cu_seqlens[[0, -1]].tolist()
    if (first, last) != (0, N):
        raise ValueError(
            f"cu_seqlens runs from {first} to {last}, but must run from 0 to N={N}; include both ends"
        )
    lengths = cu_seqlens.diff()
    if bool((lengths <= 0).any()):
        at = int((lengths <= 0).nonzero()[0])
        raise ValueError(
            f"cu_seqlens[{at}:{at + 2}]={cu_seqlens[at : at + 2].tolist()} must rise: boundaries increase strictly; "
            "drop empty documents"
        )


def _import_triton_kernels() -> Callable[..., tuple[Tensor, Tensor]]:
    from dash_megatron.ops.kernels.dash import dash_attention_triton

    return dash_attention_triton


def _resolve_backend(backend: str, q: Tensor) -> tuple[str, Callable[..., tuple[Tensor, Tensor]]]:
    """Turn `backend` into the name and function of one that can run, or raise ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {list(BACKENDS)}; try 'auto'")
    fits_triton = q.is_cuda and q.dtype != torch.float64
    if backend == "reference" or (backend == "auto" and not fits_triton):
        why = f"tensors are {str(q.dtype).removeprefix('torch.')} on {q.device.type}"
        choice, kernel = "reference", dash_attention_reference
    else:
        try:
            choice, kernel, why = "triton", _import_triton_kernels(), "tensors are on CUDA"
        except ImportError as error:
            if backend == "triton":
                raise ValueError(
                    f"backend='triton' must be importable, but: {error}; install triton, or pass backend='reference'"
                ) from error
            choice, kernel, why = "reference", dash_attention_reference, f"no Triton kernels: {error}"
    if choice == "triton" and not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' must have CUDA tensors, but q is on {q.device}; move the inputs, pass "
            "backend='reference', or set TRITON_INTERPRET=1 to debug kernels"
        )
    if choice == "triton" and q.dtype == torch.float64:
        raise ValueError(
            "q.dtype=torch.float64 must be float32, bfloat16 or float16 for backend='triton', which accumulates in "
            "float32; cast the inputs, or pass backend='reference'"
        )
    if backend == "auto" and choice not in _announced:
        _announced.add(choice)
        logger.info("dash_attention: backend 'auto' is %r (%s)", choice, why)
    return choice, kernel


def routing_of(chunks_selected: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> Routing:
    """What was chosen, with what there was to choose from; arguments as those of `dash_attention`."""
    num_tokens, device = chunks_selected.shape[1], chunks_selected.device
    available = derived(
        cu_seqlens,
        ("mean of available chunks", num_tokens, chunk_size, device),
        lambda: (document_positions(num_tokens, cu_seqlens, device) // chunk_size + 1).float().mean(),
    )
    return Routing(chunks_selected, available)


@overload
def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    chunk_size: int = ...,
    scaling_factor: float | Tensor = ...,
    sigma: float = ...,
    estimate_diagonal: bool = ...,
    alpha: float = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str = ...,
    return_routing: Literal[False] = ...,
    length_scaling: float = ...,
) -> Tensor: ...


@overload
def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    chunk_size: int = ...,
    scaling_factor: float | Tensor = ...,
    sigma: float = ...,
    estimate_diagonal: bool = ...,
    alpha: float = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str = ...,
    *,
    return_routing: Literal[True],
    length_scaling: float = ...,
) -> tuple[Tensor, Routing]: ...


def dash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_query: Tensor,
    chunk_size: int = 64,
    scaling_factor: float | Tensor = 1.0,
    sigma: float = 2.0,
    estimate_diagonal: bool = True,
    alpha: float = 1.5,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_routing: bool = False,
    length_scaling: float = 0.0,
) -> Tensor | tuple[Tensor, Routing]:
    """Causal attention to the chunks that a differentiable, adaptive router selects (arXiv 2605.18753).

    Every token attends to its own chunk and to those past chunks of its document that alpha-entmax over chunk
    summaries gives any weight; the log of that weight is a prior on the attention scores, which is how the router
    learns. The heads of a group share their chunks.

    Gradients of the Triton kernels differ in the last bits from run to run, because the gradient of the chunk summaries
    is added up with atomics, unless `torch.use_deterministic_algorithms(True)` is set: then every bit is the same in every
    run, and the backward is slower.

    Args:
        q: queries after RoPE, [B, N, Hq, D]; float16, bfloat16, float32 or float64.
        k: keys after RoPE, [B, N, Hkv, D], q's dtype; Hkv divides Hq.
        v: values, [B, N, Hkv, D], q's dtype.
        summary_query: [Hkv, D], the learned query that summarizes a chunk's keys; zero gives their mean. q's dtype,
            or float32 beside half precision.
        chunk_size: tokens per chunk, a power of two up to 128 (16 or more for Triton).
        scaling_factor: factor on the routing scores, above 0: larger routes more sparsely. A tensor [Hkv], of any
            floating dtype, has one for each key/value head, and gets a gradient. Its values are checked on CPU only.
        sigma: temperature of the prior, above 0; the router's gradient is bounded up to 2 and vanishes as it grows.
        estimate_diagonal: centre the log prior of past chunks around that of the own chunk; otherwise use it as it is,
            and sigma not at all.
        alpha: of the entmax, in (1, 2].
        cu_seqlens: boundaries of packed documents, int32 [documents + 1] from 0 to N, strictly increasing, then B == 1.
            Values are checked on CPU only, since reading them would stall a GPU.
        backend: "reference" (any device), "triton" (CUDA), or "auto": Triton on CUDA if importable, else the reference.
        return_routing: also return what the router chose.
        length_scaling: where it is above 0, the scores of a token with n past chunks are multiplied by
            1 + length_scaling * ln(n) too: the growth with length of adaptive-scalable entmax (Vasylenko et al.,
            "Long-Context Generalization with Sparse Attention", arXiv 2506.16640).

    Returns:
        Output [B, N, Hq, D] in q's dtype, accumulated in float32 or better; with `return_routing`, also a `Routing`.

    Raises:
        ValueError: an argument is wrong; the message names it, its value, the rule and the remedy.
    """
    _check_tensors(q, k, v, summary_query)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size={chunk_size!r} must be a power of two from 1 to 128, as an int; try 64")
    _check_scaling(scaling_factor, k.shape[2], q.device)
    _check_length_scaling(length_scaling)
    _check_positive("sigma", sigma, "try 2.0, or 1e6 for a flat prior")
    _check_flag("estimate_diagonal", estimate_diagonal)
    check_alpha(alpha)
    _check_cu_seqlens(cu_seqlens, q)
    _check_flag("return_routing", return_routing)
    name, attend = _resolve_backend(backend, q)
    if name == "triton" and chunk_size not in TRITON_CHUNK_SIZES:
        raise ValueError(
            f"chunk_size={chunk_size} must be one of {list(TRITON_CHUNK_SIZES)} for the Triton backend; "
            "try 64, or pass backend='reference'"
        )
    router = Router(chunk_size, scaling_factor, sigma, estimate_diagonal, alpha, length_scaling)
    out, chunks_selected = attend(q, k, v, summary_query, router, cu_seqlens)
    if not return_routing:
        return out
    return out, routing_of(chunks_selected, chunk_size, cu_seqlens)
