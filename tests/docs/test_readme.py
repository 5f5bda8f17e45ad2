"""The README's example prints what the README says, and pages keep to their size."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)


def test_the_python_example_prints_what_stands_beside_it_and_is_sparse() -> None:
    blocks = PYTHON_BLOCK.findall(README.read_text())
    assert blocks
    for block in blocks:
        names: dict[str, Any] = {}
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block, str(README), "exec"), names)
        assert printed.getvalue().splitlines() == PRINTED.findall(block) != []
    assert float(names["routing"].density) < 0.5


def test_the_readme_has_at_most_110_lines() -> None:
    assert len(README.read_text().splitlines()) <= 110


def test_prose_of_the_results_has_at_most_200_characters_a_line() -> None:
    long = [
        f"{page.name}:{number}"
        for page in sorted((ROOT / "docs" / "results").rglob("*.md"))
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > 200 and not line.startswith("|")
    ]
    assert long == []
