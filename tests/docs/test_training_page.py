"""The tables of docs/results/training.md have the figures of the two files beside it."""

import csv
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGE = (RESULTS / "training.md").read_text()


def rows(name: str) -> dict[str, dict[str, str]]:
    """The lines of a file by the name of their step."""
    with (RESULTS / name).open() as file:
        return {row["step"]: row for row in csv.DictReader(file)}


STEPS, LAYOUTS = rows("training_steps.csv"), rows("training_layouts.csv")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_one_gpu_stands_beside_full_attention(name: str) -> None:
    if name in ("62M full 4x16K as code", "62M full 4x16K rows again"):
        assert f"{float(STEPS[name]['seconds']):.4f}".rstrip("0") + " s" in PAGE
        return
    model = "1B" if name.startswith("torchtitan") else name.split()[0]
    base = next(
        f"{model} full {rows}"
        for rows in ("4x16K rows", "1x64K", "packed", "16K", "64K")
        if rows.split()[0] in name and f"{model} full {rows}" in STEPS
    )
    row, full = STEPS[name], STEPS[base]
    speed = float(full["seconds"]) / float(row["seconds"])
    seconds = f"{float(row['seconds']):.4f}".rstrip("0")
    assert f"| {seconds} | {int(row['tokens_per_second']):,} | {speed:.2f} |" in PAGE


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_stands_beside_one_gpu(name: str) -> None:
    row = LAYOUTS[name]
    speed, seconds = int(row["tokens_per_second_per_gpu"]), float(row["seconds"])
    if name.startswith("8B"):
        assert f"| {speed:,} | {float(row['mfu']):.0%} | {seconds:.3f} |" in PAGE
    elif name.endswith("alone"):
        assert f"as alone ({seconds} s)" in PAGE
    else:
        one = LAYOUTS["one GPU full" if "full" in name else "one GPU"]
        share = speed / int(one["tokens_per_second_per_gpu"])
        assert f"| {speed:,} | {share:.1%} | {seconds:.3f} | {row['peak_gib']} |" in PAGE
