"""Section `evaluation`."""

from __future__ import annotations

from pydantic import Field, model_validator

from dash_megatron.config.section import Section

TASK_NAMES = (
    "needle",
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "associative_recall",
    "copy",
)


class EvaluationConfig(Section):
    """Validation and tasks during training, on the current weights and in any layout."""

    every: int = Field(default=0, ge=0)
    """Steps between validations; 0 = never. A run that validates also does so after the last step."""
    samples: int = Field(default=64, gt=0)
    """Validation sequences per validation, always the same ones."""
    tasks: tuple[str, ...] = ()
    """Tasks of `python -m dash_megatron evaluate` that are scored during training, always on the same samples, made from the
    text of `data.valid`. An answer counts as right where each of its tokens is the argmax of the logits.
    docs/evaluation.md lists the tasks."""
    tasks_every: int = Field(default=0, ge=0)
    """Steps between scores of `tasks`; 0 = never. A run that scores them also does so after the last step."""
    task_samples: int = Field(default=20, gt=0)
    """Samples of each task and length, and for `needle` of each depth, as in `evaluate --samples`."""
    task_lengths: tuple[int, ...] = ()
    """Tokens of prompt and answer together, as in `evaluate --lengths`, at most `data.seq_length`; an empty list means
    `data.seq_length`."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        unknown = [name for name in self.tasks if name not in TASK_NAMES]
        if unknown:
            raise ValueError(
                f"evaluation.tasks={list(self.tasks)} names {unknown[0]}; the known ones are {', '.join(TASK_NAMES)}"
            )
        if self.tasks_every and not self.tasks:
            raise ValueError(
                f"evaluation.tasks_every={self.tasks_every} needs evaluation.tasks, which is empty; name some, such as "
                "[niah_single, copy], or set evaluation.tasks_every=0"
            )
        return self

    def check_data(self, valid: tuple[str, ...], seq_length: int) -> None:
        """Refuse evaluations that have no data, and tasks that do not fit into a row.

        Args:
            valid: `data.valid`.
            seq_length: tokens of a row.

        Raises:
            ValueError: naming field, value, rule and remedy.
        """
        for name in ("every", "tasks_every"):
            value = getattr(self, name)
            if value and not valid:
                raise ValueError(
                    f"evaluation.{name}={value} needs data.valid, which is empty; "
                    f"name a validation set or set evaluation.{name}=0"
                )
        for length in self.task_lengths:
            if not 2 <= length <= seq_length:
                raise ValueError(
                    f"evaluation.task_lengths={list(self.task_lengths)}: {length} must be at least 2 and at most "
                    f"data.seq_length={seq_length}, the rows that the model computes; leave it to `evaluate`"
                )
