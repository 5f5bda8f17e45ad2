"""What an evaluation is asked for; without torch, so that a machine that only submits can check it."""

from __future__ import annotations

from dataclasses import dataclass

from dash_megatron.evaluation.items import DEFAULT_DEPTHS, DEFAULT_SEED
from dash_megatron.evaluation.tasks import TASKS

PERPLEXITY = "perplexity"
DOCUMENTS = "documents"
LOSS_TASKS = (PERPLEXITY, DOCUMENTS)
"""Tasks that give losses of text by position; the others have answers."""
ALL_TASKS = (PERPLEXITY, *TASKS, DOCUMENTS)
SCORE_MODES = ("answer", "generate")


@dataclass(frozen=True)
class Settings:
    """What to evaluate."""

    tasks: tuple[str, ...] = ALL_TASKS
    lengths: tuple[int, ...] = ()
    """Tokens of prompt and answer; none: for the caller to choose."""
    only_fitting: bool = False
    """Leave out a task at lengths that it cannot have, for lengths that nobody asked for; otherwise such a length is an error."""
    depths: int = DEFAULT_DEPTHS
    """Places of the needle of task `needle`, from the first line to the last."""
    samples: int = 20
    """Samples of each task and length, and for `needle` of each depth; windows of text for `perplexity`, and documents for
    `documents`."""
    score: str = "answer"
    seed: int = DEFAULT_SEED
    batch_tokens: int = 32768
    """Most tokens of a batch; a row longer than that is a batch of its own."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.tasks if name not in ALL_TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"--tasks {','.join(unknown)}: the known ones are {', '.join(ALL_TASKS)}")
        if self.score not in SCORE_MODES:
            raise ValueError(f"--score {self.score} must be one of {', '.join(SCORE_MODES)}")
        if any(length < 2 for length in self.lengths):
            raise ValueError(f"--lengths {list(self.lengths)}: each must be at least 2 tokens")
        for name, least in (("depths", 2), ("samples", 1), ("batch_tokens", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {getattr(self, name)} must be at least {least}")
