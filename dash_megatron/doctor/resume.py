"""The resume check: whether a run with this layout, disk and data goes on bit for bit from what it saved."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml

from dash_megatron.checkpoint.folder import checkpoint_folder, finished_steps, tag_of
from dash_megatron.config import Config, load_config
from dash_megatron.doctor.runner import Finding
from dash_megatron.doctor.session import Session
from dash_megatron.doctor.small import scaled_down
from dash_megatron.parallel import Launch, destroy_process_groups
from dash_megatron.training.metrics import read_metrics
from dash_megatron.training.trainer import Trainer

# One start of the small run. Two of them, and time to notice, make the check's limit.
START_SECONDS = 600.0
SAVE_STEP, LAST_STEP = 2, 4
# What torchrun and SLURM tell processes of the other launch, which those of this one must not read
_LAUNCHER_VARIABLES = ("TORCHELASTIC_", "SLURM_", "GROUP_", "ROLE_")


def check_resume(session: Session) -> Finding:
    """Train four steps of a small model, saving after two; start again from there; losses must be equal, bit for bit.

    Every process starts a process of its own for each start, as a scheduler would: with the run's layout, precision,
    optimizer, data and sequence length, in a temporary folder in `run_dir`.
    """
    is_main = session.rank == 0
    if session.device.type == "cuda":
        # what the checks before this one held is for the processes to come
        torch.cuda.empty_cache()
    made = session.run_on_all(lambda: _make_folder(session.config.run_dir) if is_main else "")
    folder = Path(session.gather(made)[0])
    began: list[int] = []
    losses: list[dict[int, float]] = []
    try:
        config = small_run(session.config, session.size, folder)
        for number in range(2):
            port = session.gather(_free_port() if is_main else 0)[0]
            start = functools.partial(start_training, session.launch, config, folder, number, port)
            began.append(session.run_on_all(start, wait_seconds=START_SECONDS))
            read = functools.partial(_read_losses, config.run_dir, forget_last_checkpoint=number == 0)
            losses.append(session.run_on_all(read if is_main else dict))
    finally:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
    return compare_starts(began, losses) if is_main else Finding()


def compare_starts(began: Sequence[int], losses: Sequence[Mapping[int, float]]) -> Finding:
    """Compare two starts of the small run, the second of which resumed.

    Args:
        began: step after which each began.
        losses: loss by step, as each left them.
    """
    if list(began) != [0, SAVE_STEP]:
        return Finding(
            "failed", {}, f"the starts began after steps {list(began)}, in place of 0 and {SAVE_STEP}"
        )
    first, second = losses
    wrong = [step for step in range(1, LAST_STEP + 1) if step not in first or first[step] != second.get(step)]
    if not wrong:
        return Finding(figures={f"loss of step {LAST_STEP}": first[LAST_STEP]})
    return Finding(
        "failed",
        {},
        f"the loss of step {wrong[0]} is {second.get(wrong[0])} after resuming from step {SAVE_STEP}, and "
        f"{first.get(wrong[0])} without a stop: a run would go on as another one; if the file system of run_dir is sound, "
        "report this",
    )


def small_run(config: Config, world_size: int, folder: Path) -> Config:
    """The run's config with a small model, four steps and one micro-batch a step, in `folder`.

    The index of the data is kept where the run has its own; where there is none yet, it is as temporary as the rest.
    """
    own = Path(config.data.cache_dir or Path(config.run_dir) / "index_cache")
    cache = str(own if own.is_dir() else folder / "index_cache")
    small = scaled_down(
        config,
        data={"cache_dir": cache, "valid": []},
        schedule={"kind": "constant", "warmup_steps": 0, "decay_steps": None},
        training={
            "steps": LAST_STEP,
            "global_batch": config.training.micro_batch * config.data_parallel_size(world_size),
        },
        checkpoint={"every": SAVE_STEP, "keep": 0, "keep_every": 0},
        logging={"every": 1, "tensorboard": False},
        evaluation={"every": 0},
    )
    return small.model_copy(update={"run_dir": str(folder / "run")})


def start_training(launch: Launch, config: Config, folder: Path, number: int, port: int) -> int:
    """Run the small run in a process of its own, which meets those of the other ranks; collective.

    Args:
        launch: how this process was started.
        config: as `small_run` makes it.
        folder: for its config, output and report.
        number: of the start, from 0.
        port: at which rank 0's process shall listen.

    Returns:
        The step after which it began.

    Raises:
        RuntimeError: it failed, or took longer than `START_SECONDS`; the message has the end of its output.
        ValueError: this machine does not see the folder.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} of rank 0 is not on this machine: run_dir must be on a disk that all machines share"
        )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_VARIABLES)
    }
    environment |= {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
        "MASTER_ADDR": launch.master_address or "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # this process's ways with errors and sums are not the run's
    environment.pop("TORCH_NCCL_BLOCKING_WAIT", None)
    path = folder / f"start_{number}_{launch.rank:05d}"
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", __name__, f"{path}.yaml", f"{path}.json"]
    try:
        with open(f"{path}.log", "w") as log:
            subprocess.run(
                command,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=START_SECONDS,
                check=True,
            )
    except subprocess.SubprocessError as error:
        lines = Path(f"{path}.log").read_text(errors="replace").splitlines()
        said = " | ".join(line.strip() for line in lines[-4:])
        reason = "took too long" if isinstance(error, subprocess.TimeoutExpired) else "failed"
        raise RuntimeError(f"start {number + 1} of the small run {reason}: {said}") from error
    return int(Path(f"{path}.json").read_text())


def train(config_path: str, report_path: str) -> None:
    """Train to the last step, and write to a file after which step training began; a started process runs this."""
    # bits are compared
    torch.use_deterministic_algorithms(True, warn_only=True)
    trainer = Trainer(load_config(config_path))
    trainer.start()
    Path(report_path).write_text(str(trainer.step))
    trainer.train()
    destroy_process_groups()


def _make_folder(run_dir: str) -> str:
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=".doctor-", dir=run_dir)


def _read_losses(run_dir: str, forget_last_checkpoint: bool) -> dict[int, float]:
    if forget_last_checkpoint:
        if finished_steps(run_dir) != [SAVE_STEP, LAST_STEP]:
            raise RuntimeError(
                f"the small run saved steps {finished_steps(run_dir)}, in place of {[SAVE_STEP, LAST_STEP]}"
            )
        shutil.rmtree(checkpoint_folder(run_dir) / tag_of(LAST_STEP))
    return {line["step"]: line["loss"] for line in read_metrics(run_dir)}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    train(*sys.argv[1:])
