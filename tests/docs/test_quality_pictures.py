"""The picture of the page on runs from random weights comes from its summary, and the page says what the fit in it finds."""

from pathlib import Path

from docs.tools.quality_pictures import KINDS, fit_knee, main, read_runs

PAGE = Path(__file__).parents[2] / "docs" / "results" / "quality" / "from_scratch.md"


def test_the_page_gives_the_fit_of_end_losses_to_knees() -> None:
    runs = read_runs()
    fit = fit_knee(runs)
    text = PAGE.read_text()
    assert f"{len(runs)} end losses" in text
    assert len({run.kind for run in runs}) == len(KINDS) == 9
    assert f"R² = {fit.explained:.2f}" in text
    assert f"ends {100 * fit.slope:.3f} ±" in text


def test_the_page_gives_the_end_losses_of_the_summary() -> None:
    text = PAGE.read_text()
    for run in read_runs():
        assert f"{run.losses[-1]:.3f}" in text


def test_the_picture_is_drawn_into_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    main(["--output", str(folder)])
    assert {path.name for path in folder.iterdir()} == {"quality_curves.png"}
    assert all(path.stat().st_size > 10_000 for path in folder.iterdir())
