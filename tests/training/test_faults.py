"""Bad batches change nothing, are kept, and end the run when there are too many."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.checkpoint.folder import finished_steps
from dash_megatron.config import FaultsConfig
from dash_megatron.data.batches import pack_samples
from dash_megatron.training.faults import Fault, Guard, read_fault, write_fault
from dash_megatron.training.metrics import read_metrics
from tests.training.fault_workers import disagree, train_with_faults

LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")]
# samples 12 to 15 are the fourth global batch, and rank 1 of 2 reads sample 13
BAD, FIRST_OF_BAD = 13, 12


def cases_of(tree: dict[str, Any], folder: Path, stage: int, precision: str) -> list[dict[str, Any]]:
    def case(name: str, run: str, policy: str = "skip", **values: Any) -> dict[str, Any]:
        changed = {
            **tree,
            "run_dir": str(folder / f"{run}_{stage}_{precision}"),
            "model": {**tree["model"], "layers": 1},
            "zero": {"stage": stage},
            "training": {**tree["training"], "steps": 6, "precision": precision},
            "checkpoint": {"every": 2},
            "faults": {"non_finite": policy},
        }
        return {"name": f"{name}_{stage}_{precision}", "tree": changed, **values}

    return [
        case("skipped", "skipped", skipped=[FIRST_OF_BAD]),
        case("gradient", "gradient", bad=[BAD], how="gradient"),
        # killed after it went back, passed the bad batch and saved; then started again
        case("killed", "rollback", "rollback", bad=[BAD], stop=5),
        case("rollback", "rollback", "rollback", bad=[BAD]),
    ]


def test_a_bad_batch_on_one_rank_leaves_no_trace(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    cases = [case for layout in LAYOUTS for case in cases_of(tiny_config, tmp_path, *layout)]
    run_processes(2, train_with_faults, cases, str(tmp_path))
    for stage, precision in LAYOUTS:
        results = {
            name: torch.load(tmp_path / f"{name}_{stage}_{precision}.pt", weights_only=False)
            for name in ("skipped", "gradient", "killed", "rollback")
        }
        where = f"ZeRO {stage} {precision}"
        for name in ("skipped", "gradient"):
            unchanged = [step for step, changed in results[name]["changed"] if not changed]
            assert unchanged == [4], f"{where} {name}"
        assert results["killed"]["changed"] == [
            (1, True),
            (2, True),
            (3, True),
            (3, True),
            (4, False),
            (5, True),
        ]
        for name in ("gradient", "rollback"):
            for weight, expected in results["skipped"]["weights"].items():
                assert torch.equal(results[name]["weights"][weight], expected), f"{where} {name} {weight}"
            lines = read_metrics(tmp_path / f"{name}_{stage}_{precision}")
            assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6], f"{where} {name}"
            assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1], f"{where} {name}"
            losses = [line["loss"] for line in lines]
            assert math.isnan(losses[3]) == (name != "gradient")
            expected_losses = [
                line["loss"] for line in read_metrics(tmp_path / f"skipped_{stage}_{precision}")
            ]
            assert losses[:3] + losses[4:] == expected_losses[:3] + expected_losses[4:]


def test_a_bad_batch_is_kept_with_its_facts(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    case = {"name": "one", "tree": tiny_config, "bad": [5], "how": "gradient"}
    run_processes(2, train_with_faults, [case], str(tmp_path))
    fault, batches = read_fault(Path(tiny_config["run_dir"]) / "faults" / "step_00000002")
    assert (fault.step, fault.first_sample, fault.num_samples, fault.policy) == (2, 4, 4, "skip")
    assert math.isfinite(fault.loss)
    assert math.isnan(fault.grad_norm)
    facts = (Path(tiny_config["run_dir"]) / "faults" / "step_00000002" / "fault.json").read_text()
    assert '"grad_norm": null' in facts
    assert fault.checkpoint is None
    assert {rank: [batch.sample_ids for batch in found] for rank, found in batches.items()} == {
        0: [[4], [6]],
        1: [[5], [7]],
    }
    log = (tmp_path / "rank_0.log").read_text()
    assert "training samples 4 to 7): update skipped, batch kept in" in log


def test_too_many_bad_batches_in_a_row_end_the_run(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    training = {**tiny_config["training"], "steps": 12}
    tree = {**tiny_config, "training": training, "checkpoint": {"every": 2}}
    # one, then a good one, then every one
    bad = [8, *range(16, 48)]
    cases = [
        {
            "name": policy,
            "tree": {**tree, "run_dir": str(tmp_path / policy), "faults": {"non_finite": policy}},
        }
        for policy in ("skip", "rollback")
    ]
    run_processes(1, train_with_faults, [{**case, "bad": bad} for case in cases], str(tmp_path))
    for policy in ("skip", "rollback"):
        error = torch.load(tmp_path / f"{policy}.pt", weights_only=False)["error"]
        assert "as in 3 steps in a row something was wrong (step 7, training samples 24 to 27)" in error
        assert "The newest checkpoint is of step 6: resume from it with a lower optimizer.lr" in error
        assert finished_steps(tmp_path / policy) == [2, 4, 6]


def test_processes_that_disagree_on_an_update_find_out(run_processes: Any, tmp_path: Path) -> None:
    run_processes(2, disagree, str(tmp_path))
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found[:3] == [False, False, True]
        assert "one computes wrongly" in found[3]


def train(guard: Guard, losses: list[float], first: int = 0) -> list[str]:
    """Policies of the faults found, "" where there is none."""
    found = []
    for index, loss in enumerate(losses, first):
        fault = guard.check_loss(index + 1, 4 * index, loss) or guard.check_gradient(
            index + 1, 4 * index, loss, 1.0
        )
        found.append(fault.policy if fault else "")
    return found


SPIKES = FaultsConfig(loss_spike=4, loss_window=4, loss_spike_policy="skip")


def test_a_loss_far_above_the_last_is_a_spike_and_a_new_level_none() -> None:
    guard = Guard(SPIKES, 4)
    assert train(guard, [9.0, 3.0, 3.1, 2.9, 3.0, 3.1, 2.9, 3.2, 9.0, 3.0]) == [""] * 8 + ["skip", ""]
    assert guard.num_skipped(consumed_samples=40) == 1
    assert list(guard.losses) == [3.1, 2.9, 3.2, 3.0]  # the spike is no measure of the next
    assert train(Guard(FaultsConfig(loss_window=2), 4), [3.0, 3.0, 3.0, 1e6]) == [""] * 4


def test_a_resumed_guard_decides_as_one_that_was_not_interrupted() -> None:
    whole, first, second = (Guard(SPIKES, 4) for _ in range(3))
    losses = [3.0, 3.1, 2.9, 3.3, 3.0, 8.0, 3.0, 3.45, 2.7, 3.6]
    train(first, losses[:7])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert train(whole, losses)[7:] == train(second, losses[7:], first=7)
    assert whole.state_dict() == second.state_dict()


def test_a_fault_of_context_parallel_ranks_is_read_as_whole_rows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [{name: torch.randint(9, (128,), generator=generator) for name in ("tokens", "labels")}]
    whole = pack_samples(rows, eod=0, sample_ids=[7])
    fault = Fault(3, "the loss is nan", math.nan, 0.0, 7, 1, "skip")
    for rank in (1, 0):
        write_fault(
            tmp_path, fault, [whole.shard(rank, 2, 16)], data_rank=2, context_rank=rank, main=rank == 0
        )
    folder = tmp_path / "faults" / "step_00000003"
    found, batches = read_fault(folder)
    assert found.reason == fault.reason
    (batch,) = batches[2]
    assert batch.sample_ids == [7]
    for name in ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(batch, name), getattr(whole, name)), name
    (folder / "data_00002_context_001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="a context-parallel rank's file is missing"):
        read_fault(folder)
