"""Read YAML files, apply `section.key=value` overrides, and explain what is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dash_megatron.config.model import RopeScaling
from dash_megatron.config.run import Config
from dash_megatron.config.section import section_at, section_of


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field, the value, the rule and the fix."""


_INTEGER = "tag:yaml.org,2002:int"
_DATE = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice in one mapping, and 010, 1:30 and 2024-01-31 are text, not 8, 90 and a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - replaced here, lest PyYAML's own are changed
        first: [pair for pair in pairs if pair[0] not in (_INTEGER, _DATE)]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: dict[Any, Any]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice, and the first would be lost; make it one",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    _INTEGER, re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)


def parse_yaml(text: str, name: str) -> Any:
    """The value that a text of YAML holds.

    Raises:
        ConfigError: it is not valid YAML; the message begins with `name`.
    """
    try:
        return yaml.load(text, _Loader)
    # ValueError of a number with thousands of digits, RecursionError of as many brackets
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error


def read_yaml(path: str | Path, name: str, keys: str) -> dict[str, Any]:
    """Read a YAML file of `key: value` lines; an empty file has none.

    Args:
        path: the file.
        name: the file in messages, such as "--config run.yaml".
        keys: what the file should hold, for messages, such as "sections (model:, data:, ...)".

    Raises:
        ConfigError: the file cannot be read, is not valid YAML, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        where = "" if Path(path).is_absolute() else f" (relative to {Path.cwd()})"
        raise ConfigError(f"{name}{where} cannot be read: {error.strerror}; give a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error
    tree = parse_yaml(text, name)
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{name} must hold {keys}, not {type(tree).__name__}")
    return tree or {}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read one YAML file, apply overrides in order, and check every rule that needs no process group.

    Args:
        path: a YAML file in the form of `docs/configuration.md`.
        overrides: `section.key=value`; the value is YAML (`parallel.context=4`, `data.train=[a, b]`).

    Raises:
        ConfigError: unreadable file, malformed YAML, unknown key, wrong type, or a broken rule.
    """
    tree = read_yaml(path, f"--config {path}", "sections (model:, data:, ...)")
    for override in overrides:
        _apply_override(tree, override)
    return config_from_dict(tree)


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Build a checked `Config` from nested dictionaries.

    Raises:
        ConfigError: unknown key, wrong type, or a broken rule.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain_validation(error))) from None


def config_of_stored_run(tree: dict[str, Any]) -> Config:
    """Build the config that a run has stored, but for its layout, which is that of one process.

    A layout decides no result, and that of an old run may be one that is refused today.

    Raises:
        ConfigError: as `config_from_dict`.
    """
    return config_from_dict({**tree, "parallel": {}})


def read_rope_scaling(text: str) -> RopeScaling:
    """Read `model.rope_scaling` from YAML such as `{rope_type: yarn, factor: 8, ...}`.

    Raises:
        ConfigError: malformed YAML, unknown key, wrong type, or a broken rule.
    """
    name = f"--rope-scaling {text!r}"
    tree = parse_yaml(text, name)
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} must be a mapping; its keys are {', '.join(RopeScaling.model_fields)}")
    try:
        return RopeScaling.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{name}: {line}" for line in explain_validation(error, RopeScaling))
        ) from None


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
        return f"{key}={value!r} is not a known key{_suggestion(names)}"
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


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must read section.key=value, such as optimizer.lr=3e-4")
    set_key(tree, key, parse_yaml(text, f"override {override!r}: the value"), f"override {override!r}")


def set_key(tree: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Set `section.key` in nested dictionaries, making the sections that are missing.

    Raises:
        ConfigError: a section of the key is a value in the tree; the message begins with `name`.
    """
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:  # a section may be null, as a heading without keys is
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section; see docs/configuration.md")
    node[leaf] = value


def _suggestion(path: list[str]) -> str:
    """The nearest known key: beside the wrong one first, then anywhere."""
    names = _known_keys()
    moved = [name for name in names if name.split(".")[-1] == path[-1]]  # the right key, another section
    siblings = [name for name in names if name.split(".")[:-1] == path[:-1]]
    wrong = ".".join(path)
    near = moved or difflib.get_close_matches(wrong, siblings) or difflib.get_close_matches(wrong, names)
    return f"; did you mean {near[0]}?" if near else ""


def _known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = section_of(field)
        keys += [] if inner is None else _known_keys(inner, f"{prefix}{name}.")
    return keys
