"""What is made of the metrics of a study: fits, pictures and a page."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from dash_megatron import drawing
from dash_megatron.__main__ import main
from dash_megatron.studies import pictures
from dash_megatron.studies.collect import collect, write_table
from dash_megatron.studies.fit import fit_compute, fit_parametric, fit_study, frontier
from dash_megatron.studies.study_file import load_study
from tests.studies.study_runs import SIZES, Write, finish, law, runs_of


def test_the_law_that_made_the_losses_is_found_within_its_intervals() -> None:
    sizes, ratios = np.meshgrid(np.geomspace(1e7, 1e9, 5), [5, 20, 80])
    parameters, tokens = sizes.ravel(), (sizes * ratios).ravel()
    noise = np.exp(np.random.default_rng(1).normal(0, 1e-3, parameters.shape))
    fit = fit_parametric(parameters, tokens, law(parameters, tokens) * noise, draws=60)
    assert fit.values["a"] == pytest.approx(0.34, abs=0.05)
    assert fit.values["b"] == pytest.approx(0.28, abs=0.05)
    for name, truth in {"E": 1.7, "a": 0.34, "b": 0.28, "optimal": 0.28 / 0.62}.items():
        low, high = fit.intervals[name]
        assert low < truth < high, name
        assert high - low < 1.0
    exact = fit_parametric(parameters, tokens, law(parameters, tokens), draws=4)
    expected = {"E": 1.7, "A": 400, "a": 0.34, "B": 410, "b": 0.28, "optimal": 0.28 / 0.62}
    assert exact.values == pytest.approx(expected, rel=0.02)


def test_one_failed_run_does_not_move_the_exponents() -> None:
    sizes, ratios = np.meshgrid(np.geomspace(1e7, 1e9, 6), [5, 20, 80])
    parameters, tokens = sizes.ravel(), (sizes * ratios).ravel()
    loss = law(parameters, tokens)
    loss[4] *= 1.2
    assert fit_parametric(parameters, tokens, loss, draws=2).values["a"] == pytest.approx(0.34, abs=0.03)


def test_no_law_is_fitted_to_a_loss_that_is_not_finite_and_its_run_is_named() -> None:
    row = {"finished": True, "variant": "dash", "flops": 1e9, "parameters": 1e5, "tokens": 1e6}
    rows = [{**row, "run": f"run{i}", "valid_loss": 3.0 if i else float("nan")} for i in range(9)]
    (fits,) = fit_study(rows)["variants"].values()
    for fit in fits.values():
        assert fit["refused"].startswith("run0: validation loss is not finite; take them out")


def test_loss_against_compute_is_fitted_to_the_frontier() -> None:
    flops = np.geomspace(1e17, 1e21, 9)
    loss = 1.5 + 900 * flops**-0.15
    worse = np.concatenate([loss, loss + 0.3])
    assert frontier(np.tile(flops, 2), worse) == list(range(9))
    fit = fit_compute(np.tile(flops, 2), worse, draws=20)
    assert (fit.values["E"], fit.values["c"]) == (pytest.approx(1.5, rel=0.01), pytest.approx(0.15, rel=0.01))


@pytest.mark.parametrize(
    ("parameters", "tokens", "message"),
    [
        (np.geomspace(1e6, 1e7, 4), np.array([1e7, 2e7, 3e7, 4e7]), "4 runs are too few"),
        (np.tile([1e6, 2e6], 4), np.geomspace(1e7, 1e8, 8), "2 distinct parameter counts"),
        (np.geomspace(1e6, 1e8, 8), 20 * np.geomspace(1e6, 1e8, 8), "tokens go with parameters in every run"),
    ],
    ids=["runs", "sizes", "one-ratio"],
)
def test_a_fit_that_the_runs_cannot_carry_is_refused(parameters: Any, tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_parametric(parameters, tokens, law(parameters, tokens))


# tells in the title how wide pictures came out, what went wrong, and what the page asked the network for or was forbidden to
PROBE = """<script>
const asked = [], errors = [];
addEventListener('securitypolicyviolation', event => asked.push(event.blockedURI));
addEventListener('error', event => errors.push(event.message || event.target.outerHTML.slice(0, 80)), true);
addEventListener('load', () => {
  asked.push(...performance.getEntriesByType('resource').map(entry => entry.name));
  const widths = [...document.images].map(image => image.complete ? image.naturalWidth : 0);
  document.title = JSON.stringify({asked, errors, widths});
});
</script>"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
BLUE = (0, 0x72, 0xB2)
"""Of the first variant in every picture; nothing else on the page is blue."""


