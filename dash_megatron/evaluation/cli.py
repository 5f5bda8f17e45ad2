"""Arguments of `python -m dash_megatron evaluate`, which studies also name for their runs."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dash_megatron.config import Config, RopeScaling
    from dash_megatron.evaluation.settings import Settings


def add_evaluate(tools: Any) -> None:
    """Add `evaluate` to the front door's subparsers."""
    text = "loss by position and document, needles, RULER families, recall and copy, on a run or an exported model"
    evaluate = tools.add_parser("evaluate", help=text, description=text, epilog="see docs/evaluation.md")
    _fill(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _fill(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("source", metavar="SOURCE", help="a run's folder, or an exported one")
    evaluate.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
    evaluate.add_argument(
        "--rope-scaling",
        metavar="YAML",
        help="stretch a run's RoPE beyond the lengths it was trained on, with the fields of model.rope_scaling: "
        "'{rope_type: yarn, factor: 8, original_max_position_embeddings: 16384}'",
    )
    evaluate.add_argument("--tasks", type=_names, metavar="NAME,...", help="tasks to score; default: all")
    evaluate.add_argument(
        "--lengths",
        type=_integers,
        metavar="TOKENS,...",
        help="lengths of samples; default: 1/4, 1/2 and all of training's",
    )
    evaluate.add_argument(
        "--depths",
        type=int,
        default=5,
        help="how many places the needle of task `needle` is put at; default: 5",
    )
    evaluate.add_argument(
        "--samples", type=int, default=20, help="samples of each task, length and depth; default: 20"
    )
    evaluate.add_argument(
        "--score",
        default="answer",
        help="how answers are scored: answer (default), in one pass over prompt and answer; generate, by greedy continuation",
    )
    evaluate.add_argument("--text", metavar="FILE", help="local text to score and to hide needles in")
    evaluate.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PREFIX",
        help="such text from PREFIX.bin and .idx; may be repeated; default: the run's validation data",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="fixes which samples are drawn; default: 0")
    evaluate.add_argument(
        "--batch-tokens", type=int, default=32768, help="most tokens of a batch; default: 32768"
    )
    evaluate.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the results; default: RUN/evaluation/step_... or SOURCE.evaluation",
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers, such as 4096,16384") from None


def check_arguments(arguments: Sequence[str], config: Config | None = None) -> None:
    """Refuse arguments, without SOURCE, that `evaluate` would refuse before it opens anything.

    Args:
        arguments: as they are typed.
        config: of a run that is to be evaluated: also refuse what `evaluate` would before it reads the weights.

    Raises:
        FileNotFoundError: see `check_run`.
        ValueError: an unknown or malformed argument, or one that breaks a rule.
    """
    parser = argparse.ArgumentParser(prog="evaluate", add_help=False)
    _fill(parser)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            options = parser.parse_args(["RUN_DIR", *arguments])
    except SystemExit:
        raise ValueError(told.getvalue().strip().splitlines()[-1]) from None
    settings, rope_scaling = _read(options)
    if config is not None:
        # imported late: it brings torch
        from dash_megatron.evaluation.source import check_run

        check_run(config, settings, rope_scaling=rope_scaling, text=options.text, data=options.data)


def _read(options: argparse.Namespace) -> tuple[Settings, RopeScaling | None]:
    # imported late, so that --help is fast
    from dash_megatron.config import read_rope_scaling
    from dash_megatron.evaluation.settings import ALL_TASKS, Settings

    settings = Settings(
        tasks=options.tasks or ALL_TASKS,
        lengths=options.lengths or (),
        depths=options.depths,
        samples=options.samples,
        score=options.score,
        seed=options.seed,
        batch_tokens=options.batch_tokens,
    )
    return settings, read_rope_scaling(options.rope_scaling) if options.rope_scaling else None


def _evaluate(options: argparse.Namespace) -> None:
    from dash_megatron.evaluation.source import evaluate_source

    settings, rope_scaling = _read(options)
    places = {"step": options.step, "text": options.text, "data": options.data, "output": options.output}
    print(evaluate_source(options.source, settings, rope_scaling=rope_scaling, **places))
