"""The model file that travels with the weights: it computes what training computed, and generates with a cache."""

import json
import logging
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache, pipeline
from transformers.utils import generic

from dash_megatron.hf import modeling_dash
from dash_megatron.hf.export import export_run
from dash_megatron.hf.importing import import_folder
from dash_megatron.hf.modeling_dash import entmax
from dash_megatron.ops import entmax as our_entmax
from tests.hf.conftest import WITH_FILE, YARN, training_logits

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


@pytest.mark.parametrize("name", WITH_FILE)
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


@pytest.mark.parametrize("name", WITH_FILE)
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


@pytest.mark.parametrize("name", WITH_FILE)
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
def test_a_cache_may_be_passed_by_the_name_that_transformers_gives_it_from_5_24_on(
    exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported("dash")
    cache = model.model(tokens[:, :70]).past_key_values
    logits = model(tokens[:, 70:], cache=cache).logits
    assert cache.get_seq_length() == 200
    torch.testing.assert_close(logits, model(tokens).logits[:, 70:], atol=TOLERANCE, rtol=0)


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


@pytest.mark.parametrize("name", ["dash", "mixed", "own_router"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_a_cropped_cache_goes_on_from_where_it_was_cut(
    name: str, static: bool, exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported(name)
    cache = StaticCache(config=model.config, max_cache_len=256) if static else DynamicCache()
    model(tokens[:, :139], past_key_values=cache)
    if static:
        # a length, as dynamic caches of releases before 5.24 take it
        with pytest.raises(ValueError, match="tokens_to_remove=75 must be below zero"):
            cache.layers[0].crop(75)
    for layer in cache.layers:
        layer.crop(-64)
    assert cache.get_seq_length() == 75
    other = torch.cat([tokens[:, :75], tokens.flip(0)[:, 75:]], dim=1)
    logits = model(other[:, 75:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(other).logits[:, 75:], atol=TOLERANCE, rtol=0)


def test_rows_that_end_with_padding_do_not_go_on(exported: Callable[..., Any], tokens: Tensor) -> None:
    model, *_ = exported("dash")
    mask, cache = torch.ones_like(tokens[:, :50]), DynamicCache()
    mask[1, 40:] = 0
    for columns in (45, 50):  # a prompt in pieces may
        first = cache.get_seq_length()
        model(tokens[:, first:columns], attention_mask=mask[:, :columns], past_key_values=cache)
    longer = F.pad(mask, (0, 1), value=1)
    with pytest.raises(ValueError, match="padded in front"):
        model(tokens[:, 50:51], attention_mask=longer, past_key_values=cache)
    # nor where masks of single tokens are not looked at otherwise, wherever padding came in
    cache = model(tokens[:, :30]).past_key_values
    row_starts = sys.modules[type(model).__module__]._row_starts
    row_starts(mask, cache, torch.empty(2, 20, 8, device="meta"))
    with pytest.raises(ValueError, match="padded in front"):
        row_starts(longer, cache, torch.empty(2, 1, 8, device="meta"))


def test_masks_with_holes_and_caches_of_other_kinds_are_errors(
    exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported("dash")
    mask = torch.ones_like(tokens)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="no padding between tokens"):
        model(tokens, attention_mask=mask)
    mask[0] = torch.arange(200) >= 150
    with pytest.raises(ValueError, match="tokens in every row; where a prompt comes in pieces"):
        model.generate(tokens, attention_mask=mask, prefill_chunk_size=100, max_new_tokens=2)
    model.config.sliding_window, model.config.layer_types = 8, ["sliding_attention"] * 2
    with pytest.raises(ValueError, match="beside a dynamic or static cache only"):
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=256))


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.7, 2.0])
def test_its_entmax_is_ours(alpha: float) -> None:
    z = torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    z[:, 20:].masked_fill_(z[:, 20:] > 0, -torch.inf)
    z[0] = -torch.inf
    torch.testing.assert_close(entmax(z, alpha), our_entmax(z, alpha), atol=1e-12, rtol=0)


PACKED = torch.tensor([[70, 2, 128], [33, 150, 17]])
"""Tokens of the documents in each of two rows of 200."""


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["dash", "mixed"])
@torch.no_grad()
def test_documents_in_one_row_are_computed_as_if_each_stood_alone(
    name: str, backend: str, exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported(name)
    for layer in model.model.layers:
        layer.self_attn.backend = backend
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in PACKED])
    found = model(tokens, position_ids=positions)
    alone = [
        model(part[None]).logits[0]
        for row, lengths in zip(tokens, PACKED, strict=True)
        for part in row.split(lengths.tolist())
    ]
    torch.testing.assert_close(found.logits.flatten(0, 1), torch.cat(alone), atol=TOLERANCE, rtol=0)
    assert found.past_key_values is None
    # the same behind and before padding, whose positions mean nothing
    padded, places = (F.pad(x, (5, 7), value=3) for x in (tokens, positions))
    mask = F.pad(torch.ones_like(tokens), (5, 7))
    logits = model(padded, position_ids=places, attention_mask=mask).logits[:, 5:205]
    torch.testing.assert_close(logits, found.logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_positions_of_padding_begin_no_document(exported: Callable[..., Any], tokens: Tensor) -> None:
    model, *_ = exported("dash")
    mask = torch.ones_like(tokens)
    mask[1, :21] = mask[0, 190:] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as `generate` has them
    found = model(tokens, attention_mask=mask, position_ids=positions)
    expected = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found.logits[mask == 1], expected[mask == 1], atol=0, rtol=0)
    assert found.past_key_values.get_seq_length() == 200


