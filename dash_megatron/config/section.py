"""What every section of the configuration is."""

import typing
from collections.abc import Sequence
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


def section_at(root: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The section that a path of keys leads to from a root; None where it leads to a plain value or to nothing."""
    section: type[BaseModel] | None = root
    for key in path:
        field = None if section is None else section.model_fields.get(key)
        section = None if field is None else section_of(field)
    return section
