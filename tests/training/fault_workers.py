"""Runs with something wrong in them, in processes of their own."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from dash_megatron.config import config_from_dict
from dash_megatron.parallel import destroy_process_groups
from tests.training.whole import full_weights
from tests.training.workers import keep_process_groups


def train_with_faults(cases: list[dict[str, Any]], folder: str) -> None:
    """Train each case; rank 0 writes `<folder>/<name>.pt`: final weights, which steps changed anything, and the error.

    A case has `name`, `tree`, and optionally: `bad`, samples whose processing gives a loss (`how="loss"`) or a gradient
    (`how="gradient"`) that is NaN, on the one rank that reads them; `skipped`, what the guard knows beforehand;
    `stop`, the step after which the run is killed.
    """
    module = keep_process_groups()
    for case in cases:
        trainer = module.Trainer(config_from_dict(case["tree"]))
        trainer.guard.skipped_batches |= set(case.get("skipped", ()))
        plain = module.share_of_global_mean
        module.share_of_global_mean = _poisoned(plain, set(case.get("bad", ())), case.get("how", "loss"))
        changed = _watch_steps(trainer, case.get("stop"))
        error = None
        try:
            with contextlib.suppress(KeyboardInterrupt):
                trainer.run()
        except module.NonFiniteError as caught:
            error = str(caught)
        module.share_of_global_mean = plain
        trainer.watchdog.stop()
        result = {"weights": full_weights(trainer.engine), "changed": changed, "error": error}
        if trainer.is_main:
            torch.save(result, Path(folder) / f"{case['name']}.pt")
    destroy_process_groups()


def _poisoned(function: Any, bad: set[int], how: str) -> Any:
    def poisoned(model: Any, batch: Any, targets: Any) -> torch.Tensor:
        loss = function(model, batch, targets)
        if not bad & set(batch.sample_ids) or not torch.is_grad_enabled():
            return loss
        if how == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    return poisoned


def _watch_steps(trainer: Any, stop: int | None) -> list[tuple[int, bool]]:
    """(step, whether weights or moments changed) of each step from the second on, when there are moments."""
    changed: list[tuple[int, bool]] = []
    step = trainer.train_step

    def snapshot() -> list[torch.Tensor]:
        states = trainer.engine._adam.state.values()
        moments = [value.clone() for state in states for value in state.values()]
        return [*full_weights(trainer.engine).values(), *moments]

    def watched_step() -> Any:
        if trainer.step == stop:
            raise KeyboardInterrupt
        number, before = trainer.step + 1, snapshot()
        result = step()
        if not trainer.rolled_back:
            pairs = zip(before, snapshot(), strict=False)
            changed.append((number, not all(torch.equal(one, other) for one, other in pairs)))
        return result

    trainer.train_step = watched_step
    return changed


def train_with_a_slow_rank(tree: dict[str, Any], slow: int, seconds: float) -> None:
    """Train while one rank takes longer to read."""
    module = keep_process_groups()
    trainer = module.Trainer(config_from_dict(tree))
    next_batch = trainer.train_source.next_batch

    def slow_batch() -> Any:
        if torch.distributed.get_rank() == slow:
            time.sleep(seconds)
        return next_batch()

    trainer.train_source.next_batch = slow_batch
    trainer.run()
    assert trainer.watchdog.report is not None
    assert len(trainer.watchdog.report.hosts) == torch.distributed.get_world_size()
    destroy_process_groups()


def disagree(folder: str) -> None:
    """One rank skips an update, the other does not; each writes what it was told."""
    import os

    from dash_megatron.config import ParallelConfig
    from dash_megatron.parallel import init_process_groups, read_launch
    from dash_megatron.training.stop import agree_to_stop

    init_process_groups(read_launch(os.environ), ParallelConfig())
    rank = torch.distributed.get_rank()
    found: list[Any] = [
        agree_to_stop(False, False),
        agree_to_stop(False, True),
        agree_to_stop(rank == 1, False),
    ]
    try:
        agree_to_stop(False, rank == 1)
    except RuntimeError as error:
        found.append(str(error))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    destroy_process_groups()
