"""The model file that travels with the weights: it computes what training computed, and generates with a cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from dash_megatron.hf.export import export_run
from dash_megatron.hf.modeling_dash import entmax
from dash_megatron.ops import entmax as our_entmax
from tests.hf.conftest import MODELS, training_logits

# float64, sums in another order. In float32 a chunk at the very edge of the support, in or out, moves the mean log prior
# of its token by much more than rounding.
TOLERANCE = 1e-9
# float32, for tokens whose router stands at no edge
FLOAT32_TOLERANCE = 1e-4


@pytest.fixture
def exported(write_run: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`exported(name)` gives a model as transformers loads it from its folder, with the run's config and weights."""

    def export(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, dict[str, Tensor]]:
        config, weights = write_run(name)
        export_run(config.run_dir, tmp_path / name, dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert type(model).__name__ == "DashForCausalLM"
        return model.to(dtype).eval(), config, {key: value.to(dtype) for key, value in weights.items()}

    return export


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_loaded_model_gives_the_logits_of_training(
    name: str, exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, config, weights = exported(name)
    expected = training_logits(config, weights, tokens)
    torch.testing.assert_close(model(tokens).logits, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_loaded_model_gives_the_logits_of_training_in_float32(
    exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, config, weights = exported("dash", torch.float32)
    worst_BN = (model(tokens).logits - training_logits(config, weights, tokens)).abs().amax(-1)
    assert (worst_BN <= FLOAT32_TOLERANCE).float().mean() > 0.98


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_greedy_generation_is_the_same_with_a_cache_and_without(
    name: str, exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported(name)
    prompt = tokens[:, :70]  # ends inside a chunk; three borders follow
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    assert cached.shape[1] == 110


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pieces_of_a_prompt_through_the_cache_give_its_logits(
    name: str, exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported(name)
    cache, parts = DynamicCache(), []
    for part in tokens.split([3, 13, 1, 40, 64, 1, 78], dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, atol=TOLERANCE, rtol=0)
    if not model.model.layers[0].self_attn.is_full:
        assert cache.layers[0].summary.shape[2] == 200 // 16


@pytest.mark.parametrize("name", ["dash", "mixed"])
@torch.no_grad()
def test_static_caches_and_prompts_in_pieces_generate_the_same(
    name: str, exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported(name)
    mask = torch.ones_like(tokens)
    mask[1, :21] = 0  # starts inside a chunk
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "attention_mask": mask[:, :70]}
    expected = model.generate(tokens[:, :70], **options)
    static = {"cache_implementation": "static", **options}
    assert torch.equal(model.generate(tokens[:, :70], **static), expected)
    assert torch.equal(model.generate(tokens[:, :70], prefill_chunk_size=24, **options), expected)
    assert torch.equal(model.generate(tokens[:, :70], prefill_chunk_size=24, **static), expected)


@torch.no_grad()
def test_a_static_cache_keeps_its_place_in_memory_and_can_be_reset(
    exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported("dash")
    cache = StaticCache(config=model.config, max_cache_len=256)
    expected, places = model(tokens).logits, set()
    for _ in range(2):
        parts = [
            model(part, past_key_values=cache).logits for part in tokens.split([3, 61, 1, 1, 134], dim=1)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=TOLERANCE, rtol=0)
        places.add(cache.layers[0].keys.data_ptr())
        cache.reset()
    assert len(places) == 1


@torch.no_grad()
def test_sampling_draws_the_same_with_every_cache_and_without(
    exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported("dash")
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 3.0, "top_k": 50, "eos_token_id": None}
    texts = []
    kinds: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}, {}]
    for seed, kind in zip((1, 1, 1, 2), kinds, strict=True):
        torch.manual_seed(seed)
        texts.append(model.generate(tokens[:, :70], **options, **kind))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[3])


@pytest.mark.parametrize("name", ["dash", "mixed"])
@torch.no_grad()
def test_left_padding_changes_neither_logits_nor_what_is_generated(
    name: str, exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported(name)
    rows = [tokens[0, :90], tokens[1, :57]]
    padded, mask = torch.zeros(2, 90, dtype=torch.int64), torch.zeros(2, 90, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, -len(row) :], mask[index, -len(row) :] = row, 1
    logits = model(padded, attention_mask=mask).logits
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **options)
    for index, row in enumerate(rows):
        torch.testing.assert_close(
            logits[index, -len(row) :], model(row[None]).logits[0], atol=TOLERANCE, rtol=0
        )
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)
        assert torch.equal(together[index, 90 - len(row) :], alone[0])


@pytest.mark.parametrize("name", ["dash", "mixed"])
@torch.no_grad()
def test_beams_carry_their_summaries_along(name: str, exported: Callable[..., Any], tokens: Tensor) -> None:
    model, *_ = exported(name)
    options = {"max_new_tokens": 30, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    without = model.generate(tokens[:, :40], use_cache=False, **options)
    assert torch.equal(model.generate(tokens[:, :40], **options), without)
    assert torch.equal(model.generate(tokens[:, :40], cache_implementation="static", **options), without)


@pytest.mark.parametrize("name", ["dash", "mixed"])
@torch.no_grad()
def test_a_cropped_cache_goes_on_from_where_it_was_cut(
    name: str, exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported(name)
    cache = model(tokens[:, :139]).past_key_values
    cache.crop(-64)
    other = torch.cat([tokens[:, :75], tokens.flip(0)[:, 75:]], dim=1)
    logits = model(other[:, 75:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(other).logits[:, 75:], atol=TOLERANCE, rtol=0)


def test_masks_with_holes_and_caches_of_other_kinds_are_errors(
    exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported("dash")
    mask = torch.ones_like(tokens)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="no padding between them"):
        model(tokens, attention_mask=mask)
    model.config.sliding_window, model.config.layer_types = 8, ["sliding_attention"] * 2
    with pytest.raises(ValueError, match="beside a dynamic or static cache only"):
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=256))


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.7, 2.0])
def test_its_entmax_is_ours(alpha: float) -> None:
    z = torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    z[:, 20:].masked_fill_(z[:, 20:] > 0, -torch.inf)
    z[0] = -torch.inf
    torch.testing.assert_close(entmax(z, alpha), our_entmax(z, alpha), atol=1e-12, rtol=0)
