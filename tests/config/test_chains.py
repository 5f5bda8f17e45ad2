"""Configs that go on from runs of others: the same model and attention, longer contexts as docs/recipe.md extends them."""

import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from dash_megatron.config import Config, load_config

ROOT = Path(__file__).parents[2]
SHIPPED = {path.stem: load_config(path) for path in sorted((ROOT / "configs").glob("*.yaml"))}


def recipe_runs() -> dict[str, Config]:
    """Configs of the recipe's commands, by the name of their run."""
    lines = (ROOT / "docs" / "recipe.md").read_text().splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("python train.py --config ")]
    runs = [load_config(ROOT / line[3], line[4:]) for line in words]
    return {Path(run.run_dir).name: run for run in runs}


def check_goes_on(config: Config, base: Config) -> None:
    """What `training.init_from` refuses, and what it cannot see."""
    assert config.training.init_from == base.run_dir
    unscaled = {"rope_scaling": None}
    assert config.model.model_copy(update=unscaled) == base.model.model_copy(update=unscaled)
    assert config.attention == base.attention
    assert config.data.tokenizer == base.data.tokenizer
    assert config.optimizer.lr < base.optimizer.lr


def check_extends(config: Config, base: Config) -> None:
    """YaRN from the length that was trained without it."""
    check_goes_on(config, base)
    assert config.data.seq_length > base.data.seq_length
    rope, before = config.model.rope_scaling, base.model.rope_scaling
    assert rope is not None
    assert rope.rope_type == "yarn"
    original = base.data.seq_length if before is None else before.original_max_position_embeddings
    assert rope.original_max_position_embeddings == original
    assert rope.factor == config.data.seq_length / original


def test_every_config_that_goes_on_from_anothers_run_is_known_here() -> None:
    names = {config.run_dir: name for name, config in SHIPPED.items()}
    starts = {name: config.training.init_from for name, config in SHIPPED.items()}
    assert {name: names.get(start, start) for name, start in starts.items() if start} == {
        "8b_128k": "8b_64k",
        "8b_512k": "8b_128k",
        "finetune_8b_16k": "8b_16k",
        "finetune_quickstart": "quickstart",
        "continued_1b_64k": "runs/weights/1b_dense",
    }


def test_the_8b_configs_extend_each_other_and_the_fine_tuned_one_goes_on_as_it_is() -> None:
    for base, name in pairwise(("8b_64k", "8b_128k", "8b_512k")):
        check_extends(SHIPPED[name], SHIPPED[base])
    check_goes_on(SHIPPED["finetune_8b_16k"], SHIPPED["8b_16k"])
    assert SHIPPED["finetune_8b_16k"].model == SHIPPED["8b_16k"].model


@pytest.mark.parametrize("size", ["60m", "1b"])
def test_the_recipes_commands_extend_what_they_go_on_from(size: str) -> None:
    runs = recipe_runs()
    check_extends(runs[f"{size}_64k"], runs[f"{size}_branch"])
