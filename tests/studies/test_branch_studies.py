"""Studies of branches: what their file may say, which runs it makes, and the order in which they are trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dash_megatron.__main__ import main
from dash_megatron.studies.submit import submit_studies
from tests.studies.study_runs import SIZES, STUDIES, Write, runs_of

BRANCHES: dict[str, Any] = {
    "overrides": {"data.seq_length": 256, "training.steps": 6},
    "arms": [
        {"name": "full", "attention.kind": "full"},
        {"name": "dash", "attention.chunk_size": 32, "attention.target_density": 0.25},
    ],
    "orders": [1, 2],
    "reference": "full",
    "evaluate": {"held_out": "--tasks documents --lengths 256"},
}
BASE_IS_FULL = {"attention.kind": "full", "optimizer.lr": 0.01}
# trains if what it begins with is trained; the run of the name FAILS, or the base of that hidden size, is not
TRAINER = """
import pathlib, sys, yaml
config = yaml.safe_load(open(sys.argv[2]))
run, start = pathlib.Path(config["run_dir"]), config["training"]["init_from"]
with (run.parent / "order").open("a") as file:
    file.write(run.name + " ")
if FAILS in (config["model"]["hidden_size"], run.name) or start and not list(pathlib.Path(start, "checkpoints").iterdir()):
    sys.exit(2)
(run / "checkpoints" / f"step_{config['training']['steps']:08d}").mkdir(parents=True)
"""
EVALUATOR = """
import pathlib, sys
output = pathlib.Path(sys.argv[-1])
output.mkdir(parents=True)
(output / "results.json").write_text("{}")
"""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Submit a study to commands that only leave what training and evaluation leave."""
    (tmp_path / "evaluate.py").write_text(EVALUATOR)
    monkeypatch.setattr(
        "dash_megatron.studies.jobs.EVALUATE", (sys.executable, str(tmp_path / "evaluate.py"))
    )

    def submit(path: Path, fails: int | str = 0, **options: Any) -> int:
        (tmp_path / "train.py").write_text(TRAINER.replace("FAILS", repr(fails)))
        return submit_studies([path], train=[sys.executable, str(tmp_path / "train.py")], **options)

    return submit


def trained(path: Path) -> list[str]:
    """Names of runs in the order in which they were started."""
    return (path.parent / "out" / "runs" / "order").read_text().split()


def test_every_arm_is_trained_from_every_base_in_every_order(write_study: Write) -> None:
    path = write_study(points=SIZES[:2], overrides=BASE_IS_FULL, branches=BRANCHES)
    runs = {run.name: run for run in runs_of(path)}
    assert list(runs)[:5] == [
        "h32_full", "full_order1_from_h32_full", "dash_order1_from_h32_full", "full_order2_from_h32_full", "dash_order2_from_h32_full",
    ]  # fmt: skip
    assert len(runs) == 10
    base, dash, full = (
        runs["h64_full"],
        runs["dash_order2_from_h64_full"],
        runs["full_order2_from_h64_full"],
    )
    assert (base.base, dash.base, dash.size, dash.variant) == (None, "h64_full", "h64", "dash")
    assert dash.config.run_dir == str(path.parent / "out" / "runs" / dash.name)
    assert dash.config.training.init_from == base.config.run_dir
    assert (base.config.training.steps, dash.config.training.steps) == (10, 6)
    assert (base.config.data.seq_length, dash.config.data.seq_length) == (128, 256)
    assert (dash.config.model, dash.config.optimizer.lr) == (base.config.model, 0.01)
    assert (dash.config.training.seed, dash.density) == (2, 0.25)
    assert (full.config.attention.kind, full.density) == ("full", 1.0)
    changed = dash.config.model_dump(exclude={"attention", "run_dir"})
    assert changed == full.config.model_dump(exclude={"attention", "run_dir"})


def test_of_its_bases_attention_a_branch_takes_nothing(write_study: Write) -> None:
    both = arms({"name": "plain"}, {"name": "small", "attention.chunk_size": 32})
    path = write_study(
        overrides={"attention.chunk_size": 128, "attention.sigma": 3.0}, branches=BRANCHES | both
    )
    base, plain, small, *_ = runs_of(path)
    assert (base.config.attention.chunk_size, base.config.attention.sigma) == (128, 3.0)
    assert (plain.config.attention.chunk_size, plain.config.attention.sigma) == (64, 2.0)
    assert (small.config.attention.chunk_size, small.config.attention.sigma) == (32, 2.0)


def test_branches_of_a_size_have_a_learning_rate_of_their_own(write_study: Write) -> None:
    sizes = [SIZES[0] | {"branches.optimizer.lr": 0.003}, SIZES[1]]
    branches = BRANCHES | {"overrides": {"optimizer.lr": 0.005}, "orders": [1]}
    runs = runs_of(write_study(points=sizes, overrides=BASE_IS_FULL, branches=branches))
    assert [run.name for run in runs if not run.base] == ["h32_full", "h64_full"]
    assert [run.config.optimizer.lr for run in runs] == [0.01, 0.003, 0.003, 0.01, 0.005, 0.005]
    nameless = [{key: value for key, value in sizes[0].items() if key != "name"}]
    bases = runs_of(write_study(points=nameless, overrides=BASE_IS_FULL, branches=branches))
    assert (bases[0].name, bases[0].variant) == ("hidden_size-32_full", "full")


