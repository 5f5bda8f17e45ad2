"""The samples that a task is scored on: for a seed the same for every model, on a checkpoint and during training."""

from __future__ import annotations

from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.samples import Sample
from dash_megatron.evaluation.tasks import TASKS
from dash_megatron.evaluation.text import LocalText

# what `evaluate` takes by default, and training always
DEFAULT_SEED = 0
DEFAULT_DEPTHS = 5

Item = tuple[int, float | None]
"""Index, and depth where it is given."""


def task_items(task: str, samples: int, depths: int = DEFAULT_DEPTHS) -> list[Item]:
    """All items of a task: `samples` of them, or `samples` for each of `depths` depths if the task has depths."""
    places: list[float | None] = [None]
    if TASKS[task].by_depth:
        places = [number / (depths - 1) for number in range(depths)]
    return [(index, place) for place in places for index in range(samples)]


def make_sample(
    task: str, length: int, item: Item, text: LocalText, tokenizer: Tokenizer, seed: int = DEFAULT_SEED
) -> Sample:
    """Make the sample of an item; it depends on these arguments alone.

    Raises:
        ValueError: no sample has that length.
    """
    index, depth = item
    return TASKS[task].sample(f"{seed}:{task}:{length}:{depth}:{index}", length, depth, text, tokenizer)
