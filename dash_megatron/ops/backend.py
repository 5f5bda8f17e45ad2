"""The one place that picks a backend: plain torch (the reference) or the Triton kernels."""

import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger("dash_megatron")

BACKENDS = ("auto", "reference", "triton")
# tl.dot needs 16 rows
TRITON_CHUNK_SIZES = (16, 32, 64, 128)

_announced: set[str] = set()


def _import_triton_kernels() -> None:
    # a statement, which torch.compile can follow
    import dash_megatron.ops.kernels.dash  # noqa: F401


def keep_triton_cache() -> str:
    """Fix the folder in which Triton keeps compiled kernels for the next process; gives its path.

    The first kernel that torch.compile loads would otherwise send all later ones to a folder of its own under `/tmp`, so
    that where a kernel is found would depend on what ran before it.
    """
    from triton import knobs

    return os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)


def pick_backend(backend: str, q: Tensor, chunk_size: int | None = None) -> str:
    """Name of a backend that can run.

    Whoever calls this imports the implementation only once it is picked, so that torch alone suffices for the reference.

    Args:
        backend: "reference" (any device), "triton" (CUDA, or CPU with TRITON_INTERPRET=1), or "auto": Triton on CUDA if it
            can be imported and the tensors are not float64, otherwise the reference.
        q: its device and dtype decide.
        chunk_size: tokens per chunk, checked where Triton is picked; None leaves that to the caller.

    Returns:
        "reference" or "triton".

    Raises:
        ValueError: there is no such backend, or it cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {list(BACKENDS)}; try 'auto'")
    picked, why = "reference", f"tensors are {str(q.dtype).removeprefix('torch.')} on {q.device.type}"
    if backend == "triton" or (backend == "auto" and q.is_cuda and q.dtype != torch.float64):
        try:
            _import_triton_kernels()
            picked, why = "triton", "tensors are on CUDA"
        except ImportError as error:
            if backend == "triton":
                raise ValueError(
                    f"backend='triton' must be importable, but: {error}; install triton, or pass backend='reference'"
                ) from error
            why = f"no Triton kernels: {error}"
    if picked == "triton":
        _check_triton(q, chunk_size)
    if backend == "auto" and picked not in _announced:
        _announced.add(picked)
        logger.info("dash_attention: backend 'auto' is %r (%s)", picked, why)
    return picked


def _check_triton(q: Tensor, chunk_size: int | None) -> None:
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' must have CUDA tensors, but q is on {q.device}; move the inputs, pass "
            "backend='reference', or set TRITON_INTERPRET=1 to debug kernels"
        )
    if q.dtype == torch.float64:
        raise ValueError(
            "q.dtype=torch.float64 must be float32, bfloat16 or float16 for backend='triton', which accumulates in "
            "float32; cast the inputs, or pass backend='reference'"
        )
    if chunk_size is not None and chunk_size not in TRITON_CHUNK_SIZES:
        raise ValueError(
            f"chunk_size={chunk_size} must be one of {list(TRITON_CHUNK_SIZES)} for the Triton backend; "
            "use 64, or pass backend='reference'"
        )