def test_each_size_learns_at_the_rates_that_it_was_measured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(STUDIES.parent)

    def rates(path: Path, size: str) -> set[tuple[bool, float]]:
        runs = [run for run in runs_of(path) if run.size in ("", size)]
        return {(run.base is None, run.config.optimizer.lr) for run in runs}

    for size, measured in (("62m", "branches_ten/62m"), ("210m", "branches_210m_11")):
        found = rates(STUDIES / "branches_16k.yaml", size)
        assert found == rates(Path("docs/results/quality") / measured / "study.yaml", size)
        assert len(found) == 2


def test_a_point_says_of_branches_only_what_they_may_have(write_study: Write) -> None:
    wrong = [SIZES[0] | {"branches.model.layers": 3}]
    with pytest.raises(ValueError, match=r"points\[0\].branches sets model.layers, and a branch goes on"):
        runs_of(write_study(points=wrong, branches=BRANCHES))
    with pytest.raises(ValueError, match=r"branches={.*} is not a known key"):
        runs_of(write_study(points=wrong))


def test_a_base_whose_attention_learns_nothing_starts_every_arm(write_study: Write) -> None:
    top_k = {"attention.kind": "infllmv2", "attention.infllmv2.kernel_size": 16}
    kinds = [run.config.attention.kind for run in runs_of(write_study(overrides=top_k, branches=BRANCHES))]
    assert kinds == ["infllmv2", "full", "dash", "full", "dash"]


def arms(*named: dict[str, Any]) -> dict[str, Any]:
    return {"arms": list(named), "reference": named[0]["name"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "dense"}, "branches.reference=dense must be the name of an arm: full, dash"),
        ({"orders": [1, 2, 1]}, r"branches.orders=\[1, 2, 1\] must name orders, each once"),
        ({"orders": []}, r"branches.orders=\[\] must name orders"),
        (arms({"name": "full"}), "branches.arms has full alone"),
        (arms({"name": "full"}, {"name": "full"}), "branches.arms has full twice"),
        (arms({"name": "full"}, {"attention.alpha": 1.2}), r"branches.arms\[1\] has name None"),
        (arms({"name": "a"}, {"name": "b"}), "a_order1_from_dash and b_order1_from_dash are the same"),
        (
            {"evaluate": ["--tasks documents"]},
            r"branches.evaluate=\['--tasks documents'\] must be a mapping; write evaluate: {NAME: \"--tasks documents\"}",
        ),
        (
            {"arms": ["x"]},
            r"branches.arms\[0\]='x' must be a mapping; write arms: \[{name: full, attention.kind: full}, ...\]",
        ),
        ({"evaluate": {}}, "branches.evaluate={} must score held-out documents"),
        (
            {"evaluate": {"x": "--tasks copy --data documents"}},
            "branches.evaluate={'x': '--tasks copy --data documents'} must score held-out",
        ),
        ({"overrides": {"model.layers": 3}}, "branches.overrides sets model.layers, and a branch goes on"),
        ({"overrides": {"training.seed": 3}}, "branches.overrides sets training.seed.*`branches.orders`"),
        ({"overrides": {"training.init_from": "x"}}, "training.init_from, which a study sets by `base`"),
        ({"overrides": {"steps": 3}}, "branches.overrides has 'steps'; settings read section.key"),
        ({"overrides": {"training.stepz": 3}}, "training.stepz=3 is not a known key"),
        ({"order": [1]}, "branches.order is not a known key; the keys are arms, reference"),
        (
            arms({"name": "a"}, {"name": "b", "attention.chunk": 3}),
            "^b: attention.chunk=3 is not a known key",
        ),
    ],
)
def test_a_wrong_section_is_refused(changes: dict[str, Any], message: str, write_study: Write) -> None:
    path = write_study(branches={**BRANCHES, **changes})
    with pytest.raises(ValueError, match=message):
        runs_of(path)


ROUTER = {"attention.pool_heads": True, "attention.router_projections": True}
NSA = {"attention.kind": "nsa", "attention.chunk_size": 32}


@pytest.mark.parametrize(
    ("base", "arm", "refused"),
    [
        ({}, {"attention.kind": "full"}, "layer 0 .* attention.kind=dash; set"),
        ({}, {"attention.full_layers": [1]}, "layer 1 .* attention.kind=dash; set"),
        ({"attention.full_layers": [1]}, {}, None),
        ({"attention.learned_scaling": 20.0}, {}, "layer 0 .* attention.learned_scaling above 0; set"),
        ({"attention.learned_scaling": 20.0}, {"attention.learned_scaling": 2.0}, None),
        (ROUTER, {}, "layer 0 .* attention.router_projections=true; set"),
        (ROUTER, ROUTER, None),
        ({}, ROUTER, None),
        (NSA, NSA, None),
        (NSA, {}, "layer 0 .* attention.kind=nsa, attention.nsa.kernel_size=32; set"),
        (NSA, NSA | {"attention.nsa.kernel_size": 16}, "layer 0 .* attention.nsa.kernel_size=32; set"),
    ],
)
def test_an_arm_has_a_place_for_all_that_attention_of_its_base_learns(
    base: dict[str, Any], arm: dict[str, Any], refused: str | None, write_study: Write
) -> None:
    one = {"name": "other", **arm}
    branches = BRANCHES | arms(one, one | {"name": "faster", "optimizer.lr": 0.5})
    path = write_study(overrides=base, branches=branches)
    if refused is None:
        assert len(runs_of(path)) == 5
    else:
        with pytest.raises(ValueError, match=f"^branch other_order1_from_.*: {refused} that in the arm"):
            runs_of(path)


