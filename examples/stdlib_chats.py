"""Write conversations to try fine-tuning with: questions about functions of Python's standard library.

python examples/stdlib_chats.py > runs/quickstart/chats.jsonl
"""

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from dash_megatron.command_line import ending_with_reader

ASKED = ("What does {} do?", "Explain {}.", "How do I use {}?")


def documented_functions(folder: Path) -> Iterator[tuple[str, str]]:
    """Names of functions and classes, and the first paragraphs of their documentation."""
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if 20 <= len(first) <= 300 and not node.name.startswith("_") and first.isascii():
                    yield f"{module}.{node.name}", first


@ending_with_reader()
def main() -> None:
    """Print one conversation a line, every third of them with a second question."""
    warnings.simplefilter("ignore")  # old modules have invalid escapes
    found = list(documented_functions(Path(sysconfig.get_path("stdlib"))))
    for number, (name, text) in enumerate(found):
        pairs = [(ASKED[number % 3].format(name), text)]
        if number % 3 == 0:
            other, more = found[(number + 7) % len(found)]
            pairs.append((f"And {other}?", more))
        messages = [
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        print(json.dumps({"messages": messages}))


if __name__ == "__main__":
    main()
