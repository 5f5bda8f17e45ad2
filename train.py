"""Train a model: `python train.py --config configs/quickstart.yaml [section.key=value ...]`, alone or under a launcher."""

import argparse
import sys

from dash_megatron.config_loading import load_config


def main() -> int:
    """Parse the config, build the trainer, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, see docs/configuration.md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        # imported late, so that a wrong config is told at once and before any process group exists
        from dash_megatron.parallel import destroy_process_groups
        from dash_megatron.training.trainer import Trainer

        trainer = Trainer(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    trainer.run()
    destroy_process_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
