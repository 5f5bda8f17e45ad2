"""What every section of the configuration is."""

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: immutable, typed, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def section_of(field: Any) -> type[BaseModel] | None:
    """The section that a pydantic field holds, even where it may also be null; None for a plain value."""
    for kind in typing.get_args(field.annotation) or (field.annotation,):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
