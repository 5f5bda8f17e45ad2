"""What follows from where packed documents start, computed once for all layers that are given the same tensor."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

# By the tensor itself, not its values, which reading would stall a GPU; forgotten when the tensor is.
_derived: Any = WeakTensorKeyDictionary()


def derived(cu_seqlens: Tensor | None, key: Hashable, make: Callable[[], T]) -> T:
    """`make()`, or what it gave for this very tensor and key before, if nobody wrote into the tensor since.

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
    version, known = _derived.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        known = {}
        _derived[cu_seqlens] = cu_seqlens._version, known
    if (key, stream) not in known:
        known[key, stream] = make()
    return known[key, stream]
