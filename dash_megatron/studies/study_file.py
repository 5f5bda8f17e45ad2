"""A study as its YAML says it: a base config, what varies, how long each run trains, and what a plan assumes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from dash_megatron.config import Section
from dash_megatron.config.flops import peak_flops
from dash_megatron.config.loading import explain, read_yaml


class StudyError(ValueError):
    """A study that cannot be run; the message names the field, the value, the rule and the remedy."""


class Budgets(Section):
    """How long runs train: at most one of the lists may have entries; without any, as long as `training.steps` says."""

    tokens_per_parameter: tuple[float, ...] = ()
    """Tokens over all parameters of the run; its twins read as many tokens as the run itself."""
    tokens: tuple[float, ...] = ()
    """Tokens of every run."""
    flops: tuple[float, ...] = ()
    """Training FLOPs of every run, counted as `flops_counted` says."""
    flops_counted: Literal["dense", "assumed"] = "dense"
    """`dense` counts attention as if it were full, so that twins read equal tokens; `assumed` counts it at the assumed
    density, so that twins spend equal compute and the sparse one reads more."""

    @model_validator(mode="after")
    def _check(self) -> Budgets:
        given = [name for name in ("tokens_per_parameter", "tokens", "flops") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"budgets has {' and '.join(given)} and may have one of them; split the study in two"
            )
        for name in given:
            values = getattr(self, name)
            if min(values) <= 0:
                raise ValueError(
                    f"budgets.{name}={list(values)} must be above 0; take out what is not, or write 1e9 for a billion"
                )
        return self

    def entries(self) -> list[tuple[str, float] | None]:
        """Pairs of kind and amount; one None where there is no budget."""
        for kind in ("tokens_per_parameter", "tokens", "flops"):
            if getattr(self, kind):
                return [(kind, amount) for amount in getattr(self, kind)]
        return [None]


class Assumptions(Section):
    """What `plan` cannot know and takes for granted; every plan states it."""

    density: float | None = Field(default=None, gt=0, le=1)
    """Selected over causally available chunks, in layers that select; `assume.density` among a run's settings changes
    it for that run. Null takes the last `attention.target_density`, or 0.25 where there is none."""
    utilization: float | None = Field(default=0.4, gt=0, le=1)
    """FLOPs of the model at its density over the GPU's bf16 peak; null takes the step time that
    `python -m dash_megatron plan` models, which knows of kernels and links."""
    gpu: str = "H200"
    """Whose peak: one of those in `dash_megatron/config/flops.py`."""
    gpus: int = Field(default=1, gt=0)
    """GPUs of one run; matters for `utilization: null` only."""
    price: float = Field(default=3.0, ge=0)
    """Of one GPU for an hour."""
    currency: str = "$"
    """Written before costs."""
    context: float | None = Field(default=None, ge=1)
    """Mean number of tokens that a token may attend to; null computes it from the lengths of the documents in
    `data.train`, or from `data.seq_length` where those cannot be read."""

    @model_validator(mode="after")
    def _check(self) -> Assumptions:
        if peak_flops(self.gpu) is None:
            raise ValueError(f"assume.gpu={self.gpu} is not known; take B200, H200, H100, H800, A100 or L40S")
        return self


class Study(Section):
    """One study."""

    base: str
    """YAML config of a run, from the folder that commands run in."""
    output: str
    """Folder of everything the study writes; runs get folders in it."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """`section.key: value` for every run."""
    points: tuple[dict[str, Any], ...] = ()
    """A list of runs: each entry has the settings that belong together, such as those of a model size, and may have a
    `name`."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """`section.key: [values]`: every combination, with every point."""
    twins: tuple[str | dict[str, Any], ...] = ()
    """Runs to compare with: each is another `attention.kind`, or a set of settings. A run of kind `full` takes no
    attention setting from its twin, and is run once for all that it is twin of."""
    seeds: tuple[int, ...] = ()
    """`training.seed` of each repetition; empty: the base's."""
    budgets: Budgets = Field(default_factory=Budgets)
    warmup: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps that warm up, since budgets change the steps; null keeps `schedule.warmup_steps`."""
    assume: Assumptions = Field(default_factory=Assumptions)
    evaluate: dict[str, str] = Field(default_factory=dict)
    """`name: arguments` of `python -m dash_megatron evaluate`, for every run once it is trained; results go to
    `<run_dir>/evaluation/<name>`. Not done by SLURM arrays."""

    @model_validator(mode="after")
    def _check(self) -> Study:
        owned = {"run_dir": "output", "training.seed": "seeds"}
        if self.budgets.entries() != [None]:
            owned["training.steps"] = "budgets"
        for place, settings in self._settings():
            for key in settings:
                if key in owned:
                    raise ValueError(f"{place} sets {key}, which a study sets by `{owned[key]}`; take it out")
                if key != "name" and "." not in key:
                    raise ValueError(f"{place} has {key!r}; settings read section.key, such as optimizer.lr")
        for number, point in enumerate(self.points):
            if "name" in point and not (isinstance(point["name"], str) and point["name"]):
                raise ValueError(
                    f"points[{number}] has name {point['name']!r}, which becomes a folder and must be text, such as '30m'"
                )
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key} is empty, so that there would be no runs; give values")
            for number, point in enumerate(self.points):
                if key in point:
                    raise ValueError(f"{key} stands in grid and in points[{number}]; leave it in one of them")
        for name, arguments in self.evaluate.items():
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"evaluate has {name!r}; a name becomes a folder: letters, digits and ._+- only"
                )
            if "--output" in arguments:
                raise ValueError(
                    f"evaluate.{name} sets --output, which is <run_dir>/evaluation/{name}; take it out"
                )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} has one twice; take it out")
        return self

    def _settings(self) -> list[tuple[str, dict[str, Any]]]:
        points = [(f"points[{number}]", point) for number, point in enumerate(self.points)]
        twins = [(f"twins[{n}]", twin) for n, twin in enumerate(self.twins) if isinstance(twin, dict)]
        return [("overrides", self.overrides), ("grid", dict(self.grid)), *points, *twins]


def load_study(path: str | Path) -> Study:
    """Read a study.

    Raises:
        ValueError: unreadable file, malformed YAML, unknown key, wrong type, or a broken rule.
    """
    tree = read_yaml(path, f"study {path}", "base:, output:, ...")
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        lines = explain(error, "docs/studies.md", list(Study.model_fields))
        raise StudyError("\n".join(f"study {path}: {line}" for line in lines)) from None
