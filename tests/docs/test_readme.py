"""The README's example prints what the README says, the recipe's commands can be given, and pages keep to their size."""

import io
import re
import shlex
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from dash_megatron.config import load_config

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RECIPE_COMMANDS = re.findall(r"^python train.py .*$", (ROOT / "docs" / "recipe.md").read_text(), re.MULTILINE)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)


def test_the_python_example_prints_what_stands_beside_it_and_is_sparse() -> None:
    blocks = PYTHON_BLOCK.findall(README.read_text())
    assert blocks
    for block in blocks:
        names: dict[str, Any] = {}
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block, str(README), "exec"), names)
        assert printed.getvalue().splitlines() == PRINTED.findall(block) != []
    assert float(names["routing"].density) < 0.5


def test_the_readme_has_at_most_110_lines() -> None:
    assert len(README.read_text().splitlines()) <= 110


def test_make_goes_on_with_tokens_where_a_call_ended_before_those_of_validation(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "corpus").mkdir(parents=True)
    for name in ("corpus/manifest.json", "tokenizer.model", "train.idx.json"):
        (data / name).touch()
    command = ["make", "--dry-run", "--directory", str(ROOT), f"RUN={tmp_path}", "quickstart"]

    def commands() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert "data_tools.tokenize_corpus" in commands()
    (data / "manifest.json").touch()
    assert "data_tools.tokenize_corpus" not in commands()


def test_prose_of_the_results_has_at_most_200_characters_a_line() -> None:
    long = [
        f"{page.name}:{number}"
        for page in sorted((ROOT / "docs" / "results").rglob("*.md"))
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > 200 and not line.startswith("|")
    ]
    assert long == []


def test_files_beside_the_pages_on_quality_have_at_most_100_kb() -> None:
    files = [path for path in (ROOT / "docs" / "results" / "quality").glob("*/**/*") if path.is_file()]
    assert files
    assert [path.name for path in files if path.stat().st_size > 100_000] == []


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_the_recipe_has_commands_of_a_base_and_what_goes_on_from_it(command: str) -> None:
    config_path, *overrides = shlex.split(command.removeprefix("python train.py --config "))
    config = load_config(ROOT / config_path, overrides)
    attention, base = config.attention, config.training.init_from
    if base is None:
        assert (attention.kind, config.data.seq_length, config.schedule.kind) == ("full", 2048, "constant")
        return
    assert (attention.kind, attention.density_budget, attention.learned_scaling) == ("dash", "model", 20)
    before = [x.split()[3] for x in RECIPE_COMMANDS if f"run_dir={base} " in x]
    assert before == [config_path]


FIGURE = re.compile(r"[-+]?\d+\.\d+ ± \d+\.\d+")


@pytest.mark.parametrize("name", ["README.md", "docs/results/quality.md"])
def test_figures_in_short_are_those_of_the_pages_of_quality(name: str) -> None:
    pages = sorted((ROOT / "docs" / "results" / "quality").glob("*.md"))
    every = " ".join(" ".join(path.read_text() for path in pages).replace("%", "").split())
    found = set(FIGURE.findall((ROOT / name).read_text().replace("%", "")))
    assert len(found) > 20
    assert sorted(figure for figure in found if figure not in every) == []
