"""The runs of a study: every point, grid combination, budget, seed, twin and branch, as a config with a name."""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from dash_megatron.config import Config, config_from_dict
from dash_megatron.config.flops import parameter_count
from dash_megatron.config.loading import read_yaml, set_key
from dash_megatron.data.vocabulary import vocabulary_rows
from dash_megatron.evaluation.cli import check_arguments
from dash_megatron.planning.baseline_times import density_of_lists
from dash_megatron.planning.routing import AssumedRouting
from dash_megatron.studies.cost import Cost, curriculum_context, estimate_cost, flops_per_token, mean_context
from dash_megatron.studies.study_file import Branches, Budgets, Study, StudyError, settings_of_branches

_DENSITY = "assume.density"
_NOT_IN_NAMES = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    name: str
    """Its folder in the study's `runs`."""
    config: Config
    settings: dict[str, Any]
    """What sets it apart, as `section.key: value`."""
    variant: str
    """What it is called among runs of other sizes, budgets and seeds: its kind and settings outside `model`."""
    size: str
    """Its settings in `model`, or its point's name."""
    parameters: int
    budget: float | None
    """What `budgets` gives it, in tokens, FLOPs or tokens a parameter; None: `training.steps` says how long it trains."""
    tokens: int
    density: float
    """The density that is assumed; for infllmv2 and nsa that of their lists, for full attention 1."""
    context: float
    cost: Cost
    twin_of: list[str] = field(default_factory=list)
    base: str | None = None
    """The run that a branch goes on from; None for other runs. The `variant` of a branch is the name of its arm, and its order of the data
    is `training.seed`."""

    @property
    def folder(self) -> Path:
        """Its `run_dir`."""
        return Path(self.config.run_dir)


@dataclass(frozen=True)
class _Recipe:
    settings: dict[str, Any]
    budget: tuple[str, float] | None
    seed: int | None
    point: str | None
    of_point: frozenset[str]
    """Keys that the point sets."""
    varied: frozenset[str]
    """Keys of the grid that have several values."""
    tokens: float | None = None
    """Tokens of the run that a twin belongs to; None for other runs."""


def expand(study: Study) -> list[StudyRun]:
    """Every run, twins and branches behind the run they belong to; branches order by order.

    Raises:
        ValueError: a config that breaks a rule, a global batch that no number of processes divides, two runs that are the same,
            or a budget too small for one step.
    """
    tree = read_yaml(study.base, f"base={study.base}", "sections (model:, data:, ...)")
    runs: list[StudyRun] = []
    for recipe in _recipes(study):
        run = _make(study, tree, recipe)
        _add(runs, run)
        if study.branches:
            for branch in _branches(study, study.branches, tree, recipe, run):
                _add(runs, branch)
        for twin in study.twins:
            made = _twin(study, recipe, run, twin)
            try:
                _add(runs, _make(study, tree, made), twin_of=run.name)
            except ValueError as error:
                raise StudyError(f"twin {json.dumps(twin)} of {run.name}: {error}") from error
    return runs


def evaluations(study: Study, run: StudyRun) -> dict[str, str]:
    """Arguments of the evaluations of a run, by name."""
    return study.branches.evaluate if study.branches and run.base else study.evaluate


def check_samples(runs: Iterable[tuple[Study, StudyRun]]) -> None:
    """Refuse evaluations, such as of lengths too short for a task, that would be found wrong only once a run is trained.

    Those of data that is not made yet are left to the end of training, and told on standard error.
    """
    known = set()
    told = set()
    for study, run in runs:
        place, data = "branches.evaluate" if run.base else "evaluate", run.config.data
        for name, arguments in evaluations(study, run).items():
            facts = (arguments, data.tokenizer, data.valid, data.seq_length)
            if data.tokenizer is None or facts in known:
                continue
            known.add(facts)
            try:
                check_arguments(shlex.split(arguments), run.config)
            except FileNotFoundError as error:
                warning = f"warning: {place}.{name} needs what is not there yet: {error}"
                if warning not in told:
                    told.add(warning)
                    print(warning, file=sys.stderr, flush=True)
            except ValueError as error:
                raise StudyError(f"run {run.name}: {place}.{name}={arguments!r}: {error}") from error


def _twin(study: Study, recipe: _Recipe, run: StudyRun, twin: str | dict[str, Any]) -> _Recipe:
    settings = {"attention.kind": twin} if isinstance(twin, str) else dict(twin)
    kept = dict(recipe.settings)
    if settings.get("attention.kind") == "full":
        kept = {
            key: value for key, value in kept.items() if not key.startswith("attention.") and key != _DENSITY
        }
    # by dense FLOPs and by parameters, twins read the same tokens
    own_budget = study.budgets.flops and study.budgets.flops_counted == "assumed"
    tokens = None if own_budget else float(run.tokens)
    return replace(recipe, settings={**kept, **settings}, tokens=tokens)


