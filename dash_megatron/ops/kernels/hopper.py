"""When the Hopper kernels can run, and what they have in common; it imports no Gluon, which other releases may lack."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dash_megatron.ops.kernels.geometry import Sizes

# Rows that a warpgroup of a Hopper kernel has.
HOPPER_ROWS = 64
# Gluon changes from release to release: the Hopper kernels do not compile with 3.7.
GLUON_IS_KNOWN = triton.__version__.startswith("3.6.")
ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def fits_hopper(
    q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, chunk_sizes: tuple[int, ...] = (64, 128)
) -> bool:
    """Whether a Hopper kernel for such chunks can take these tensors: half precision, common sizes, keys and values in dense rows."""
    return (
        q.is_cuda
        and GLUON_IS_KNOWN
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.bfloat16, torch.float16)
        and sizes.head_dim in (64, 128)
        and sizes.chunk_size in chunk_sizes
        # no descriptor describes a buffer without rows
        and len(k) > 0
        and all(x.stride() == (sizes.num_kv_heads * sizes.head_dim, sizes.head_dim, 1) for x in (k, v))
        and q.stride(0) % 8 == q.stride(1) % 8 == 0
        and all(x.data_ptr() % 16 == 0 for x in (q, k, v))
    )
