"""Which backend computes the stages of DashAttention under context parallelism; see `shards.py`."""

from torch import Tensor

from dash_megatron.ops import sharded_reference
from dash_megatron.ops.backend import pick_backend
from dash_megatron.ops.shards import Stages


def stages(backend: str, q: Tensor) -> Stages:
    """The stages of a backend.

    Args:
        backend: as in `dash_attention`.
        q: decides where `backend` is "auto".

    Raises:
        ValueError: the backend cannot run here.
    """
    if pick_backend(backend, q) == "reference":
        return sharded_reference
    # imported late: Triton is not everywhere
    from dash_megatron.ops.kernels import sharded

    return sharded
