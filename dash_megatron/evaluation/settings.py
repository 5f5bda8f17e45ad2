"""What an evaluation is asked for; without torch, so that a machine that only submits can check it."""

from __future__ import annotations

from dataclasses import dataclass

from dash_megatron.evaluation.items import DEPTHS, SEED
from dash_megatron.evaluation.tasks import TASKS

PERPLEXITY = "perplexity"
DOCUMENTS = "documents"
LOSSES = (PERPLEXITY, DOCUMENTS)
"""Tasks that give losses of text by position; the others have answers."""
FAMILIES = (PERPLEXITY, *TASKS, DOCUMENTS)
SCORES = ("answer", "generate")


@dataclass(frozen=True)
class Settings:
    """What to evaluate."""

    tasks: tuple[str, ...] = FAMILIES
    lengths: tuple[int, ...] = ()
    """Tokens of prompt and answer; none: for the caller to choose."""
    depths: int = DEPTHS
    """Places of the needle of task `needle`, from the first line to the last."""
    samples: int = 20
    """Of each task and length, and for `needle` of each depth; windows of text for `perplexity`, and documents for
    `documents`."""
    score: str = "answer"
    seed: int = SEED
    batch_tokens: int = 32768
    """Most tokens of a batch; a row longer than that is a batch of its own."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.tasks if name not in FAMILIES]
        if unknown or not self.tasks:
            raise ValueError(f"--tasks {','.join(unknown)}: the known ones are {', '.join(FAMILIES)}")
        if self.score not in SCORES:
            raise ValueError(f"--score {self.score} must be one of {', '.join(SCORES)}")
        if any(length < 2 for length in self.lengths):
            raise ValueError(f"--lengths {list(self.lengths)}: each must be at least 2 tokens")
        for name, least in (("depths", 2), ("samples", 1), ("batch_tokens", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} {getattr(self, name)} must be at least {least}")
