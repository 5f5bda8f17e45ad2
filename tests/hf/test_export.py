"""Exporting a run: from every layout, the same numbers, or nothing at all."""

import json
import logging
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from dash_megatron.__main__ import main
from dash_megatron.checkpoint.weights import open_weights
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.hf import export, names, probe
from dash_megatron.hf.export import export_run
from dash_megatron.hf.folder import INDEX, FolderWeights
from dash_megatron.hf.importing import import_folder
from dash_megatron.hf.tokenizer import check_tokenizer
from tests.hf.conftest import MODELS, training_logits
from tests.training.test_resume import run_of
from tests.training.workers import train_all


def test_every_layout_exports_its_weights(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    runs = {
        "zero1": {"zero": {"stage": 1}},
        "zero1_bf16": {"zero": {"stage": 1}, "training": {"precision": "bf16"}},
        "zero3": {"zero": {"stage": 3}, "model": {"qk_norm": True, "tie_embeddings": True}},
    }
    trees = {name: run_of(tiny_config, tmp_path / name, **sections) for name, sections in runs.items()}
    for tree in trees.values():
        tree["training"] = {**tree["training"], "steps": 1}
    run_processes(2, train_all, [(tree, None) for tree in trees.values()])
    split = run_of(tiny_config, tmp_path / "tensor2", parallel={"tensor": 2}, training={"steps": 1})
    run_processes(2, train_all, [(split, None)])
    for name in (*trees, "tensor2"):
        report = export_run(tmp_path / name, tmp_path / "out" / name, dtype="float32")
        assert report.logits_difference < 1e-9
        tensors = read_folder(tmp_path / "out" / name)
        _, _, weights = open_weights(tmp_path / name)
        assert torch.equal(tensors["model.embed_tokens.weight"], weights["embedding.word_embeddings.weight"])
    card = (tmp_path / "out" / "zero1" / "README.md").read_text()
    assert "| loss |" in card
    assert "- It was trained on rows of 128 tokens;" in card
    assert re.search(r"attended to \d+% of the chunks of 16 tokens up to its own", card)
    assert "- The license of the weights is not named." in card
    settings = card.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(settings)["optimizer"]["lr"] == tiny_config["optimizer"]["lr"]
    # of the weights, which whoever trained them chooses
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert yaml.safe_load(settings)["data"]["train"] == ["train"]
    # neither of the run nor of its data
    assert "/" not in settings
    assert str(tmp_path) not in card


def test_a_small_model_is_one_file_and_a_large_one_several_of_the_same_tensors(
    write_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = write_run("dash")
    export_run(config.run_dir, tmp_path / "one", dtype="float32")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    monkeypatch.setattr("dash_megatron.hf.folder.FILE_BYTES", 1)
    export_run(config.run_dir, tmp_path / "several", dtype="float32")
    assert len(list((tmp_path / "several").glob("model-*-of-00004.safetensors"))) == 4
    assert (tmp_path / "several" / INDEX).is_file()
    one, several = read_folder(tmp_path / "one"), read_folder(tmp_path / "several")
    assert one.keys() == several.keys()
    assert all(torch.equal(tensor, several[name]) for name, tensor in one.items())


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors, one file after the other, each under the name that the index gives it."""
    index = FolderWeights(folder).files
    tensors = {
        name: (file.name, value)
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    assert {name: file for name, (file, _) in tensors.items()} == index
    return {name: value for name, (_, value) in tensors.items()}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_routers_select_in_the_probe_and_both_models_select_alike(
    name: str, write_run: Callable[..., Any], tmp_path: Path, tokens: Tensor
) -> None:
    config, weights = write_run(name)
    export_run(config.run_dir, tmp_path / "out", dtype="float32")
    ours = probe.run_training(weights, config, tokens[0], torch.float32)
    theirs = probe.run_exported(tmp_path / "out", tokens[0])
    wide = {key: value.double() for key, value in weights.items()}
    expected = training_logits(config, wide, tokens[:1])[0]
    torch.testing.assert_close(torch.cat([*ours.logits(320)], 1), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.cat([*theirs.logits(320)], 1), expected, atol=1e-9, rtol=0)
    for layer, (one, other) in enumerate(zip(ours.selected, theirs.selected, strict=True)):
        if config.attention.kind_of(layer) == "full":
            assert one is None
            assert other is None
        else:
            assert one is not None
            assert torch.equal(one, other)
            available = (torch.arange(200) // 16 + 1).sum() * one.shape[0]
            assert 0.2 < one.sum() / available < 0.95


@pytest.mark.parametrize("trust", [None, True])
@torch.no_grad()
def test_a_dense_run_is_exported_as_a_llama_that_needs_no_file(
    trust: bool | None, write_run: Callable[..., Any], tmp_path: Path, tokens: Tensor
) -> None:
    config, weights = write_run("full")
    export_run(config.run_dir, tmp_path / "full", dtype="float32")
    assert not list((tmp_path / "full").glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", trust_remote_code=trust).eval()
    assert type(model) is LlamaForCausalLM
    assert type(model.config) is LlamaConfig
    # by which others than transformers choose a class
    assert model.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(
        model(tokens).logits, training_logits(config, weights, tokens), atol=1e-4, rtol=0
    )
    card = (tmp_path / "full" / "README.md").read_text()
    assert "with full attention" in card
    assert "plain Llama, which transformers loads with no code of this folder" in card
    assert "trust_remote_code" not in card
    assert "chunks" not in card.partition("## Last metrics")[0]
    assert "kernels" not in card.partition("## Last metrics")[0]


LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
}
# what the Llama of transformers does not compute, and which of the tensors it would then ignore
NO_LLAMA: dict[str, tuple[str, dict[str, Any], str]] = {
    "dash": ("dash", {}, "indexer_q"),
    "norms": ("full_with_norms", {}, "_norm"),
    "biases": ("full", {"model": {"qkv_bias": True}}, "bias"),
    # of it transformers takes the short factors for a short text
    "longrope": ("full", {"model": {"rope_scaling": LONGROPE}}, ""),
}


@pytest.mark.parametrize("kind", NO_LLAMA)
@torch.no_grad()
def test_a_model_that_is_no_llama_is_refused_without_its_file_instead_of_loaded_as_one(
    kind: str,
    write_run: Callable[..., Any],
    tmp_path: Path,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, changes, ignored = NO_LLAMA[kind]
    config, weights = write_run(name, **changes)
    out, short = tmp_path / "out", tokens[:, :40]
    export_run(config.run_dir, out, dtype="float32")
    monkeypatch.setattr("builtins.input", Mock(side_effect=EOFError))  # it asks where there is a terminal
    for load in (AutoModelForCausalLM, AutoModel, AutoConfig):
        with pytest.raises(ValueError, match="pass the argument `trust_remote_code=True`"):
            load.from_pretrained(out)
    expected = training_logits(config, weights, short)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    assert model.config.architectures == [type(model).__name__] == ["DashForCausalLM"]
    torch.testing.assert_close(model(short).logits, expected, atol=1e-3, rtol=0)
    # a Llama's, of transformers' own tensor parallelism, would part heads from their indexer_q
    assert not model.supports_tp_plan

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    llama, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert "using a model of type `dash` to instantiate a model of type `llama`" in caplog.text
    assert all(ignored in key for key in info["unexpected_keys"])
    assert not info["missing_keys"]
    assert (llama(short).logits - expected).abs().max() > 0.1
    card = (out / "README.md").read_text()
    assert "Without `trust_remote_code=True` transformers refuses to load it" in card
    assert ("attends to everything" in card) == (name == "dash")


def test_peft_adapts_an_export_whose_modules_are_not_named_as_it_does_a_llama(
    write_run: Callable[..., Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (lm-eval[hf] brings it)")
    config, _ = write_run("dash")
    export_run(config.run_dir, tmp_path / "out", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for settings in (peft.LoraConfig(), peft.VeraConfig()):
        adapted = peft.get_peft_model(model, settings)
        assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}
        model = adapted.unload()


@torch.no_grad()
def test_a_loaded_export_is_saved_again_with_its_file(
    write_run: Callable[..., Any], tmp_path: Path, tokens: Tensor
) -> None:
    config, _ = write_run("own_router")
    export_run(config.run_dir, tmp_path / "first", dtype="float32")
    logits = []
    for folder, again in (("first", "second"), ("second", "third")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True).eval()
        model.save_pretrained(tmp_path / again)
        logits.append(model(tokens).logits)
    assert torch.equal(*logits)
    trees = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "third")]
    assert trees[0]["auto_map"] == trees[1]["auto_map"]
    assert trees[0]["model_type"] == trees[1]["model_type"] == "dash"
    import_folder(tmp_path / "third", tmp_path / "start")


def test_bfloat16_weights_are_the_rounded_ones(write_run: Callable[..., Any], tmp_path: Path) -> None:
    config, weights = write_run("dash", attention={"scaling_factor": 0.1})
    before = os.umask(0o027)
    report = export_run(config.run_dir, tmp_path / "out")
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    assert 0 < report.rounding < probe.BF16_TOLERANCE
    table = read_folder(tmp_path / "out")["model.embed_tokens.weight"]
    assert torch.equal(table, weights["embedding.word_embeddings.weight"].bfloat16())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.dtype == torch.bfloat16


def test_the_tokenizer_encodes_as_in_training(write_run: Callable[..., Any], tmp_path: Path) -> None:
    config, _ = write_run("full")
    export_run(config.run_dir, tmp_path / "out")
    fast, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer(config.data.tokenizer)
    assert fast.is_fast
    check_tokenizer(fast, ours)
    assert fast.decode(ours.encode(b"\xff\xfea\xc3")) == b"\xff\xfea\xc3".decode(errors="replace")
    # also what lm-eval begins texts with
    assert fast.eos_token_id == fast.bos_token_id == ours.eod
    # trainers end texts so
    assert fast("def x" + fast.eos_token).input_ids == [*ours.encode("def x"), ours.eod]
    fast.backend_tokenizer.model.dropout = 0.5
    with pytest.raises(ValueError, match="exported tokenizer encodes"):
        check_tokenizer(fast, ours)


def _rotated_qkv(qkv: Tensor, model: Any) -> Any:
    q, k, v = SPLIT_QKV(qkv, model)
    return q.roll(model.channels_per_head, 0), k, v


SPLIT_QKV = names._split_qkv
# of the run, what is done wrong, and the message (a key of the exported config grows by a tenth, a whole number by one, and a bool is
# turned)
WRONG: dict[str, tuple[str, str, str]] = {
    "heads in another order": ("dash", "heads", "other chunks"),
    "another router": ("dash", "layer_scaling_factors", "other chunks"),
    "other local chunks": ("mixed", "local_chunks", "other chunks"),
    "another query pool": ("mixed", "query_pool", "other chunks"),
    "other heads pooled": ("mixed", "pool_heads", "other chunks"),
    "another prior": ("dash", "sigma", "of the export"),
    "another norm": ("full", "rms_norm_eps", "logits of the export differ"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_export_that_computes_something_else_is_not_published(
    wrong: str, write_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change, message = WRONG[wrong]

    def changed_config(*arguments: Any) -> Any:
        config = make(*arguments)
        value = getattr(config, change)
        factors = value if isinstance(value, list) else [value]
        grown = [
            not each if isinstance(each, bool) else each + 1 if isinstance(each, int) else 1.1 * each
            for each in factors
        ]
        setattr(config, change, grown if isinstance(value, list) else grown[0])
        return config

    make = export.llama_config
    if change == "heads":
        monkeypatch.setattr(names, "_split_qkv", _rotated_qkv)
    else:
        monkeypatch.setattr(export, "llama_config", changed_config)
    config, _ = write_run(name)
    with pytest.raises(ValueError, match=message):
        export_run(config.run_dir, tmp_path / "out", dtype="float32")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_the_command_line_exports_and_says_what_is_wrong(
    write_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = write_run("full")
    out = str(tmp_path / "out")
    arguments = ["--dtype", "float32", "--license", "mit"]
    assert main(["convert", "to-hf", config.run_dir, out, *arguments]) == 0
    assert "license: mit\n" in (tmp_path / "out" / "README.md").read_text()
    told = capsys.readouterr().out
    assert re.search(
        r"tokens logits within \S+ of the training model, no layer of which selects chunks; rounding", told
    )
    assert main(["convert", "to-hf", config.run_dir, out]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", "to-hf", config.run_dir, out + "2", "--step", "7"]) == 2
    assert "no checkpoint of step 7" in capsys.readouterr().err
    assert main(["convert", "to-hf", config.run_dir, out + "2", "--dtype", "int8"]) == 2
    assert "--dtype=int8 must be one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "where"), [("dash", "every layer"), ("mixed", "the 2 of 3 layers that select")]
)
def test_an_export_says_of_which_layers_the_chunks_were_compared(
    name: str,
    where: str,
    write_run: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, _ = write_run(name)
    assert main(["convert", "to-hf", config.run_dir, str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert (
        f"tokens the same chunks in {where} as the training model, logits within" in capsys.readouterr().out
    )
    assert f"selected the same chunks in {where}, and\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("prompt", ["def value", ""], ids=["prompt", "empty"])
def test_a_run_and_its_export_draw_the_same_text(
    prompt: str,
    write_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, _ = write_run("dash")
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    drawn: list[list[int]] = []

    # the texts of random weights are mostly broken bytes, which the two tokenizers show differently
    def decode(_: Any, ids: Any, **__: Any) -> str:
        drawn.append(list(map(int, ids)))
        return ""

    monkeypatch.setattr(Tokenizer, "decode", decode)
    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", decode)
    asked = ["--prompt", prompt, "--max-new-tokens", "30", "--temperature", "2.5"]
    assert main(["sample", config.run_dir, *asked]) == 0
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path / "hf"), *asked])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "generate.py"))
    assert drawn[0] == drawn[2]
    assert len(drawn[0]) >= 30


def test_the_example_tells_of_a_folder_that_is_no_export(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "nothing", "--prompt", "x"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(__file__).parents[2] / "examples" / "generate.py"))
    assert "nothing has no config.json; give a folder of" in capsys.readouterr().err
