"""The house rules that `lint-imports` does not check: file cycles, private names, and arguments told without torch."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def module_files(*folders: str) -> dict[str, Path]:
    """Every Python file below the folders by its module name; a package has the name of its folder."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imported_names(file: Path) -> Iterator[tuple[str, str]]:
    """The pairs (module, name) of every `from module import name` of a file, and (module, "") of every `import module`,
    inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{file} has a relative import"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def test_no_file_imports_itself_through_others() -> None:
    files = module_files("dash_megatron", "data_tools")
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        # `from package import module` imports the module, not only the package
        targets = (
            f"{source}.{name}" if f"{source}.{name}" in files else source
            for source, name in imported_names(file)
        )
        graph[module] = {target for target in targets if target in files}
    # raises CycleError, which names the files
    graphlib.TopologicalSorter(graph).prepare()


def test_no_private_name_is_imported_from_another_module() -> None:
    private = [
        f"{module}: from {source} import {name}"
        for module, file in module_files("dash_megatron", "data_tools", "benchmarks", "slurm", "docs").items()
        for source, name in imported_names(file)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not private


def test_no_command_needs_torch_to_tell_its_arguments_or_to_plan() -> None:
    code = "import dash_megatron.__main__ as door, sys; door._parser(); print(*sys.modules)"
    code += "; import dash_megatron.planning.table; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    arguments, plan = map(set, map(str.split, told.stdout.splitlines()))
    assert "dash_megatron.studies.cli" in arguments
    heavy = {"torch", "matplotlib", "transformers", "megatron", "deepspeed"}
    assert not arguments & (heavy | {"numpy"})
    assert not plan & heavy
