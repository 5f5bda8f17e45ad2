"""A package `wandb` that writes down what it is asked, for processes of tests."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

from tests.training.workers import train_all


class FakeWandb(ModuleType):
    """Module and run in one; every call is a line `[method, arguments]` of a file of this process.

    Args:
        folder: where the file is, `calls_<rank>.jsonl`.
        failing: name of the method that raises.
    """

    def __init__(self, folder: Path, failing: str | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None, origin="fake")
        self.folder, self.failing, self.step = folder, failing, 0

    def init(self, **asked: Any) -> "FakeWandb":
        """Begin a run, or go on with it, whose count of lines the real package knows."""
        self._note("init", asked)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        """Name the axis of curves."""
        self._note("define_metric", [name, step_metric])

    def log(self, values: dict[str, float], step: int, commit: bool) -> None:
        """Take one line of values; the real package drops those whose step is below its own."""
        assert commit
        assert step >= self.step
        self.step = step + 1
        self._note("log", values)

    def finish(self) -> None:
        """End the run."""
        self._note("finish", None)

    def _note(self, method: str, arguments: Any) -> None:
        if method == self.failing:
            raise RuntimeError("no network")
        with open(self.folder / f"calls_{dist.get_rank()}.jsonl", "a") as file:
            file.write(json.dumps([method, arguments]) + "\n")


def train_beside(runs: list[tuple[dict[str, Any], int | None]], folder: str, failing: str | None) -> None:
    """`train_all` with a `FakeWandb`."""
    sys.modules["wandb"] = FakeWandb(Path(folder), failing)
    train_all(runs)
