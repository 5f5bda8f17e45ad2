"""Functions that tests run in processes of their own."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from dash_megatron.config_loading import config_from_dict
from dash_megatron.parallel import destroy_process_groups


def keep_process_groups() -> Any:
    """The trainer's module, whose process groups now outlive a trainer, so that one process can run several."""
    from dash_megatron.training import trainer as module

    device = None

    def init_once(*arguments: Any) -> torch.device:
        nonlocal device
        device = device or init(*arguments)
        return device

    init, module.init_process_groups = module.init_process_groups, init_once
    return module


def train_all(runs: list[tuple[dict[str, Any], int | None]]) -> None:
    """Train several runs after one another; a number ends its run early, as a kill before that step would.

    Each process writes the sample ids of every step it took to `<run_dir>/samples_<rank>.jsonl`.
    """
    module = keep_process_groups()
    for tree, last_step in runs:
        trainer = module.Trainer(config_from_dict(tree))
        watch_samples(trainer, last_step)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.run()
    destroy_process_groups()


def watch_samples(trainer: Any, last_step: int | None) -> None:
    """Record what the trainer reads, and interrupt it before a step."""
    source, step = trainer.train_source, trainer.train_step
    next_batch, read = source.next_batch, []
    path = Path(trainer.config.run_dir) / f"samples_{torch.distributed.get_rank()}.jsonl"

    def watched_batch() -> Any:
        batch = next_batch()
        read.extend(batch.sample_ids)
        return batch

    def watched_step() -> Any:
        if trainer.step == last_step:
            raise KeyboardInterrupt
        read.clear()
        result = step()
        with path.open("a") as file:
            file.write(json.dumps({"step": trainer.step, "samples": read}) + "\n")
        return result

    source.next_batch, trainer.train_step = watched_batch, watched_step


def one_step(cases: list[tuple[str, dict[str, Any]]], folder: str, max_logits: int | None = None) -> None:
    """Save loss, gradient norm, every gradient and the updated weights of one optimizer step to `<folder>/<name>.pt`."""
    if max_logits is not None:
        from dash_megatron.layers import model

        model.MAX_LOGITS = max_logits
    module = keep_process_groups()
    for name, tree in cases:
        trainer = module.Trainer(config_from_dict(tree))
        trainer.start_reporting()
        result = _measured_step(trainer)
        if trainer.is_main:
            torch.save(result, Path(folder) / f"{name}.pt")
    destroy_process_groups()


def _measured_step(trainer: Any) -> dict[str, Any]:
    engine, calls, gradients = trainer.engine, 0, {}
    step = engine.step

    def watched_step() -> None:
        nonlocal calls, gradients
        calls += 1
        if calls == trainer.accumulation_steps:
            gradients = engine.full_gradients()
        step()

    engine.step = watched_step
    totals, _ = trainer.train_step()
    weights = engine.full_weights()
    return {"loss": totals.loss, "norm": engine.grad_norm(), "gradients": gradients, "weights": weights}
