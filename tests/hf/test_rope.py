"""Scaled rotary frequencies: those of transformers, in training and in the model file, and carried through folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_megatron.config import RopeScaling
from dash_megatron.hf.importing import import_folder
from dash_megatron.hf.modeling_dash import DashForCausalLM
from dash_megatron.hf.modeling_dash import rotary_frequencies as of_the_model_file
from dash_megatron.layers.rotary import attention_factor, rotary_frequencies
from tests.hf.conftest import LLAMA3, YARN
from tests.hf.llamas import SHAPE, first_logits, run_config

# channels of `SHAPE`'s heads: 16
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [1.0 + n for n in range(8)],
    "original_max_position_embeddings": 100,
    "factor": 2.56,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, exact borders": {**YARN, "truncate": False, "beta_slow": 0.5},
    "yarn, its own factor": {**YARN, "attention_factor": 0.83},
    "yarn, two weights": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "longrope": LONG,
    "longrope, its own factor": {**LONG, "attention_factor": 1.4},
}


def dense_config(scaling: dict[str, Any], **changes: Any) -> LlamaConfig:
    """A dense Llama of 256 positions."""
    rope = {**scaling, "rope_theta": 5e4}
    return LlamaConfig(**{**SHAPE, "rope_parameters": rope, "max_position_embeddings": 256, **changes})


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_frequencies_are_those_of_transformers_bit_for_bit(name: str, head_dim: int) -> None:
    scaling = dict(SCALINGS[name])
    for key in {"short_factor", "long_factor"} & scaling.keys():
        scaling[key] = scaling[key] * (head_dim // 16)
    config = dense_config(scaling, head_dim=head_dim)
    ours = RopeScaling(**scaling)
    for seq_length in (64, 256):
        config.max_position_embeddings = seq_length
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=seq_length)
        with torch.device("meta"):  # on which models are built
            found = rotary_frequencies(head_dim, 5e4, ours, seq_length)
            also, its_factor = of_the_model_file(config)
        assert torch.equal(found, expected)
        assert torch.equal(also, expected)
        assert attention_factor(ours) == pytest.approx(factor, rel=1e-15)
        assert its_factor == factor


@pytest.mark.parametrize("kind", ["dynamic", "foo"])
def test_the_model_file_refuses_frequencies_that_training_does_not_know(kind: str) -> None:
    config = dense_config({"rope_type": "linear", "factor": 4.0})
    config.rope_parameters["rope_type"] = kind  # as by hand in config.json
    with pytest.raises(ValueError, match=f"rope_type={kind} must be default, linear, llama3, yarn, longrope"):
        of_the_model_file(config)


def test_a_scaling_given_in_place_of_the_files_must_name_the_base() -> None:
    config = dense_config({"rope_type": "linear", "factor": 4.0})
    # as AutoModelForCausalLM.from_pretrained(..., rope_scaling={...}) does
    config.rope_scaling = {**YARN}  # which transformers adds to
    with pytest.raises(ValueError, match="must have rope_theta"):
        of_the_model_file(config)


@pytest.mark.parametrize("name", SCALINGS)
@torch.no_grad()
def test_a_dense_model_with_scaled_rope_goes_on_as_it_was(
    name: str, tiny_config: dict[str, Any], tmp_path: Path, tokens: Tensor
) -> None:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(dense_config(SCALINGS[name])).eval()
    dense.save_pretrained(tmp_path / "hf")
    sections = import_folder(tmp_path / "hf", tmp_path / "start").sections
    kept = {key: value for key, value in sections["model"]["rope_scaling"].items() if value is not None}
    assert kept == SCALINGS[name]
    tiny_config["data"]["seq_length"] = 256
    run = run_config(tiny_config, tmp_path / "start", kind="full")
    expected = dense(tokens).logits
    torch.testing.assert_close(first_logits(run, tokens), expected, atol=1e-4, rtol=0)
    plain = run.model_copy(update={"model": run.model.model_copy(update={"rope_scaling": None})})
    with pytest.raises(ValueError, match=r"model.rope_scaling=None differs"):
        first_logits(plain, tokens)
    as_ours = DashForCausalLM(dense_config(SCALINGS[name], full_attention_layers=[0, 1])).eval()
    as_ours.load_state_dict(dense.state_dict())
    torch.testing.assert_close(as_ours(tokens).logits, expected, atol=1e-4, rtol=0)


def test_what_a_folder_leaves_open_is_what_transformers_takes(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "hf")
    tree = json.loads((tmp_path / "hf" / "config.json").read_text())
    del tree["rope_parameters"]
    long = {key: value for key, value in LONG.items() if key not in ("factor", "rope_type")}
    older = {"rope_theta": 5e5, "rope_scaling": {**long, "type": "longrope"}, "max_position_embeddings": 300}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(tree | older))
    model = import_folder(tmp_path / "hf", tmp_path / "start").sections["model"]
    config = LlamaConfig.from_pretrained(tmp_path / "hf")
    assert model["rope_theta"] == config.rope_parameters["rope_theta"] == 5e5
    scaling = RopeScaling(**model["rope_scaling"])
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](config)
    assert torch.equal(rotary_frequencies(16, 5e5, scaling, 100), expected)
    assert attention_factor(scaling) == factor
