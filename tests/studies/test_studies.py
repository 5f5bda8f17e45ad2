"""Studies: what their YAML expands to, what it costs, how runs are trained, and what is made of their metrics."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dash_megatron.__main__ import main
from dash_megatron.evaluation.cli import check_arguments
from dash_megatron.planning.baseline_times import NOTE
from dash_megatron.studies import jobs as jobs_module
from dash_megatron.studies import pictures, scores
from dash_megatron.studies import submit as submit_module
from dash_megatron.studies.collect import collect, dense_twins
from dash_megatron.studies.cost import mean_piece_context
from dash_megatron.studies.fit import fit_compute, fit_parametric, frontier
from dash_megatron.studies.local import environments
from dash_megatron.studies.plan import as_row
from dash_megatron.studies.runs import StudyRun, expand
from dash_megatron.studies.study_file import load_study

STUDIES = Path(__file__).parents[2] / "studies"
BASE = {
    "run_dir": "runs/unused",
    "model": {
        "layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 96, "vocab_size": 320,
    },
    "attention": {"chunk_size": 16},
    "data": {"seq_length": 128},
    "training": {"steps": 10, "global_batch": 4},
    "checkpoint": {"every": 5},
}  # fmt: skip
SIZES = [{"name": f"h{width}", "model.hidden_size": width} for width in (32, 64, 128, 256)]
Write = Callable[..., Path]


@pytest.fixture
def write_study(tmp_path: Path) -> Write:
    def write(**keys: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        tree = {"base": str(tmp_path / "base.yaml"), "output": str(tmp_path / "out"), **keys}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
        return tmp_path / "study.yaml"

    return write


def runs_of(path: Path) -> list[StudyRun]:
    return expand(load_study(path))


def finish(run: StudyRun, loss: float, density: float | None) -> None:
    """Leave what a finished run would."""
    layers = run.config.model.layers
    per_layer = [density] * layers
    available = (run.context - 0.5) / 16 + 0.5
    lines = [
        {
            "step": step,
            "tokens": step * run.tokens // run.config.training.steps,
            "loss": loss + 1 / step,
            "valid_loss": loss,
            "valid_loss_by_position": [
                {"from": 0, "to": 64, "loss": loss + 1},
                {"from": 64, "to": 128, "loss": loss - 1},
            ],
            "density": density,
            "density_per_layer": per_layer,
            "chunks_selected_per_layer": [None if d is None else d * available for d in per_layer],
            "tokens_per_second": 1000.0,
            "skipped": 0,
        }
        for step in np.linspace(1, run.config.training.steps, 10, dtype=int).tolist()
    ]
    checkpoint = run.folder / "checkpoints" / f"step_{run.config.training.steps:08d}"
    checkpoint.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluated(run.folder, "step", {"copy": {64: 0.5, 128: 0.25}, "niah_single": {64: 1.0}})


def evaluated(run_dir: Path, name: str, scores: dict[str, dict[int, float]], **model: Any) -> Path:
    """Leave what `evaluate` would."""
    tasks = {
        task: {str(length): {"samples": 4, "score": score} for length, score in found.items()}
        for task, found in scores.items()
    }
    path = run_dir / "evaluation" / name / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"model": {"rope_scaling": None, **model}, "tasks": tasks}))
    return path


def law(parameters: Any, tokens: Any) -> Any:
    return 1.7 + 400 * parameters**-0.34 + 410 * tokens**-0.28


def test_points_grids_budgets_seeds_and_twins_multiply(write_study: Write) -> None:
    path = write_study(
        points=SIZES[:2],
        grid={"attention.scaling_factor": [1, 2]},
        budgets={"tokens": [5120, 10240]},
        seeds=[1, 2],
        twins=["full"],
    )
    runs = runs_of(path)
    dash = [run for run in runs if run.config.attention.kind == "dash"]
    full = [run for run in runs if run.config.attention.kind == "full"]
    assert len(dash) == 2 * 2 * 2 * 2
    assert len({run.name for run in runs}) == len(runs)
    # the scaling factor is nothing to full attention: one twin for both
    assert len(full) == 2 * 2 * 2
    assert {len(run.twin_of) for run in full} == {2}
    assert {run.config.training.steps for run in runs} == {10, 20}
    assert {run.config.training.seed for run in runs} == {1, 2}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_repositorys_studies_can_be_planned_and_evaluated(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(path.read_text())
    tree["overrides"].setdefault("model.vocab_size", 4096)  # of a tokenizer that may not be made yet
    (tmp_path / path.name).write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(STUDIES.parent)
    assert main(["study", "plan", str(tmp_path / path.name), "--json"]) == 0, capsys.readouterr().err
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert {"dash", "full"} <= {run["kind"] for run in runs}
    for arguments in tree.get("evaluate", {}).values():
        check_arguments(shlex.split(arguments))


def test_a_named_size_has_a_learning_rate_without_being_another_kind_of_run(write_study: Write) -> None:
    points = [dict(SIZES[0]), {**SIZES[1], "optimizer.lr": 1e-4, "attention.sigma": 1.0}]
    runs = runs_of(write_study(points=points, grid={"optimizer.weight_decay": [0.0]}))
    assert [run.size for run in runs] == ["h32", "h64"]
    assert [run.variant for run in runs] == ["dash weight_decay=0.0", "dash sigma=1.0 weight_decay=0.0"]
    assert runs[1].config.optimizer.lr == 1e-4


def test_a_dense_point_is_the_twin_of_the_others_and_not_of_itself(write_study: Write) -> None:
    points = [{"name": kind, "attention.kind": kind} for kind in ("full", "dash")]
    full, dash = runs_of(write_study(points=points, twins=["full"]))
    assert (full.config.attention.kind, full.twin_of) == ("full", [dash.name])


def test_losses_by_position_are_means_over_seeds_where_all_have_one() -> None:
    seeds = [{128: 3.0, 64: 1.0}, {64: 2.0, 128: 5.0, 256: 7.0}]
    assert list(pictures.mean_by_position(seeds).items()) == [(64, 1.5), (128, 4.0)]
    assert pictures.mean_by_position([]) == {}


def test_scores_of_all_evaluations_are_gathered_the_newest_first_and_those_of_another_rope_apart(
    tmp_path: Path,
) -> None:
    old = evaluated(tmp_path, "z_old", {"copy": {64: 0.1, 128: 0.2}})
    os.utime(old, (1, 1))
    evaluated(tmp_path, "new", {"copy": {64: 0.7}})
    evaluated(tmp_path, "yarn", {"copy": {64: 0.9}}, rope_scaling={"rope_type": "yarn"})
    losses = {"perplexity": {"64": {"windows": 2, "nll": 3.0}}}
    (tmp_path / "evaluation" / "more").mkdir()
    (tmp_path / "evaluation" / "more" / "results.json").write_text(json.dumps({"model": {}, "tasks": losses}))
    found = scores.read_scores(tmp_path)
    plain, other = scores.Place("copy", False, 64), scores.Place("copy", True, 64)
    assert found == {plain: 0.7, scores.Place("copy", False, 128): 0.2, other: 0.9}
    assert scores.means_over_runs([found, {plain: 0.5, other: 0.1}]) == {plain: 0.6, other: 0.5}
    assert scores.means_over_runs([]) == {}
    old.write_text("{}")
    with pytest.raises(ValueError, match=r"z_old.results\.json is no result of `evaluate`"):
        scores.read_scores(tmp_path)


def test_tokens_per_parameter_give_twins_the_same_tokens(write_study: Write) -> None:
    dash, full = runs_of(write_study(budgets={"tokens_per_parameter": [0.5]}, twins=["full"]))
    assert dash.tokens == full.tokens
    assert dash.parameters > full.parameters
    assert abs(dash.tokens / dash.parameters - 0.5) < 512 / dash.parameters
    assert full.cost.saving == 0 < dash.cost.saving < 1


def test_all_runs_of_a_twin_family_are_compared_with_its_dense_run(write_study: Write) -> None:
    path = write_study(
        points=SIZES[:2], grid={"attention.scaling_factor": [1, 2]}, twins=["full", {"attention.sigma": 1.0}]
    )
    rows = [as_row(run) for run in runs_of(path)]
    twins = {run: twin["run"] for run, twin in dense_twins(rows).items()}
    assert set(twins) == {row["run"] for row in rows if row["kind"] != "full"}
    assert all(twin == f"{run.split('_')[0]}_full" for run, twin in twins.items()), twins


def test_a_run_is_planned_at_the_density_that_it_asks_for_unless_the_study_says_another(
    write_study: Write,
) -> None:
    targets = [None, 0.5, {0: 1.0, 4: [0.2, 0.4]}]
    keys: dict[str, Any] = {"grid": {"attention.target_density": targets}}
    assert [run.density for run in runs_of(write_study(**keys))] == pytest.approx([0.25, 0.5, 0.3])
    one_full = runs_of(write_study(**keys, overrides={"attention.full_layers": [0]}))
    assert [run.density for run in one_full] == pytest.approx([0.25, 0.5, 0.4])
    assert {run.density for run in runs_of(write_study(**keys, assume={"density": 0.1}))} == {0.1}
    assert {run.density for run in runs_of(write_study(**keys, overrides={"assume.density": 0.2}))} == {0.2}


def test_flops_counted_at_the_density_give_the_sparse_run_more_tokens(write_study: Write) -> None:
    keys = {"overrides": {"data.seq_length": 4096}, "twins": ["full"], "assume": {"density": 0.1}}
    dash, full = runs_of(write_study(**keys, budgets={"flops": [1e12], "flops_counted": "assumed"}))
    assert dash.tokens > full.tokens
    assert dash.cost.flops == pytest.approx(1e12, rel=0.1)
    assert full.cost.flops == pytest.approx(1e12, rel=0.1)
    dash, full = runs_of(write_study(**keys, budgets={"flops": [1e12]}))
    assert dash.tokens == full.tokens


def test_hours_and_price_follow_from_flops_and_utilization(
    write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assume = {"utilization": 0.5, "gpu": "A100", "price": 2.0}
    path = write_study(assume=assume, twins=["full"])
    dash, _ = runs_of(path)
    assert dash.cost.gpu_hours == pytest.approx(dash.cost.flops / (0.5 * 312e12 * 3600))
    assert dash.cost.price == pytest.approx(2 * dash.cost.gpu_hours)
    assert main(["study", "plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][1]["twin_of"] == [dash.name]
    modelled, _ = runs_of(write_study(assume={**assume, "utilization": None}, twins=["full"]))
    assert modelled.cost.gpu_hours != dash.cost.gpu_hours > 0
    top_k = {"attention.kind": "infllmv2", "attention.infllmv2.kernel_size": 16}
    for utilization in (None, 0.5):
        path = write_study(assume={**assume, "utilization": utilization}, twins=[top_k])
        assert main(["study", "plan", str(path)]) == 0
        assert (NOTE in capsys.readouterr().out) == (utilization is None)


def test_mean_context_of_packed_documents_is_that_of_documents_laid_out() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, size=20_000)
    document = np.repeat(np.arange(len(lengths)), lengths)
    document = document[: len(document) // 100 * 100].reshape(-1, 100)
    seen = (document[:, None, :] == document[:, :, None]) & np.tri(100, dtype=bool)
    assert mean_piece_context(lengths, 100) == pytest.approx(seen.sum() / document.size, rel=0.01)


def test_a_curriculum_is_priced_by_the_context_of_its_steps(
    write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    curriculum = {"data.seq_length_curriculum": {0: 32, 4: 128}}
    plain, short = (runs_of(write_study(overrides=overrides))[0] for overrides in ({}, curriculum))
    # half of the length, own token included, for 4 of 10 steps, then of the whole
    assert short.context == pytest.approx((4 * 16.5 + 6 * 64.5) / 10)
    assert plain.context == 64.5
    assert short.cost.dense_flops < plain.cost.dense_flops
    path = write_study(overrides=curriculum)
    assert main(["study", "plan", str(path)]) == 0
    assert "data.seq_length_curriculum is counted" in capsys.readouterr().out


def test_a_budget_of_flops_buys_more_steps_of_shorter_contexts(write_study: Write) -> None:
    budgets = {"flops": [1e11], "flops_counted": "dense"}
    curriculum = {"data.seq_length_curriculum": {0: 32, 200: 128}}
    plain, short = (runs_of(write_study(overrides=each, budgets=budgets))[0] for each in ({}, curriculum))
    for run in (plain, short):
        per_step = run.cost.dense_flops / run.config.training.steps
        assert abs(run.cost.dense_flops - 1e11) < 1.5 * per_step
    assert short.config.training.steps > plain.config.training.steps > 200


def test_baselines_have_the_density_and_flops_of_their_lists(write_study: Write) -> None:
    top_k = {"attention.kind": "infllmv2", "attention.infllmv2.kernel_size": 16}
    sets = [{**top_k, "attention.infllmv2.top_k": number} for number in (3, 11)]
    few, many = [
        runs_of(write_study(overrides={"data.seq_length": 1024, **settings}))[0] for settings in sets
    ]
    # 64 chunks, of which the first, 8 local ones and the best are on
    assert few.density == pytest.approx((sum(range(1, 13)) + 52 * 12) / (64 * 65 / 2))
    assert few.density < many.density
    assert few.cost.flops < many.cost.flops
    nsa = {"attention.kind": "nsa", "attention.nsa.kernel_size": 16, "attention.nsa.top_k": 3}
    windows = [{**nsa, "attention.nsa.window": window} for window in (0, 16, 32)]
    runs = [runs_of(write_study(overrides={"data.seq_length": 1024, **settings}))[0] for settings in windows]
    # the two local chunks are in the window of 16 tokens
    assert runs[0].density == runs[1].density < runs[2].density


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budget": {}}, "budget is not a known key; the keys are base, output"),
        ({"grid": {"optimizer.lrr": [1]}}, "optimizer.lrr=1 is not a known key; did you mean optimizer.lr?"),
        ({"grid": {"optimizer.lr": []}}, "grid.optimizer.lr is empty"),
        ({"grid": {"optimizer.lr": [1e-3, 1e-3]}}, "are the same"),
        ({"points": [{"name": "a"}, {"name": "b"}]}, "are the same"),
        ({"budgets": {"tokens": [100]}}, "gives no step; raise the budget"),
        ({"budgets": {"tokens": [100], "flops": [1]}}, "may have one of them"),
        ({"budgets": {"tokens": [-1]}}, "must be above 0"),
        ({"overrides": {"run_dir": "x"}}, "overrides sets run_dir, which a study sets by `output`"),
        ({"seeds": [1, 1]}, "has one twice"),
        ({"evaluate": {"a/b": "--tasks copy"}}, "evaluate has 'a/b'; a name becomes a folder"),
        ({"evaluate": {"a": "--output x"}}, "evaluate.a sets --output"),
        ({"points": [{"name": 30, "model.layers": 1}]}, "points[0] has name 30, which becomes a folder"),
        ({"assume": {"gpu": "H9"}}, "assume.gpu=H9 is not known"),
        ({"grid": {"assume.density": [2]}}, "assume.density=2 must lie in (0, 1]"),
        ({"base": "nowhere.yaml"}, "base=nowhere.yaml cannot be read"),
        ({"overrides": {"schedule.warmup_steps": 50}}, "schedule.warmup_steps=50"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_wrong_study_is_told_with_field_rule_and_remedy(
    keys: dict[str, Any], message: str, write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "plan", str(write_study(**keys))]) == 2
    assert message in capsys.readouterr().err


# a stand-in for train.py: the loss of a step is nothing to how a study starts runs
TRAINER = """
import os, pathlib, sys, yaml
config = yaml.safe_load(open(sys.argv[2]))
run = pathlib.Path(config["run_dir"])
(run / "starts").open("a").write("x")
code = (CODES).get(config["model"]["hidden_size"], 0)
if code == 1 and (run / "starts").read_text() == "xx":
    code = 0