def test_generation_uses_no_name_that_transformers_warns_of(
    exported: Callable[..., Any], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(generic.logger, "warning_once", lambda text, *_: told.append(text))
    model, *_ = exported("dash")
    model.generate(tokens[:, :20], max_new_tokens=2, do_sample=False)
    assert told == []


def test_documents_in_one_row_have_no_cache_and_are_told_by_positions(
    exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported("dash")
    positions = torch.arange(100).repeat(2)[None]
    for options in ({"use_cache": True}, {"past_key_values": DynamicCache(), "use_cache": False}):
        with pytest.raises(ValueError, match="several documents in one row, which a cache cannot hold"):
            model(tokens, position_ids=positions, **options)
    with pytest.raises(ValueError, match="several documents in one row, which a cache cannot hold"):
        model.generate(tokens, position_ids=positions.expand(2, -1), max_new_tokens=2)
    with pytest.raises(ValueError, match="told apart by position_ids that begin again"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 100, 200]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_where_layers_are_computed_again(
    reentrant: bool, exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported("mixed")
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    counted = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: counted.append(1))
    for found, grad in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, grad, atol=TOLERANCE, rtol=0)
    assert len(counted) == 2
    with pytest.raises(ValueError, match="past_key_values must be None while gradient checkpointing"):
        model(tokens, past_key_values=DynamicCache())
    model.eval()
    assert model(tokens[:, :40]).past_key_values.get_seq_length() == 40


@torch.no_grad()
def test_logits_of_the_last_columns_or_of_those_named(exported: Callable[..., Any], tokens: Tensor) -> None:
    model, *_ = exported("dash")
    expected = model(tokens).logits
    for kept, columns in ((3, [197, 198, 199]), (torch.tensor([5, 0, 199]), [5, 0, 199])):
        logits = model(tokens, logits_to_keep=kept).logits
        torch.testing.assert_close(logits, expected[:, columns], atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match=r"logits_to_keep of shape \[2, 1\] must be a number or have one"):
        model(tokens, logits_to_keep=torch.tensor([[1], [2]]))


@torch.no_grad()
def test_the_model_without_its_head_is_no_dense_llama(
    exported: Callable[..., Any], tokens: Tensor, tmp_path: Path
) -> None:
    model, *_ = exported("dash")
    bare = AutoModel.from_pretrained(tmp_path / "dash", trust_remote_code=True).double().eval()
    found = bare(tokens).last_hidden_state
    torch.testing.assert_close(found, model.model(tokens).last_hidden_state, atol=0, rtol=0)


@torch.no_grad()
def test_hidden_states_are_those_between_the_layers_and_an_output_may_be_a_tuple(
    exported: Callable[..., Any], tokens: Tensor
) -> None:
    model, *_ = exported("dash")
    inner, outer = (each(tokens, output_hidden_states=True) for each in (model.model, model))
    first, second, last = outer.hidden_states
    assert torch.equal(first, model.get_input_embeddings()(tokens))
    assert torch.equal(model.model.norm(model.model.layers[1](second, *_places(model, tokens))), last)
    assert torch.equal(inner.last_hidden_state, last)
    assert model(tokens).hidden_states is None
    logits, cache = model(tokens, return_dict=False)
    assert torch.equal(logits, outer.logits)
    assert cache.get_seq_length() == 200
    options = {"max_new_tokens": 2, "output_hidden_states": True, "return_dict_in_generate": True}
    prompt, token = model.generate(tokens, **options).hidden_states
    assert [states[2].shape[1] for states in (prompt, token)] == [200, 1]
    with pytest.raises(ValueError, match="output_attentions must be False: no layer makes"):
        model(tokens, output_attentions=True)


def _places(model: Any, tokens: Tensor) -> tuple[Any, ...]:
    cos, sin = model.model.rotary(torch.arange(tokens.shape[1])[None], torch.float64)
    return cos, sin, torch.zeros(len(tokens), dtype=torch.int64), 0, None, None


def test_an_input_of_no_tokens_or_of_two_kinds_is_an_error(exported: Callable[..., Any]) -> None:
    model, *_ = exported("dash")
    empty = torch.zeros(1, 0, dtype=torch.int64)
    end = model.config.eos_token_id
    for run in (model, partial(model.generate, max_new_tokens=2)):
        with pytest.raises(ValueError, match=rf"the input has no tokens; .*input_ids=\[\[{end}\]\]"):
            run(empty)
    assert model.generate(max_new_tokens=2)[0, 0] == end
    for arguments in ({}, {"input_ids": empty, "inputs_embeds": torch.zeros(1, 3, 64)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


def test_a_pipeline_continues_a_text_and_has_nothing_to_say(
    write_run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = write_run("dash")
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    logger = logging.getLogger("transformers")  # which keeps its messages to itself
    logger.addHandler(caplog.handler)
    try:
        write = pipeline("text-generation", str(tmp_path / "hf"), trust_remote_code=True)
        texts = write(["def value", ""], max_new_tokens=3)
    finally:
        logger.removeHandler(caplog.handler)
    assert type(write.model).__name__ == "DashForCausalLM"
    assert texts[0][0]["generated_text"].startswith("def value")
    assert "not supported" not in caplog.text


def test_a_scaling_added_by_hand_keeps_the_base(write_run: Callable[..., Any], tmp_path: Path) -> None:
    config, _ = write_run("dash", model={"rope_theta": 5e5})
    export_run(config.run_dir, tmp_path / "hf", dtype="float32")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scaling": YARN}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert model.config.rope_parameters == {**YARN, "rope_theta": 5e5}
    with pytest.raises(ValueError, match=r"rope_parameters=.* and rope_scaling=.*yarn.* disagree"):
        import_folder(tmp_path / "hf", tmp_path / "start")


@pytest.mark.parametrize("version", ["4.57.6", "5.4.0"])
def test_an_older_transformers_is_told_before_what_it_lacks(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = ModuleType("transformers")
    older.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", older)
    with pytest.raises(ImportError, match=f"transformers {version} must be 5.5 or newer"):
        runpy.run_path(modeling_dash.__file__)
