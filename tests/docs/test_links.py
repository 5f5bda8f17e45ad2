"""Every link of every page leads somewhere: files, headings, pictures, and names inside Python files."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"!?\[(?P<text>[^]]*)\]\((?P<target>[^) ]+)\)")
# paths of the repository, wherever a page names one
FOLDERS = "benchmarks|configs|dash_megatron|data_tools|docs|examples|slurm|studies|tests"
FILE = re.compile(rf"(?<![\w./])(?:{FOLDERS})/[\w*./-]*\.(?:json|jsonl|md|png|py|sbatch|sh|yaml)\b")
MODULE = re.compile(r"python -m ((?:benchmarks|dash_megatron|data_tools|docs|tests)[\w.]*)")
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[tuple[str, str]]:
    """(text, target) of every link and picture of a page that leads into the repository."""
    prose = CODE_BLOCK.sub("", page.read_text())
    found = [(match["text"], match["target"]) for match in LINK.finditer(prose)]
    return [(text, target) for text, target in found if not target.startswith(("http://", "https://"))]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", CODE_BLOCK.sub("", page.read_text()), re.MULTILINE):
        plain = LINK.sub(lambda match: match["text"], heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (numbered := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(numbered)
    return found


@cache
def names(path: Path) -> set[str]:
    """What a Python file defines: functions, classes, `Class.method`s and constants."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
            elif isinstance(node, ast.ClassDef):
                found.add(prefix + node.name)
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)
            elif isinstance(node, ast.If):
                collect([*node.body, *node.orelse], prefix)

    collect(ast.parse(path.read_text()).body, "")
    return found


def fault(page: Path, text: str, target: str) -> str | None:
    """What is wrong with a link, or None. The text of a link into code may be `path#name`, in backticks."""
    place, _, anchor = target.partition("#")
    path = (page.parent / place).resolve() if place else page
    if not path.is_relative_to(ROOT) or not path.exists():
        return f"{target} does not exist"
    if anchor and (path.suffix != ".md" or anchor not in anchors(path)):
        return f"{target}: {path.name} has no heading #{anchor}"
    file, _, name = text.strip("`").partition("#")
    if path.suffix == ".py" and name:
        if not str(path).endswith("/" + file):
            return f"{text} links to {target}, another file"
        if name not in names(path):
            return f"{text}: {target} defines no {name}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_headings_and_names_that_exist(page: Path) -> None:
    faults = [fault(page, text, target) for text, target in links(page)]
    assert [problem for problem in faults if problem] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_pages_name_exist(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in FILE.findall(text) if not list(ROOT.glob(name))]
    for module in MODULE.findall(text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            missing.append(module)
    assert missing == []


def test_walks_name_functions_in_every_link_into_code() -> None:
    page = ROOT / "docs" / "architecture.md"
    walks = page.read_text().partition("## Five walks")[2]
    code = [match for match in LINK.finditer(walks) if match["target"].endswith(".py")]
    assert len(code) > 80
    assert [match["text"] for match in code if "#" not in match["text"]] == []


@pytest.mark.parametrize(
    ("text", "target", "problem"),
    [
        ("a page", "missing.md", "does not exist"),
        ("a heading", "README.md#no-such-heading", "no heading"),
        ("`training/trainer.py#Trainer.no_such_method`", "dash_megatron/training/trainer.py", "defines no"),
        ("`training/engine.py#Trainer`", "dash_megatron/training/trainer.py", "another file"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(text: str, target: str, problem: str) -> None:
    assert problem in (fault(ROOT / "README.md", text, target) or "")
