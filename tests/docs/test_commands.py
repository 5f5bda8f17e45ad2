"""Commands of pages and of comments in YAML have options that their programs know, and configs that fit their overrides."""

import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from dash_megatron.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
YAML = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "studies").glob("*.yaml"))]
CODE_BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"^#   (python (?:.*\\\n)*.*)$", re.MULTILINE)
PROGRAM = re.compile(r"python (?=-m [\w.]+(?: |$)|[\w/]+\.py(?: |$))")
OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)*=")


def commands(path: Path) -> list[str]:
    """What calls a program of this repository, from that program on."""
    text = path.read_text()
    blocks = (CODE_BLOCK if path.suffix == ".md" else COMMENT).findall(text)
    lines = [
        line for block in blocks for line in re.sub(r"\\\n#?", " ", block).partition(" && ")[0].splitlines()
    ]
    return [line[place.end() :] for line in lines if (place := PROGRAM.search(line))]


COMMANDS = [
    pytest.param(command, id=f"{path.name}: {command[:80]}")
    for path in [*PAGES, *YAML]
    for command in dict.fromkeys(commands(path))
]


@cache
def known_options(*program: str) -> set[str]:
    command = [sys.executable, *program, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120).stdout
    return set(re.findall(r"--[a-z][a-z-]*", text))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_options_that_its_program_knows_and_a_config_that_fits_its_overrides(
    command: str,
) -> None:
    words = shlex.split(command, comments=True)
    # options of a subcommand are in its own help
    count = 1 if words[0] != "-m" else 2 if words[1] != "dash_megatron" else 3
    count += words[2:3] in (["study"], ["convert"]) or words[2:4] == ["doctor", "replay"]
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options - known_options(*words[:count]) == set()

    values = dict(pairwise(words))
    if values.get("--config", "").startswith("configs/"):
        layouts = [value.split() for option, value in pairwise(words) if option == "--layout"]
        for layout in layouts or [[]]:
            overrides = [word for word in words if OVERRIDE.match(word)]
            config = load_config(ROOT / values["--config"], [*overrides, *layout])
            config.accumulation_steps(
                int(values.get("--processes", config.parallel.tensor * config.parallel.context))
            )


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 50
