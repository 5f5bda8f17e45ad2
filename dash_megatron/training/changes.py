"""What a run that resumes does otherwise than its checkpoint's config says, as one table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dash_megatron.config import Config, config_of_stored_run, differences
from dash_megatron.training.schedule import learning_rate

_OTHER_ORDER = "goes on at its sample number in another order: some samples are read twice, others never"
_ROUNDING = "none but rounding"
_FROM_NEXT_STEP = "holds from the next step on"
_TRAINED_WITH = "weights were trained with the former; checkpoint.check_loss=false says that it is meant"
_FACTOR = "attention.scaling_factor"
_MOVED = "not read: the run goes on from the factors that attention.target_density has moved"
# What a change of a key means, or of any other key of a section.
_EFFECTS = {
    "run_dir": "the folder was moved or copied",
    "model": _TRAINED_WITH,
    "model.init_std": "none: weights are loaded",
    "attention": _TRAINED_WITH,
    "attention.target_density": _FROM_NEXT_STEP,
    "attention.density_budget": _FROM_NEXT_STEP,
    "attention.backend": _ROUNDING,
    "data": _FROM_NEXT_STEP,
    "data.tokenizer": "must be the one that made the data",
    "data.train": _OTHER_ORDER,
    "data.valid": "validation losses before and after are of different texts",
    "data.seq_length": _OTHER_ORDER,
    "data.num_workers": "none",
    "data.cache_dir": "none",
    "parallel": _ROUNDING,
    "zero": _ROUNDING,
    "training.steps": "the schedule of the learning rate ends at another step",
    "training.global_batch": _FROM_NEXT_STEP,
    "training.micro_batch": _ROUNDING,
    "training.recompute": _ROUNDING,
    "training.precision": _FROM_NEXT_STEP,
    "training.seed": _OTHER_ORDER,
    "logging.profile_steps": "none",
    "training.init_from": "not read: the run goes on from its own checkpoint",
}
_MOVES_THE_RATE = ("training.steps", "optimizer.lr", "schedule.")
_WIDEST_COLUMN = 48
"""Characters to which columns are filled up; what is longer is told whole and moves the rest of its line."""


class Change(NamedTuple):
    """A setting that differs from the stored config."""

    key: str
    old: str
    new: str
    effect: str


def changes_since(stored: Mapping[str, Any], config: Config, moved: bool = False) -> list[Change]:
    """The settings that differ from a stored config, in the order of the configuration page.

    Args:
        stored: what a checkpoint keeps of its run's config; keys that came since have their default.
        config: of the run that resumes.
        moved: the checkpoint has scaling factors that a target density, now or earlier, has moved.
    """
    # a layout that is refused today is compared as it was written
    layout = {"parallel": config.parallel.model_dump(mode="json") | stored.get("parallel", {})}
    saved = config_of_stored_run(dict(stored)).model_dump(mode="json") | layout
    found = [
        Change(key, _text(old), _text(new), _effect(key)) for key, old, new in differences(saved, config)
    ]
    if not moved:
        return found
    return [change._replace(effect=_MOVED) if change.key.startswith(_FACTOR) else change for change in found]


def describe_changes(stored: Mapping[str, Any], config: Config, step: int, moved: bool = False) -> str | None:
    """The table of settings that differ, with a line on the learning rate where they move it; None where nothing differs.

    Args:
        stored, config, moved: as in `changes_since`.
        step: finished steps.
    """
    changes = changes_since(stored, config, moved)
    if not changes:
        return None
    rows = [Change("setting", "stored", "now", "effect"), *changes]
    widths = [min(_WIDEST_COLUMN, max(len(row[column]) for row in rows)) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row.effect])
        for row in rows
    ]
    if step and any(change.key.startswith(_MOVES_THE_RATE) for change in changes):
        lines.append(_rate(config_of_stored_run(dict(stored)), config, step))
    return "\n".join(["settings differ from those of the checkpoint:", *lines])


def _rate(saved: Config, config: Config, step: int) -> str:
    last, following = learning_rate(step - 1, saved), learning_rate(step, config)
    line = f"learning rate: {last:.3g} in step {step}"
    if step < config.training.steps:
        line += f", {following:.3g} in step {step + 1}"
    if step > saved.schedule.warmup_steps and last < min(following, saved.optimizer.lr):
        line += (
            ": it had begun to decay, which is undone; to go on from before, start from an earlier checkpoint"
        )
    return line


def _effect(key: str) -> str:
    section, *names = key.split(".")
    return _EFFECTS.get(".".join([section, *names[:1]])) or _EFFECTS.get(section) or _FROM_NEXT_STEP


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
