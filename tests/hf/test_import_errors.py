"""Hugging Face folders that no run may start from: damaged, or of models that training would not compute."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dash_megatron.__main__ import main
from dash_megatron.hf.architectures import check_architecture
from dash_megatron.hf.export import export_run
from dash_megatron.hf.folder import INDEX, new_folder
from dash_megatron.hf.importing import import_folder
from dash_megatron.training.initial import load_initial_weights
from tests.hf.llamas import MINICPM, first_logits, run_config, save_llama


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
CORRUPTED: dict[str, tuple[Any, str]] = {
    "missing": (lambda x: x.pop(K_PROJ), f"no tensor {K_PROJ}, which must have shape"),
    "extra": (
        lambda x: x.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(3)}),
        "has tensor .*bias",
    ),
    "shape": (
        lambda x: x.update({K_PROJ: torch.ones(3, 64)}),
        r"has shape \[3, 64\] and must have \[32, 64\]",
    ),
    "quantized": (
        lambda x: x.update({K_PROJ: x[K_PROJ].char()}),
        f"tensor {K_PROJ} is of torch.int8; give weights that are not quantized",
    ),
    "not finite": (
        lambda x: x[K_PROJ][3].fill_(torch.nan),
        f"tensor {K_PROJ} has values that are not finite",
    ),
}


@pytest.mark.parametrize("case", CORRUPTED)
def test_a_wrong_tensor_is_an_error_that_names_it(case: str, tmp_path: Path) -> None:
    change, message = CORRUPTED[case]
    save_llama(tmp_path / "hf")
    _edit(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=message):
        import_folder(tmp_path / "hf", tmp_path / "start")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_damaged_file_and_a_wrong_index_are_errors(
    write_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dash_megatron.hf.folder.FILE_BYTES", 1)  # several files
    config, _ = write_run("full")
    folder = tmp_path / "hf"
    export_run(config.run_dir, folder, dtype="float32")
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"].pop("model.norm.weight")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"disagree about tensor model.norm.weight"):
        import_folder(folder, tmp_path / "start")
    (folder / file).write_bytes((folder / file).read_bytes()[:-7])
    with pytest.raises(ValueError, match="is damaged"):
        import_folder(folder, tmp_path / "start")
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        import_folder(folder, tmp_path / "start")
    for text in ("{", "[]", "{}", '{"weight_map": null}', '{"weight_map": {"a": 1}}'):
        (folder / INDEX).write_text(text)
        with pytest.raises(ValueError, match=rf"{INDEX} is damaged .*; download it again"):
            import_folder(folder, tmp_path / "start")


def test_a_damaged_tokenizer_is_left_out_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_llama(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    assert import_folder(tmp_path / "hf", tmp_path / "start").tokenizer is None
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}/hf/tokenizer.json is left out: data.tokenizer=")


def test_two_processes_do_not_make_one_folder_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf")
    with new_folder(tmp_path / "start") as folder:
        (folder / "left").touch()
        with pytest.raises(ValueError, match="start is being made by another process; wait for that one"):
            import_folder(tmp_path / "hf", tmp_path / "start")
        assert [path.name for path in folder.iterdir()] == ["left"]
        shutil.copytree(folder, tmp_path / "of_killed")
    (tmp_path / "of_killed").rename(tmp_path / ".other.partial")
    import_folder(tmp_path / "hf", tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["model.safetensors", "model.yaml"]


def test_a_disk_that_cannot_take_the_weights_ends_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llama(tmp_path / "hf")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # as a quota does
    try:
        code = main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "start")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "error: File too large: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scaled rope": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type=dynamic, but training knows",
    ),
    "scaled rope, older name": (
        {"rope_parameters": None, "rope_scaling": {"type": "proportional"}},
        "rope_type=proportional, but training knows",
    ),
    "scaled rope, a field missing": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        r"needs \['high_freq_factor', 'low_freq_factor'\]",
    ),
    "scaled rope, a field too many": (
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "beta_fast": 32}},
        r"does not use \['beta_fast'\]",
    ),
    "part of a head": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 must be 1",
    ),
    "positions of each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e4}}},
        "rope_parameters has full_attention=.* with rope_type=default",
    ),
    "positions of three axes": (
        {"rope_scaling": {"type": "default", "mrope_section": [4, 2, 2]}},
        r"rope_scaling has mrope_section=\[4, 2, 2\], and training does not know",
    ),
    "a text for a mapping": ({"rope_scaling": "linear"}, "has a value of another type than its key needs"),
    "a list for a number": ({"num_hidden_layers": [2]}, "has a value of another type than its key needs"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act=gelu must be silu"),
    "bias": ({"attention_bias": True}, "attention_bias=true"),
    "positions of several kinds": (
        {"model_type": "qwen2", "use_mrope": True},
        "use_mrope=true must be false",
    ),
    "biases": ({"qkv_bias": True}, "qkv_bias=true must be false"),
    "biases elsewhere": (
        {"model_type": "internlm3", "qkv_bias": True, "bias": True},
        "bias=true must be false",
    ),
    "nothing": ({"hidden_size": None}, "no hidden_size"),
    "another architecture": (
        {"model_type": "granite"},
        "model_type=granite must be one of llama, .*; granite has multipliers on embeddings",
    ),
    "no architecture": ({"model_type": None}, "model_type=None must be one of llama"),
    "an unknown key": (
        {"logits_scaling": 8.0, "unused": None},
        "has logits_scaling=8.0, and training does not know .* in llama; if",
    ),
    "a key of another architecture": (
        MINICPM | {"model_type": "llama"},
        "has scale_emb=12, scale_depth=1.4, dim",
    ),
    "quantized": ({"quantization_config": {"bits": 4}}, "has quantization_config="),
    "a key of a later export": (
        {"chunk_size": 16, "scaling_factor": 1.0, "sigma": 2.0, "estimate_diagonal": True, "chunk_bias": 0.5},
        "has chunk_bias=0.5, and training does not know",
    ),
    "code of its own": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}},
        "auto_map names modeling_x.XForCausalLM",
    ),
    "windows": ({"model_type": "mistral", "sliding_window": 128}, "sliding_window=128 must be null"),
    "windows in silence": ({"model_type": "mistral"}, "sliding_window=4096 must be null"),
    "windows in some layers": (
        {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
        r"layer_types has \['sliding_attention'\]",
    ),
    "windows from a layer on": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        "sliding_window=64 must be null",
    ),
    "two scalings": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        "rope_parameters=.* and rope_scaling=.*yarn.* disagree",
    ),
    "two bases": ({"rope_theta": 1e4}, "rope_parameters=.* and rope_theta=10000.0 disagree"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_training_would_not_compute_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = REFUSED[case]
    save_llama(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=message):
        import_folder(tmp_path / "hf", tmp_path / "start")
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "start")]) == 2
    assert "config.json" in capsys.readouterr().err


def test_windows_that_a_config_names_but_does_not_use_are_no_windows() -> None:
    unused = {
        "use_mrope": False,
        "use_sliding_window": False,
        "max_window_layers": 24,
        "sliding_window": 32768,
    }
    check_architecture({"model_type": "qwen2", "num_hidden_layers": 28, **unused})  # as Qwen2.5 is published


def test_a_folder_that_is_none_or_has_a_damaged_config_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "file").touch()
    for name, message in (
        ("file", f"{tmp_path}/file is a file; give a local folder"),
        ("none", f"{tmp_path}/none does not exist; give a local folder"),
        ("damaged", f"{tmp_path}/damaged/config.json is not JSON"),
    ):
        assert main(["convert", "from-hf", str(tmp_path / name), str(tmp_path / "start")]) == 2
        assert message in capsys.readouterr().err


def test_a_run_refuses_weights_of_another_model(
    tiny_config: dict[str, Any], tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dash_megatron.hf.folder.FILE_BYTES", 1)  # several files
    save_llama(tmp_path / "hf")
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "start")]) == 0
    run = run_config(tiny_config, tmp_path / "start")
    model = run.model.model_copy(update={"rope_theta": 1e4, "norm_eps": 0.5})
    wrong = run.model_copy(update={"model": model})
    told = r"model.rope_theta=10000.0 differs from 50000.0, model.norm_eps=0.5 differs from \S+ in .*; set them to those; for longer"
    with pytest.raises(ValueError, match=told):
        first_logits(wrong, tokens)
    save_file({"decoder.unknown": torch.ones(1)}, tmp_path / "start" / "extra.safetensors")
    index = json.loads((tmp_path / "start" / INDEX).read_text())
    index["weight_map"]["decoder.unknown"] = "extra.safetensors"
    (tmp_path / "start" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has tensor decoder.unknown"):
        first_logits(run, tokens)
    with pytest.raises(FileNotFoundError, match="convert from-hf"):
        load_initial_weights(None, tmp_path / "hf", run.model)  # type: ignore[arg-type]
