"""CONTRIBUTING.md lists the files that a new `attention.kind` goes into: those that name the kinds that are there."""

import ast
import re
from typing import get_args

from dash_megatron.config import AttentionConfig
from dash_megatron.layers.model import CORE_ATTENTION
from tests.docs.test_links import ROOT

KINDS = get_args(AttentionConfig.model_fields["kind"].annotation)


def test_every_kind_has_a_layer() -> None:
    assert set(CORE_ATTENTION) == set(KINDS)


def test_the_files_that_name_a_baseline_are_listed_for_whoever_adds_a_kind() -> None:
    baselines = set(KINDS) - {"dash", "full"}
    naming = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dash_megatron").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in baselines
    }
    rows = re.findall(r"^\| (\[[^|]+)\|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {file for row in rows for file in re.findall(r"\((dash_megatron/[^)]+)\)", row)} == naming