if code == 0:
    (run / "checkpoints" / f"step_{config['training']['steps']:08d}").mkdir(parents=True)
sys.exit(code)
"""


def trainer(tmp_path: Path, codes: dict[int, int]) -> list[str]:
    script = tmp_path / "fake_train.py"
    script.write_text(TRAINER.replace("CODES", repr(codes)))
    return [sys.executable, str(script)]


def starts(path: Path) -> dict[str, int]:
    return {run.size: len((run.folder / "starts").read_text()) for run in runs_of(path) if (run.folder / "starts").exists()}  # fmt: skip


def test_submit_restarts_faults_not_errors_and_skips_what_is_finished(
    write_study: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(points=SIZES)
    command = trainer(tmp_path, {64: 2, 128: 1})
    assert submit_module.submit_studies([path], train=command) == 1
    assert starts(path) == {"h32": 1, "h64": 1, "h128": 2, "h256": 1}
    assert "its config or machine is wrong" in capsys.readouterr().out
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert starts(path) == {"h32": 1, "h64": 2, "h128": 2, "h256": 1}


def test_submit_ends_where_a_run_was_asked_to_stop(write_study: Write, tmp_path: Path) -> None:
    path = write_study(points=SIZES)
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {64: 75})) == 75
    assert starts(path) == {"h32": 1, "h64": 1}


def test_submit_trains_only_what_is_asked_for_in_that_order(
    write_study: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, command = write_study(points=SIZES), trainer(tmp_path, {})
    assert submit_module.submit_studies([path], train=command, only=["h256*", "h[36]*"]) == 0
    assert [line.split()[1].split("_")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" steps")] == ["h256", "h32", "h64"]  # fmt: skip
    assert starts(path) == {"h32": 1, "h64": 1, "h256": 1}
    with pytest.raises(ValueError, match=r"--only h999 fits no run.*h32"):
        submit_module.submit_studies([path], train=command, only=["h999"])


EVALUATOR = """
import pathlib, sys
run, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[-1])
with (run / "evaluated").open("a") as file:
    file.write(" ".join(sys.argv[2:-2]) + ";")
