"""Generation through the package's cache and kernels: the same tokens as the model file computes by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from dash_megatron.hf import fast_cache, fast_layer
from dash_megatron.hf.fast_layer import FastLayer
from dash_megatron.hf.modeling_dash import DashForCausalLM
from tests.ops.kernels_under_test import CUDA, DEVICE
from tests.ops.quick_interpreter import quicken

# float64, sums in another order
TOLERANCE = 1e-9
# a router of single queries, among all past chunks
SINGLE = {"local_chunks": 0, "query_pool": 1, "pool_heads": False}
# a router with projections of its own
OWN = {"router_projections": True}
GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def _model(dtype: torch.dtype = torch.float64, **changes: Any) -> DashForCausalLM:
    """Two layers of large random weights, so that routers select: the first with DashAttention, as all or but the last.

    Each router sees the mean of more queries than there are in a chunk, and leaves the chunk before to be always on.
    """
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 320, "num_hidden_layers": 2, "chunk_size": 16}
    router = {"scaling_factor": 3.0, "sigma": 2.0, "estimate_diagonal": True, "alpha": 1.5}
    router |= {"local_chunks": 1, "query_pool": 20, "pool_heads": True}
    model = DashForCausalLM(LlamaConfig(**(shape | router | changes)))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # matrices, summary queries and factors of routing scores
        if parameter.dim() > 1 or parameter.shape[0] in (2, 32):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3
    return model.to(dtype).eval().requires_grad_(False)


def _use(model: DashForCausalLM, backend: str) -> DashForCausalLM:
    for layer in model.model.layers:
        layer.self_attn.backend = backend
    return model


@pytest.fixture
def tokens() -> Tensor:
    """Two rows of 150 tokens, more than nine chunks."""
    return torch.randint(1, 320, (2, 150), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def both(tokens: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """`both(model, prompt, **options)` generates with this file's kernels (their reference), and without."""

    def generate(model: DashForCausalLM, prompt: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        texts = [
            _use(model, backend).generate(prompt, **GREEDY | options) for backend in ("reference", "torch")
        ]
        return texts[0], texts[1]

    return generate


def _left_padding(tokens: Tensor, columns: int) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[1, :columns] = 0
    return mask


@pytest.mark.parametrize("padding", [0, 21], ids=["no padding", "left padding"])
@pytest.mark.parametrize("full", [[], [0], [1]], ids=["dash", "full first", "full last"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_greedy_text_is_that_of_the_model_file_alone(
    padding: int, full: list[int], cache: dict[str, str], both: Callable[..., Any], tokens: Tensor
) -> None:
    model, prompt = _model(full_attention_layers=full, **({} if padding else SINGLE)), tokens[:, :70]
    ours, expected = both(model, prompt, attention_mask=_left_padding(prompt, padding), **cache)
    assert torch.equal(ours, expected)
    assert ours.shape[1] == 110


def test_greedy_text_in_float32_is_that_of_the_model_file_alone(
    both: Callable[..., Any], tokens: Tensor
) -> None:
    prompt = tokens[:, :70]
    ours, expected = both(
        _model(torch.float32, learned_scaling=True), prompt, attention_mask=_left_padding(prompt, 21)
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("router", [{}, OWN], ids=["shared", "own router"])
def test_beams_carry_their_cache_along(
    router: dict[str, Any], both: Callable[..., Any], tokens: Tensor
) -> None:
    for options in ({}, {"cache_implementation": "static"}):
        mask = _left_padding(tokens[:, :40], 5)
        ours, expected = both(_model(**router), tokens[:, :40], num_beams=3, attention_mask=mask, **options)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("router", [{}, OWN], ids=["shared", "own router"])
@pytest.mark.parametrize(
    "make_cache", [DynamicCache, lambda: StaticCache(LlamaConfig(num_hidden_layers=2), 160)]
)
def test_pieces_of_a_padded_prompt_give_the_logits_of_all_at_once(
    router: dict[str, Any], make_cache: Callable[[], Any], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pieces are attended few queries at a time, and the cache doubles
    monkeypatch.setattr(fast_layer, "MAX_SCORES", 4 * 10 * 7)
    monkeypatch.setattr(fast_layer, "SPARE_COLUMNS", 4)
    model, mask, cache, parts = _model(**router), _left_padding(tokens, 2), make_cache(), []
    expected, past = _use(model, "torch")(tokens, attention_mask=mask).logits, 0
    _use(model, "reference")
    for part in tokens.split([3, 13, 1, 60, 1, 72], dim=1):
        past += part.shape[1]
        parts.append(model(part, attention_mask=mask[:, :past], past_key_values=cache).logits)
    assert all(isinstance(layer, FastLayer) for layer in cache.layers)
    assert cache.layers[0].store.lengths.tolist() == [150, 148]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("router", [{}, OWN], ids=["shared", "own router"])
def test_a_padded_prompt_gives_the_logits_and_gradients_of_the_file(
    router: dict[str, Any], tokens: Tensor
) -> None:
    model, real = _model(**router).requires_grad_(True), _left_padding(tokens, 21).bool()
    results = []
    for backend in ("reference", "torch"):
        model.zero_grad()
        logits = _use(model, backend)(tokens, attention_mask=real.long()).logits
        logits[real].square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([logits[real].detach(), *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=1e-9)


@pytest.mark.parametrize("router", [{}, OWN], ids=["shared", "own router"])
def test_a_cropped_cache_goes_on_from_where_it_was_cut(router: dict[str, Any], tokens: Tensor) -> None:
    model, mask = _model(**router), _left_padding(tokens, 21)
    other = torch.cat([tokens[:, :75], tokens.flip(0)[:, 75:]], dim=1)
    expected = _use(model, "torch")(other, attention_mask=mask).logits
    cache = _use(model, "reference")(tokens[:, :140], attention_mask=mask[:, :140]).past_key_values
    cache.crop(-65)
    assert cache.get_seq_length() == 75
    for last in (76, 77, 150):
        first = cache.get_seq_length()
        logits = model(other[:, first:last], attention_mask=mask[:, :last], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[:, first:last], atol=TOLERANCE, rtol=0)
    # as the drafts of transformers 5.5 do
    cache.crop(140)
    logits = model(other[:, 140:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, 140:], atol=TOLERANCE, rtol=0)


def test_a_cache_says_when_too_many_columns_were_cropped_to_know_the_queries_before(tokens: Tensor) -> None:
    model = _model()
    for first, second in (("reference", "reference"), ("torch", "torch"), ("reference", "torch")):
        cache = _use(model, first)(tokens[:, :140]).past_key_values
        cache.crop(-fast_layer.SPARE_QUERIES - 2)
        with pytest.raises(ValueError, match="router of query_pool=20 sees 19: no more than 64 columns"):
            _use(model, second)(tokens[:, 74:75], past_key_values=cache)
    cache = _use(_model(**SINGLE), "reference")(tokens[:, :140]).past_key_values
    cache.crop(-100)


def test_a_cache_says_when_too_many_columns_were_cropped_to_know_the_keys_of_the_router(
    tokens: Tensor,
) -> None:
    model = _model(**OWN | {"query_pool": 1})
    for first, second in (("reference", "reference"), ("torch", "torch"), ("reference", "torch")):
        cache = _use(model, first)(tokens[:, :140]).past_key_values
        cache.crop(-fast_layer.SPARE_QUERIES - 2)
        with pytest.raises(ValueError, match=r"1[34] (keys of the router|routing keys) before column 74"):
            _use(model, second)(tokens[:, 74:75], past_key_values=cache)


def test_a_prompt_that_leaves_no_graph_to_the_cache_goes_on_with_the_routers_keys(tokens: Tensor) -> None:
    model = _model(**OWN)
    expected = _use(model, "torch")(tokens).logits
    cache = _use(model.requires_grad_(True), "reference")(tokens[:, :70]).past_key_values
    assert not isinstance(cache.layers[0], FastLayer)
    with torch.no_grad():
        logits = model(tokens[:, 70:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, 70:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("router", [{}, OWN], ids=["shared", "own router"])
def test_rows_can_be_repeated_and_selected(router: dict[str, Any], tokens: Tensor) -> None:
    model, mask = _use(_model(**router), "reference"), _left_padding(tokens, 21)
    expected = _use(model, "torch")(tokens, attention_mask=mask).logits
    cache = _use(model, "reference")(tokens[:, :100], attention_mask=mask[:, :100]).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    logits = model(tokens.flip(0)[:, 100:101], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected.flip(0)[:, 100:101], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("router", [{}, OWN], ids=["shared", "own router"])
@pytest.mark.parametrize(
    "make_cache", [DynamicCache, lambda: StaticCache(LlamaConfig(num_hidden_layers=2), 160)]
)
def test_a_cache_changes_hands_in_mid_text_and_can_be_reset(
    router: dict[str, Any], make_cache: Callable[[], Any], tokens: Tensor
) -> None:
    model, mask, cache = _model(**router), _left_padding(tokens, 21), make_cache()
    expected, real = _use(model, "torch")(tokens, attention_mask=mask).logits, mask.bool()
    for order in (("reference", "torch"), ("torch", "reference")):
        parts = []
        for number, last in enumerate((70, 71, 110, 111, 150)):
            _use(model, order[number % 2])
            first = cache.get_seq_length()
            parts.append(
                model(tokens[:, first:last], attention_mask=mask[:, :last], past_key_values=cache).logits
            )
            assert isinstance(cache.layers[1], FastLayer) == (order[number % 2] == "reference")
        torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], atol=TOLERANCE, rtol=0)
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("router", [{}, OWN], ids=["shared", "own router"])
def test_a_gradient_through_the_cache_is_left_to_the_model_file(
    router: dict[str, Any], tokens: Tensor
) -> None:
    model = _use(_model(**router).requires_grad_(True), "reference")
    cache = model(tokens[:, :70]).past_key_values
    model(tokens[:, 70:71], past_key_values=cache).logits.square().mean().backward()
    assert not any(isinstance(layer, FastLayer) for layer in cache.layers)
    # keys of the prompt's tokens had a part in it
    assert model.model.embed_tokens.weight.grad[tokens[0, 5]].abs().max() > 0


def test_a_static_cache_refuses_more_than_it_holds(tokens: Tensor) -> None:
    model, cache = _use(_model(), "reference"), StaticCache(LlamaConfig(num_hidden_layers=2), 100)
    places = set()
    for _ in range(2):
        model(tokens[:, :99], past_key_values=cache)
        model(tokens[:, 99:100], past_key_values=cache)
        places.add(cache.layers[0].keys.data_ptr())
        with pytest.raises(ValueError, match="at least the 101 columns"):
            model(tokens[:, 100:101], past_key_values=cache)
        cache.reset()
    assert len(places) == 1


@pytest.mark.parametrize(
    ("heads", "dim", "chunk_size", "fits"),
    [(32, 128, 64, True), (33, 16, 16, False), (4, 512, 16, False), (4, 16, 8, False)],
)
def test_shapes_that_kernels_do_not_take_are_left_to_the_model_file(
    heads: int, dim: int, chunk_size: int, fits: bool
) -> None:
    q, k = torch.empty(1, heads, 1, dim), torch.empty(1, 1, 1, dim)
    assert fast_cache._kernels_take(q, k, chunk_size) == fits


@pytest.mark.parametrize("router", [{}, OWN], ids=["shared", "own router"])
def test_kernels_generate_what_the_model_file_alone_does(
    router: dict[str, Any], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        quicken(monkeypatch)
    shape = {"num_attention_heads": 8, "head_dim": 16, "learned_scaling": True}
    model = _model(torch.float32, num_hidden_layers=1, **shape, **router).to(DEVICE)
    prompt = tokens[:, :34].to(DEVICE)
    options = GREEDY | {"attention_mask": _left_padding(prompt, 5), "max_new_tokens": 3}
    expected = _use(model, "torch").generate(prompt, **options)
    assert torch.equal(_use(model, "triton").generate(prompt, **options), expected)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU: nothing waits elsewhere")
def test_a_step_never_waits_for_the_device_and_can_be_captured(tokens: Tensor) -> None:
    model, tokens = _use(_model(torch.float32).cuda(), "auto"), tokens.cuda()
    cache, mask = StaticCache(model.config, 160), torch.ones_like(tokens)
    token, position = tokens[:, :1].clone(), torch.empty(1, 1, dtype=torch.int64, device="cuda")

    def begin() -> None:
        cache.reset()
        model(tokens[:, :70], attention_mask=mask[:, :70], past_key_values=cache)
        position.fill_(70)

    def step() -> Tensor:
        logits = model(
            token, attention_mask=mask[:, :71], position_ids=position, past_key_values=cache
        ).logits
        position.add_(1)
        return logits

    def next_token(column: int) -> None:
        token.copy_(tokens[:, column : column + 1])

    begin()
    expected = []
    for column in range(70, 150):
        next_token(column)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if column > 70 else "default")
        try:
            expected.append(step())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert isinstance(cache.layers[0], FastLayer)
    begin()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    for column in range(70, 150):
        next_token(column)
        graph.replay()
        torch.testing.assert_close(logits, expected[column - 70], atol=1e-3, rtol=0)
