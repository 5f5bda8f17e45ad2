"""Prices of the top-k baselines' attention."""

from dataclasses import replace
from pathlib import Path

import pytest

from dash_megatron.config import AttentionConfig, Config, config_from_dict, load_config
from dash_megatron.planning import baseline_times
from dash_megatron.planning.baseline_times import NOTE, baseline_seconds, share_of_pairs
from dash_megatron.planning.kernel_times import AttentionWork, dash_stages
from dash_megatron.planning.routing import AssumedRouting, effective_routing
from dash_megatron.planning.search import configured_layout
from dash_megatron.planning.step_time import StepEstimate, estimate_step
from dash_megatron.planning.table import plan

CONFIG = Path(__file__).parents[2] / "configs" / "1b_16k.yaml"
TOKENS, CHUNKS = 16384, 256
WORK = AttentionWork(TOKENS, 32, 2, TOKENS**2 / 2, 0.0, 0.0)
NO_BYTES = float("inf")


def attention(kind: str, **keys: int) -> AttentionConfig:
    return AttentionConfig.model_validate({"kind": kind, kind: keys})


def price(kind: str, bandwidth: float = 3e12, **keys: int) -> tuple[float, float]:
    seconds = baseline_seconds(WORK, attention(kind, **keys), CHUNKS, 1.0, bandwidth)
    return seconds.forward, seconds.backward


def listed(chunks: int) -> tuple[float, float]:
    """Seconds of DashAttention's kernels without the router, by lists of so many chunks a token."""
    pairs = WORK.pairs * share_of_pairs(CHUNKS, chunks)
    stages = dash_stages(replace(WORK, selected=pairs, visited=pairs))
    return stages["attend"] / 1e3, (stages["queries"] + stages["keys"]) / 1e3


def run_of(kind: str, length: int = TOKENS, **keys: int) -> Config:
    tree = load_config(CONFIG, [f"data.seq_length={length}"]).model_dump()
    tree["attention"] = {"kind": kind, **({kind: keys} if keys else {})}
    return config_from_dict(tree)


def step(kind: str, length: int = TOKENS, density: float = 0.1, **keys: int) -> StepEstimate:
    config = run_of(kind, length, **keys)
    return estimate_step(config, configured_layout(config, 8), 128256, AssumedRouting(density=density))


def test_a_fixed_list_is_whole_where_the_document_begins() -> None:
    assert share_of_pairs(4, 2) == (1 + 2 + 2 + 2) / (1 + 2 + 3 + 4)
    assert share_of_pairs(4, 9) == 1


@pytest.mark.parametrize("top_k", [0, 16, 300])
def test_without_scores_baselines_cost_their_lists(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline_times, "SCORE_FLOPS", float("inf"))
    assert price("infllmv2", NO_BYTES, top_k=top_k) == pytest.approx(listed(top_k + 9))
    selected, window = listed(top_k + 3), listed(512 // 64 + 1)
    both = [one + other for one, other in zip(selected, window, strict=True)]
    assert price("nsa", NO_BYTES, top_k=top_k) == pytest.approx(both)


def test_only_the_scores_of_nsa_have_a_backward() -> None:
    for kind, more in (("infllmv2", False), ("nsa", True)):
        (forward, backward), (slow_forward, slow_backward) = price(kind), price(kind, bandwidth=1e12)
        assert slow_forward > forward
        assert (slow_backward > backward) == more


def test_denser_pooled_keys_cost_more() -> None:
    for kind in ("infllmv2", "nsa"):
        assert price(kind, kernel_size=16, kernel_stride=8) > price(kind, kernel_size=16, kernel_stride=16)


def test_a_step_of_a_baseline_has_the_density_of_its_lists() -> None:
    for kind, chunks in (("infllmv2", 1 + 8 + 16), ("nsa", 1 + 16 + 9)):
        routing = effective_routing(run_of(kind), AssumedRouting(density=0.5))
        assert routing.density == routing.peak_density == share_of_pairs(CHUNKS, chunks)
        assert step(kind, density=0.1) == step(kind, density=0.9)
        assert step(kind, top_k=64).attention > step(kind, top_k=16).attention
        # scores grow with the square of the length, which lists do not
        assert step(kind, 4 * TOKENS).attention > 5 * step(kind).attention


def test_a_plan_says_that_baselines_were_never_measured() -> None:
    for kind, expected in (("nsa", True), ("dash", False)):
        assert (
            NOTE
            in plan(
                "run", load_config(CONFIG, [f"attention.kind={kind}", "attention.target_density=null"]), 8
            ).to_text(top=1)
        ) == expected