if FAILS in str(output):
    sys.exit(2)
output.mkdir(parents=True)
(output / "results.json").write_text("{}")
"""


def test_submit_evaluates_what_is_trained_once_and_again_where_it_failed(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "fake_evaluate.py"
    script.write_text(EVALUATOR.replace("FAILS", "'h64'"))
    monkeypatch.setattr(jobs_module, "EVALUATE", (sys.executable, str(script)))
    path = write_study(
        points=SIZES[:2],
        evaluate={"short": "--tasks copy", "twice": "--rope-scaling '{rope_type: linear, factor: 2}'"},
    )
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 1
    assert "failed: evaluation short ended with exit code 2" in capsys.readouterr().out
    both = "--tasks copy;--rope-scaling {rope_type: linear, factor: 2};"
    folders = {run.size: run.folder for run in runs_of(path)}
    assert (folders["h32"] / "evaluated").read_text() == both
    assert (folders["h64"] / "evaluated").read_text() == "--tasks copy;"  # the rest would fail alike
    script.write_text(EVALUATOR.replace("FAILS", "'nothing'"))
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert "2 of 2 runs are finished" in capsys.readouterr().out
    assert (folders["h32"] / "evaluated").read_text() == both
    assert (folders["h64"] / "evaluated").read_text() == "--tasks copy;" + both
    path = write_study(points=SIZES[:2], evaluate={"short": "--tasks copy --samples 5"})
    script.write_text(
        EVALUATOR.replace("FAILS", "'nothing'").replace("mkdir(parents=True)", "mkdir(exist_ok=True)")
    )
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {})) == 0
    assert (folders["h32"] / "evaluated").read_text() == both + "--tasks copy --samples 5;"
    assert starts(path) == {"h32": 1, "h64": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks recal", "evaluate.all='--tasks recal': --tasks recal: the known ones are perplexity"),
        ("--length 64k", "'64k' must be whole numbers, such as 4096,16384"),
        ("--sample-count 3", "unrecognized arguments: --sample-count 3"),
        ("--rope-scaling '{rope_type: yarn}'", "rope_type=yarn needs"),
        ("--rope-scaling '{rope_type: yarn", "No closing quotation"),
    ],
)
def test_a_wrong_evaluation_is_told_before_anything_is_trained(
    arguments: str, message: str, write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(evaluate={"all": arguments})
    assert main(["study", "submit", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not (path.parent / "out").exists()


def test_several_studies_wait_in_one_queue_in_the_order_asked_for(
    write_study: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name in ("first", "second"):
        path = write_study(points=SIZES, output=str(tmp_path / name))
        paths.append(path.rename(tmp_path / f"{name}.yaml"))
    command = trainer(tmp_path, {})
    assert submit_module.submit_studies(paths, train=command, only=["second/h64*", "h32*", "first/h1*"]) == 0
    order = [line.split()[1].split("_")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" steps")]  # fmt: skip
    assert order == ["h64", "h32", "h32", "h128"]
    assert starts(paths[0]) == {"h32": 1, "h128": 1}
    assert starts(paths[1]) == {"h32": 1, "h64": 1}
    assert submit_module.submit_studies(paths, train=command) == 0
    assert starts(paths[0]) == starts(paths[1]) == dict.fromkeys(("h32", "h64", "h128", "h256"), 1)
    (tmp_path / "other").mkdir()
    twice = shutil.copy(paths[0], tmp_path / "other" / "first.yaml")
    with pytest.raises(ValueError, match="must have names of their own"):
        submit_module.submit_studies([paths[0], twice], train=command)


# notes when it begins and when it ends, and takes a while
SLOW = """
import pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[2]))
run = pathlib.Path(config["run_dir"])
log = run.parent / "order"
with log.open("a") as file:
    file.write(f"+{config['model']['hidden_size']} ")
