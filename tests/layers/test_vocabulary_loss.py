"""The loss whose logits are made piece by piece, beside Megatron's own of all logits at once."""

import weakref
from typing import Any

import pytest
import torch

from dash_megatron.layers import scoring, vocabulary_loss
from tests.layers.test_gpt_model import VOCABULARY, config_of, model_of, positions_of, tokens_of

pytestmark = pytest.mark.usefixtures("single_process")

TOKENS = 50


def rows_of(seed: int = 0) -> torch.Tensor:
    return torch.cat([tokens_of(TOKENS, seed), tokens_of(TOKENS, seed + 1)])


def weight_of_labels() -> torch.Tensor:
    weight = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(7))
    weight[:, 10:20] = 0
    return weight


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return model_of(config_of(model={"tie_embeddings": request.param}, attention={"kind": "full"})).double()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    return rows_of(), positions_of(TOKENS).expand(2, -1), rows_of(seed=2)


@pytest.mark.parametrize("pieces", [1, 5])
def test_weighted_sums_and_their_gradients_are_those_of_all_logits_at_once(
    model: torch.nn.Module, inputs: Any, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_loss, "MAX_LOGITS", 2 * TOKENS * VOCABULARY // pieces)
    weight, parameters = weight_of_labels(), list(model.parameters())
    expected = (model(*inputs) * weight).sum()
    found = model(*inputs, loss_weight=weight)
    assert found.dtype == torch.float64
    # Megatron's scores are float32
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)
    d_expected, d_found = (torch.autograd.grad(3 * loss, parameters) for loss in (expected, found))
    for (name, _), one, other in zip(model.named_parameters(), d_expected, d_found, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm(), name


def test_losses_of_labels_and_argmaxes_are_those_of_all_logits_at_once(
    model: torch.nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_loss, "MAX_LOGITS", 32 * VOCABULARY)
    expected = model(*inputs)
    best = model(*inputs[:2])[..., : VOCABULARY - 9].argmax(-1)
    labels = torch.where(weight_of_labels() > 0.5, inputs[2], best)
    with torch.no_grad():
        assert torch.allclose(model(*inputs).to(expected.dtype), expected, rtol=1e-6)
        with scoring(model, VOCABULARY - 9):
            losses, right = model(*inputs[:2], labels).unbind(-1)
            with pytest.raises(ValueError, match="loss_weight must not be given within `scoring`"):
                model(*inputs, loss_weight=weight_of_labels())
        assert torch.equal(losses, model(*inputs[:2], labels))
        assert torch.equal(right.bool(), labels == best)


def test_of_all_pieces_one_exists_at_a_time(
    model: torch.nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_loss, "MAX_LOGITS", 20 * VOCABULARY)
    seen: list[weakref.ref[torch.Tensor]] = []
    score = vocabulary_loss.score_labels

    def spy(logits: torch.Tensor, labels: torch.Tensor) -> Any:
        assert not [piece for piece in seen if piece() is not None]
        seen.append(weakref.ref(logits))
        return score(logits, labels)

    monkeypatch.setattr(vocabulary_loss, "score_labels", spy)
    model(*inputs, loss_weight=weight_of_labels()).backward()
    assert len(seen) == 5


def test_a_table_of_few_bits_gets_a_gradient_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_loss, "MAX_LOGITS", 8)
    group = torch.distributed.group.WORLD
    # every label adds the same; beyond 256, bf16 would not count it
    hidden = torch.ones(1024, 1, 1, dtype=torch.bfloat16)
    rows = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    table = vocabulary_loss.Table(rows, group, False)
    labels = torch.zeros(1, 1024, dtype=torch.int64)
    loss = vocabulary_loss.VocabularyLoss(labels, torch.full((1, 1024), 2.0), None)
    vocabulary_loss._WeightedLoss.apply(hidden, rows, table, loss, True).backward()
    assert rows.grad.tolist() == [[-1024], [1024]]
