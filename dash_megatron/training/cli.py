"""Arguments of `python -m dash_megatron sample`."""

from __future__ import annotations

import argparse
from typing import Any


def add_sample(tools: Any) -> None:
    """Add `sample` to the front door's subparsers."""
    sample = tools.add_parser("sample", help="continue a prompt with a run's newest checkpoint")
    sample.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run")
    sample.add_argument("--prompt", default="", help="text to continue; default: start a document")
    sample.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message, and what is printed the answer"
    )
    sample.add_argument("--max-new-tokens", type=int, default=128, help="most tokens to add; default: 128")
    sample.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        help="divides the logits; 0 takes their argmax; default: 0.7",
    )
    sample.add_argument("--seed", type=int, default=0, help="fixes the draw; default: 0")
    sample.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
    sample.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> None:
    # imported late, so that --help is fast
    from dash_megatron.training.sample import sample_from_run

    text = sample_from_run(
        options.run_dir,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        step=options.step,
        chat=options.chat,
    )
    print(text if options.chat else options.prompt + text)