time.sleep(0.5)
with log.open("a") as file:
    file.write(f"-{config['model']['hidden_size']} ")
(run / "checkpoints" / f"step_{config['training']['steps']:08d}").mkdir(parents=True)
"""


def test_a_run_waits_for_the_one_whose_weights_it_begins_with(
    write_study: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    points = [dict(point) for point in SIZES]
    points[0]["training.init_from"] = str(runs_of(write_study(points=points))[3].folder)
    points[1]["training.init_from"] = str(runs_of(write_study(points=points))[0].folder)
    path = write_study(points=points)
    script = tmp_path / "slow_train.py"
    script.write_text(SLOW)
    with pytest.raises(ValueError, match=r"begins with the weights of h256_dash.*submit that one first"):
        submit_module.submit_studies([path], slurm=["--dry-run"])
    assert submit_module.submit_studies([path], train=[sys.executable, str(script)], at_once=3) == 0
    order = (runs_of(path)[0].folder.parent / "order").read_text().split()
    assert sorted(order[:2]) == ["+128", "+256"]
    assert order.index("+32") > order.index("-256")
    assert order.index("+64") > order.index("-32")


def test_runs_that_wait_for_each_other_do_not_wait_for_ever(write_study: Write, tmp_path: Path) -> None:
    folders = [tmp_path / "out" / "runs" / f"{name}-dash" for name in "ab"]
    points = [
        {"name": "a", "training.init_from": str(folders[1])},
        {"name": "b", "training.init_from": str(folders[0])},
    ]
    path = write_study(points=points)
    assert [run.folder for run in runs_of(path)] == folders
    assert submit_module.submit_studies([path], train=trainer(tmp_path, {}), at_once=2) == 0


# waits until as many runs have started as are to run at once
TOGETHER = """
import os, pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[2]))
run = pathlib.Path(config["run_dir"])
(run / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "any"))
for _ in range(600):
    if len(list(run.parent.glob("*/gpu"))) >= 2:
        break
    time.sleep(0.05)
