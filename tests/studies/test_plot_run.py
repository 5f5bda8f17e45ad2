"""The picture of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dash_megatron.__main__ import main
from dash_megatron.studies import plot_run as module
from tests.tiny import tiny_tree


def write_metrics(folder: Path, density: list[float | None]) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(1, 6):
        mean = None if density[0] is None else 0.5
        lines.append({"step": step, "loss": 8.0 / step, "valid_loss": 5.0 / step if step % 2 else None})
        lines[-1].update(density=mean, density_per_layer=density)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("density", "panels"),
    [([0.4, 0.6], 2), ([None, None], 1), ([0.4, None], 2)],
    ids=["dash", "full", "mixed"],
)
def test_losses_and_density_of_layers_that_route_are_drawn(
    density: list[float | None], panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    close = module.plt.close
    monkeypatch.setattr(module.plt, "close", lambda figure: (drawn.append(figure), close(figure)))
    write_metrics(tmp_path, density)
    assert main(["study", "plot-run", str(tmp_path)]) == 0
    axes = drawn[0].axes
    assert len(axes) == panels
    assert list(axes[0].lines[0].get_ydata()) == [8.0, 4.0, 8 / 3, 2.0, 1.6]
    assert list(axes[0].lines[1].get_xdata()) == [1, 3, 5]
    # the last loss stands behind the end of its line, not on it
    (label,) = [text for text in axes[0].texts if text.get_text() == "1.00"]
    assert label.get_window_extent().x0 >= axes[0].get_window_extent().x1
    if panels == 2:
        assert [list(line.get_ydata()) for line in axes[1].lines] == [
            [100 * layer] * 5 for layer in density if layer is not None
        ]
    with Image.open(tmp_path / "training.png") as image:
        assert image.width >= 1000


def test_the_density_asked_for_is_drawn_beside_that_of_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(module, "save", lambda figure, path, dpi: drawn.append(figure) or path)
    tree = tiny_tree(tmp_path, tmp_path)
    tree["attention"]["target_density"] = {1: 0.9, 5: 0.5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    write_metrics(tmp_path, [0.4, 0.6])
    module.plot_run(tmp_path)
    target = drawn[0].axes[1].lines[-1]
    assert list(target.get_ydata()) == pytest.approx([90, 80, 70, 60, 50])
    assert target.get_label() == "target, 50%"


def test_the_entropy_of_the_data_is_drawn_for_a_layout_that_is_refused_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_tree(tmp_path, tmp_path)
    tree["attention"]["kind"] = "full"
    tree["parallel"] = {"context": 2, "context_comm": "p2p"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    write_metrics(tmp_path, [None, None])
    seen: list[list[str]] = []
    monkeypatch.setattr(module, "unigram_entropy", lambda paths: seen.append(list(paths)) or 1.0)
    module.plot_run(tmp_path)
    assert seen == [[str(tmp_path / "train")]]


def test_a_folder_without_metrics_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "plot-run", str(tmp_path)]) == 2
    assert f"{tmp_path}/metrics.jsonl does not exist" in capsys.readouterr().err


def test_a_full_disk_ends_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, [None, 3.0])
    (tmp_path / "training.png").symlink_to("/dev/full")
    assert main(["study", "plot-run", str(tmp_path)]) == 1
    assert "error: No space left on device" in capsys.readouterr().err
