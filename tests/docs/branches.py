"""What tests of the pages on branches share: comparisons paired by document or sample, in the words of the pages."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from dash_megatron.studies.paired import Comparison, Measured, Ratio, compare
from docs.tools.branch_pictures import QUALITY

ROOT = QUALITY.parents[2]
TASKS = ("niah_single", "niah_multikey", "associative_recall")
Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """The rows of a table beside a page."""
    with path.open() as file:
        return list(csv.DictReader(file))


def losses(run: str, rows: Sequence[Row]) -> Measured:
    """Losses by document, of rows of whole documents or of their parts."""
    found: dict[tuple[str], tuple[float, float]] = {}
    for row in rows:
        loss, tokens = found.get((row["document"],), (0.0, 0.0))
        more = float(row["tokens"])
        found[(row["document"],)] = (loss + float(row[run]) * more, tokens + more)
    return found


def mean_loss(run: str, steps: tuple[int, int], rows: Sequence[Row]) -> float:
    """The mean training loss of logged steps, the first and the last among them."""
    return fmean(float(row[run]) for row in rows if steps[0] <= int(row["step"]) <= steps[1])


def scores(run: str, task: str, rows: Sequence[Row]) -> Measured:
    """Right answers by sample."""
    return {(row["sample"],): (float(row[run]), 1.0) for row in rows if row["task"] == task}


def read_words(path: Path) -> str:
    """A page with one space between words, so that a sentence is found across lines."""
    return " ".join(path.read_text().split())


def read_answers() -> str:
    """The words of the page on quality, and of that which has every figure of it."""
    return f"{read_words(QUALITY.parent / 'quality.md')} {read_words(QUALITY / 'evidence.md')}"


def read_pages(page: Path) -> list[str]:
    """The words of a study's page, of those on quality, of the recipe and of the README."""
    return [
        read_words(page),
        read_answers(),
        *(read_words(ROOT / path) for path in ("docs/recipe.md", "README.md")),
    ]


def compare_losses(arm: str, reference: str, orders: Sequence[int], rows: Sequence[Row]) -> Comparison:
    """Losses by document of an arm and its reference in these orders."""
    return compare_all(*({n: losses(f"{each}_order{n}", rows) for n in orders} for each in (arm, reference)))


def compare_scores(
    arm: str, reference: str, task: str, orders: Sequence[int], rows: Sequence[Row]
) -> Comparison:
    """Right answers by sample of an arm and its reference in these orders."""
    return compare_all(
        *({n: scores(f"{each}_order{n}", task, rows) for n in orders} for each in (arm, reference))
    )


def compare_all(arm: dict[int, Measured], reference: dict[int, Measured]) -> Comparison:
    """`compare`, where it finds something in common."""
    found = compare(arm, reference)
    assert found is not None
    return found


