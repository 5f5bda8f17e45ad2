"""A study as its YAML says it: a base config, what varies, how long each run trains, and what a plan assumes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from dash_megatron.config import Section
from dash_megatron.config.flops import peak_flops
from dash_megatron.config.loading import read_yaml
from dash_megatron.config.validation_errors import explain_validation
from dash_megatron.evaluation.cli import check_arguments


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
            if len(set(values)) != len(values):
                raise ValueError(f"budgets.{name}={list(values)} has one twice; take it out")
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
    it for that run. Null takes the last `attention.target_density`, or where there is none 0.1, as `plan` does."""
    utilization: float | None = Field(default=0.4, gt=0, le=1)
    """FLOPs of the model at its density over the GPU's bf16 peak; null takes the step time that
    `python -m dash_megatron plan` models, which knows of kernels and links."""
    gpu: str = "H200"
    """Whose peak: one of those in `dash_megatron/config/flops.py`."""
    gpus: int = Field(default=1, gt=0)
    """GPUs of one run; matters for `utilization: null` only."""
    price: float = Field(default=3.0, ge=0)
    """Price of one GPU for an hour."""
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


class Branches(Section):
    """Short runs that go on from the weights of each base, in other attention and with other settings, to be compared."""

    arms: tuple[dict[str, Any], ...] = Field(examples=["[{name: full, attention.kind: full}, ...]"])
    """What is compared: each has a `name`, and the settings that set it apart. Of the base's attention it takes nothing."""
    reference: str
    """Name of the arm that the others are compared with."""
    orders: tuple[int, ...] = (1,)
    """Orders of the data, as `training.seed` of a branch: every arm is trained once in each. One order says nothing about
    how far another one would end elsewhere."""
    overrides: dict[str, Any] = Field(default_factory=dict, examples=["{training.steps: 100}"])
    """`section.key: value` for every branch, beside the settings of its base: its steps, length, schedule, batch and data."""
    evaluate: dict[str, str] = Field(examples=['{NAME: "--tasks documents"}'])
    """`name: arguments` of `python -m dash_megatron evaluate`, for every branch once it is trained. Arms are compared on all
    that it scores; at least one entry must have `--tasks documents`, the losses of held-out documents."""

    @model_validator(mode="after")
    def _check(self) -> Branches:
        names = [arm.get("name") for arm in self.arms]
        for number, name in enumerate(names):
            if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"branches.arms[{number}] has name {name!r}, which becomes a folder: letters, digits and ._+- only, "
                    "such as dash_25"
                )
            if names.count(name) > 1:
                raise ValueError(f"branches.arms has {name} twice; rename one")
        if self.reference not in names:
            raise ValueError(
                f"branches.reference={self.reference} must be the name of an arm: {', '.join(map(str, names))}"
            )
        if len(names) < 2:
            raise ValueError(
                f"branches.arms has {self.reference} alone, and nothing to compare it with; add one"
            )
        if not self.orders or len(set(self.orders)) != len(self.orders):
            raise ValueError(
                f"branches.orders={list(self.orders)} must name orders, each once, such as [1, 2, 3]; an order that comes "
                "twice would be the same run"
            )
        if not any(_scores_documents(arguments) for arguments in self.evaluate.values()):
            raise ValueError(
                f"branches.evaluate={self.evaluate} must score held-out documents, by which arms are compared; add "
                "`documents: --tasks documents --samples 400 --lengths 16384`, with data.seq_length as the length"
            )
        return self

    def settings(self) -> list[tuple[str, dict[str, Any]]]:
        """Every set of settings, with its place in the file."""
        arms = [(f"branches.arms[{number}]", arm) for number, arm in enumerate(self.arms)]
        return [("branches.overrides", self.overrides), *arms]


def _scores_documents(arguments: str) -> bool:
    return re.search(r"--tasks[ =](\S+,)?documents(,|\s|$)", arguments) is not None


