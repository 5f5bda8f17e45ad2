"""Functions that tests run in processes of their own."""

import contextlib
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dash_megatron.config import ParallelConfig, config_from_dict
from dash_megatron.layers.sharding import splits
from dash_megatron.parallel import destroy_process_groups
from tests.training.whole import full_gradients, full_weights


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


def one_step(
    cases: list[tuple[str, dict[str, Any]]],
    folder: str,
    max_logits: int | None = None,
    steps: int = 1,
    max_activated: int | None = None,
) -> None:
    """Save what `_measured_steps` gives for every case: rank 0 to `<folder>/<name>.pt`, every rank's copy of weights that
    no process group shards to `<folder>/<name>_<rank>.pt`."""
    from dash_megatron.layers import recompute, vocabulary_loss

    vocabulary_loss.MAX_LOGITS = max_logits or vocabulary_loss.MAX_LOGITS
    recompute.MAX_ACTIVATED = max_activated or recompute.MAX_ACTIVATED
    module = keep_process_groups()
    for name, tree in cases:
        trainer = module.Trainer(config_from_dict(tree))
        trainer.reporter.start(trainer.step, trainer.commit)
        result = _measured_steps(trainer, steps)
        copies = {
            parameter: result["weights"][parameter]
            for parameter in result["weights"]
            if parameter not in splits(trainer.engine.model)
        }
        torch.save(copies, Path(folder) / f"{name}_{torch.distributed.get_rank()}.pt")
        if trainer.is_main:
            torch.save(result, Path(folder) / f"{name}.pt")
    destroy_process_groups()


def one_step_on_one_gpu(*arguments: Any) -> None:
    """`one_step` of processes that all compute on the first GPU, which NCCL refuses: everything goes over gloo."""
    from dash_megatron.parallel import groups

    os.environ["LOCAL_RANK"] = "0"
    init = torch.distributed.init_process_group

    def init_with_gloo(backend: str, **settings: Any) -> None:
        init("gloo", **settings)

    groups.dist.init_process_group = init_with_gloo
    groups.check_own_gpus = lambda gpu: None
    one_step(*arguments)


def _measured_steps(trainer: Any, steps: int) -> dict[str, Any]:
    """Loss, gradient norm and every gradient of the first step, and the weights before it and after the last."""
    engine, calls, gradients = trainer.engine, 0, {}
    step = engine.step

    def watched_step() -> None:
        nonlocal calls, gradients
        calls += 1
        if calls == trainer.accumulation_steps:
            gradients = full_gradients(engine)
        step()

    engine.step = watched_step
    first = full_weights(engine)
    totals = trainer.train_step().totals
    result = {"loss": totals.loss, "norm": engine.grad_norm(), "gradients": gradients}
    result["density"] = totals.densities
    for _ in range(steps - 1):
        trainer.train_step()
    validation = trainer.maybe_validate()
    result["validation"] = [validation.loss, *(part["loss"] for part in validation.by_position or [])]
    return {**result, "first_weights": first, "weights": full_weights(engine)}