def _branches(
    study: Study, branches: Branches, tree: dict[str, Any], recipe: _Recipe, base: StudyRun
) -> Iterator[StudyRun]:
    """The branches of a base, which are a study of their own: its points are the arms, its seeds an order."""
    of_base = {**study.overrides, **recipe.settings}
    apart = ("attention", "assume", "branches")
    shared = {key: value for key, value in of_base.items() if key.split(".")[0] not in apart}
    shared |= branches.overrides | settings_of_branches(of_base)
    own = study.model_copy(
        update={
            "overrides": {**shared, "training.init_from": str(base.folder)},
            "points": branches.arms,
            "grid": {},
            "budgets": Budgets(),
            "warmup": None,
        }
    )
    # order by order, so that there is something to compare as soon as the first is through
    for order in branches.orders:
        of_order = own.model_copy(update={"seeds": (order,)})
        for arm in _recipes(of_order):
            run = _make(of_order, {**tree, "attention": {}}, arm)
            name = f"{arm.point}_order{order}_from_{base.name}"
            _check_start(name, base, run)
            config = run.config.model_copy(update={"run_dir": str(base.folder.with_name(name))})
            variant = str(arm.point)
            yield replace(run, name=name, config=config, variant=variant, size=base.size, base=base.name)


def _check_start(name: str, base: StudyRun, branch: StudyRun) -> None:
    """Refuse a branch that has no place for what attention of its base learns, before the base is trained."""
    for layer in range(base.config.model.layers):
        kept = branch.config.attention.learned(layer)
        lost = [setting for setting in base.config.attention.learned(layer) if setting not in kept]
        if lost:
            raise StudyError(
                f"branch {name}: layer {layer} has no place for what its base learned with {', '.join(lost)}; set that in the "
                "arm too, with attention.full_layers as in the base; a base of kind full or infllmv2 can start every arm"
            )


def _recipes(study: Study) -> Iterator[_Recipe]:
    keys = list(study.grid)
    varied = frozenset(key for key, values in study.grid.items() if len(values) > 1)
    for point in study.points or ({},):
        settings = {key: value for key, value in point.items() if key != "name"}
        for values in product(*study.grid.values()):
            mixed = {**settings, **dict(zip(keys, values, strict=True))}
            for budget, seed in product(study.budgets.entries(), study.seeds or (None,)):
                yield _Recipe(mixed, budget, seed, point.get("name"), frozenset(settings), varied)


def _add(runs: list[StudyRun], run: StudyRun, twin_of: str | None = None) -> None:
    """Append a run; a dense twin that is there already gets one more run that it is twin of."""
    for other in runs:
        if _identity(other.config) == _identity(run.config):
            if twin_of and other.config.attention.kind == "full":
                if other.name != twin_of:
                    other.twin_of.append(twin_of)
                return
            raise StudyError(
                f"runs {other.name} and {run.name} are the same: {json.dumps(other.settings)} and "
                f"{json.dumps(run.settings)} give one config; take one of them out"
            )
        if other.name == run.name:
            raise StudyError(f"two different runs would be called {run.name}; give the points a `name` each")
    runs.append(replace(run, twin_of=[twin_of] if twin_of else []))


def _identity(config: Config) -> str:
    return config.model_copy(update={"run_dir": ""}).model_dump_json()


def _make(study: Study, base: dict[str, Any], recipe: _Recipe) -> StudyRun:
    tree, overrides = copy.deepcopy(base), study.overrides
    if recipe.settings.get("attention.kind") == "full":
        # what base and overrides say of selecting is nothing to a dense run
        tree["attention"] = {}
        overrides = {key: value for key, value in overrides.items() if not key.startswith("attention.")}
    for key, value in {**overrides, **recipe.settings}.items():
        if key != _DENSITY and not (study.branches and key.startswith("branches.")):
            set_key(tree, key, value, f"{key}={value!r}")
    if recipe.seed is not None:
        set_key(tree, "training.seed", recipe.seed, "seeds")
    tree["run_dir"] = "unnamed"
    if study.warmup is not None:
        # rules between steps and warm-up are checked once the budget has said how many steps there are
        set_key(tree, "schedule.warmup_steps", 0, "warmup")
    config = _rough_config(tree, recipe)
    facts = _facts(config)
    variant, size = _labels(config, recipe)
    name = _name(variant, size, recipe, config, bool(study.seeds))
    longest = context = study.assume.context or facts.context
    # a budget of FLOPs buys more steps of shorter contexts, which change the mean over all steps again
    for _ in range(10):
        density = _density(study, recipe, config, context)
        steps = _steps(study, recipe, config, facts, context, density, name)
        before, context = context, curriculum_context(config.data, steps, longest)
        if context == before:
            break
    set_key(tree, "training.steps", steps, "budgets")
    if study.warmup is not None:
        set_key(tree, "schedule.warmup_steps", round(study.warmup * steps), "warmup")
    tree["run_dir"] = str(Path(study.output) / "runs" / name)
    try:
        config = config_from_dict(tree)
        # on as few processes as can share the model: a batch that these do not divide is divided by no number of them
        config.accumulation_steps(config.parallel.tensor * config.parallel.context)
        cost = estimate_cost(config, facts.vocab_size, context, density, study.assume)
    except ValueError as error:
        raise StudyError(f"run {name}: {error}") from error
    tokens = steps * config.training.global_batch * config.data.seq_length
    own = {**recipe.settings, **({} if recipe.seed is None else {"training.seed": recipe.seed})}
    budget = recipe.budget and recipe.budget[1]
    return StudyRun(
        name, config, own, variant, size, facts.parameters, budget, tokens, density, context, cost
    )


