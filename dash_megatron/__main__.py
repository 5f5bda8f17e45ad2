"""The front door: `python -m dash_megatron plan | convert | evaluate | doctor | study | sample ...`.

The arguments of each command are in the `cli.py` of its package, which imports what the command needs when it runs.
"""

import argparse
import sys

from dash_megatron.command_line import ending_with_reader, parse_with_overrides
from dash_megatron.doctor.cli import add_doctor, replay_parser
from dash_megatron.evaluation.cli import add_evaluate
from dash_megatron.files import error_text
from dash_megatron.hf.cli import add_convert
from dash_megatron.planning.cli import add_plan
from dash_megatron.ranks import print_error_once
from dash_megatron.studies.cli import add_study
from dash_megatron.training.cli import add_sample

# where a path leads to nothing, to a file or folder that should be the other, or to what may not be read or written
_WRONG_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


@ending_with_reader()
def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 2 where an argument or a file is wrong, 1 where the command or a disk has a fault."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:2] == ["doctor", "replay"]:
        options = replay_parser().parse_args(arguments[2:])
    else:
        options = parse_with_overrides(_parser(), arguments)
    try:
        code = options.run(options)
    except (ValueError, OSError) as error:
        print_error_once(f"error: {error_text(error, vars(options).get('output'))}")
        return 1 if isinstance(error, OSError) and not isinstance(error, _WRONG_FILES) else 2
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dash_megatron", description="Tools around training runs."
    )
    tools = parser.add_subparsers(required=True, metavar="TOOL")
    for add in (add_sample, add_evaluate, add_convert, add_plan, add_doctor, add_study):
        add(tools)
    return parser


if __name__ == "__main__":
    sys.exit(main())