def test_speed_is_joined_over_context_lengths_of_one_kind(
    write_study: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(grid={"data.seq_length": [128, 256]}, twins=["full"])
    for run in runs_of(path):
        finish(run, 3.0, None if run.config.attention.kind == "full" else 0.4)
    drawn: dict[str, list[Any]] = {}
    monkeypatch.setattr(
        pictures,
        "_save",
        lambda figure, path, title: drawn.update(
            {path.name: [(line.get_label(), list(line.get_xdata())) for line in figure.axes[0].lines]}
        ),
    )
    study = load_study(path)
    pictures.draw_study(study, collect(study), {"variants": {}}, path.parent)
    assert drawn["throughput.png"] == [("dash", [128, 256]), ("full", [128, 256])]


def test_scores_and_losses_of_evaluations_are_read_once(
    write_study: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study()
    (run,) = runs_of(path)
    finish(run, 3.0, 0.4)
    read = Mock(wraps=pictures.read_scores)
    monkeypatch.setattr(pictures, "read_scores", read)
    study = load_study(path)
    drawn = pictures.draw_study(study, collect(study), {"variants": {}}, path.parent)
    assert {"scores.png", "losses.png"} <= drawn.keys()
    read.assert_called_once_with(run.folder)


@pytest.mark.parametrize("name", ["scores.png", "losses.png", "position.png"])
def test_ticks_are_the_lengths_and_positions_that_were_measured(
    write_study: Write, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_study()
    (run,) = runs_of(path)
    finish(run, 3.0, 0.4)
    told: dict[str, list[str]] = {}

    def read_ticks(figure: Any, path: Path, *_: object) -> None:
        told[path.name] = [label.get_text() for label in figure.axes[0].get_xticklabels()]

    monkeypatch.setattr(pictures, "save", read_ticks)
    monkeypatch.setattr(drawing, "save", read_ticks)
    study = load_study(path)
    pictures.draw_study(study, collect(study), {"variants": {}}, path.parent)
    pictures.plt.close("all")
    assert told[name] == ["64", "128"]


def test_losses_over_training_are_a_line_for_each_seed_of_the_largest_runs(
    write_study: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(points=SIZES, seeds=[1, 2])
    for index, run in enumerate(runs_of(path)):
        finish(run, 3.0 + index, 0.4)
    lines: dict[str, Any] = {}
    monkeypatch.setattr(
        pictures, "_save", lambda figure, path, title: lines.update({path.name: figure.axes[0].lines})
    )
    study = load_study(path)
    pictures.draw_study(study, collect(study), {"variants": {}}, path.parent)
    largest = max(run.parameters for run in runs_of(path))
    expected = [
        (3.0 + index, run.tokens) for index, run in enumerate(runs_of(path)) if run.parameters == largest
    ]
    drawn = [(line.get_ydata()[-1], line.get_xdata()[-1]) for line in lines["curves.png"]]
    assert drawn == expected
    assert len(drawn) == 2


@pytest.mark.parametrize("counted", ["dense", "assumed"])
def test_runs_of_equal_flops_are_drawn_though_smaller_ones_read_more_tokens(
    write_study: Write, monkeypatch: pytest.MonkeyPatch, counted: str
) -> None:
    budgets = {"flops": [2e10, 4e10], "flops_counted": counted}
    path = write_study(points=SIZES[:2], twins=["full"], budgets=budgets, assume={"density": 0.4})
    for run in runs_of(path):
        finish(run, 3.0, None if run.config.attention.kind == "full" else 0.4)
    lines: dict[str, Any] = {}
    monkeypatch.setattr(
        pictures, "_save", lambda figure, path, title: lines.update({path.name: figure.axes[0].lines})
    )
    study = load_study(path)
    rows = collect(study)
    drawn = pictures.draw_study(study, rows, {"variants": {}}, path.parent)
    pictures.plt.close("all")
    longest = [row["tokens"] for row in rows if row["size"] == "h64" and row["budget"] == 4e10]
    assert max(longest) < max(row["tokens"] for row in rows if row["size"] == "h32")
    curves = lines["curves.png"]
    assert [line.get_label() for line in curves] == ["dash", "full"]
    assert [line.get_xdata()[-1] for line in curves] == longest
    assert {"position.png", "scores.png", "losses.png"} <= drawn.keys()


@pytest.mark.parametrize("factors", [[1.0, 1.1], [1.0, 2.2], [1.0, 10.0], [1.0, 3000.0]], ids=str)
def test_no_two_ticks_of_compute_read_the_same(
    write_study: Write, monkeypatch: pytest.MonkeyPatch, factors: list[float]
) -> None:
    path = write_study(budgets={"tokens": [1e6 * factor for factor in factors]}, twins=["full"])
    for run in runs_of(path):
        finish(run, 3.0, None if run.config.attention.kind == "full" else 0.4)
    told: dict[str, list[str]] = {}

    def read_ticks(figure: Any, path: Path, title: str) -> None:
        figure.canvas.draw()
        low, high = figure.axes[0].get_xlim()
        ticks = figure.axes[0].xaxis.get_major_ticks()
        told[path.name] = [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high]

    monkeypatch.setattr(pictures, "_save", read_ticks)
    study = load_study(path)
    pictures.draw_study(study, collect(study), {"variants": {}}, path.parent)
    pictures.plt.close("all")
    ticks = told["loss_compute.png"]
    assert len(set(ticks)) == len(ticks) > 1


def test_densities_are_joined_at_means_over_seeds_not_at_the_luckiest(
    write_study: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(twins=["full"], seeds=[1, 2])
    of_seed = {"dash": iter([(3.2, 0.25), (3.0, 0.375)]), "full": iter([(3.0, None), (2.9, None)])}
    for run in runs_of(path):
        finish(run, *next(of_seed[run.config.attention.kind]))
    lines: dict[str, Any] = {}
    monkeypatch.setattr(
        pictures, "_save", lambda figure, path, title: lines.update({path.name: figure.axes[0].lines})
    )
    study = load_study(path)
    pictures.draw_study(study, collect(study), {"variants": {}}, path.parent)
    pictures.plt.close("all")
    (line,) = lines["pareto.png"]
    assert list(line.get_xdata()) == [31.25, 100.0]
    assert line.get_ydata() == pytest.approx([3.1, 2.95])


def test_a_step_without_a_finite_loss_counts_in_no_mean(
    write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study()
    run = runs_of(path)[0]
    finish(run, 3.0, 0.4)
    file = run.folder / "metrics.jsonl"
    *_, last = lines = [json.loads(line) for line in file.read_text().splitlines()]
    before = last | {"step": last["step"] - 1, "loss": None}
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], before, last]))
    (row,) = collect(load_study(path))
    assert row["loss"] == last["loss"]
    file.write_text(json.dumps(before) + "\n")
    rows = collect(load_study(path))
    assert math.isnan(rows[0]["loss"])
    assert '"loss": null' in write_table(load_study(path), rows)[0].read_text()
    assert main(["study", "collect", str(path), "--json"]) == 0
    assert '"loss": null' in capsys.readouterr().out


def test_a_last_validation_that_is_not_finite_is_not_replaced_by_the_one_before(
    write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(twins=["full"])
    for run in runs_of(path):
        finish(run, 3.0, None if run.config.attention.kind == "full" else 0.4)
    file = runs_of(path)[0].folder / "metrics.jsonl"
    *lines, last = [json.loads(line) for line in file.read_text().splitlines()]
    last |= {
        "valid_loss": None,
        "valid_loss_by_position": [{**x, "loss": None} for x in last["valid_loss_by_position"]],
    }
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, last]))
    diverged, full = collect(load_study(path))
    assert (math.isnan(diverged["valid_loss"]), full["valid_loss"]) == (True, 3.0)
    assert main(["study", "report", str(path)]) == 0
    assert "dash: validation loss is not finite" in (path.parent / "out" / "report.html").read_text()


