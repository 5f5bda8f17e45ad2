"""Write the sidecar of .bin/.idx files that were made elsewhere, after checking every token in them.

python -m data_tools.write_sidecar --prefix data/train --tokenizer data/tokenizer.model
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dash_megatron.data.sidecar import describe, sidecar_path
from dash_megatron.data.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.write_sidecar", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--prefix", required=True, help="path of the .bin and .idx files without their ending"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="the model file that made the data")
    options = parser.parse_args(arguments)
    try:
        tokenizer = Tokenizer(options.tokenizer)
        sidecar = describe(
            options.prefix,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
        )
        sidecar.write(options.prefix)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{sidecar_path(options.prefix)}: {sidecar.documents} documents, {sidecar.tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
