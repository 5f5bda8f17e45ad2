"""A cache of what follows from `cu_seqlens`, shared by all layers that are given the same tensor.

Every layer of a model needs the same tables of packed documents: the chunk grid, the query tiles, the mean number of
available chunks. They are computed by the first layer and kept under the tensor itself, in a weak dictionary: its values are
never compared, because reading them would make the host wait for a GPU. An entry is dropped when the tensor is freed, or when
somebody has written into it since (its version counter has moved). Nothing is cached without a tensor, inside torch.compile,
while a CUDA graph is captured, or for inference tensors, which have no version; and each CUDA stream has entries of its own.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

_cache: Any = WeakTensorKeyDictionary()


def cached(cu_seqlens: Tensor | None, key: Hashable, make: Callable[[], T]) -> T:
    """Return `make()`, or what it returned for this very tensor and key before.

    The result is shared: whoever gets it must not write into it.
    """
    # traced graphs, captured graphs and tensors without a version have to do all of it each time
    if type(cu_seqlens) is not Tensor or torch.compiler.is_compiling() or cu_seqlens.is_inference():
        return make()
    stream = None
    if cu_seqlens.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return make()
        # other streams would have to wait for the one that computes it
        stream = torch.cuda.current_stream(cu_seqlens.device).cuda_stream
    version, known = _cache.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        known = {}
        _cache[cu_seqlens] = cu_seqlens._version, known
    if (key, stream) not in known:
        known[key, stream] = make()
    return known[key, stream]
