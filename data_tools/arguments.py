"""What the command lines of all tools share: their parser, arguments for reading text, and how errors end them."""

import argparse
import sys
from collections.abc import Callable, Sequence

from dash_megatron.command_line import ending_with_reader
from dash_megatron.files import error_text


def make_parser(tool: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m data_tools.<tool>`, described by the first line of its module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m data_tools.{tool}", description=(doc or "").splitlines()[0]
    )


def add_input(parser: argparse.ArgumentParser) -> None:
    """`--input`: what `readers.find_inputs` takes."""
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="corpus folders or files")


def add_text_key(parser: argparse.ArgumentParser) -> None:
    """`--text-key`: where records hold their text."""
    parser.add_argument(
        "--text-key", default="text", help="key or column that holds the text (default: text)"
    )


def add_max_bad_lines(parser: argparse.ArgumentParser) -> None:
    """`--max-bad-lines`: how many lines that are no records are skipped before a tool gives up."""
    parser.add_argument("--max-bad-lines", type=int, default=0, help="bad lines to tolerate (default: 0)")


@ending_with_reader()
def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    work: Callable[[argparse.Namespace], str],
    errors: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """Parse arguments and do a tool's work, which gives the line to print; returns the exit status.

    One of `errors`, which a user can mend, ends as one line on standard error and status 1.
    """
    options = parser.parse_args(arguments)
    try:
        told = work(options)
    except errors as error:
        print(f"error: {error_text(error, vars(options).get('output'))}", file=sys.stderr)
        return 1
    print(told)
    return 0
