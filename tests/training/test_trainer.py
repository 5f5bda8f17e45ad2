"""train.py as its users start it, and what a run leaves behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import yaml

from dash_megatron.config import config_from_dict, load_config
from dash_megatron.training import setup
from dash_megatron.training.metrics import StepMetrics, read_metrics
from dash_megatron.training.trainer import Trainer
from tests.conftest import Started, train_command
from tests.training.workers import keep_process_groups, train_all

ROOT = Path(__file__).parents[2]


def start(
    arguments: list[str], launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """On the CPU, unless CUDA_VISIBLE_DEVICES says otherwise."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments]
    environment = {"CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.fixture
def config_file(tiny_config: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config))
    return str(path)


def test_a_tensorboard_folder_that_cannot_be_written_is_refused_before_anything_is_computed(
    tiny_config: dict[str, Any],
) -> None:
    path = Path(tiny_config["run_dir"], "tensorboard")
    path.parent.mkdir()
    path.touch()
    tree = tiny_config | {"logging": {"tensorboard": True}}
    with pytest.raises(ValueError, match=f"the folder of logging.tensorboard={path}: File exists"):
        Trainer(config_from_dict(tree), {})


def test_kernels_are_refused_without_a_gpu_before_anything_is_computed(
    tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tree = tiny_config | {"attention": tiny_config["attention"] | {"backend": "triton"}}
    with pytest.raises(ValueError, match=r"attention\.backend=triton cannot run here"):
        Trainer(config_from_dict(tree), {})


def test_a_wrong_init_from_is_told_before_the_rows_are_ordered(
    config_file: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    arguments = ["--config", config_file, "training.init_from=nowhere"]
    code, output = Started(tmp_path / "log", train_command, *arguments).end()
    assert code == 2
    assert "error: training.init_from=nowhere" in output
    assert not Path(tiny_config["run_dir"], "index_cache").exists()


def test_train_alone_leaves_config_metrics_tensorboard_checkpoint(
    config_file: str, tiny_config: dict[str, Any]
) -> None:
    overrides = ["training.steps=3", "logging.tensorboard=true", "evaluation.every=2", "evaluation.samples=3"]
    overrides += ["evaluation.tasks=[copy]", "evaluation.tasks_every=3", "evaluation.task_samples=2"]
    result = start(["--config", config_file, *overrides])
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    assert re.search(
        r"step 2/3 \| loss \d.* \| lr .* \| grad norm .* tokens/s \| density \d+% \| validation loss .* left",
        lines[1],
    )
    run = Path(tiny_config["run_dir"])
    first, second, third = read_metrics(run)
    assert first.keys() == StepMetrics.__annotations__.keys()
    assert first["valid_loss"] is None
    assert second["valid_loss"] is not None
    assert [(part["from"], part["to"]) for part in second["valid_loss_by_position"]] == [(0, 64), (64, 128)]
    assert second["tasks"] is None
    assert third["tasks"] == {"copy": {"128": {"score": ANY, "nll": pytest.approx(5.8, abs=1.0)}}}
    assert second["tokens"] == 2 * 4 * 128
    assert len(second["density_per_layer"]) == len(second["chunks_selected_per_layer"]) == 2
    assert second["model_tflops_per_second"] > 0
    assert second["dense_equivalent_tflops_per_second"] > 0
    assert list((run / "tensorboard").iterdir())
    assert (run / "checkpoints" / "step_00000003").is_dir()
    assert (run / "config.yaml").read_text().startswith("# commit: ")
    assert load_config(run / "config.yaml").training.steps == 3
    assert re.search(r"validation loss \d\.\d+, unigram entropy of the corpus \d\.\d+", result.stdout)
    # what the start waits for, and nothing that would alarm its reader
    assert result.stdout.startswith("loading torch, Megatron-core and DeepSpeed\n")
    assert "ordering the rows of" in result.stderr
    assert "WARNING" not in result.stderr
    assert "untested" not in result.stdout + result.stderr


def test_training_on_cpu_compiles_nothing(config_file: str, tmp_path: Path) -> None:
    result = start(
        ["--config", config_file, "training.steps=1"],
        ("-X", "importtime"),
        PATH=str(tmp_path),  # no compiler, no ninja, no git
        TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "extensions").exists()
    # nor does it wait for the import of what could
    imported = re.findall(r"^import time:.* (\S+)$", result.stderr, re.MULTILINE)
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in imported
    assert not {"torch._inductor.compile_fx", "functorch.compile", "wandb.sdk"} & set(imported)


def test_torchrun_starts_two_processes_that_train_as_one(
    config_file: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    alone = ["--config", config_file, f"run_dir={tmp_path / 'alone'}"]
    code, output = Started(tmp_path / "log", train_command, *alone).end()
    assert code == 0, output
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    together = start(["--config", config_file], torchrun)
    assert together.returncode == 0, together.stderr
    assert (
        "2 process(es) on cpu: 2 data x 1 context x 1 tensor parallel, 2 micro-batch(es) of 1 a step"
        in together.stdout
    )
    # one process reports, and both trained on their share of the same batches
    assert len(re.findall(r"^step ", together.stdout, re.MULTILINE)) == 4
    losses = [
        [line["loss"] for line in read_metrics(run)] for run in (tmp_path / "alone", tiny_config["run_dir"])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layer=3", "did you mean model.layers"),
        ("training.global_batch=3", "training.global_batch=3 must be a multiple of 2"),
        ("data.train=[/nowhere/train]", "/nowhere/train.idx does not exist"),
        ("data.tokenizer=null", "data.tokenizer is empty"),
        ("model.vocab_size=64", "model.vocab_size=64 must be at least 320"),
        ("parallel.sequence=true", "parallel.sequence=true needs parallel.tensor > 1"),
        (
            "zero.options={overlap_com: true}",
            "it says: 1 validation error for DeepSpeedZeroConfig overlap_com ",
        ),
        ("zero.options={offload_optimizer: {device: cpu}}", "it says: You are using ZeRO-Offload"),
    ],
)
def test_a_wrong_setting_is_exit_code_2_before_any_process_group(
    override: str, message: str, config_file: str, tmp_path: Path
) -> None:
    # two processes are announced and the other never comes: whoever waits for it, hangs
    launcher = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    if override.startswith(("data.train", "zero.options")):
        launcher = {}  # data is looked at, and DeepSpeed started, by all processes together
    code, output = Started(
        tmp_path / "log", train_command, "--config", config_file, override, **launcher
    ).end()
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output


def test_rows_longer_than_positions_are_stretched_to_are_told(
    config_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def yarn(factor: float) -> list[str]:
        original = "original_max_position_embeddings: 32"
        return [
            "data.seq_length=128",
            f"model.rope_scaling={{rope_type: yarn, factor: {factor}, {original}}}",
        ]

    short = "data.seq_length=128 exceeds 64, the positions that model.rope_scaling stretches to (factor=2 x "
    arguments = ["--config", config_file, *yarn(2.0), "training.steps=1"]
    code, output = Started(tmp_path / "log", train_command, *arguments).end()
    assert code == 0, output
    assert short in output
    assert "set model.rope_scaling.factor=4\n" in output
    setup.warn_of_new_positions(load_config(config_file, yarn(4.0)))
    setup.warn_of_new_positions(load_config(config_file, ["data.seq_length=128"]))
    assert not caplog.text


def test_an_error_goes_to_standard_error_alone(config_file: str) -> None:
    result = start(["--config", config_file, "model.layer=3"])
    assert result.returncode == 2
    assert result.stderr.startswith("error: model.layer=3 is not a known key")
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_an_error_is_exit_code_2_even_where_python_would_abort_on_its_way_out(
    config_file: str, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    # as threads of libraries do now and then, while process groups are left
    late = "import os, sys\nclass Late:\n    def __del__(self, abort=os.abort):\n        abort()\nsys.late = Late()\n"
    # as Weights & Biases hears that a run failed
    hears = "import atexit\nexit = sys.exit\ndef hear(code):\n    atexit.register(print, 'heard of', code)\n    exit(code)\nsys.exit = hear\n"
    (tmp_path / "sitecustomize.py").write_text(late + hears)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = start(["--config", config_file, "data.train=[/nowhere/train]"], PYTHONPATH=path)
    assert result.returncode == 2, result.stderr
    assert "error: /nowhere/train.idx does not exist" in result.stderr
    assert "heard of 2" in result.stdout
    assert Path(tiny_config["run_dir"]).is_dir()
    assert not Path(tiny_config["run_dir"], "owner.json").exists()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_training_learns_under_every_zero_stage(
    stage: int, tiny_config: dict[str, Any], run_processes: Any
) -> None:
    tree = {**tiny_config, "zero": {"stage": stage}}
    tree["training"] = {"steps": 15, "global_batch": 4, "micro_batch": 2, "precision": "bf16"}
    run_processes(2, train_all, [(tree, None)])
    metrics = read_metrics(tree["run_dir"])
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_compiles_nothing_at_a_second_start(config_file: str, tmp_path: Path) -> None:
    caches = {name: str(tmp_path / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    found = []
    for number in (1, 2):
        arguments = ["--config", config_file, "model.head_dim=64", f"run_dir={tmp_path / str(number)}"]
        arguments += ["training.precision=bf16", "evaluation.every=2"]
        result = start(arguments, CUDA_VISIBLE_DEVICES="0", **caches)
        assert result.returncode == 0, result.stderr
        assert f"compiling the kernels that are not in {caches['TRITON_CACHE_DIR']}" in result.stdout
        print(re.findall("first step done after .*", result.stdout))
        found.append(set(tmp_path.rglob("*.cubin")))
    assert found[0]
    assert found[1] == found[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["dash", "full"])
@pytest.mark.parametrize("recompute", ["none", "selective", "attention", "full"])
def test_a_gpu_learns_in_bf16(
    kind: str, recompute: str, config_file: str, tiny_config: dict[str, Any]
) -> None:
    overrides = [f"attention.kind={kind}", f"training.recompute={recompute}", "model.head_dim=64"]
    overrides += ["training.precision=bf16", "training.steps=30", "optimizer.lr=3e-3"]
    result = start(["--config", config_file, *overrides], CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 0, result.stderr
    assert "1 process(es) on cuda" in result.stdout
    metrics = read_metrics(tiny_config["run_dir"])
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 2.0


def test_the_dense_twin_trains_from_the_same_config(tiny_config: dict[str, Any], run_processes: Any) -> None:
    tree = {**tiny_config, "attention": {"kind": "full", "chunk_size": 16}}
    run_processes(1, train_all, [(tree, None)])
    last = read_metrics(tree["run_dir"])[-1]
    assert last["density"] is None
    assert last["density_per_layer"] == [None, None]
    assert last["model_tflops_per_second"] == last["dense_equivalent_tflops_per_second"]


def test_two_processes_prefetching_data_train_as_one_that_does_not(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    one = {**tiny_config, "run_dir": str(tmp_path / "one")}
    two = {**tiny_config, "run_dir": str(tmp_path / "two"), "data": {**tiny_config["data"], "num_workers": 1}}
    run_processes(1, train_all, [(one, None)])
    run_processes(2, train_all, [(two, None)])
    losses = [[line["loss"] for line in read_metrics(tree["run_dir"])] for tree in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def break_weights(tree: dict[str, Any]) -> None:
    """One weight becomes infinite after the first step; the error's text is kept."""
    import torch

    from dash_megatron.config import config_from_dict

    module = keep_process_groups()
    trainer = module.Trainer(config_from_dict(tree))
    step = trainer.train_step

    def breaking_step() -> Any:
        result = step()
        with torch.no_grad():
            next(trainer.engine.model.parameters()).fill_(float("inf"))
        return result

    trainer.train_step = breaking_step
    try:
        trainer.run()
    except module.NonFiniteError as error:
        Path(tree["run_dir"], "error.json").write_text(json.dumps(str(error)))


def test_a_non_finite_loss_names_its_samples_and_saves_nothing(
    tiny_config: dict[str, Any], run_processes: Any
) -> None:
    run_processes(1, break_weights, {**tiny_config, "faults": {"non_finite": "halt"}})
    run = Path(tiny_config["run_dir"])
    message = json.loads((run / "error.json").read_text())
    assert (
        "the loss is nan (step 2, training samples 4 to 7). Start again with a lower optimizer.lr" in message
    )
    assert [line["step"] for line in read_metrics(run)] == [1]
    assert not (run / "checkpoints").exists()


def test_one_process_of_a_run_asks_git_for_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    for rank in range(3):
        monkeypatch.setattr(setup.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(setup, "code_commit", lambda rank=rank: asked.append(rank) or "abc")
        setup.about_this_code(torch.device("cpu"))
    assert asked == [0]
