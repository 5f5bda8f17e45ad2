"""What the YAML of a study expands to, and what its runs cost."""

from __future__ import annotations

import json
import os
import shlex
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dash_megatron.__main__ import main
from dash_megatron.data.index_file import write_index
from dash_megatron.evaluation.cli import check_arguments
from dash_megatron.planning.baseline_times import NOTE
from dash_megatron.planning.routing import AssumedRouting, effective_routing
from dash_megatron.studies import cost, scores
from dash_megatron.studies.collect import dense_twins
from dash_megatron.studies.cost import mean_context, mean_piece_context
from dash_megatron.studies.plan import as_row
from tests.studies.study_runs import BASE, SIZES, STUDIES, Write, evaluated, runs_of


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


def test_named_points_without_a_size_are_told_apart_by_what_the_grid_varies(write_study: Write) -> None:
    points = [{"name": "slow", "optimizer.lr": 1e-4}, {"name": "fast", "optimizer.lr": 1e-3}]
    grid = {"optimizer.weight_decay": [0.0, 0.1], "attention.sigma": [1.0]}
    runs = runs_of(write_study(points=points, grid=grid, twins=["full"]))
    assert [run.name for run in runs if run.config.optimizer.lr == 1e-4] == [
        "slow-dash-weight_decay-0.0",
        "slow-full-weight_decay-0.0",
        "slow-dash-weight_decay-0.1",
        "slow-full-weight_decay-0.1",
    ]
    assert len({run.variant for run in runs}) == len(runs) == 8


def test_a_dense_point_is_the_twin_of_the_others_and_not_of_itself(write_study: Write) -> None:
    points = [{"name": kind, "attention.kind": kind} for kind in ("full", "dash")]
    full, dash = runs_of(write_study(points=points, twins=["full"]))
    assert (full.config.attention.kind, full.twin_of) == ("full", [dash.name])


def test_losses_by_position_are_means_over_seeds_where_all_have_one() -> None:
    seeds = [{128: 3.0, 64: 1.0}, {64: 2.0, 128: 5.0, 256: 7.0}]
    assert list(scores.means_over_runs(seeds).items()) == [(64, 1.5), (128, 4.0)]
    assert scores.means_over_runs([]) == {}


def test_scores_of_all_evaluations_are_gathered_the_newest_first_and_those_of_another_rope_apart(
    tmp_path: Path,
) -> None:
    old = evaluated(tmp_path, "z_old", {"copy": {64: 0.1, 128: 0.2}})
    os.utime(old, (1, 1))
    evaluated(tmp_path, "new", {"copy": {64: 0.7}})
    evaluated(tmp_path, "yarn", {"copy": {64: 0.9}}, rope_scaling={"rope_type": "yarn"})
    losses = {"perplexity": {"64": {"windows": 2, "nll": 3.0}, "128": {"windows": 2, "nll": None}}}
    (tmp_path / "evaluation" / "more").mkdir()
    (tmp_path / "evaluation" / "more" / "results.json").write_text(json.dumps({"model": {}, "tasks": losses}))
    found = scores.read_scores(tmp_path)
    plain, other = scores.TaskLength("copy", False, 64), scores.TaskLength("copy", True, 64)
    loss = scores.TaskLength("perplexity", False, 64)
    assert found == {plain: 0.7, scores.TaskLength("copy", False, 128): 0.2, other: 0.9, loss: 3.0}
    assert scores.means_over_runs([found, {plain: 0.5, other: 0.1}]) == {plain: 0.6, other: 0.5}
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
    assert [run.density for run in runs_of(write_study(**keys))] == pytest.approx([0.1, 0.5, 0.3])
    one_full = runs_of(write_study(**keys, overrides={"attention.full_layers": [0]}))
    assert [run.density for run in one_full] == pytest.approx([0.1, 0.5, 0.4])
    assert {run.density for run in runs_of(write_study(**keys, assume={"density": 0.3}))} == {0.3}
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


def test_mean_context_takes_no_memory_for_each_document(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 300, size=100_001, dtype=np.int32)
    whole = mean_piece_context(lengths, 100)
    monkeypatch.setattr(cost, "_DOCUMENTS_AT_ONCE", 1000)
    tracemalloc.start()
    assert mean_piece_context(lengths, 100) == pytest.approx(whole, rel=1e-12)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


