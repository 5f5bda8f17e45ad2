"""Train a model: `python train.py --config configs/quickstart.yaml [section.key=value ...]`.

Alone, in `--processes N` on this machine, or under a launcher (srun, torchrun).
"""

import argparse
import contextlib
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from dash_megatron.config import load_config
from dash_megatron.exit_codes import ExitCode
from dash_megatron.launcher import launch

OTHERS_WAIT_SECONDS = 10.0
"""For which ranks other than 0 keep an error to themselves: mostly rank 0 has it too, and its end ends them."""
SAME_ERROR_SECONDS = 60.0
"""For which an error that one rank has told is not told by others."""


def main() -> int:
    """Parse the config, build the trainer, run; give back an `ExitCode`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, see docs/configuration.md")
    parser.add_argument("--processes", type=int, help="start so many on this machine, such as one a GPU")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.processes is not None:
            check_processes(arguments.processes)
            command = [sys.executable, os.path.abspath(__file__), "--config", arguments.config]
            return launch([*command, *arguments.overrides], arguments.processes)
        if not rank():
            print("loading torch, Megatron-core and DeepSpeed", flush=True)
        # imported late, so that a wrong config is told at once and before any process group exists
        from dash_megatron.checkpoint.folder import CheckpointError
        from dash_megatron.parallel import destroy_process_groups
        from dash_megatron.training.stop import Halted
        from dash_megatron.training.trainer import Trainer

        trainer = Trainer(config)
        trainer.start()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        return leave(ExitCode.CONFIG_ERROR, f"error: {error}")
    except OSError as error:
        return leave(ExitCode.FAULT, f"error: {told(error)}")
    try:
        code = trainer.train()
    except Halted as error:
        return leave(ExitCode.HALTED, f"halted: {error}")
    except (CheckpointError, OSError) as error:
        return leave(ExitCode.FAULT, f"error: {told(error)}")
    if code == ExitCode.REQUEUE:
        leave(code)
    destroy_process_groups()
    return code


def check_processes(processes: int) -> None:
    """Refuse a number of processes that cannot be started, or that a launcher has started already."""
    if processes < 1:
        raise ValueError(f"--processes {processes} must be at least 1")
    if rank() is not None:
        raise ValueError(
            "--processes is for a command that nothing else starts, and torchrun or srun has started this one; leave it out"
        )


def rank() -> int | None:
    """Number of this process among those of the run, as its launcher says; None where it has none."""
    environment = os.environ
    alone = "RANK" not in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    number = environment.get("RANK", environment.get("SLURM_PROCID", ""))
    return None if alone or not number.isdigit() else int(number)


def told(error: Exception) -> str:
    """What went wrong, without Python's number of it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def leave(code: ExitCode, reason: str = "stopped as asked, and saved") -> ExitCode:
    """Tell people why this process ends before the run does, and the batch script, which may not see its exit code."""
    if path := os.environ.get("DASH_EXIT_FILE"):
        # where even this cannot be written, the exit code still tells
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(f"{int(code)}\t{' '.join(reason.splitlines())}\n")
    if code != ExitCode.REQUEUE:
        let_rank_0_tell()
        tell(reason)
    return code


def tell(reason: str) -> None:
    """Print why this process ends, unless another of this machine, which the same launcher started, has just told the same."""
    if rank() is not None:
        told_before = Path(tempfile.gettempdir(), f"dash-megatron-told-{launch_digest(reason)}")
        with contextlib.suppress(OSError):
            if rank() and time.time() - told_before.stat().st_mtime < SAME_ERROR_SECONDS:
                return
        with contextlib.suppress(OSError):
            told_before.touch()
    print(reason, file=sys.stderr, flush=True)


def launch_digest(text: str) -> str:
    """Digest of a text and of what the processes of one launcher on one machine have in common."""
    launcher = (os.getppid(), os.environ.get("MASTER_PORT"), os.environ.get("SLURM_JOB_ID"))
    return hashlib.sha256(f"{launcher} {text}".encode()).hexdigest()[:24]


def let_rank_0_tell() -> None:
    """Wait for rank 0 to tell an error and to end, upon which the launcher ends this process, which has nothing to add."""
    if rank():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(OTHERS_WAIT_SECONDS)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # until the trainer notes it, Ctrl-C has nothing to save and ends without a stack
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = main()
    except Exception:
        let_rank_0_tell()
        raise
    sys.exit(status)
