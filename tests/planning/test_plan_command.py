"""`python -m dash_megatron plan`, and the page of its numbers."""

import json
from pathlib import Path

import pytest

from dash_megatron.__main__ import main
from dash_megatron.planning.report import fill_in, sparse_ratio

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "8b_128k.yaml")


def test_the_table_lists_layouts_by_speed_and_the_configs_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", CONFIG, "--gpus", "64", "--top", "3", "--density", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "131,072 tokens x 64 sequences = 8,388,608 tokens a step, density 10%" in lines[0]
    assert lines[2].split()[:3] == ["tensor", "context", "data"]
    speeds = [float(line.split()[-2].replace(",", "")) for line in lines[3:6]]
    assert speeds == sorted(speeds, reverse=True)
    assert "the config's own layout:" in lines


def test_json_holds_memory_bytes_time_and_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "--config",
        CONFIG,
        "--gpus",
        "128",
        "--json",
        "--top",
        "2",
        "training.recompute=full",
    ]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["layouts"]) == 2
    assert document["configured"]["recompute"] == "full"
    best = document["layouts"][0]
    assert best["fits"]
    assert best["seconds"] == pytest.approx(sum(best["seconds_parts"].values()))
    assert best["tokens_per_second_per_gpu"] == pytest.approx(64 * 131072 / best["seconds"] / 128)
    assert best["memory_gib"] == pytest.approx(sum(best["memory_parts_gib"].values()))
    longest = max(best["seconds_parts"], key=best["seconds_parts"].get)
    assert best["bound"].startswith(longest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "64", "--density", "0"], "density=0.0 must be above 0"),
        (["--gpus", "0"], "gpus=0 must be at least 1"),
        (["--gpus", "1"], "nothing fits"),
        (["--gpus", "7"], "no tensor x context x data split"),
        (["--gpus", "64", "--top", "0"], "top=0 must be at least 1"),
        (["--gpus", "64", "model.vocab_size=null"], "model.vocab_size is null"),
        (["--gpus", "64", "model.layer=3"], "did you mean model.layers?"),
    ],
)
def test_wrong_arguments_are_one_line_that_says_what_to_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", CONFIG, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_layout_that_does_not_divide_is_named_beside_the_found_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--config", CONFIG, "--gpus", "4", "--density", "0.1", "--peak-density", "0.1"]) == 0
    assert "does not run on 4 GPUs: parallel.tensor=1 x parallel.context=8 = 8" in capsys.readouterr().out


def test_the_quick_tables_of_the_page_are_current() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    names = ("kernels", "exchanges", "balance")
    assert fill_in(page, names) == page, "run `python -m dash_megatron.planning.report --output docs/`"
    with pytest.raises(ValueError, match="begin kernels"):
        fill_in("", ["kernels"])


def test_sparse_saves_nothing_without_locality() -> None:
    assert sparse_ratio(0.1, 0.0) == pytest.approx(1.0, abs=0.01)
    assert sparse_ratio(0.02, 0.98) < 0.3
