"""Read a config from YAML and `section.key=value` overrides, and write its reference page."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from dash_megatron.config.rope import RopeScaling
from dash_megatron.config.sections import Config


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field, the value, the rule and the fix."""


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read one YAML file, apply overrides in order, and check every rule that needs no process group.

    Args:
        path: a YAML file in the form of `docs/configuration.md`.
        overrides: `section.key=value`; the value is YAML (`parallel.context=4`, `data.train=[a, b]`).

    Raises:
        ConfigError: unreadable file, malformed YAML, unknown key, wrong type, or a broken rule.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {path} must hold sections (model:, data:, ...), not {type(tree).__name__}"
        )
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
        lines = [_explain(dict(problem)) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def read_rope_scaling(text: str) -> RopeScaling:
    """Read `model.rope_scaling` from YAML such as `{rope_type: yarn, factor: 8, ...}`.

    Raises:
        ConfigError: malformed YAML, unknown key, wrong type, or a broken rule.
    """
    try:
        return RopeScaling.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"--rope-scaling {text!r} is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"--rope-scaling {text!r}: {line}" for line in lines)) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must read section.key=value, such as optimizer.lr=3e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    node[leaf] = value


def _explain(problem: dict[str, Any]) -> str:
    """One line for one pydantic problem."""
    # where a value may be of several types, pydantic adds the type it tried
    path = [str(part) for part in problem["loc"] if part not in ("float", "tuple[float, ...]")]
    key, value = ".".join(path), problem.get("input")
    if problem["type"] == "extra_forbidden":
        return f"{key}={value!r} is not a known key{_suggestion(path)}; see docs/configuration.md"
    if problem["type"] == "missing":
        return f"{key} is missing and has no default; set it in the YAML or as {key}=value"
    if problem["type"] == "value_error":  # a rule of ours, which already names its fields
        return str(problem["ctx"]["error"])
    return f"{key}={value!r}: {problem['msg']}; see docs/configuration.md"


def _suggestion(path: list[str]) -> str:
    """The nearest known key: beside the wrong one first, then anywhere."""
    names = _known_keys()
    moved = [name for name in names if name.split(".")[-1] == path[-1]]  # the right key, another section
    siblings = [name for name in names if name.split(".")[:-1] == path[:-1]]
    wrong = ".".join(path)
    near = moved or difflib.get_close_matches(wrong, siblings) or difflib.get_close_matches(wrong, names)
    return f"; did you mean {near[0]}?" if near else ""


def _known_keys() -> list[str]:
    keys = []
    for name, field in Config.model_fields.items():
        keys.append(name)
        section = _section_of(field)
        if section is not None:
            keys += [f"{name}.{leaf}" for leaf in section.model_fields]
    return keys


def render_reference() -> str:
    """The text of `docs/configuration.md`, from the docstrings of the sections and their fields."""
    lines = [
        "# Configuration reference",
        "",
        "Generated from the sections in `dash_megatron/config/` by `make docs`. A run is one YAML file of these sections; any key",
        "can be overridden on the command line: `train.py --config FILE section.key=value`.",
        "",
        f"`run_dir` (text, required): {Config.model_fields['run_dir'].description}",
    ]
    for name, field in Config.model_fields.items():
        lines += _render_section(name, _section_of(field))
    return "\n".join(lines) + "\n"


def _section_of(field: Any) -> type[BaseModel] | None:
    """The section that a field holds, which may also be null; None for a value."""
    for kind in typing.get_args(field.annotation) or (field.annotation,):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _render_section(name: str, section: type[BaseModel] | None) -> list[str]:
    if section is None:
        return []
    lines = ["", f"## {name}", "", (section.__doc__ or "").strip(), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    inner_sections: list[str] = []
    for leaf, inner in section.model_fields.items():
        default = "required" if inner.is_required() else f"`{_default_text(inner)}`"
        meaning = " ".join((inner.description or "").split())
        lines.append(f"| `{leaf}` | {_type_text(inner)} | {default} | {meaning} |")
        inner_sections += _render_section(f"{name}.{leaf}", _section_of(inner))
    return lines + inner_sections


def _default_text(field: Any) -> str:
    value = field.default_factory() if field.default is PydanticUndefined else field.default
    if isinstance(value, BaseModel):
        value = {}  # every key of the section at its default
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def _type_text(field: Any) -> str:
    annotation = field.annotation
    section = _section_of(field)
    if section is not None:
        return "section or null" if type(None) in typing.get_args(annotation) else "section"
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    text = getattr(annotation, "__name__", "") if isinstance(annotation, type) else ""
    text = text if text and not typing.get_args(annotation) else str(annotation)
    for old, new in (("typing.Any", "any"), ("str", "text"), (" | None", " or null"), ("|", "or")):
        text = text.replace(old, new)
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in _BOUNDS
        if hasattr(rule, name)
    ]
    return " ".join([text, *(f"({bound})" for bound in bounds)])


_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


if __name__ == "__main__":
    print(render_reference(), end="")