class Study(Section):
    """One study."""

    base: str
    """YAML config of a run, from the folder that commands run in."""
    output: str = Field(min_length=1)
    """Folder of everything the study writes; runs get folders in it."""
    overrides: dict[str, Any] = Field(default_factory=dict, examples=["{optimizer.lr: 3e-4}"])
    """`section.key: value` for every run."""
    points: tuple[dict[str, Any], ...] = Field(default=(), examples=["[{name: 30m, model.layers: 8}, ...]"])
    """A list of runs: each entry has the settings that belong together, such as those of a model size, and may have a
    `name`. `branches.section.key` is of the branches of these runs alone, such as the learning rate of a size."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict, examples=["{optimizer.lr: [3e-4, 6e-4]}"])
    """`section.key: [values]`: every combination, with every point."""
    twins: tuple[str | dict[str, Any], ...] = Field(default=(), examples=["[full, {attention.alpha: 1.2}]"])
    """Runs to compare with: each is another `attention.kind`, or a set of settings. A run of kind `full` takes no
    attention setting from its twin, and is run once for all that it is twin of."""
    seeds: tuple[int, ...] = ()
    """`training.seed` of each repetition; empty: the base's."""
    budgets: Budgets = Field(default_factory=Budgets)
    warmup: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps that warm up, since budgets change the steps; null keeps `schedule.warmup_steps`."""
    assume: Assumptions = Field(default_factory=Assumptions)
    evaluate: dict[str, str] = Field(default_factory=dict, examples=['{NAME: "--tasks perplexity"}'])
    """`name: arguments` of `python -m dash_megatron evaluate`, for every run once it is trained; results go to
    `<run_dir>/evaluation/<name>`. Not done by SLURM arrays. Branches have their own."""
    branches: Branches | None = None
    """What goes on from every run of the study, which then are bases."""

    @model_validator(mode="after")
    def _check(self) -> Study:
        owned = {"run_dir": "output", "training.seed": "seeds"}
        if self.budgets.entries() != [None]:
            owned["training.steps"] = "budgets"
        _check_settings(self._settings(), owned)
        if self.branches:
            self._check_branches(self.branches)
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
        _check_names("evaluate", self.evaluate)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} has one twice; take it out")
        return self

    def against(self, reference: str) -> Study:
        """The study with another arm as the reference of its branches.

        Raises:
            ValueError: it has no branches, or no such arm.
        """
        names = [arm["name"] for arm in self.branches.arms] if self.branches else []
        if self.branches is None or reference not in names:
            known = ", ".join(map(str, names)) or "the study has no branches"
            raise StudyError(f"--reference {reference} must be the name of an arm: {known}")
        branches = self.branches.model_copy(update={"reference": reference})
        return self.model_copy(update={"branches": branches})

    def _check_branches(self, branches: Branches) -> None:
        owned = {
            "run_dir": "output",
            "training.seed": "branches.orders",
            "training.init_from": "base",
        }
        of_bases = [(f"{place}.branches", settings_of_branches(found)) for place, found in self._settings()]
        every = branches.settings() + of_bases
        _check_settings(every, owned)
        _check_names("branches.evaluate", branches.evaluate)
        for place, settings in every:
            for key in settings:
                if key.startswith("model."):
                    raise ValueError(
                        f"{place} sets {key}, and a branch goes on with the model of its base; set it in `points`, which "
                        "makes a base of each"
                    )
        if self.twins:
            raise ValueError("a study has twins or branches; name what you compare with in branches.arms")

    def _settings(self) -> list[tuple[str, dict[str, Any]]]:
        points = [(f"points[{number}]", point) for number, point in enumerate(self.points)]
        twins = [(f"twins[{n}]", twin) for n, twin in enumerate(self.twins) if isinstance(twin, dict)]
        return [("overrides", self.overrides), ("grid", dict(self.grid)), *points, *twins]


def settings_of_branches(settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings of a base that are its branches', `branches.section.key`, by `section.key`."""
    prefix = "branches."
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def _check_settings(places: list[tuple[str, dict[str, Any]]], owned: dict[str, str]) -> None:
    """Refuse keys that are no `section.key`, and those that the study sets itself, by the key that does it."""
    for place, settings in places:
        for key in settings:
            if key in owned:
                raise ValueError(f"{place} sets {key}, which a study sets by `{owned[key]}`; take it out")
            if key != "name" and "." not in key:
                raise ValueError(f"{place} has {key!r}; settings read section.key, such as optimizer.lr")


def _check_names(place: str, evaluations: dict[str, str]) -> None:
    for name, arguments in evaluations.items():
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(
                f"{place} has {name!r}; a name becomes a folder: letters, digits and ._+- only, and of these no .+- at the beginning"
            )
        if "--output" in arguments:
            raise ValueError(
                f"{place}.{name} sets --output, which is <run_dir>/evaluation/{name}; take it out"
            )


def load_study(path: str | Path) -> Study:
    """Read a study.

    Raises:
        ValueError: unreadable file, malformed YAML, unknown key, wrong type, or a broken rule.
    """
    tree = read_yaml(path, f"study {path}", "base:, output:, ...")
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        lines = explain_validation(error, Study, "docs/studies.md")
        raise StudyError("\n".join(f"study {path}: {line}" for line in lines)) from None


def check_evaluations(study: Study) -> None:
    """Refuse arguments of evaluations that would be found wrong only once a run is trained."""
    of_branches = study.branches.evaluate if study.branches else {}
    every = {f"evaluate.{name}": arguments for name, arguments in study.evaluate.items()}
    every |= {f"branches.evaluate.{name}": arguments for name, arguments in of_branches.items()}
    for place, arguments in every.items():
        try:
            check_arguments(shlex.split(arguments))
        except ValueError as error:
            raise StudyError(f"{place}={arguments!r}: {error}") from error