def test_data_without_tokens_has_no_part_in_the_mean_context(tmp_path: Path) -> None:
    for name, lengths in ("some", [3, 9]), ("none", []), ("zero", [0, 0]):
        write_index(tmp_path / f"{name}.idx", np.array(lengths, dtype=np.int32), np.dtype(np.uint16))
    some, none, zero = (str(tmp_path / name) for name in ("some", "none", "zero"))
    assert mean_context((none, some, zero), 8, True) == mean_context((some,), 8, True)
    assert mean_context((none, zero), 8, True) == mean_context((str(tmp_path / "missing"),), 8, True)


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
    for run in (few, many, *runs):
        assert effective_routing(run.config, AssumedRouting()).density == run.density


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budget": {}}, "budget is not a known key; the keys are base, output"),
        ({"budgets": 3}, "budgets=3 must be a section; its keys are tokens_per_parameter"),
        ({"grid": {"optimizer.lrr": [1]}}, "optimizer.lrr=1 is not a known key; did you mean optimizer.lr?"),
        ({"grid": ["optimizer.lr"]}, "must be a mapping; write grid: {optimizer.lr: [3e-4, 6e-4]}"),
        (
            {"points": ["a"]},
            "points[0]='a' must be a mapping; write points: [{name: 30m, model.layers: 8}, ...]",
        ),
        ({"overrides": {"attention.target_density": 0.5}, "twins": ["nsa"]}, 'error: twin "nsa" of dash: '),
        ({"seeds": 3}, "seeds=3 must be a list: write seeds: [3]; see"),
        ({"evaluate": {"a": 3}}, "evaluate.a=3 must be text: write '3'; see"),
        ({"twins": [3]}, "twins[0]=3 is of a wrong type; write twins: [full, {attention.alpha: 1.2}]"),
        ({"grid": {"optimizer.lr": []}}, "grid.optimizer.lr is empty"),
        ({"grid": {"optimizer.lr": [1e-3, 1e-3]}}, "are the same"),
        ({"points": [{"name": "a"}, {"name": "b"}]}, "are the same"),
        ({"budgets": {"tokens": [100]}}, "gives no step; raise the budget"),
        ({"budgets": {"tokens": [100], "flops": [1]}}, "may have one of them"),
        ({"budgets": {"tokens": [-1]}}, "must be above 0"),
        ({"overrides": {"run_dir": "x"}}, "overrides sets run_dir, which a study sets by `output`"),
        ({"seeds": [1, 1]}, "has one twice"),
        ({"output": ""}, "output='': String should have at least 1 character"),
        ({"evaluate": {"a/b": "--tasks copy"}}, "evaluate has 'a/b'; a name becomes a folder"),
        ({"evaluate": {"..": "--tasks copy"}}, "evaluate has '..'; a name becomes a folder"),
        ({"budgets": {"tokens": [5120, 5120.0]}}, "budgets.tokens=[5120.0, 5120.0] has one twice"),
        ({"evaluate": {"a": "--output x"}}, "evaluate.a sets --output"),
        ({"points": [{"name": 30, "model.layers": 1}]}, "points[0] has name 30, which becomes a folder"),
        ({"assume": {"gpu": "H9"}}, "assume.gpu=H9 is not known"),
        ({"grid": {"assume.density": [2]}}, "assume.density=2 must lie in (0, 1]"),
        (
            {"base": "nowhere.yaml"},
            f"base=nowhere.yaml (relative to {Path.cwd()}) cannot be read: No such file",
        ),
        ({"overrides": {"schedule.warmup_steps": 50}}, "schedule.warmup_steps=50"),
        (
            {"overrides": {"training.micro_batch": 3}},
            "run dash: training.global_batch=4 must be a multiple of 3 = training.micro_batch=3 x 1 data-parallel "
            "processes; try 3",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_wrong_study_is_told_with_field_rule_and_remedy(
    keys: dict[str, Any], message: str, write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "plan", str(write_study(**keys))]) == 2
    assert message in capsys.readouterr().err


# a stand-in for train.py: the loss of a step is nothing to how a study starts runs


@pytest.mark.parametrize(
    ("schedule", "keys", "message"),
    [
        (3, {"budgets": {"tokens": [5120]}}, "schedule=3 must be a section, such as schedule.kind=...; its keys are"),
        (None, {}, "schedule=None must be a section"),
        ([1], {"warmup": 0.2}, "warmup: schedule is a value, not a section"),
    ],
    ids=str,
)  # fmt: skip
def test_a_base_whose_schedule_is_no_section_is_told(
    schedule: Any, keys: dict[str, Any], message: str, write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(**keys)
    (path.parent / "base.yaml").write_text(yaml.safe_dump({**BASE, "schedule": schedule}))
    assert main(["study", "plan", str(path)]) == 2
    assert message in capsys.readouterr().err
