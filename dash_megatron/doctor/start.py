"""One start of a small run: `python -m dash_megatron.doctor.start CONFIG REPORT`, by `resume.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dash_megatron.config_loading import load_config
from dash_megatron.parallel import destroy_process_groups
from dash_megatron.training.trainer import Trainer


class ReportingTrainer(Trainer):
    """Notes where it began."""

    began_after = -1

    def resume(self) -> None:
        """As `Trainer.resume`."""
        super().resume()
        self.began_after = self.step


def main(config_path: str, report_path: str) -> None:
    """Train to the last step, and write the step after which training began to `report_path`."""
    # bits are compared
    torch.use_deterministic_algorithms(True, warn_only=True)
    trainer = ReportingTrainer(load_config(config_path))
    trainer.run()
    destroy_process_groups()
    Path(report_path).write_text(json.dumps({"began_after": trainer.began_after}))


if __name__ == "__main__":
    main(*sys.argv[1:])
