"""What the data tools need: many of their processes run on machines without a GPU, and some at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "data_tools").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_starts_without_the_seconds_that_torch_takes(tool: str) -> None:
    code = f"import sys, data_tools.{tool}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
