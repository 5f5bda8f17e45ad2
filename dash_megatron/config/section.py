"""What every section of the configuration is."""

import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Base of every section: immutable, typed, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth(cls, value: Any, field: ValidationInfo) -> Any:
        """Where numbers belong, true and false are a slip, though Python takes them for 1 and 0."""
        kinds = _kinds_of(cls, field.field_name or "")
        truth = None if bool in kinds or not kinds & {int, float} else _truth_in(value)
        if truth is not None:
            number = "a number" if float in kinds else "a whole number"
            raise PydanticCustomError(
                "bool_for_number", f"Input should be {number}, not {str(truth).lower()}"
            )
        return value


@functools.cache
def _kinds_of(section: type[Section], name: str) -> frozenset[type]:
    """The types of the plain values of a field."""
    return frozenset(_kinds(section.model_fields[name].annotation))


def _kinds(annotation: Any) -> Iterator[type]:
    """The types of the plain values that a value of an annotated type is, or holds."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from map(type, typing.get_args(annotation))
    elif inner := typing.get_args(annotation):
        for each in inner:
            yield from _kinds(each)
    else:
        yield annotation


def _truth_in(value: Any) -> bool | None:
    """The first true or false that a value is, or holds as an entry or a key."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, dict | list | tuple):
        return None
    found = map(_truth_in, [*value, *value.values()] if isinstance(value, dict) else value)
    return next((truth for truth in found if truth is not None), None)


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


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting that differs, as dotted key, old value and new one; null is an empty section or mapping.

    Args:
        old, new: sections, or what `model_dump(mode="json")` makes of them.
        key: of both; empty for whole configs.
    """
    old, new = (x.model_dump(mode="json") if isinstance(x, BaseModel) else x for x in (old, new))
    if old == new:
        return
    if isinstance(old, Mapping | None) and isinstance(new, Mapping | None):
        old, new = old or {}, new or {}
        for name in {**new, **old}:
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    else:
        yield key, old, new