def below(arm: str, reference: str, orders: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """How many documents have a lower loss, by order."""
    pairs = [[losses(f"{each}_order{n}", rows) for each in (arm, reference)] for n in orders]
    return [sum(own[item] < other[item] for item in own) for own, other in pairs]


def without_one(arm: str, reference: str, orders: Sequence[int], rows: Sequence[Row]) -> str:
    """The difference to the reference, in percent, without the document that moves it most."""

    def difference(rows: Sequence[Row]) -> float:
        return sure(compare_losses(arm, reference, orders, rows).relative).value

    whole = difference(rows)
    names = {row["document"] for row in rows}
    rests = [difference([row for row in rows if row["document"] != name]) for name in names]
    return f"{100 * max(rests, key=lambda rest: abs(rest - whole)):+.2f}%"


def compare_training(
    arm: str, reference: str, orders: Sequence[int], steps: tuple[int, int], rows: Sequence[Row]
) -> Ratio:
    """Losses of training by logged step, from the first to the last of these."""
    logged = [row for row in rows if steps[0] <= int(row["step"]) <= steps[1]]
    both = ({n: {(x["step"],): (float(x[f"{each}_order{n}"]), 1.0) for x in logged} for n in orders} for each in (arm, reference))  # fmt: skip
    return sure(compare_all(*both).relative)


def places(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Ranges of positions that losses by document are split into."""
    return sorted({(int(row["from"]), int(row["to"])) for row in rows})


def rows_at(place: tuple[int, int] | None, rows: Sequence[Row]) -> tuple[str, list[Row]]:
    """The name of a range of positions in a page's table, "all" without one, and the rows that are in it."""
    found = [row for row in rows if place in (None, (int(row["from"]), int(row["to"])))]
    return f"{place[0]}-{place[1]}" if place else "all", found


def collected(study: str, arm: str, task: str = "documents", to: str = "") -> tuple[float, float]:
    """A share of full attention's answers or a difference of losses in percent, with its larger error, from `study collect`."""
    rows = read_rows(QUALITY / study / "comparisons.csv")
    row = next(x for x in rows if (x["arm"], x["task"], x["to"]) == (arm, task, to))
    value, error = float(row["relative"]), max(float(row[f"relative_error_{over}"] or 0) for over in ("items", "orders"))  # fmt: skip
    return (1 + value, error) if task in TASKS else (100 * value, 100 * error)


def sure(found: Ratio | None) -> Ratio:
    """A ratio that is there."""
    assert found is not None
    return found


def larger(found: Ratio) -> float:
    """The larger of the errors; over items where there is one order."""
    return max(found.error_items or 0, found.error_orders or 0)


def guess(guessed: float, least: float, most: float, found: float, form: str) -> str:
    """Cells of what was predicted, with its range, and of what was found, bold outside of it."""
    bold = "" if least <= found <= most else "**"
    return f"{guessed:{form}} ({least:{form}} to {most:{form}}) | {bold}{found:{form}}{bold} |"


def guess_share(guessed: float, found: float, samples: int) -> str:
    """Cells of a share of right answers that was predicted without a range, and found, bold from two standard errors on."""
    bold = "**" if abs(found - guessed) >= 2 * (guessed * (1 - guessed) / samples) ** 0.5 else ""
    return f"{guessed:.2f} | {bold}{found:.3f}{bold}"


def errors(found: Ratio, scale: int = 1, digits: int = 2) -> str:
    """Standard errors over items and over orders, each behind a ±."""
    both = (found.error_items, found.error_orders)
    return "".join(f" ± {scale * each:.{digits}f}" for each in both if each is not None)


def percent(found: Ratio | None) -> str:
    """A difference to the reference, in percent."""
    return f"{100 * sure(found).value:+.2f}{errors(sure(found), 100)}"


def share(found: Ratio | None, digits: int = 3) -> str:
    """A share of the reference."""
    return f"{1 + sure(found).value:.{digits}f}{errors(sure(found), digits=digits)}"


def predictions(found: Sequence[Ratio | None], predicted: Sequence[float]) -> list[str]:
    """Of a loss in percent and of shares: what was predicted and what was found, bold from two standard errors on."""
    cells = []
    for place, (ratio, guess) in enumerate(zip(found, predicted, strict=True)):
        assert ratio is not None
        value = 100 * ratio.value if place == 0 else 1 + ratio.value
        error = (100 if place == 0 else 1) * max(ratio.error_items or 0, ratio.error_orders or 0)
        text = f"{value:+.2f}" if place == 0 else f"{value:.3f}"
        bold = "**" if abs(value - guess) >= 2 * error else ""
        name = f"{guess:+.2f}" if place == 0 else f"{guess:.3f}".removesuffix("0")
        cells.append(f"{name}: {bold}{text}{bold}")
    return cells


def right_answers(
    rows: Sequence[Row], arm: str, orders: Sequence[int], task: str, nearest: int, furthest: int = 99
) -> tuple[int, int]:
    """Right answers of those that stand so many thousands of tokens back, and how many these are."""
    found = [
        int(row[f"{arm}_order{n}"])
        for row in rows
        if row["task"] == task
        and 1024 * nearest <= (1 - float(row["place"])) * int(row["tokens"]) < 1024 * furthest
        for n in orders
    ]
    return sum(found), len(found)
