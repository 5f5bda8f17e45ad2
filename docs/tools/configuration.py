"""Write `docs/configuration.md` from the docstrings of the config's sections: `python -m docs.tools.configuration`."""

from __future__ import annotations

import re
import typing
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dash_megatron.command_line import ending_with_reader
from dash_megatron.config import Config
from dash_megatron.config.section import section_of

# how a bound of a number is written: the name that pydantic's constraint has, and its sign
_BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


def render_reference() -> str:
    """The text of `docs/configuration.md`, from the docstrings of the sections and their fields."""
    lines = [
        "# Configuration reference",
        "",
        "Generated from the sections in `dash_megatron/config/` by `make docs`. A run is one YAML file of these sections; any key",
        "can be overridden on the command line: `train.py --config FILE section.key=value`. Why each key exists is in",
        "[configuration-evidence.md](configuration-evidence.md).",
        "",
        f"`run_dir` (text, required): {Config.model_fields['run_dir'].description}",
    ]
    for name, field in Config.model_fields.items():
        lines += _render_section(name, section_of(field))
    return "\n".join(lines) + "\n"


def _render_section(name: str, section: type[BaseModel] | None) -> list[str]:
    if section is None:
        return []
    lines = ["", f"## {name}", "", _one_line(section.__doc__), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    inner_sections: list[str] = []
    for leaf, inner in section.model_fields.items():
        default = "required" if inner.is_required() else f"`{_default_text(inner)}`"
        lines.append(f"| `{leaf}` | {_type_text(inner)} | {default} | {_one_line(inner.description)} |")
        inner_sections += _render_section(f"{name}.{leaf}", section_of(inner))
    return lines + inner_sections


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _default_text(field: Any) -> str:
    value = field.default_factory() if field.default is PydanticUndefined else field.default
    if isinstance(value, BaseModel):
        value = {}  # every key of the section at its default
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def _type_text(field: Any) -> str:
    annotation = field.annotation
    if section_of(field) is not None:
        return "section or null" if type(None) in typing.get_args(annotation) else "section"
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    text = getattr(annotation, "__name__", "") if isinstance(annotation, type) else ""
    text = text if text and not typing.get_args(annotation) else str(annotation)
    for old, new in (("typing.Any", "any"), ("str", "text"), (" | None", " or null"), ("|", "or")):
        text = text.replace(old, new)
    text = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", text)
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in _BOUNDS
        if hasattr(rule, name)
    ]
    return " ".join([text, *(f"({bound})" for bound in bounds)])


if __name__ == "__main__":
    with ending_with_reader():
        print(render_reference(), end="")