else:
    sys.exit(2)
if WAIT:
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (run / "waiting").touch()
    time.sleep(60)
(run / "checkpoints" / f"step_{config['training']['steps']:08d}").mkdir(parents=True)
"""


def test_submit_trains_several_at_once_each_on_the_next_gpu(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    path = write_study(points=SIZES)
    script = tmp_path / "fake_train.py"
    script.write_text(TOGETHER.replace("WAIT", "False"))
    assert submit_module.submit_studies([path], train=[sys.executable, str(script)], at_once=2) == 0
    gpus = [(run.folder / "gpu").read_text() for run in runs_of(path)]
    assert set(gpus) == {"3", "5"}
    assert set(gpus[:2]) == {"3", "5"}


def test_runs_that_outnumber_gpus_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def places(at_once: int, processes: int) -> list[str | None]:
        return [place.get("CUDA_VISIBLE_DEVICES") for place in environments(at_once, processes)]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert places(3, 1) == ["0", "1", "2"]
    assert places(3, 2) == ["0,1", "2,3", "0,1"]
    assert places(2, 4) == [None, None]
    assert places(1, 1) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert places(2, 1) == [None, None]


def test_a_stop_reaches_all_runs_at_once(write_study: Write, tmp_path: Path) -> None:
    path = write_study(points=SIZES)
    script = tmp_path / "fake_train.py"
    script.write_text(TOGETHER.replace("WAIT", "True"))
    code = f"""
