"""Train a model: `python train.py --config configs/quickstart.yaml [section.key=value ...]`, alone or under a launcher."""

import argparse
import contextlib
import os
import sys

from dash_megatron.config import load_config
from dash_megatron.exit_codes import ExitCode


def main() -> int:
    """Parse the config, build the trainer, run; give back an `ExitCode`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, see docs/configuration.md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        # imported late, so that a wrong config is told at once and before any process group exists
        from dash_megatron.parallel import destroy_process_groups
        from dash_megatron.training.stop import Halted
        from dash_megatron.training.trainer import Trainer

        trainer = Trainer(config)
        trainer.start()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        return leave(ExitCode.CONFIG_ERROR, f"error: {error}")
    try:
        code = trainer.train()
    except Halted as error:
        return leave(ExitCode.HALTED, f"halted: {error}")
    if code == ExitCode.REQUEUE:
        leave(code)
    destroy_process_groups()
    return code


def leave(code: ExitCode, reason: str = "stopped as asked, and saved") -> ExitCode:
    """Tell people why this process ends before the run does, and the batch script, which may not see its exit code."""
    if code != ExitCode.REQUEUE:
        print(reason, file=sys.stderr)
    if path := os.environ.get("DASH_EXIT_FILE"):
        # where even this cannot be written, the exit code still tells
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(f"{int(code)}\t{' '.join(reason.splitlines())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
