"""Pictures are set up in one place, and look alike."""

from pathlib import Path

from PIL import Image

from dash_megatron import drawing

ROOT = Path(__file__).parents[1]


def test_only_one_module_sets_up_matplotlib() -> None:
    folders = ("dash_megatron", "benchmarks", "data_tools", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = [path.name for path in files if "pyplot" in path.read_text() or ".use(" in path.read_text()]
    assert found == ["drawing.py"]


def test_every_line_of_a_picture_has_a_style_of_its_own() -> None:
    styles = [drawing.line_style(index) for index in range(49)]
    assert len(set(styles)) == 49
    assert len({color for color, _ in styles[:7]}) == len({marker for _, marker in styles[:7]}) == 7


def test_an_axis_of_values_that_differ_little_is_labelled_with_the_values() -> None:
    figure, axis = drawing.plt.subplots()
    axis.plot([1, 2], [4.25001, 4.25003])
    figure.canvas.draw()
    labels = [label.get_text() for label in axis.get_yticklabels()]
    drawing.plt.close(figure)
    assert all(label.startswith("4.25") for label in labels), labels


def test_a_saved_figure_is_a_file_and_forgotten(tmp_path: Path) -> None:
    figure, axis = drawing.plt.subplots(figsize=(4, 3))
    drawing.tokens_axis(axis, [64, 1024])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["64", "1,024"]
    path = drawing.save(figure, tmp_path / "picture.png", dpi=100)
    with Image.open(path) as image:
        assert image.size == (400, 300)
    assert not drawing.plt.fignum_exists(figure.number)
