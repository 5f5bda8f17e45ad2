"""Where a run's curves go for people to look at, beside `metrics.jsonl`: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dash_megatron.config import Config, WandbConfig
from dash_megatron.files import write_whole
from dash_megatron.retry import explain_os_error, make_writable_folder

logger = logging.getLogger(__name__)

_TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"
"""File of a run's folder with the id under which Weights & Biases knows the run."""
_FINISH_SECONDS = "60"


class Tracker(Protocol):
    """A copy of what the `.jsonl` files have, which no run ends for."""

    def add(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        """Show the values of a step, by tag; histograms are of finite values, on CPU."""

    def close(self) -> None:
        """Write what is still to be written."""


class TensorBoard:
    """Events in `<run_dir>/tensorboard`.

    Args:
        run_dir: the run's folder.
        resumed_step: steps finished before this start; later ones of an earlier start are hidden.
    """

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        self._writer = SummaryWriter(str(run_dir / _TENSORBOARD), purge_step=resumed_step + 1)

    def add(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        """As `Tracker.add`."""
        for tag, values in histograms.items():
            self._writer.add_histogram(tag, values.numpy(), step)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """As `Tracker.close`."""
        self._writer.close()


class WeightsAndBiases:
    """The scalars of TensorBoard under the same names, in one run of Weights & Biases for all starts of a run.

    They are drawn over `step`, so that steps which a resume does again are drawn again, over those of the earlier start.

    Args:
        wandb: the section `logging.wandb`.
        config: the whole config, shown beside the curves.

    Raises:
        Exception: whatever the package raises, as where nobody is logged in or the network is away.
    """

    def __init__(self, wandb: WandbConfig, config: Config) -> None:
        import wandb as package

        # a network that goes away must not keep a run that is done
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", _FINISH_SECONDS)
        folder = Path(config.run_dir)
        path = folder / WANDB_ID
        if not path.is_file():
            write_whole(path, secrets.token_hex(4) + "\n")
        self._run = package.init(
            project=wandb.project,
            entity=wandb.entity,
            group=wandb.group,
            name=wandb.name or folder.resolve().name,
            dir=str(folder),
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=config.model_dump(mode="json"),
            allow_val_change=True,
        )
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> None:
        """As `Tracker.add`, without histograms."""
        # the package counts lines in steps of its own, and drops those that do not ascend
        self._run.log({**scalars, "step": step}, step=max(step, self._run.step), commit=True)

    def close(self) -> None:
        """As `Tracker.close`; waits a minute at most for what is still to be sent."""
        self._run.finish()


def check_tensorboard(config: Config) -> None:
    """Make the folder of TensorBoard's events and see that it may be written to, lest a thread of TensorBoard finds out.

    Raises:
        ValueError: it may not.
        OSError: the file system is full or away.
    """
    if config.logging.tensorboard:
        make_writable_folder(Path(config.run_dir) / _TENSORBOARD, "the folder of logging.tensorboard")


def check_wandb(config: Config) -> None:
    """Refuse `logging.wandb` where the package is missing, before anything is computed.

    Raises:
        ValueError: it is missing.
    """
    # the package leaves folders of its name about, which Python takes for packages without a file
    found: Any = importlib.util.find_spec("wandb") if config.logging.wandb is not None else None
    if config.logging.wandb is not None and (found is None or found.origin is None):
        raise ValueError(
            "logging.wandb needs the package wandb; install it with `pip install 'dash-megatron[wandb]'`, or set "
            "logging.wandb=null"
        )


def open_wandb(config: Config) -> Tracker | None:
    """Begin, or go on with, the run's page at Weights & Biases; None where none is wanted, or where that fails, which is told."""
    if config.logging.wandb is None:
        return None
    try:
        return WeightsAndBiases(config.logging.wandb, config)
    except Exception as error:  # of the package, its login or the network
        _tell("Weights & Biases is left out", error)
        return None


def add_or_drop(
    trackers: list[Tracker], step: int, scalars: Mapping[str, float], histograms: Mapping[str, Tensor]
) -> None:
    """Show the values of a step on all trackers; one that fails is told of and dropped from the list."""
    for tracker in list(trackers):
        try:
            tracker.add(step, scalars, histograms)
        except Exception as error:  # of a disk, a network or a package
            _tell(f"{type(tracker).__name__} stops here", error)
            trackers.remove(tracker)


def close_quietly(tracker: Tracker) -> None:
    """Close a tracker; what goes wrong is told."""
    try:
        tracker.close()
    except Exception as error:
        _tell(f"{type(tracker).__name__} was not closed properly", error)


def _tell(what: str, error: Exception) -> None:
    reason = explain_os_error(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    logger.error("%s: %s; metrics.jsonl goes on", what, reason)