def test_losses_over_training_are_those_of_training_where_validations_are_no_curve(
    write_study: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(twins=["full"])
    for run in runs_of(path):
        finish(run, 3.0, None if run.config.attention.kind == "full" else 0.4)
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines[:-2]:
            line["valid_loss"] = None
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures: dict[str, tuple[Any, str]] = {}
    monkeypatch.setattr(
        pictures, "_save", lambda figure, path, title: figures.update({path.name: (figure, title)})
    )
    study = load_study(path)
    pictures.draw_study(study, collect(study), {"variants": {}}, path.parent)
    figure, title = figures["curves.png"]
    assert title == "Training loss over training"
    first, second = figure.axes[0].lines
    assert len(first.get_xdata()) == 10
    # the two runs have the same losses: the second line is thinner, so that the first shows at its sides
    assert list(first.get_ydata()) == list(second.get_ydata())
    assert first.get_linewidth() >= 2 * second.get_linewidth()
    assert all(title for _, title in figures.values())


@pytest.fixture
def finished_study(write_study: Write) -> Path:
    path = write_study(points=SIZES, twins=["full"], budgets={"tokens": [51200, 102400, 204800]})
    for run in runs_of(path):
        dense = run.config.attention.kind == "full"
        finish(run, law(run.parameters, run.tokens), None if dense else 0.4)
    return path


def test_flops_of_a_run_are_those_of_its_measured_density(finished_study: Path) -> None:
    run = runs_of(finished_study)[0]
    row = collect(load_study(finished_study))[0]
    expected = run.cost.flops + (run.cost.dense_flops - run.cost.flops) * (0.4 - run.density) / (
        1 - run.density
    )
    assert row["flops"] == pytest.approx(expected, rel=0.02)
    assert row["dense_flops"] == pytest.approx(run.cost.dense_flops)


def test_fit_plot_and_report_of_a_study_whose_runs_follow_a_law(
    finished_study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("collect", "fit", "plot", "report"):
        assert main(["study", command, str(finished_study)]) == 0, capsys.readouterr().err
    out = finished_study.parent / "out"
    fits = json.loads((out / "fits.json").read_text())["variants"]
    assert set(fits) == {"dash", "full"}
    assert fits["dash"]["parameters and tokens"]["values"]["a"] == pytest.approx(0.34, abs=0.02)
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 24
    page = (out / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    pngs = sorted(path.name for path in (out / "plots").glob("*.png"))
    names = ("curves", "density", "loss_compute", "losses", "pareto", "position", "scores", "throughput")
    assert pngs == [f"{name}.png" for name in names]
    assert {base64.b64decode(image) for image in images} == {
        (out / "plots" / name).read_bytes() for name in pngs
    }
    assert "lines are fits to each frontier" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('alt="') == len(images) == 8
    assert "Losses of text by the most tokens of it" in page
    # the router's parameters make the sparse twin the larger one
    assert re.search(r"<li>dash: -0\.00\d\d nats on average of 12, ", page)


def test_a_run_that_selects_otherwise_than_it_was_asked_to_is_named(
    write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(twins=["full"], grid={"attention.target_density": [0.375, 0.5]})
    for run in runs_of(path):
        finish(run, 3.0, None if run.config.attention.kind == "full" else 0.4)
    name = next(run.name for run in runs_of(path) if run.config.attention.target_density == 0.5)
    said = f"or train them for more steps: {name} (40.0% for 50.0%)."
    assert main(["study", "collect", str(path)]) == 0
    assert said in capsys.readouterr().out
    assert main(["study", "report", str(path)]) == 0
    assert said in (path.parent / "out" / "report.html").read_text()


def browse(page: Path, folder: Path) -> tuple[str, str, Path]:
    """Open a page in a headless browser: its DOM once loaded, the lines of its console, and a screenshot."""
    names = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    shot = folder / "page.png"
    command = [
        browser,
        "--headless",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--no-first-run",
    ]
    command += ["--no-sandbox"]  # which root, and containers without user namespaces, cannot have
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command += ["--enable-logging=stderr", "--force-color-profile=srgb", "--window-size=1200,4000"]
    command += [f"--screenshot={shot}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, "".join(line for line in done.stderr.splitlines(True) if "CONSOLE" in line), shot


def test_the_page_shows_all_its_pictures_in_a_browser_and_asks_for_nothing_else(
    finished_study: Path, tmp_path: Path
) -> None:
    assert main(["study", "report", str(finished_study)]) == 0
    text = (finished_study.parent / "out" / "report.html").read_text()
    # a reader in the page needs a script, which the page itself forbids
    assert text.count(f'content="{POLICY}">') == 1
    probe = tmp_path / "probe.html"
    probe.write_text(
        text.replace(f'content="{POLICY}">', f"content=\"{POLICY}; script-src 'unsafe-inline'\">{PROBE}")
    )
    dom, console, shot = browse(probe, tmp_path)
    seen = json.loads(html.unescape(re.findall(r"<title>(\{.*?)</title>", dom)[0]))
    assert (seen["asked"], seen["errors"], console) == ([], [], "")
    assert len(seen["widths"]) == 8
    assert min(seen["widths"]) > 600
    with Image.open(shot) as image:
        counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
    assert counts.get(BLUE, 0) > 500
