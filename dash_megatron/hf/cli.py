"""Arguments of `python -m dash_megatron convert`, and what each direction prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_convert(tools: Any) -> None:
    """Add `convert` and its two directions to the front door's subparsers."""
    convert = tools.add_parser("convert", help="to and from Hugging Face folders")
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")
    to_hf = directions.add_parser("to-hf", help="export a run's checkpoint for transformers")
    to_hf.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run")
    to_hf.add_argument("output", metavar="OUT", help="folder to make")
    to_hf.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
    to_hf.add_argument(
        "--dtype", default="bfloat16", help="data type of the weights: bfloat16 (default) or float32"
    )
    to_hf.add_argument(
        "--license", help="license of the weights, for the model card, such as apache-2.0; default: none"
    )
    to_hf.set_defaults(run=_to_hf)
    from_hf = directions.add_parser(
        "from-hf", help="weights for training.init_from from a Llama-shaped model"
    )
    from_hf.add_argument("source", metavar="DIR", help="folder with config.json and safetensors")
    from_hf.add_argument("output", metavar="OUT", help="folder to make")
    from_hf.set_defaults(run=_from_hf)


def _to_hf(options: argparse.Namespace) -> None:
    # imported late, so that --help is fast
    from dash_megatron.hf.export import export_run

    report = export_run(
        options.run_dir, options.output, step=options.step, dtype=options.dtype, terms=options.license
    )
    same = f"the same chunks in {report.where} as the training model, logits" if report.where else "logits"
    print(
        f"{options.output}: on {report.num_tokens} tokens {same} within {report.logits_difference:.1e}"
        f"{'' if report.where else ' of the training model, no layer of which selects chunks'}; "
        f"rounding weights changed logits by {report.rounding:.2%}"
    )


def _from_hf(options: argparse.Namespace) -> None:
    from dash_megatron.checkpoint.folder import MODEL_SECTIONS
    from dash_megatron.hf.importing import import_folder

    _, tokenizer, positions = import_folder(options.source, options.output)
    print(
        f"{options.output}: start a run with training.init_from={options.output} and the sections in "
        f"{Path(options.output) / MODEL_SECTIONS}"
    )
    if positions is not None:
        print(
            f"its positions were trained up to {positions}: for a longer data.seq_length change model.rope_scaling, as "
            "docs/recipe.md does"
        )
    if tokenizer is None:
        print(
            "no tokenizer was found that training takes (tokenizer.model, or tokenizer.json with tokenizer_config.json): "
            "data.tokenizer must be the one that the model was trained with"
        )
    else:
        print(f"tokenize with, and set, data.tokenizer={tokenizer}")
