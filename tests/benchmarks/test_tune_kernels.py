"""A sweep over launch configurations ends at the first illegal access, and says which configuration made it."""

import pytest
import torch

from benchmarks import tune_kernels
from dash_megatron.ops.kernels import configs


class Broken:
    """Stages of which one always fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def backward_keys(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "told", ["CUDA error: an illegal memory access", "Triton Error [CUDA]: an illegal memory access"]
)
def test_an_illegal_access_is_raised_with_its_configuration(told):
    launches = configs.find_launches(torch.device("cpu"), torch.bfloat16, 128, 32, 4)
    with pytest.raises(RuntimeError, match="illegal") as raised:
        tune_kernels.try_time(Broken(RuntimeError(told)), "pairs", launches)
    assert raised.value.__notes__ == [f"pairs: {list(launches.pairs)}"]


def test_a_configuration_that_does_not_fit_takes_for_ever():
    launches = configs.find_launches(torch.device("cpu"), torch.bfloat16, 128, 32, 4)
    error = RuntimeError("too many resources requested for launch")
    assert tune_kernels.try_time(Broken(error), "pairs", launches) == float("inf")


def test_small_chunks_are_tried_several_a_step():
    assert {x.keys for x in tune_kernels.candidates("attend", 32)} == {64}
    assert {x.keys for x in tune_kernels.candidates("queries", 16)} == {32, 64}
    assert {x.keys for x in tune_kernels.candidates("keys", 32)} == {32}
    assert {x.keys for x in tune_kernels.candidates("pairs", 32)} == {64}
    limited = [x for x in tune_kernels.candidates("queries", 32) if x.maxnreg]
    assert [tune_kernels.table_entry(x) for x in limited] == [
        {"num_warps": 8, "num_stages": 3, "keys": 64, "maxnreg": 128}
    ]
    assert not any(x.maxnreg for x in tune_kernels.candidates("queries", 64))
