"""Read YAML files, apply `section.key=value` overrides, and build checked configs from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dash_megatron.config.model import RopeScaling
from dash_megatron.config.run import Config
from dash_megatron.config.validation_errors import explain_validation


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