import sys
import time
from dash_megatron.studies.submit import submit_studies
sys.exit(submit_studies([{str(path)!r}], train=[sys.executable, {str(script)!r}], at_once=2))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        for _ in range(600):
            if sum((run.folder / "waiting").exists() for run in runs_of(path)) == 2:
                break
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=50) == 75
    assert sum((run.folder / "gpu").exists() for run in runs_of(path)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at-once", "0"], "--at-once 0 must be at least 1"),
        (["--at-once", "2", "--slurm=--nodes 1"], "--at-once 2 is for this machine"),
    ],
)
def test_a_wrong_number_at_once_is_refused(
    arguments: list[str], message: str, write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "submit", str(write_study()), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_config_is_refused(write_study: Write, tmp_path: Path) -> None:
    path = write_study()
    run = runs_of(path)[0]
    run.folder.mkdir(parents=True)
    tree = run.config.model_dump(mode="json")
    tree["optimizer"]["lr"] = 0.5
    (run.folder / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"was trained with optimizer\.lr=0\.5"):
        submit_module.submit_studies([path], train=trainer(tmp_path, {}))


def test_slurm_gets_one_array_of_the_runs_that_are_not_finished(
    write_study: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_study(points=SIZES)
    finish(runs_of(path)[1], 3.0, 0.5)
    words = "--nodes 1 --gpus-per-node 4 --time 1:00:00 --dry-run"
    assert main(["study", "submit", str(path), f"--slurm={words}"]) == 0
    script = capfd.readouterr().out
    assert "#SBATCH --array=0-2" in script
    assert "h256_dash" in script
    assert "h64_dash" not in script


def test_a_study_trains_here_and_its_results_are_collected(
    tiny_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_config))
    tree = {
        "base": str(tmp_path / "base.yaml"),
        "output": str(tmp_path / "out"),
        "budgets": {"tokens": [1024]},
        "evaluate": {"copied": "--tasks copy --lengths 80,100 --samples 1"},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["study", "submit", str(path)]) == 0
    assert main(["study", "submit", str(path)]) == 0
    assert "1 of 1 runs are finished" in capsys.readouterr().out
    assert set(scores.read_scores(runs_of(path)[0].folder)) == {
        scores.Place("copy", False, 80),
        scores.Place("copy", False, 100),
    }
    row = collect(load_study(path))[0]
    assert (row["finished"], row["step"], row["tokens"]) == (True, 2, 1024)
    assert 0 < row["density"] <= 1
    assert 0 < row["flops"] <= row["dense_flops"]
    # one run is too few for a law, and enough for a page
    for command, code in (("collect", 0), ("fit", 2), ("plot", 0), ("report", 0)):
        assert main(["study", command, str(path)]) == code, capsys.readouterr().err
    assert "no variant has the runs that a fit needs" in capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "lines are fits" not in page
    pngs = sorted(png.name for png in (tmp_path / "out" / "plots").glob("*.png"))
    assert {"curves.png", "density.png", "pareto.png", "scores.png"} <= set(pngs)
    assert page.count('alt="') == len(pngs)


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
        lambda figure, path: drawn.update(
            {path.name: [(line.get_label(), list(line.get_xdata())) for line in figure.axes[0].lines]}
        ),
    )
    study = load_study(path)
    pictures.draw_study(study, collect(study), {"variants": {}}, path.parent)
    assert drawn["throughput.png"] == [("dash", [128, 256]), ("full", [128, 256])]


def test_losses_over_training_are_a_line_for_each_seed_of_the_largest_runs(
    write_study: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(points=SIZES, seeds=[1, 2])
    for index, run in enumerate(runs_of(path)):
        finish(run, 3.0 + index, 0.4)
    lines: dict[str, Any] = {}
    monkeypatch.setattr(
        pictures, "_save", lambda figure, path: lines.update({path.name: figure.axes[0].lines})
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
    expected = run.cost.flops + (run.cost.dense_flops - run.cost.flops) * (0.4 - 0.25) / (1 - 0.25)
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
    names = ("curves", "density", "loss_compute", "pareto", "position", "scores", "throughput")
    assert pngs == [f"{name}.png" for name in names]
    assert {base64.b64decode(image) for image in images} == {
        (out / "plots" / name).read_bytes() for name in pngs
    }
    assert "lines are fits to each frontier" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('alt="') == len(images) == 7
    # the router's parameters make the sparse twin the larger one
    assert re.search(r"<li>dash: -0\.00\d\d nats on average of 12, ", page)


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
    assert len(seen["widths"]) == 7
    assert min(seen["widths"]) > 600
    with Image.open(shot) as image:
        counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
    assert counts.get(BLUE, 0) > 500