def _rough_config(tree: dict[str, Any], recipe: _Recipe) -> Config:
    """The config but for the steps of a budget, which are not known yet: more than any curriculum has."""
    tree = copy.deepcopy(tree)
    if recipe.budget:
        set_key(tree, "training.steps", 10**9, "budgets")
    try:
        return config_from_dict(tree)
    except ValueError as error:
        where = recipe.point or json.dumps(recipe.settings)
        raise StudyError(f"{where}: {error}" if recipe.settings else str(error)) from error


@dataclass(frozen=True)
class _Facts:
    vocab_size: int
    parameters: int
    context: float


def _facts(config: Config) -> _Facts:
    vocab_size, data = vocabulary_rows(config), config.data
    context, _ = mean_context(data.train, data.seq_length, data.pack_documents)
    return _Facts(vocab_size, parameter_count(config, vocab_size), context)


def _density(study: Study, recipe: _Recipe, config: Config, context: float) -> float:
    if config.attention.kind == "full":
        return 1.0
    if config.attention.fixed_lists:
        return density_of_lists(config.attention, context)
    value = {**study.overrides, **recipe.settings}.get(_DENSITY, study.assume.density)
    if value is None:
        value = config.attention.final_density(config.model.layers) or AssumedRouting.density
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise StudyError(f"{_DENSITY}={value!r} must lie in (0, 1], such as 0.25")
    return float(value)


def _labels(config: Config, recipe: _Recipe) -> tuple[str, str]:
    """Variant and size, for people."""
    outside = {
        key: value
        for key, value in recipe.settings.items()
        if not key.startswith(("model.", "branches.")) and key not in (_DENSITY, "attention.kind")
    }
    inside = {key: value for key, value in recipe.settings.items() if key.startswith("model.")}
    size = recipe.point if recipe.point and inside else _words(inside)
    if recipe.point and inside:
        # a named size may have a learning rate of its own, say
        hidden = {key for key in recipe.of_point if not key.startswith("attention.")}
        outside = {key: value for key, value in outside.items() if key not in hidden}
    name: str = config.attention.kind
    if recipe.point and not inside:
        name = f"{recipe.point} ({name})"
        outside = {key: value for key, value in outside.items() if key in recipe.varied}
    return " ".join(part for part in (name, _words(outside)) if part), size


def _words(settings: dict[str, Any]) -> str:
    return " ".join(f"{key.split('.')[-1]}={_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    return json.dumps(value).strip('"').replace(" ", "")


def _name(variant: str, size: str, recipe: _Recipe, config: Config, seeded: bool) -> str:
    parts = [size, variant]
    if recipe.budget:
        kind, amount = recipe.budget
        unit = {"tokens_per_parameter": "tpp", "tokens": "tok", "flops": "flop"}[kind]
        parts.append(f"{amount:g}{unit}")
    if seeded:
        parts.append(f"seed{config.training.seed}")
    return "_".join(_NOT_IN_NAMES.sub("-", part).strip("-") for part in parts if part)


def _steps(
    study: Study, recipe: _Recipe, config: Config, facts: _Facts, context: float, density: float, name: str
) -> int:
    """Optimizer steps of a budget, to the nearest."""
    if recipe.budget is None:
        return config.training.steps
    kind, amount = recipe.budget
    if recipe.tokens is not None:
        tokens = recipe.tokens
    elif kind == "tokens_per_parameter":
        tokens = amount * facts.parameters
    elif kind == "tokens":
        tokens = amount
    else:
        sparse, dense = flops_per_token(config, facts.vocab_size, context, density)
        tokens = amount / (dense if study.budgets.flops_counted == "dense" else sparse)
    per_step = config.training.global_batch * config.data.seq_length
    steps = round(tokens / per_step)
    if steps < 1:
        raise StudyError(
            f"run {name}: budgets.{kind}={amount:g} is {tokens:,.0f} tokens and a step reads {per_step:,} "
            f"(training.global_batch={config.training.global_batch} x data.seq_length={config.data.seq_length}), which "
            "gives no step; raise the budget or lower the batch"
        )
    return steps
