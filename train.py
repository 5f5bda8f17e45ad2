"""Train a model: `python train.py --config configs/quickstart.yaml [section.key=value ...]`.

Alone, in `--processes N` on this machine, or under a launcher (srun, torchrun).
"""

import argparse
import atexit
import contextlib
import os
import signal
import sys
from typing import NoReturn

from dash_megatron.command_line import ending_with_reader, parse_with_overrides
from dash_megatron.config import load_config
from dash_megatron.exit_codes import ExitCode, tell_scheduler
from dash_megatron.files import error_text
from dash_megatron.launcher import check_processes, launch
from dash_megatron.ranks import launched_rank, let_rank_0_print_error, print_error_once


@ending_with_reader()
def main() -> int:
    """Parse the config, build the trainer, run; give back an `ExitCode`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, see docs/configuration.md")
    parser.add_argument(
        "--processes", type=int, help="start this many processes on this machine, such as one for each GPU"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    arguments = parse_with_overrides(parser)
    try:
        config = load_config(arguments.config, arguments.overrides)
        check_processes(config, arguments.processes)
        if arguments.processes is not None:
            command = [sys.executable, os.path.abspath(__file__), "--config", arguments.config]
            return launch([*command, *arguments.overrides], arguments.processes)
        if not launched_rank():
            print("loading torch, Megatron-core and DeepSpeed", flush=True)
        # imported late, so that a wrong config is told at once and before any process group exists
        from dash_megatron.parallel import destroy_process_groups
        from dash_megatron.training.stop import Halted
        from dash_megatron.training.trainer import Trainer

        trainer = Trainer(config)
        trainer.start()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        return tell_end(ExitCode.CONFIG_ERROR, f"error: {error_text(error)}")
    except OSError as error:
        return tell_end(ExitCode.FAULT, f"error: {error_text(error)}")
    try:
        code = trainer.train()
    except Halted as error:
        return tell_end(ExitCode.HALTED, f"halted: {error}")
    except OSError as error:
        return tell_end(ExitCode.FAULT, f"error: {error_text(error)}")
    if code == ExitCode.REQUEUE:
        tell_end(code)
    destroy_process_groups()
    return code


def tell_end(code: ExitCode, reason: str = "stopped as asked, and saved") -> ExitCode:
    """Tell people why this process ends before the run does, and the batch script, which may not see its exit code."""
    tell_scheduler(code, reason)
    if code != ExitCode.REQUEUE:
        print_error_once(reason)
    return code


def leave(code: int) -> NoReturn:
    """End the process now: on the long way out, with process groups still there, some had aborted, whose code is then 134."""
    with contextlib.suppress(SystemExit):
        sys.exit(code)  # which Weights & Biases hears, and calls the run failed
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # until the trainer notes it, Ctrl-C has nothing to save and ends without a stack
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = main()
    except Exception:
        let_rank_0_print_error()
        raise
    if status not in (ExitCode.DONE, ExitCode.REQUEUE):
        leave(status)
    sys.exit(status)
