"""What pydantic finds wrong with a config or a study, in words that name key, value, rule and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from dash_megatron.config.run import Config
from dash_megatron.config.section import section_at, section_of


def explain_validation(
    error: ValidationError, root: type[BaseModel] = Config, page: str = "docs/configuration.md"
) -> list[str]:
    """One line for each problem that pydantic found.

    Args:
        error: what pydantic raised.
        root: what was to be read. Of a config, the nearest key is named for an unknown one; of others, all of its section.
        page: the document that describes the keys.
    """
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors(include_url=False)]
    lines = [
        # a rule of ours, which already names its fields
        str(problem["ctx"]["error"])
        if problem["type"] == "value_error"
        else f"{_explain(problem, root)}; see {page}"
        for problem in problems
        if not _is_of_one_type(problem["loc"])
    ]
    # a value that may be of several types has a problem with each, told in the same words
    return list(dict.fromkeys(lines))


# what pydantic adds to the place of a value, where that may be of several types: the type it tried
_TRIED_TYPE = re.compile(r"(str|float)|(tuple|dict)\[.*")


def _is_of_one_type(place: tuple[str | int, ...]) -> bool:
    """Whether a problem is of one type that a value was tried as: pydantic then also reports the value as a whole."""
    return any(_TRIED_TYPE.fullmatch(str(part)) for part in place[:-1])


def _explain(problem: dict[str, Any], root: type[BaseModel]) -> str:
    place, value, kind = problem["loc"], problem.get("input"), problem["type"]
    several = _TRIED_TYPE.fullmatch(str(place[-1])) is not None
    # where a mapping's key is wrong, pydantic adds `[key]` to the place
    path = list(place[:-1] if several or place[-1] == "[key]" else place)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    names = [str(part) for part in path]
    if kind == "extra_forbidden":
        section = section_at(root, names[:-1])
        if root is not Config and section is not None:
            return f"{key} is not a known key; the keys are {', '.join(section.model_fields)}"
        return f"{key}={value!r} is not a known key{_suggestion(names, value)}"
    examples = _examples(root, path)
    such_as = f"; write {' or '.join(examples)}" if examples else ""
    if kind == "missing" and isinstance(path[-1], int):
        return f"{key.rpartition('[')[0]}={value!r} has too few entries{such_as}"
    if kind == "missing":
        where = f" in the YAML or as {key}=value" if root is Config else ""
        return f"{key} is missing and has no default; set it{where}"
    if several:
        return f"{key}={value!r} is of a wrong type{such_as}"
    if kind in ("tuple_type", "list_type"):
        entries, name = "..." if value is None else value, f"{key}=" if root is Config else f"{path[-1]}: "
        return f"{key}={value!r} must be a list{such_as or f': write {name}[{entries}]'}"
    if kind == "model_type" and (section := section_at(root, names)) is not None:
        example = f", such as {key}.{_example(section)}" if root is Config else ""
        return f"{key}={value!r} must be a section{example}; its keys are {', '.join(section.model_fields)}"
    if kind == "dict_type":
        return f"{key}={value!r} must be a mapping{such_as}"
    if kind == "string_type" and isinstance(value, int | float):
        shell = f", and on the command line \"'{value}'\"" if root is Config else ""
        return f"{key}={value!r} must be text: write '{value}'{shell}"
    if kind == "string_type":
        return f"{key}={value!r} must be text"
    if kind == "int_parsing":
        return f"{key}={value!r} must be a whole number, written in digits{such_as}"
    if kind == "invalid_key":
        return f"{'.'.join(names[:-1]) or 'the top level'} has the key {value!r}, which is not text and not a known key"
    return f"{key}{'' if path != list(place) else f'={value!r}'}: {problem['msg']}{such_as}"


def _examples(root: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """How the field may be written that has a path, or has an entry there; nothing where it has no examples."""
    for end in range(len(path), 0, -1):
        names = [str(part) for part in path[:end]]
        section = section_at(root, names[:-1])
        field = section.model_fields.get(names[-1]) if section is not None else None
        if field is not None:
            name = f"{'.'.join(names)}=" if root is Config else f"{names[-1]}: "
            return [f"{name}{example}" for example in field.examples or ()]
    return []


def _example(section: type[BaseModel]) -> str:
    """A key that makes a section of a value: the first that has no default, else the first."""
    fields = section.model_fields
    name = next((name for name, field in fields.items() if field.is_required()), next(iter(fields)))
    return f"{name}={'NAME' if fields[name].annotation is str else '...'}"


def _suggestion(path: list[str], value: Any) -> str:
    """The nearest known key: the same one of another section, one of the same section, then any; else those of its section."""
    *sections, wrong = path
    names = {name: name.split(".") for name in _known_keys()}
    siblings = [name for name, parts in names.items() if parts[:-1] == sections]
    # what holds no keys was not meant as a section
    others = [name for name in names if isinstance(value, dict) or section_at(Config, names[name]) is None]
    moved = [name for name in others if names[name][-1] == wrong]
    near = moved or _near(wrong, siblings, 0.55) or _near(wrong, others, 0.75)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; the keys of {'.'.join(sections) or 'the top level'} are {', '.join(names[name][-1] for name in siblings)}"


def _near(wrong: str, names: list[str], alike: float) -> list[str]:
    """Those of some known keys whose last part is spelled alike, the nearest first: sections alone make no key near."""
    leaves = {name.rpartition(".")[2]: name for name in names}
    return [leaves[leaf] for leaf in difflib.get_close_matches(wrong, leaves, cutoff=alike)]


def _known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = section_of(field)
        keys += [] if inner is None else _known_keys(inner, f"{prefix}{name}.")
    return keys
