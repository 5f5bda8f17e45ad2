"""Hugging Face folders as the start of a run."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dash_megatron.__main__ import main
from dash_megatron.checkpoint.folder import MODEL_SECTIONS
from dash_megatron.config import AttentionConfig, RopeScaling, config_from_dict
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.hf.architectures import KNOWN_MODEL_TYPES
from dash_megatron.hf.export import export_run
from dash_megatron.hf.folder import FolderWeights
from dash_megatron.hf.importing import import_folder
from dash_megatron.hf.modeling_dash import DashConfig, DashForCausalLM
from dash_megatron.layers import init_weights
from dash_megatron.layers.baselines import ZERO_INITIALIZED
from dash_megatron.training.density import DensityController
from dash_megatron.training.initial import load_initial_weights
from tests.hf.conftest import MODELS, training_model
from tests.hf.llamas import MINICPM, SHAPE, change_config, first_logits, run_config, save_llama
from tests.training.test_resume import run_of
from tests.training.workers import one_step


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_comes_back_bit_for_bit(
    name: str, dtype: str, write_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dash_megatron.hf.probe.BF16_TOLERANCE", 10.0)  # large random weights, sharp routers
    config, weights = write_run(name)
    export_run(config.run_dir, tmp_path / "hf", dtype=dtype)
    sections = import_folder(tmp_path / "hf", tmp_path / "back").sections
    found = FolderWeights(tmp_path / "back")
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(found[key], value.to(getattr(torch, dtype))), key
    saved = config_from_dict({**config.model_dump(), **sections})
    if config.attention.kind != "full":
        assert saved.attention == config.attention
    resolved = config.model.model_copy(update={"head_dim": config.model.channels_per_head, "vocab_size": 320})
    assert saved.model == resolved
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == Path(config.data.tokenizer).read_bytes()


def test_an_older_export_has_what_came_since_turned_off(
    write_run: Callable[..., Any], tmp_path: Path
) -> None:
    config, _ = write_run("dash")
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    tree = json.loads((tmp_path / "hf" / "config.json").read_text())
    tree["model_type"] = "llama"
    del tree["auto_map"]["AutoConfig"]
    for key in ("density_budget", "learned_scaling", "local_chunks", "query_pool"):
        del tree[key]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(tree))
    sections = import_folder(tmp_path / "hf", tmp_path / "back").sections
    assert config_from_dict({**config.model_dump(), **sections}).attention == config.attention
    router = DashForCausalLM(DashConfig.from_pretrained(tmp_path / "hf")).model.layers[0].self_attn.router
    assert (router.local_chunks, router.query_pool) == (0, 1)


PLAIN: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen2, tied": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **SHAPE, tie_word_embeddings=True, use_sliding_window=True, sliding_window=8, max_window_layers=2
        ),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
}
# computed by a Llama here: their code comes with their weights
LIKE_LLAMA: dict[str, dict[str, Any]] = {
    "minicpm": {**MINICPM, "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"}},
    "internlm3": {"model_type": "internlm3", "bias": False, "qkv_bias": False},
    "internlm3, biases": {"model_type": "internlm3", "bias": False, "qkv_bias": True},
    "smollm2": {"is_llama_config": True, "rope_interleaved": False, "_attn_implementation_autoset": True},
}


@torch.no_grad()
def draw_norms_and_biases(model: torch.nn.Module) -> None:
    """Move what starts at 1 or 0."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += torch.randn_like(parameter) * 0.3


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_a_dense_model_computes_the_same_under_full_attention(
    name: str, tiny_config: dict[str, Any], tmp_path: Path, tokens: Tensor
) -> None:
    kind, config = PLAIN[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    draw_norms_and_biases(model)
    model.save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "start")
    run = run_config(tiny_config, tmp_path / "start", kind="full")
    torch.testing.assert_close(first_logits(run, tokens), model(tokens).logits, atol=1e-4, rtol=0)
    dash = run_config(tiny_config, tmp_path / "start", chunk_size=32, learned_scaling=True)
    first_chunk = tokens[:, :32]
    torch.testing.assert_close(first_logits(dash, first_chunk), model(first_chunk).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", LIKE_LLAMA)
@torch.no_grad()
def test_a_model_that_is_a_llama_by_another_name_computes_the_same(
    name: str, tiny_config: dict[str, Any], tmp_path: Path, tokens: Tensor
) -> None:
    torch.manual_seed(0)
    # Qwen2 is a Llama with biases
    biased = LIKE_LLAMA[name].get("qkv_bias")
    model = (
        Qwen2ForCausalLM(Qwen2Config(**SHAPE)) if biased else LlamaForCausalLM(LlamaConfig(**SHAPE))
    ).eval()
    draw_norms_and_biases(model)
    model.save_pretrained(tmp_path / "hf")
    change_config(tmp_path / "hf", LIKE_LLAMA[name])
    import_folder(tmp_path / "hf", tmp_path / "start")
    if "scale_emb" in LIKE_LLAMA[name]:
        scaled = {"embed_tokens": 12.0, "o_proj": 1.4 / 2**0.5, "down_proj": 1.4 / 2**0.5, "lm_head": 16 / 64}
        for key, module in model.named_modules():
            if (factor := scaled.get(key.rpartition(".")[2])) is not None:
                module.register_forward_hook(lambda _, __, output, factor=factor: output * factor)
    run = run_config(tiny_config, tmp_path / "start", kind="full")
    torch.testing.assert_close(first_logits(run, tokens), model(tokens).logits, atol=1e-4, rtol=0)


def test_every_architecture_that_is_taken_has_its_logits_compared() -> None:
    compared = {config.model_type for _, config in PLAIN.values()}
    compared |= {tree.get("model_type", "llama") for tree in LIKE_LLAMA.values()}
    compared |= {DashConfig.model_type}  # of exports, which come back bit for bit
    assert compared == set(KNOWN_MODEL_TYPES)


@torch.no_grad()
def test_a_dense_model_goes_on_with_nsa_whose_own_weights_start_fresh(
    tiny_config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_llama(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "start")
    config = run_config(tiny_config, tmp_path / "start", kind="nsa", chunk_size=32, nsa={"window": 32})
    with training_model(config) as model, caplog.at_level("INFO"):
        init_weights(model, seed=1, std=0.02)
        drawn = {name: value.clone() for name, value in model.named_parameters()}
        load_initial_weights(model, config.training.init_from, config.model)
        loaded = {name for name, value in model.named_parameters() if not torch.equal(value, drawn[name])}
    given = FolderWeights(tmp_path / "start")
    fresh = {name.rpartition(".")[2] for name in set(drawn) - set(given)}
    assert fresh == {*ZERO_INITIALIZED, "key_mlp_in", "value_mlp_in"}
    # norms are 1 in both
    assert loaded == {name for name in given if "norm" not in name}
    assert "has no gate_bias, gate_weight, key_mlp_in" in caplog.text
    assert "for 2 layers: these weights start as they do in a new run" in caplog.text


@torch.no_grad()
def test_multipliers_of_minicpm_are_folded_into_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_llama(tmp_path / "hf", MINICPM, tie_word_embeddings=True)
    sections = import_folder(tmp_path / "hf", tmp_path / "start").sections
    assert not sections["model"]["tie_embeddings"]
    before, after = FolderWeights(tmp_path / "hf"), FolderWeights(tmp_path / "start")
    table = before["model.embed_tokens.weight"]
    torch.testing.assert_close(after["embedding.word_embeddings.weight"], table * 12)
    torch.testing.assert_close(after["output_layer.weight"], table / 4)
    torch.testing.assert_close(
        after["decoder.layers.1.mlp.linear_fc2.weight"],
        before["model.layers.1.mlp.down_proj.weight"] * 1.4 / 2**0.5,
    )


def test_every_layout_starts_from_the_folder(
    tiny_config: dict[str, Any], run_processes: Any, write_run: Callable[..., Any], tmp_path: Path
) -> None:
    config, weights = write_run("dash")
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    import_folder(tmp_path / "hf", tmp_path / "start")
    start = {"training": {"init_from": str(tmp_path / "start")}, "zero": {"stage": 3}}
    tree = run_of(tiny_config, tmp_path / "tensor2", parallel={"tensor": 2}, **start)
    run_processes(2, one_step, [("tensor2", tree)], str(tmp_path))
    found = torch.load(tmp_path / "tensor2.pt")["first_weights"]
    for key, value in weights.items():
        assert torch.equal(found[key], value), key


def test_a_run_with_a_target_goes_on_with_the_folders_scaling_factors_as_with_a_runs(
    write_run: Callable[..., Any], tmp_path: Path
) -> None:
    config, _ = write_run("own_router")
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "start")]) == 0
    with training_model(config) as model:
        earlier = load_initial_weights(model, tmp_path / "start", config.model)
        assert earlier is not None
        # layer 1 is full attention's
        cores: Any = {layer: SimpleNamespace(scaling_factor=1.0) for layer in (0, 2)}
        DensityController(AttentionConfig(target_density=0.5), cores).begin_as(earlier)
    assert [core.scaling_factor for core in cores.values()] == [10.0, 10.0]
    note = (tmp_path / "start" / MODEL_SECTIONS).read_text()
    assert "attention must keep kind, full_layers,\n# learned_scaling and router_projections" in note


