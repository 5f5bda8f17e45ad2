"""docs/recipe.md says what `plan` computes."""

from functools import cache
from pathlib import Path

from dash_megatron.config import load_config
from dash_megatron.planning.routing import AssumedRouting
from dash_megatron.planning.search import search

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "recipe.md").read_text().split())
MODELS = ("8b_16k", "3b_16k")
"""Those with heads of 128."""
FULL = ("attention.kind=full", "attention.target_density=null")
SHARED_BUDGET = ("attention.density_budget=model", "attention.learned_scaling=20")
PROJECTIONS = "attention.router_projections=true"
CHUNKS_OF_64 = ("attention.chunk_size=64", "attention.local_chunks=2")


@cache
def speed(model: str, *keys: str) -> float:
    """tokens/s/GPU of the fastest layout on 32 H200s, at the density that the recipe takes."""
    config = load_config(ROOT / "configs" / f"{model}.yaml", keys)
    return search(config, 32, AssumedRouting(density=0.25))[0].tokens_per_second_per_gpu


def before_full(*keys: str) -> str:
    """By how much the models are faster than full attention."""
    ahead = [speed(model, *SHARED_BUDGET, *keys) / speed(model, *FULL) - 1 for model in MODELS]
    return " and ".join(f"{each:.0%}" for each in ahead)


def test_the_page_gives_the_speeds_with_heads_of_128_that_plan_finds() -> None:
    assert (
        f"8B and 3B at 16K by this recipe {before_full(PROJECTIONS)} before full attention on 32 H200s"
        in PAGE
    )
    assert f"with `{' '.join(CHUNKS_OF_64)}` {before_full(PROJECTIONS, *CHUNKS_OF_64)}, if" in PAGE
    without = f"{before_full()}, and {before_full(*CHUNKS_OF_64)}"
    assert f"Without `router_projections` it is {without}." in PAGE
    gains = [
        speed(model, *SHARED_BUDGET, PROJECTIONS, *CHUNKS_OF_64) / speed(model, *SHARED_BUDGET, PROJECTIONS)
        - 1
        for model in MODELS
    ]
    told = f"{100 * min(gains):.0f} to {max(gains):.0%}"
    assert f"64 is {told} of a step faster with heads of 128, by `plan`" in PAGE
    for model in MODELS:
        text = (ROOT / "configs" / f"{model}.yaml").read_text()
        assert f"{' '.join(CHUNKS_OF_64)} is {told} faster by plan" in text
