"""Train a model: `python train.py --config configs/quickstart.yaml [section.key=value ...]`.

Alone, in `--processes N` on this machine, or under a launcher (srun, torchrun).
"""

import argparse
import contextlib
import hashlib
import os
import signal
import socket
import sys
import time

from dash_megatron.config import load_config
from dash_megatron.exit_codes import ExitCode
from dash_megatron.files import error_text
from dash_megatron.launcher import check_processes, launch, launched_rank

OTHERS_WAIT_SECONDS = 10.0
"""For which ranks other than 0 keep an error to themselves: mostly rank 0 has it too, and its end ends them."""
SAME_ERROR_SECONDS = 1.0
"""For which a rank other than 0 stays behind an error that it has told, so that others see that it is told."""


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
        if not launched_rank():
            print("loading torch, Megatron-core and DeepSpeed", flush=True)
        # imported late, so that a wrong config is told at once and before any process group exists
        from dash_megatron.checkpoint.folder import CheckpointError
        from dash_megatron.parallel import destroy_process_groups
        from dash_megatron.training.stop import Halted
        from dash_megatron.training.trainer import Trainer

        trainer = Trainer(config)
        trainer.start()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        return leave(ExitCode.CONFIG_ERROR, f"error: {error_text(error)}")
    except OSError as error:
        return leave(ExitCode.FAULT, f"error: {error_text(error)}")
    try:
        code = trainer.train()
    except Halted as error:
        return leave(ExitCode.HALTED, f"halted: {error}")
    except (CheckpointError, OSError) as error:
        return leave(ExitCode.FAULT, f"error: {error_text(error)}")
    if code == ExitCode.REQUEUE:
        leave(code)
    destroy_process_groups()
    return code


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
    """Print why this process ends, unless another of this machine, which the same launcher started, is telling the same.

    Rank 0 always tells. Of the others one can have a name in Linux's table of sockets, which ends with the process.
    """
    with socket.socket(socket.AF_UNIX) as claim:
        if launched_rank():
            try:
                claim.bind(f"\0dash-megatron-told-{launch_digest(reason)}")
            except OSError:
                return
        print(reason, file=sys.stderr, flush=True)
        if launched_rank():
            time.sleep(SAME_ERROR_SECONDS)


def launch_digest(text: str) -> str:
    """Digest of a text and of what the processes of one launcher on one machine have in common."""
    launcher = (os.getppid(), os.environ.get("MASTER_PORT"), os.environ.get("SLURM_JOB_ID"))
    return hashlib.sha256(f"{launcher} {text}".encode()).hexdigest()[:24]


def let_rank_0_tell() -> None:
    """Wait for rank 0 to tell an error and to end, upon which the launcher ends this process, which has nothing to add."""
    if launched_rank():
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