def test_another_tokenizer_than_the_weights_learnt_is_told(
    write_run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = write_run("full")
    own = Tokenizer(str(config.data.tokenizer))
    other: Any = SimpleNamespace(path="other.model", fingerprint="0" * 64)
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    import_folder(tmp_path / "hf", tmp_path / "start")
    with training_model(config) as model:
        load_initial_weights(model, tmp_path / "start", config.model, own)
        assert "data.tokenizer" not in caplog.text
        load_initial_weights(model, tmp_path / "start", config.model, other)
    told = f"data.tokenizer=other.model has fingerprint {'0' * 12}, but {tmp_path / 'start'} was trained with a tokenizer of "
    assert f"{told}{own.fingerprint[:12]}, whose tokens its weights know" in caplog.text


def test_two_descriptions_of_rope_that_agree_are_taken(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    both = {"rope_scaling": yarn, "rope_theta": 5e4, "rope_parameters": {**yarn, "rope_theta": 5e4}}
    save_llama(tmp_path / "hf", both)
    model = import_folder(tmp_path / "hf", tmp_path / "start").sections["model"]
    assert model["rope_theta"] == 5e4
    assert {key: value for key, value in model["rope_scaling"].items() if value is not None} == yarn


def test_a_run_may_rescale_positions_to_go_on_with_a_longer_context_but_not_forget_to(
    tiny_config: dict[str, Any],
    tmp_path: Path,
    tokens: Tensor,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_llama(tmp_path / "hf", max_position_embeddings=128)
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "start")]) == 0
    told = "its positions were trained up to 128: for a longer data.seq_length change model.rope_scaling, as"
    assert told in capsys.readouterr().out
    run = run_config(tiny_config, tmp_path / "start")
    yarn = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    longer = run.model_copy(update={"model": run.model.model_copy(update={"rope_scaling": yarn})})
    with caplog.at_level(logging.INFO):
        found = first_logits(longer, tokens)
    stretched = (
        "model.rope_scaling=rope_type='yarn' factor=4.0 original_max_position_embeddings=128, not None as in"
    )
    assert f"positions are rescaled: {stretched}" in caplog.text
    assert not torch.allclose(found, first_logits(run, tokens))
    sections = tmp_path / "start" / MODEL_SECTIONS
    tree = yaml.safe_load(sections.read_text())
    tree["model"]["rope_scaling"] = yarn.model_dump()
    sections.write_text(yaml.safe_dump(tree))
    assert torch.equal(found, first_logits(longer, tokens))
    with pytest.raises(ValueError, match=r"model.rope_scaling=None differs from rope_type='yarn'"):
        first_logits(run, tokens)
