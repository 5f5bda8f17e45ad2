"""Write the sidecar of .bin/.idx files that were made elsewhere, after checking every token in them.

python -m data_tools.write_sidecar --prefix data/train --tokenizer data/tokenizer.model
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dash_megatron.data.sidecar import Sidecar, describe, sidecar_path
from dash_megatron.data.tokenizer import Tokenizer
from data_tools.arguments import make_parser, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = make_parser("write_sidecar", __doc__)
    parser.add_argument(
        "--prefix", required=True, help="path of the .bin and .idx files without their ending"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="the model file that made the data")
    return run(parser, arguments, _describe)


def _describe(options: argparse.Namespace) -> str:
    tokenizer = Tokenizer(options.tokenizer)
    sidecar = describe(
        options.prefix,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        chat_template=_known_template(options.prefix),
    )
    sidecar.write(options.prefix)
    return f"{sidecar_path(options.prefix)}: {sidecar.documents} documents, {sidecar.tokens} tokens"


def _known_template(prefix: str) -> str | None:
    """The chat template that the sidecar names which is replaced, and which the files do not tell."""
    try:
        return Sidecar.read(prefix).chat_template
    except (FileNotFoundError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main())
