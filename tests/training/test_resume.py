"""A resumed run is the run that was never interrupted, bit for bit, and reads the next unseen sample."""

import json
from pathlib import Path
from typing import Any

import pytest

from dash_megatron.checkpoint.folder import finished_steps
from dash_megatron.checkpoint.weights import load_weights
from dash_megatron.config import config_from_dict
from dash_megatron.training.changes import describe_changes
from dash_megatron.training.metrics import read_metrics
from tests.gpus import in_float32_on, on_two_gpus
from tests.training.workers import train_all

MOVED = "not read: the run goes on from the factors that attention.target_density has moved"
TRAINED_WITH = "weights were trained with the former; checkpoint.check_loss=false says that it is meant"
# what a line of metrics.jsonl says of training rather than of the clock
EXACT = (
    "step",
    "loss",
    "valid_loss",
    "lr",
    "grad_norm",
    "tokens",
    "density_per_layer",
    "chunks_selected_per_layer",
)


def run_of(tree: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    changed = {name: {**tree.get(name, {}), **values} for name, values in sections.items()}
    return {**tree, **changed, "run_dir": str(folder)}


def samples_of(folder: Path, rank: int) -> dict[int, list[int]]:
    lines = (folder / f"samples_{rank}.jsonl").read_text().splitlines()
    return {line["step"]: line["samples"] for line in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("stage", "precision", "cuda"),
    [
        *((stage, "fp32", False) for stage in (0, 1, 2, 3)),
        *((stage, "bf16", False) for stage in (1, 3)),
        *(on_two_gpus(stage, "bf16") for stage in (1, 3)),
    ],
)
def test_an_interrupted_run_ends_bit_identical_to_one_that_was_not(
    stage: int,
    precision: str,
    cuda: bool,
    tiny_config: dict[str, Any],
    tiny_chats: Path,
    run_processes: Any,
    tmp_path: Path,
) -> None:
    tiny_config = in_float32_on(cuda, tiny_config)
    # one of the runs learns conversations beside text
    chats = [f"0.5 {tiny_chats / 'train'}"] if stage == 2 else []
    sections: dict[str, dict[str, Any]] = {
        "zero": {"stage": stage},
        "data": {"train": [*chats, f"0.5 {tiny_config['data']['train'][0]}"]},
        "training": {"steps": 6, "precision": precision},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 3, "samples": 5},
        "schedule": {"warmup_steps": 2},
    }
    whole = run_of(tiny_config, tmp_path / "whole", **sections)
    halves = run_of(tiny_config, tmp_path / "halves", **sections)
    # interrupted one step after it saved, so that a step is done twice
    run_processes(2, train_all, [(whole, None), (halves, 4), (halves, None)], cuda=cuda)

    expected, found = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "halves")
    assert [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    # sums on a GPU are of no fixed order
    rel = 0.01 if cuda else 0.0
    for one, other in zip(expected, found, strict=True):
        for key in EXACT:
            exact = not cuda or one[key] is None
            assert other[key] == (one[key] if exact else pytest.approx(one[key], rel=rel)), (one["step"], key)
    for rank in (0, 1):
        assert samples_of(tmp_path / "whole", rank) == samples_of(tmp_path / "halves", rank)

    weights, resumed = load_weights(tmp_path / "whole")[2], load_weights(tmp_path / "halves")[2]
    assert weights.keys() == resumed.keys()
    for name, weight in weights.items():
        assert (resumed[name] - weight).norm() <= rel * weight.norm(), name


def test_no_sample_is_read_twice_and_none_is_skipped_after_a_change_to_smaller_batches(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    large, small = (
        run_of(
            tiny_config,
            tmp_path / "run",
            checkpoint={"every": 2, "asynchronous": False},
            training={"steps": 4, "global_batch": batch},
        )
        for batch in (8, 2)
    )
    run_processes(2, train_all, [(large, 2), (small, None)])
    read = [
        index for rank in (0, 1) for step in samples_of(tmp_path / "run", rank).values() for index in step
    ]
    assert sorted(read) == list(range(2 * 8 + 2 * 2))
    tokens = [line["tokens"] for line in read_metrics(tmp_path / "run")]
    assert tokens == [samples * tiny_config["data"]["seq_length"] for samples in (8, 16, 18, 20)]


def test_only_the_newest_checkpoints_stay_and_half_ones_never_count(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = run_of(tiny_config, tmp_path / "run", checkpoint={"every": 1, "keep": 2})
    (tmp_path / "run" / "checkpoints" / "step_00000099.partial").mkdir(parents=True)
    run_processes(1, train_all, [(tree, None)])
    assert finished_steps(tmp_path / "run") == [3, 4]


def test_a_checkpoint_of_another_model_is_refused(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    first = run_of(tiny_config, tmp_path / "run", training={"steps": 2})
    second = run_of(tiny_config, tmp_path / "run", model={"ffn_hidden_size": 128})
    with pytest.raises(pytest.fail.Exception, match=r"model.ffn_hidden_size=128 differs from 96"):
        run_processes(1, train_all, [(first, None), (second, None)])


def test_every_setting_that_differs_on_a_resume_is_in_one_table(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    wsd = {"kind": "wsd", "decay_steps": 1}
    held = {"target_density": 0.5}
    first = run_of(tiny_config, tmp_path / "run", training={"steps": 2}, schedule=wsd, attention=held)
    second = run_of(
        tiny_config,
        tmp_path / "run",
        training={"steps": 3, "seed": 5, "init_from": "elsewhere"},
        attention={**held, "chunk_size": 32, "scaling_factor": 9.0},
        zero={"stage": 2},
        schedule=wsd,
    )
    run_processes(1, train_all, [(first, None), (second, None)])
    log = (tmp_path / "rank_0.log").read_text()
    table = log.partition("settings differ from those of the checkpoint:\n")[2].splitlines()
    rows = [line.split(None, 3) for line in table]
    assert rows[0] == ["setting", "stored", "now", "effect"]
    assert [row[:3] for row in rows[1:7]] == [
        ["attention.chunk_size", "16", "32"],
        ["attention.scaling_factor", "1.0", "9.0"],
        ["zero.stage", "1", "2"],
        ["training.steps", "2", "3"],
        ["training.seed", "1234", "5"],
        ["training.init_from", "null", "elsewhere"],
    ]
    assert (
        rows[1][3]
        == "weights were trained with the former; checkpoint.check_loss=false says that it is meant"
    )
    assert rows[2][3] == MOVED
    assert rows[6][3] == "not read: the run goes on from its own checkpoint"
    assert table[7].startswith("learning rate: 0.001 in step 2, 0.001 in step 3")
    assert log.count("settings differ") == 1


def test_settings_that_differ_are_told_with_what_that_does_and_a_decay_that_is_undone() -> None:
    tree = {
        "run_dir": "unused",
        "model": {"layers": 2, "hidden_size": 8, "heads": 2, "kv_heads": 1, "ffn_hidden_size": 16},
        "data": {"seq_length": 128},
        "optimizer": {"lr": 0.5},
        "schedule": {"kind": "wsd", "decay_steps": 4},
        "training": {"steps": 10, "global_batch": 1},
    }
    longer = config_from_dict(run_of(tree, Path("unused"), training={"steps": 20}))
    told = describe_changes(tree, longer, step=10)
    assert told is not None
    assert "learning rate: 0.05 in step 10, 0.5 in step 11: it had begun to decay, which is undone" in told
    assert "undone" not in str(describe_changes(tree, longer, step=6))
    # the new decay has begun too, at a higher rate
    a_little = config_from_dict(run_of(tree, Path("unused"), training={"steps": 12}))
    assert "0.05 in step 10, 0.162 in step 11: it had begun" in str(describe_changes(tree, a_little, step=10))
    for before, after in (("cosine", "cosine"), ("cosine", "wsd"), ("wsd", "constant")):
        ended = {**tree, "schedule": {"kind": before}}
        gone_on = config_from_dict(
            run_of(ended, Path("unused"), training={"steps": 20}, schedule={"kind": after})
        )
        assert "it had begun to decay, which is undone" in str(describe_changes(ended, gone_on, step=10))
    higher = config_from_dict(run_of(tree, Path("unused"), optimizer={"lr": 0.6}))
    assert str(describe_changes(tree, higher, step=5)).endswith("0.5 in step 5, 0.6 in step 6")
    warming = {**tree, "schedule": {**tree["schedule"], "warmup_steps": 3}}
    longer = config_from_dict(run_of(warming, Path("unused"), training={"steps": 20}))
    assert "undone" not in str(describe_changes(warming, longer, step=2))
    for section, value, effect in (
        ("attention", {"target_density": 0.5}, "holds from the next step on"),
        ("model", {"rope_theta": 5e5}, "checkpoint.check_loss=false says that it is meant"),
    ):
        other = config_from_dict(run_of(tree, Path("unused"), **{section: value}))
        assert str(describe_changes(tree, other, step=1)).endswith(effect)
    # of a run that had a target, has dropped it, and starts once more
    other = config_from_dict(run_of(tree, Path("unused"), attention={"scaling_factor": 9}))
    assert str(describe_changes(tree, other, step=1, moved=True)).endswith(MOVED)
    assert str(describe_changes(tree, other, step=1)).endswith(TRAINED_WITH)
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    told = str(describe_changes(tree, config_from_dict(run_of(tree, Path("unused"), model=scaled)), step=1))
    assert [line.split()[:3] for line in told.splitlines()[2:]] == [
        ["model.rope_scaling.rope_type", "null", "linear"],
        ["model.rope_scaling.factor", "null", "4.0"],
    ]
    assert describe_changes(tree, config_from_dict(tree), step=10) is None


def test_changes_tell_whole_values_and_of_a_mapping_what_differs(tiny_config: dict[str, Any]) -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "truncate": False}
    folder = Path("/a/folder/of/which/the/name/is/longer/than/a/column/of/the/table")
    density = {0: 1.0, 20: 0.5}
    tree = run_of(
        tiny_config, folder / "a", model={"rope_scaling": yarn}, attention={"target_density": density}
    )
    other = run_of(
        tree,
        folder / "b",
        model={"rope_scaling": yarn | {"factor": 16.0, "mscale": 1.0}},
        attention={"target_density": density | {20: 0.25}},
        data={"seq_length_curriculum": {0: 128}},
    )
    told = str(describe_changes(tree, config_from_dict(other), step=1)).splitlines()
    assert [line.split(maxsplit=3) for line in told[2:]] == [
        ["run_dir", f"{folder}/a", f"{folder}/b", "the folder was moved or copied"],
        ["model.rope_scaling.factor", "8.0", "16.0", TRAINED_WITH],
        ["model.rope_scaling.mscale", "null", "1.0", TRAINED_WITH],
        ["attention.target_density.20", "0.5", "0.25", "holds from the next step on"],
        ["data.seq_length_curriculum.0", "null", "128", "holds from the next step on"],
    ]
    # columns stand under each other where what is in them is short
    assert len({line.index("holds from") for line in told[-2:]}) == 1
    back = str(describe_changes(other, config_from_dict(tree), step=1)).splitlines()
    assert back[-1].split(maxsplit=3)[:3] == ["data.seq_length_curriculum.0", "128", "null"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"training": {"steps": 1}},
            r"training.steps=1 is below 2, the steps that \S+step_00000002 has finished",
        ),
        (
            {"attention": {"kind": "full"}},
            r"attention.kind=full differs from dash, whose weights it cannot use: \S+ is missing in this run and has shape",
        ),
        (
            {"attention": {"full_layers": [0]}},
            r"attention.full_layers=\[0\] differs from \[\], whose weights",
        ),
    ],
)
def test_a_change_that_cannot_work_names_its_key(
    sections: dict[str, Any], message: str, tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    first = run_of(tiny_config, tmp_path / "run", training={"steps": 2})
    second = run_of(tiny_config, tmp_path / "run", **({"training": {"steps": 2}} | sections))
    with pytest.raises(pytest.fail.Exception, match=message):
        run_processes(1, train_all, [(first, None), (second, None)])
