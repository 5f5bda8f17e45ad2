"""A few of the faults of `make chaos`; each run ends as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.faults import Fault, draw
from tests.chaos.supervisor import suffer, without_faults

# seed, kind: fast ones, and of each family one
SUBSET = [
    (1, "killed while a save writes"),
    (2, "killed after a checkpoint was published"),
    (3, "killed in a load"),
    (4, "killed, newest checkpoint damaged"),
    (5, "disk full for a while"),
    (15, "signal"),
    (26, "data file corrupted"),
]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Runs without faults by layout, as they are needed."""
    return {}


@pytest.mark.parametrize(("seed", "kind"), SUBSET, ids=[kind for _, kind in SUBSET])
def test_a_run_survives(
    seed: int, kind: str, tiny_config: dict[str, Any], tmp_path: Path, expected: dict[str, Any]
) -> None:
    fault: Fault = draw(seed, kind)
    if fault.layout not in expected:
        expected[fault.layout] = without_faults(tiny_config, fault.layout, tmp_path / "whole")
    outcome = suffer(tiny_config, fault, expected[fault.layout], tmp_path / "suffering")
    if outcome.problems and outcome.problems[0].startswith("skipped"):
        pytest.skip(outcome.problems[0])
    assert not outcome.problems
    assert outcome.starts > 1 or fault.family[0] == "disk"


def test_a_run_that_is_not_the_same_is_found_out(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    fault = Fault(0, "killed in a step", "zero1", rank=1, step=5, seconds=0, detail="")
    whole = without_faults(tiny_config, fault.layout, tmp_path / "whole")
    whole[-1] = {**whole[-1], "loss": whole[-1]["loss"] + 1e-7}
    outcome = suffer(tiny_config, fault, whole, tmp_path / "suffering")
    assert outcome.problems == ["losses differ from the run without faults, first at step [12]"]
    assert outcome.codes[0][1] == -9
