"""Train a model: `python train.py --config configs/quickstart.yaml [section.key=value ...]`, alone or under a launcher."""

import argparse
import sys

from dash_megatron.config_loading import load_config
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
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.CONFIG_ERROR
    try:
        code = trainer.train()
    except Halted as error:
        print(f"halted: {error}", file=sys.stderr)
        return ExitCode.HALTED
    destroy_process_groups()
    return code


if __name__ == "__main__":
    sys.exit(main())
