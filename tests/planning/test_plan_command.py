"""`python -m dash_megatron plan`, and the page of its numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_megatron.__main__ import main
from dash_megatron.config import load_config
from dash_megatron.planning.routing import AssumedRouting
from dash_megatron.planning.search import estimate_configured
from dash_megatron.planning.step_time import StepEstimate

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "8b_128k.yaml")


def test_the_table_lists_layouts_by_speed_and_the_configs_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", CONFIG, "--gpus", "64", "--top", "3", "--density", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "131,072 tokens x 64 sequences = 8,388,608 tokens a step, density 10%" in lines[0]
    assert lines[2].split()[:3] == ["tensor", "context", "data"]
    speeds = [float(line.split()[-4].replace(",", "")) for line in lines[3:6]]
    assert speeds == sorted(speeds, reverse=True)
    assert "the config's own layout:" in lines


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.01234, "0.0123"), (0.5, "0.500"), (0.9996, "1.00"), (12.34, "12.34")]
)
def test_steps_below_a_second_are_told_in_three_digits(
    seconds: float, told: str, tiny_config: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config))
    monkeypatch.setattr(StepEstimate, "seconds", seconds)
    assert main(["plan", "--config", str(tmp_path / "config.yaml"), "--gpus", "1"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:3] == ["1", "1", "1"])
    assert told in row.split()


def test_a_vocabulary_that_the_config_leaves_open_is_the_tokenizers(
    tiny_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = []
    for rows in (None, 320):
        tree = {**tiny_config, "model": {**tiny_config["model"], "vocab_size": rows}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        assert main(["plan", "--config", str(tmp_path / "config.yaml"), "--gpus", "1", "--json"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0]["configured"] == documents[1]["configured"]


def test_json_holds_memory_bytes_time_and_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "--config",
        CONFIG,
        "--gpus",
        "128",
        "--json",
        "--top",
        "2",
        "training.recompute=full",
    ]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["layouts"]) == 2
    assert document["configured"]["recompute"] == "full"
    best = document["layouts"][0]
    assert best["fits"]
    assert best["seconds"] == pytest.approx(sum(best["seconds_parts"].values()))
    assert best["tokens_per_second_per_gpu"] == pytest.approx(64 * 131072 / best["seconds"] / 128)
    assert best["memory_gib"] == pytest.approx(sum(best["memory_parts_gib"].values()))
    longest = max(best["seconds_parts"], key=best["seconds_parts"].get)
    assert best["bound"].startswith(longest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "64", "--density", "0"], "--density 0.0 must be above 0"),
        (["--gpus", "64", "--peak-density", "2"], "--peak-density 2.0 must be above 0 and at most 1"),
        (["--gpus", "64", "--locality", "-1"], "--locality -1.0 must be at least 0"),
        (["--gpus", "64", "--price", "-1"], "--price -1.0 must be a number of at least 0"),
        (["--gpus", "64", "--imbalance", "nan"], "--imbalance nan must be a number of at least 1"),
        (["--gpus", "64", "--memory-gib", "nan"], "--memory-gib nan must be a number above 0"),
        (["--gpus", "64", "--memory-gib", "-80"], "--memory-gib -80.0 must be a number above 0"),
        (["--gpus", "64", "--gpu", "T4"], "--gpu T4 must be one of B200, H200"),
        (["--gpus", "64", "--profile", "nowhere"], "nowhere must be the folder of a run"),
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--gpus", "1"], "--gpus 1: nothing fits"),
        (["--gpus", "7"], "--gpus 7: no tensor x context x data split"),
        (
            ["--gpus", "7", "training.global_batch=64"],
            "; try training.global_batch=63, or another number of GPUs",
        ),
        (["--gpus", "64", "--top", "0"], "--top 0 must be at least 1"),
        (["--gpus", "64", "model.vocab_size=null"], "set model.vocab_size, such as model.vocab_size=128256"),
        (["--gpus", "64", "model.layer=3"], "did you mean model.layers?"),
    ],
)
def test_wrong_arguments_are_one_line_that_says_what_to_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", CONFIG, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_overrides_stand_on_both_sides_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = "zero.stage=3", "model.layers=40", "model.layers=48"
    assert main(["plan", first, "--config", CONFIG, "--gpus", "64", second, "--json", third]) == 0
    mixed = json.loads(capsys.readouterr().out)
    assert main(["plan", "--config", CONFIG, "--gpus", "64", "--json", first, second, third]) == 0
    assert json.loads(capsys.readouterr().out) == mixed


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [
        (["plan", "a.b=1", "--config", CONFIG, "--gpus", "64", "c.d=2", "--tops", "3"], "c.d=2 --tops 3"),
        (["sample", "runs/a", "--seed", "1", "training.seed=1"], "training.seed=1"),
    ],
)
def test_an_option_that_no_command_has_is_refused(
    arguments: list[str], unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {unknown}\n")


def _layouts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--config", CONFIG, "--gpus", "128", "--json", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    return {**document, "best": document["layouts"][0]}


def test_days_and_cost_are_those_of_all_steps_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    best = _layouts(capsys, "--price", "2", "training.steps=1000")["best"]
    assert best["days"] == pytest.approx(1000 * best["seconds"] / 86400)
    assert best["cost"] == pytest.approx(2 * 128 * 24 * best["days"])


def test_a_run_of_less_than_an_hour_takes_some_days_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", CONFIG, "--gpus", "128", "training.steps=200"]
    days = _layouts(capsys, "training.steps=200")["best"]["days"]
    assert 0.005 < days < 1 / 24
    assert main(["plan", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[3].split()[-2] == f"{days:.2f}"


def test_another_gpu_has_its_own_speed_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    h200, b200, a100 = (
        _layouts(capsys, "--gpu", gpu, "--routing", "1.5", "training.recompute=attention")["configured"]
        for gpu in ("H200", "B200", "A100")
    )
    assert h200["fits"]
    assert not a100["fits"]
    for part in ("matmul", "attention"):
        assert h200["seconds_parts"][part] / b200["seconds_parts"][part] == pytest.approx(2250 / 989)
        assert a100["seconds_parts"][part] / h200["seconds_parts"][part] == pytest.approx(989 / 312)


def test_gpus_without_launches_of_their_own_or_like_theirs_attend_over_tiles(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # tiles of which every token selects for itself are where pairs are worth it
    for routing, longer in (("1.5", False), ("7", True)):
        h200, h100, a100 = (
            _layouts(
                capsys, "--gpu", gpu, "--memory-gib", "140", "--routing", routing, "parallel.context_comm=a2a"
            )["configured"]["seconds_parts"]["attention"]
            for gpu in ("H200", "H100", "A100")
        )
        # an H100 is as fast as an H200, and an A100 by as much slower as its products are
        assert h100 == h200
        slower = a100 / h200 * 312 / 989
        assert (slower > 1.1) == longer
        assert (slower == pytest.approx(1)) != longer


def test_a_profile_corrects_compute_by_how_long_its_steps_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(CONFIG, ["training.global_batch=8"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    modelled = estimate_configured(config, 8, AssumedRouting(density=0.25, peak_density=0.25)).seconds
    rate = config.training.global_batch * config.data.seq_length / modelled
    lines = [
        {"step": step, "tokens_per_second": rate / slow, "density": 0.25, "processes": 8}
        for step, slow in enumerate((50, 1.5, 1.5, 1.6), 1)
    ]
    same = {"loss": 3.0, "valid_loss": None, "gpu_memory_gib": 61.5}
    text = "".join(json.dumps(line | same) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    plain, corrected = _layouts(capsys), _layouts(capsys, "--profile", str(tmp_path))
    before, after = plain["configured"]["seconds_parts"], corrected["configured"]["seconds_parts"]
    for part in ("matmul", "elementwise", "attention", "optimizer"):
        assert after[part] == pytest.approx(1.5 * before[part])
    assert after["context"] == before["context"]
    profile = corrected["profile"]
    states = profile["modelled_states_gib"]
    held = (61.5 - states) / (profile["modelled_memory_gib"] - states)
    before, after = plain["configured"]["memory_parts_gib"], corrected["configured"]["memory_parts_gib"]
    for part in ("activations", "working"):
        assert after[part] == pytest.approx(held * before[part])
    for part in ("weights", "gradients", "optimizer", "reserved"):
        assert after[part] == before[part]
    assert main(["plan", "--config", CONFIG, "--gpus", "128", "--profile", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "on 8 GPUs at density 25%" in line
    assert "1.50 times as long; memory 61.5 GiB" in line
    (tmp_path / "metrics.jsonl").write_text(text.replace("61.5", "null"))
    assert main(["plan", "--config", CONFIG, "--gpus", "128", "--profile", str(tmp_path)]) == 2
    assert "trained on CPUs and must be a run on GPUs" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text(text[: text.index("\n") + 1])
    assert main(["plan", "--config", CONFIG, "--gpus", "128", "--profile", str(tmp_path)]) == 2
    assert "has 1 logged lines and must have 3 or more" in capsys.readouterr().err


def test_a_layout_that_does_not_divide_is_named_beside_the_found_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--config", CONFIG, "--gpus", "4", "--density", "0.1", "--peak-density", "0.1"]) == 0
    assert "does not run on 4 GPUs: parallel.tensor=1 x parallel.context=8 = 8" in capsys.readouterr().out


def test_a_plan_is_for_the_density_that_the_config_ends_with(capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*arguments: str) -> float:
        assert main(["plan", "--config", CONFIG, "--gpus", "64", "--json", *arguments]) == 0
        density: float = json.loads(capsys.readouterr().out)["routing"]["density"]
        return density

    target = "attention.target_density={0: 1.0, 100: 0.3}"
    assert planned() == 0.1
    assert planned(target) == 0.3
    assert planned("--density", "0.2", target) == 0.2


def test_choices_that_neighbours_do_not_share_cost_attention(capsys: pytest.CaptureFixture[str]) -> None:
    def parts(*arguments: str) -> dict[str, float]:
        found: dict[str, float] = _layouts(capsys, *arguments)["configured"]["seconds_parts"]
        return found

    runs, trained, independent = (parts("--routing", name) for name in ("runs", "trained", "independent"))
    assert runs["attention"] < trained["attention"] < independent["attention"]
    assert runs["matmul"] == trained["matmul"] == independent["matmul"]
    assert parts() == trained
    assert parts("--routing", "1") == pytest.approx(runs)
    pooled = parts("attention.query_pool=16", "attention.pool_heads=true")
    assert runs["attention"] < pooled["attention"] < trained["attention"]
    assert main(["plan", "--config", CONFIG, "--gpus", "128", "--routing", "0.5"]) == 2
    assert "--routing 0.5 must be trained, runs, independent, or a number" in capsys.readouterr().err


def test_the_table_says_how_much_is_visited(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", CONFIG, "--gpus", "128", "--routing", "2.5", "--top", "1"]) == 0
    assert "kernels visit 2.49 times the pairs selected (--routing 2.5)" in capsys.readouterr().out


def test_the_flag_of_earlier_releases_names_what_replaced_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", CONFIG, "--gpus", "128", "--listed", "4.6"]) == 2
    assert "--listed was replaced: --routing 4.6 says the same" in capsys.readouterr().err
