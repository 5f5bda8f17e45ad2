"""Pictures that can be read: lengths as numbers, scores on any color."""

from typing import Any

import matplotlib.pyplot as plt
import pytest

from dash_megatron.evaluation import pictures


def labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_xticklabels()]


def test_lengths_stand_as_numbers_where_they_were_measured() -> None:
    by_length = {str(length): {"score": 0.5} for length in (768, 1024, 16384)}
    figure = pictures._scores({"copy": by_length}, trained_length=1024)
    assert labels(figure.axes[0]) == ["768", "1,024", "16,384"]
    ends = {"768": (64, 768), "1024": (64, 1024)}
    found = {
        length: {"nll": 2.0, "perplexity": 7.4, "buckets": [{"to": end, "nll": 2.0} for end in each]}
        for length, each in ends.items()
    }
    assert labels(pictures._perplexity(found).axes[0]) == ["64", "768", "1,024"]
    plt.close("all")


def test_losses_of_answers_stand_beside_their_scores() -> None:
    read = {"copy": {"64": {"score": 0.0, "nll": 3.0}, "128": {"score": 0.0, "nll": 4.0}}}
    scores, losses = pictures._scores(read, trained_length=64).axes
    assert list(scores.lines[0].get_ydata()) == [0.0, 0.0]
    assert list(losses.lines[0].get_ydata()) == [3.0, 4.0]
    written = {"copy": {"64": {"score": 0.0, "nll": None}}}
    assert len(pictures._scores(written, trained_length=64).axes) == 1
    plt.close("all")


def test_lines_at_the_same_values_all_show() -> None:
    length = {"nll": 2.0, "perplexity": 7.4, "buckets": [{"to": 64, "nll": 2.0}, {"to": 128, "nll": 1.0}]}
    zero = {"64": {"score": 0.0, "nll": 3.0}, "128": {"score": 0.0, "nll": 3.0}}
    for figure in (
        pictures._perplexity({"128": length, "256": length}),
        pictures._scores({"copy": zero, "needle": zero}, trained_length=64),
    ):
        below, above = [
            line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() in "os"
        ][:2]
        assert below.get_linewidth() > above.get_linewidth()
        assert below.get_markersize() > above.get_markersize()
    plt.close("all")


@pytest.mark.parametrize("score", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_scores_stand_out_from_their_field(score: float) -> None:
    figure = pictures._needle({"1024": {"depths": {"0.000": {"score": score}}}})
    axis = figure.axes[0]
    field = axis.images[0].cmap(score)
    ink = {"white": 1.0, "black": 0.0}[axis.texts[0].get_color()]
    brightness = 0.2126 * field[0] + 0.7152 * field[1] + 0.0722 * field[2]
    assert abs(ink - brightness) > 0.4
    plt.close("all")