def test_branches_and_twins_exclude_each_other(write_study: Write) -> None:
    with pytest.raises(ValueError, match="a study has twins or branches"):
        runs_of(write_study(branches=BRANCHES, twins=["full"]))


def test_branches_wait_for_their_base_and_what_is_done_is_not_done_again(
    write_study: Write, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(
        points=SIZES[:2], overrides=BASE_IS_FULL, branches=BRANCHES, evaluate={"of_base": "--tasks copy"}
    )
    assert train(path, at_once=3, only=["*h32*"]) == 0
    assert trained(path)[0] == "h32_full"
    assert len(trained(path)) == 5
    assert train(path) == 0
    assert trained(path)[5:] == [run.name for run in runs_of(path)[5:]]
    assert train(path) == 0
    assert "10 of 10 runs are finished" in capsys.readouterr().out
    assert len(trained(path)) == 10
    for run in runs_of(path):
        evaluated = [folder.name for folder in (run.folder / "evaluation").iterdir()]
        assert evaluated == (["held_out"] if run.base else ["of_base"])


def test_the_base_of_branches_that_are_asked_for_comes_along(write_study: Write, train: Any) -> None:
    path = write_study(points=SIZES[:2], overrides=BASE_IS_FULL, branches=BRANCHES)
    assert train(path, only=["dash_order2*"]) == 0
    assert trained(path) == [
        "h32_full", "dash_order2_from_h32_full", "h64_full", "dash_order2_from_h64_full",
    ]  # fmt: skip
    assert train(path, only=["full_order1_from_h32*"]) == 0
    assert trained(path)[4:] == ["full_order1_from_h32_full"]


def test_no_branch_is_trained_from_a_base_that_failed(
    write_study: Write, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(points=SIZES[:2], overrides=BASE_IS_FULL, branches=BRANCHES)
    # a start that was cut short left something
    (runs_of(path)[0].folder / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert train(path, fails=32) == 1
    assert trained(path) == ["h32_full", *(run.name for run in runs_of(path)[5:])]
    said = capsys.readouterr().out
    assert said.count("failed: its base h32_full is not trained") == 4
    assert "5 of 10 runs failed" in said


def test_an_arm_that_fails_as_it_trains_keeps_no_other_from_being_trained(
    write_study: Write, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(overrides=BASE_IS_FULL, branches=BRANCHES)
    assert train(path, fails="dash_order1_from_full") == 1
    said = capsys.readouterr().out
    assert said.count("its config or machine is wrong; see") == 1
    assert "1 of 5 runs failed: dash_order1_from_full" in said
    # it was not the last
    assert trained(path) == [run.name for run in runs_of(path)]
    for run in runs_of(path):
        assert (run.folder / "evaluation" / "held_out").is_dir() == (
            run.name not in ("full", "dash_order1_from_full")
        )


def test_slurm_gets_bases_first_and_branches_that_depend_on_their_job(
    write_study: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_study(points=SIZES[:2], overrides=BASE_IS_FULL, branches=BRANCHES)
    words = "--nodes 1 --gpus-per-node 2 --time 1:00:00 --inputs-later --dry-run"
    assert main(["study", "submit", str(path), f"--slurm={words}"]) == 0
    bases, branches = capfd.readouterr().out.split("#!/usr/bin/env bash")[1:]
    assert "--array=0-1\n" in bases
    assert "dependency" not in bases.partition("# ==== the job")[0]
    assert "--array=0-7\n" in branches
    assert "--dependency=afterok:JOB" in branches


def test_slurm_gets_no_base_where_its_branches_do_not_fit_the_processes(
    write_study: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = BRANCHES | {"overrides": BRANCHES["overrides"] | {"training.global_batch": 3}}
    path = write_study(points=SIZES[:1], overrides=BASE_IS_FULL, branches=odd)
    words = "--nodes 1 --gpus-per-node 2 --time 1:00:00 --inputs-later --dry-run"
    assert main(["study", "submit", str(path), f"--slurm={words}"]) == 2
    told = capfd.readouterr()
    assert "#!/usr/bin/env bash" not in told.out
    assert "training.global_batch=3 must be a multiple of 2" in told.err


def test_as_many_runs_as_gpus_are_trained_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from dash_megatron.studies.local import environments

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert len(environments(None, 1)) == 4
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(None, 2)] == ["0,1", "2,3"]
    assert environments(None, 8) == [{}]
