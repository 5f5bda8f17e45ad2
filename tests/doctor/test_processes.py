"""Checks that compare processes, or in which they communicate: two of them over gloo, with one thing broken."""

import json
from pathlib import Path
from typing import Any

import pytest

from dash_megatron.doctor.examine import CHECKS
from tests.doctor.workers import examine_broken


def test_two_processes_agree_on_every_check_and_name_one_that_hangs(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    """One test, because processes take long to start."""
    kept = Path(tiny_config["run_dir"]) / "checkpoints" / "step_00000002" / "weights"
    kept.parent.mkdir(parents=True)
    kept.write_text("of the run")
    with pytest.raises(pytest.fail.Exception, match=r"exit codes \[None, 1\]") as output:
        run_processes(2, examine_broken, {**tiny_config, "parallel": {"context": 2}}, str(tmp_path))
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert found == other

    expected = {check.name: "skipped" if check.name == "kernels" else "ok" for check in CHECKS}
    assert {name: result["status"] for name, result in found["sound"].items()} == expected, found["sound"]
    assert found["sound"]["parity"]["figures"]["density"] < 0.9, "routing selects"
    rates = {name.split(" on rank")[0] for name in found["sound"]["bandwidth"]["figures"]}
    together = ("all_reduce", "all_gather", "reduce_scatter", "to next rank")
    assert rates == {f"data x context {name} GB/s" for name in together} | {"context to next rank GB/s"}

    fingerprint = found["fingerprint"]
    assert fingerprint["versions"]["status"] == "failed"
    assert "but launch table of last week on rank 1" in fingerprint["versions"]["message"]
    assert fingerprint["disk"]["status"] == "skipped"

    exchange = found["exchange"]
    assert exchange["parity"]["status"] == "failed"
    assert "gradient of decoder.layers.0" in exchange["parity"]["message"]
    assert exchange["leak"]["status"] == "ok"

    assert "loss differs from one process's" in found["tensors"]["parity"]["message"]

    assert found["network"]["bandwidth"]["status"] == "failed"
    assert "context to next rank gave wrong values" in found["network"]["bandwidth"]["message"]

    raised = found["one raises"]
    assert raised["sum"]["status"] == "failed"
    assert "rank 1: RuntimeError: out of memory" in raised["sum"]["message"]
    assert raised["sum"]["seconds"] < 30
    # both have it from rank 1
    assert raised["part"]["message"] == "rank 1: ZeroDivisionError: division by zero"
    assert raised["bandwidth"]["status"] == raised["leak"]["status"] == "ok"

    assert " in hang\n" in str(output.value), "the stack of rank 1"
    lost, (hanging, following) = json.loads((tmp_path / "hang.json").read_text())
    assert lost
    assert (hanging["status"], following["status"]) == ("failed", "skipped")
    assert "not every process came through" in hanging["message"]
    assert "Ranks 1 failed to pass" in hanging["message"]

    assert kept.read_text() == "of the run"
    assert [path.name for path in Path(tiny_config["run_dir"]).iterdir()] == ["checkpoints"]
