"""What tests of the pages on branches share: comparisons paired by document or sample, in the words of the pages."""

from pathlib import Path

from dash_megatron.studies.paired import Comparison, Measured, Ratio, compare
from docs.tools.branch_pictures import QUALITY

ROOT = QUALITY.parents[2]


def read_words(path: Path) -> str:
    """A page with one space between words, so that a sentence is found across lines."""
    return " ".join(path.read_text().split())


def compare_all(arm: dict[int, Measured], reference: dict[int, Measured]) -> Comparison:
    """`compare`, where it finds something in common."""
    found = compare(arm, reference)
    assert found is not None
    return found


def errors(found: Ratio, scale: int = 1, digits: int = 2) -> str:
    """Standard errors over items and over orders, each behind a ±."""
    both = (found.error_items, found.error_orders)
    return "".join(f" ± {scale * each:.{digits}f}" for each in both if each is not None)


def percent(found: Ratio | None) -> str:
    """A difference to the reference, in percent."""
    assert found is not None
    return f"{100 * found.value:+.2f}{errors(found, 100)}"


def share(found: Ratio | None, digits: int = 3) -> str:
    """A share of the reference."""
    assert found is not None
    return f"{1 + found.value:.{digits}f}{errors(found, digits=digits)}"