class _Weight(torch.nn.Module):
    """One weight, whose gradient in every element is what the model is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 48))

    def forward(self, gradient: float) -> torch.Tensor:
        return (self.weight.float() * gradient).sum()


class _LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that was made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.nbytes = max([self.nbytes, *(x.nbytes for x in tensors)])
        return made


def sum_gradients(cases: list[tuple[str, dict[str, Any]]], addends: list[float], folder: str) -> None:
    """Save the gradient of one weight to `<folder>/<name>.pt`, to which each rank's micro-batches add its addend.

    Beside it, the bytes of the largest tensor that was made on the way, and how many updates Adam had made before.
    """
    from dash_megatron.parallel import init_process_groups, read_launch
    from dash_megatron.training.engine import Engine

    configs = [(name, config_from_dict(tree)) for name, tree in cases]
    init_process_groups(read_launch(os.environ), configs[0][1].parallel)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, config in configs:
        with _LargestTensor() as largest:
            engine = Engine(_Weight(), config, size)
            updates = engine.adam_steps()
            for micro_batch in range(config.accumulation_steps(size)):
                if micro_batch:
                    engine.step()
                engine.backward(engine.forward(addends[rank]))
        gradient = full_gradients(engine)["weight"]
        if rank == 0:
            torch.save((gradient, largest.nbytes, updates), Path(folder) / f"{name}.pt")
    destroy_process_groups()


def steps_in_bf16(cases: list[tuple[str, dict[str, Any], bool, bool]], folder: str) -> None:
    """Two steps of every case, whose gradients DeepSpeed adds up, or we in many buckets; the last process may lack one of them.

    Every rank leaves what `_measured_steps` gives in `<folder>/<name>_<rank>.pt`.
    """
    module, rank = keep_process_groups(), int(os.environ["RANK"])
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    from dash_megatron.training import gradient_sums

    gradient_sums.MIN_BUCKET_ELEMENTS = 1000
    for name, tree, by_deepspeed, one_lacks in cases:
        trainer = module.Trainer(config_from_dict(tree))
        trainer.reporter.start(trainer.step, trainer.commit)
        engine = trainer.engine
        if by_deepspeed:
            engine._optimizer.__class__, engine._adam.update = BF16_Optimizer, None
            engine._optimizer.sums = None
        else:
            assert len(engine._optimizer.sums._buckets) > 4
        if one_lacks and rank:
            engine.model.get_parameter("decoder.layers.0.mlp.linear_fc2.weight").requires_grad_(False)
        torch.save(_measured_steps(trainer, steps=2), Path(folder) / f"{name}_{rank}.pt")
    destroy_process_groups()


def save_logits(trees: list[tuple[str, dict[str, Any]]], folder: str) -> None:
    """Save the logits of 64 fixed tokens under initial weights to `<folder>/<name>_<rank>.pt`."""
    module = keep_process_groups()
    for name, tree in trees:
        trainer = module.Trainer(config_from_dict(tree))
        positions = torch.arange(64)[None]
        with torch.no_grad():
            logits = trainer.engine.model(positions * 7 % trainer.vocab_size, positions)
        torch.save(logits, Path(folder) / f"{name}_{torch.distributed.get_rank()}.pt")
    destroy_process_groups()


def begin_all(cases: list[tuple[str, dict[str, Any], dict[str, int]]], folder: str) -> None:
    """Build a trainer of every case, which may name a rank that is "late" to see checkpoints, or "unable" to check files.

    Each process leaves the names of the files that it checked, and its error, in `<folder>/<name>_<rank>.json`.
    """
    from dash_megatron.checkpoint import files
    from dash_megatron.checkpoint import folder as checkpoints

    module, rank = keep_process_groups(), int(os.environ["RANK"])
    finished_steps, checksum = checkpoints.finished_steps, files.checksum
    checked: list[str] = []
    faults: dict[str, int] = {}

    def watched_steps(run_dir: str | Path) -> list[int]:
        return [] if faults.get("late") == rank else finished_steps(run_dir)

    def watched_checksum(path: Path) -> str:
        checked.append(path.name)
        if faults.get("unable") == rank:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return checksum(path)

    checkpoints.finished_steps, files.checksum = watched_steps, watched_checksum
    for name, tree, own_faults in cases:
        error = None
        checked.clear()
        faults.clear()
        faults.update(own_faults)
        try:
            module.Trainer(config_from_dict(tree))
        except (ValueError, OSError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        result = {"checked": checked, "error": error}
        (Path(folder) / f"{name}_{rank}.json").write_text(json.dumps(result))
    destroy_process_groups()


def compare_fingerprints(folder: str) -> None:
    """The last rank claims to run other code; each rank leaves the message of its error."""
    from dash_megatron.parallel import init_process_groups, read_launch
    from dash_megatron.training.setup import check_same_implementation

    init_process_groups(read_launch(os.environ), ParallelConfig())
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    check_same_implementation("the same")
    try:
        check_same_implementation("other" if rank == size - 1 else "usual")
    except ValueError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))
    destroy_process_groups()


def steps_with_an_idle_rank(trees: list[dict[str, Any]], folder: str) -> None:
    """Two steps of every case in which no token that context rank 0 of 2 holds is a target."""
    from dash_megatron.parallel.context.layout import zigzag_tokens

    module = keep_process_groups()
    for tree in trees:
        trainer = module.Trainer(config_from_dict(tree))
        trainer.reporter.start(trainer.step, trainer.commit)
        next_batch, length = trainer.train_source.next_batch, trainer.config.data.seq_length
        idle = torch.zeros(length, dtype=torch.bool)
        idle[zigzag_tokens(length, 0, 2)] = True

        def masked_batch(next_batch: Any = next_batch, idle: torch.Tensor = idle) -> Any:
            batch = next_batch()
            here = torch.arange(len(idle)) if batch.context is None else batch.context.token
            return dataclasses.replace(batch, loss_mask=batch.loss_mask & ~idle[here])

        trainer.train_source.next_batch = masked_batch
        result = _measured_steps(trainer, steps=2)
        if trainer.is_main:
            parallel = trainer.config.parallel
            torch.save(result, Path(folder) / f"idle_{parallel.context}_{parallel.context_comm}.pt")
    destroy_process_groups()
