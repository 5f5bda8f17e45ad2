"""The samples that a task is scored on: for a seed the same for every model, on a checkpoint and during training."""

from __future__ import annotations

from collections.abc import Sequence

from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.samples import LengthError, Sample
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
    return TASKS[task].sample(_seed(task, length, item, seed), length, item[1], text, tokenizer)


def check_items(
    task: str,
    length: int,
    items: Sequence[Item],
    text: LocalText,
    tokenizer: Tokenizer,
    seed: int = DEFAULT_SEED,
) -> None:
    """Check that the samples of all items can be made, of which only the first is.

    Raises:
        LengthError: no sample of one of them has that length.
    """
    least = max(
        TASKS[task].shortest(_seed(task, length, item, seed), item[1], text, tokenizer) for item in items
    )
    if least > length:
        raise LengthError(
            f"task {task}: --lengths {length} must be at least {least}, the shortest that one of its samples can be with this "
            f"tokenizer and text; samples of another length may need more, so take more, such as {1 << least.bit_length()}"
        )
    make_sample(task, length, items[0], text, tokenizer, seed)


def _seed(task: str, length: int, item: Item, seed: int) -> str:
    index, depth = item
    return f"{seed}:{task}:{length}:{depth}:{index}"
