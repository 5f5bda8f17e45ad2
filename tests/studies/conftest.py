"""Studies of a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.studies.study_runs import BASE, Write


@pytest.fixture
def write_study(tmp_path: Path) -> Write:
    def write(**keys: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        tree = {"base": str(tmp_path / "base.yaml"), "output": str(tmp_path / "out"), **keys}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
        return tmp_path / "study.yaml"

    return write
