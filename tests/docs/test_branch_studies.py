"""The pages of studies made by `study submit` against what `study collect` wrote, and the study files that made them."""

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest

from dash_megatron.studies.runs import expand
from dash_megatron.studies.study_file import load_study
from docs.tools.branch_pictures import QUALITY


@dataclass(frozen=True)
class Page:
    """A study's page and files, and the arm that its tables compare with a reference, full attention."""

    study: str
    """Folder of the files; the page has its name, or that of the folder it is in."""
    arm: str
    reference: str = "full"

    @property
    def text(self) -> str:
        """The page without its line breaks."""
        return " ".join((QUALITY / f"{self.study.partition('/')[0]}.md").read_text().split())

    def read(self, name: str) -> list[dict[str, str]]:
        with (QUALITY / self.study / name).open() as file:
            return list(csv.DictReader(file))

    @property
    def comparisons(self) -> list[dict[str, str]]:
        return [row for row in self.read("comparisons.csv") if row["arm"] == self.arm]


PAGES = [
    Page("branches_210m", "dash_25"), Page("branches_projections", "own"),
    Page("branches_second_base", "own"), Page("branches_second_base", "own11"),
    Page("branches_longer/long", "own"), Page("branches_longer/210m", "own"),
    Page("branches_longer/others", "nsa"), Page("branches_longer/others", "infllmv2"),
    Page("branches_needles/orders", "own"), Page("branches_needles/orders", "infllmv2_25"),
    Page("branches_needles/ret10", "ret10", "full_ret10"),
    Page("branches_ten/62m", "ret10", "full_ret10"), Page("branches_ten/nsa", "nsa_25", "full_ret10"),
    Page("branches_ten/210m", "own"),
    Page("branches_fifth_base/dense", "ret10", "full_ret10"),
    Page("branches_fifth_base/dense", "dash_11", "full_ret10"),
    Page("branches_fifth_base/nsa", "nsa_25", "full_ret10"),
]  # fmt: skip
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.study}-{page.arm}")


def _errors(row: dict[str, str], scale: int = 1, of: str = "relative") -> str:
    """Over items and over orders; with one order there is none over these."""
    found = (row[f"{of}_error_{over}"] for over in ("items", "orders"))
    return "".join(f" ± {scale * float(error):.2f}" for error in found if error)


def _percent(row: dict[str, str], of: str = "relative") -> str:
    return f"{100 * float(row[of]):+.2f}{_errors(row, 100, of)}"


def _line(row: dict[str, str]) -> str:
    values = [f"{float(row[name]):.4f}" for name in ("reference_value", "value")]
    if row["task"] == "documents":
        name = f"{row['from']}-{row['to']}" if row["to"] else "all"
        difference = _percent(row)
    else:
        name, difference = (
            f"{row['task']}, {row['length']}",
            f"{1 + float(row['relative']):.2f}" + _errors(row),
        )
    # one order says nothing of the next
    beyond = {"unknown": [], "within": ["no"]}.get(row["verdict"], ["yes"])
    return f"| {' | '.join([name, *values, difference, *beyond])} |"


def _of(kind: str, rows: list[dict[str, str]], name: str) -> float:
    return fmean(float(row[name]) for row in rows if row["run"].startswith(f"{kind}_order"))


@each_page
def test_tables_are_what_was_collected(page: Page) -> None:
    lines = {_line(row) for row in page.comparisons if row["evaluation"] != "training"}
    assert len(lines) > 10
    assert not {line for line in lines if line not in page.text}


@each_page
def test_the_text_has_the_figures_of_the_files(page: Page) -> None:
    training = next(row for row in page.comparisons if row["task"] == "loss")
    assert f"{_percent(training)}%" in page.text
    whole = next(row for row in page.comparisons if row["task"] == "documents" and not row["to"])
    assert f"the median document stands at {_percent(whole, 'median')}%" in page.text
    answers = [row for row in page.read("answers.csv") if row["length"] == "16384"]
    for kind in (page.reference, page.arm):
        of_kind = [row for row in answers if row["run"].startswith(f"{kind}_order")]
        assert len(of_kind) == 3 * len(whole["orders"].split())
        assert f"{_of(kind, answers, 'nats'):.2f}" in page.text


@each_page
def test_the_study_file_makes_the_runs_of_the_page(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    names = {run.name for run in expand(load_study(QUALITY / page.study / "study.yaml"))}
    assert names == {row["run"] for row in page.read("results.csv")}


def test_speed_and_memory_of_210m() -> None:
    page = PAGES[0]
    runs = page.read("results.csv")
    full, dash = (_of(kind, runs, "tokens_per_second") for kind in ("full", page.arm))
    assert f"{dash / full:.2f} times as fast ({dash / 1000:.1f}K against {full / 1000:.1f}K" in page.text
    for kind in ("full", page.arm):
        assert f"{_of(kind, runs, 'gpu_memory_gib'):.1f}" in page.text


def test_what_projections_of_the_router_change() -> None:
    page = PAGES[1]
    recipe = [row for row in page.read("comparisons.csv") if row["arm"] == "recipe"]
    whole = next(row for row in recipe if row["task"] == "documents" and not row["to"])
    assert f"{_percent(whole)}% above (two orders)" in page.text
    assert f"{_percent(next(row for row in recipe if row['task'] == 'loss'))}% (three orders)" in page.text
    runs = page.read("results.csv")
    sizes = [_of(kind, runs, "parameters") / 1e6 for kind in ("own", "full")]
    assert f"{sizes[0]:.1f}M parameters instead of {sizes[1]:.1f}M" in page.text
    work = _of("own", runs, "flops") / _of("recipe", runs, "flops")
    assert f"{work - 1:.1%} more floating-point operations" in page.text
