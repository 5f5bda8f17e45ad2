"""The front door: `python -m dash_megatron sample | study ...`."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one tool; 2 where an argument or a file is wrong."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dash_megatron", description="Tools around training runs."
    )
    tools = parser.add_subparsers(required=True, metavar="TOOL")

    sample = tools.add_parser("sample", help="continue a prompt with a run's newest checkpoint")
    sample.add_argument("run_dir", metavar="RUN_DIR")
    sample.add_argument("--prompt", default="", help="text to continue; default: start a document")
    sample.add_argument("--max-new-tokens", type=int, default=128)
    sample.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
    sample.set_defaults(run=_sample)

    study = tools.add_parser("study", help="look at runs").add_subparsers(required=True, metavar="COMMAND")
    plot = study.add_parser("plot-run", help="draw losses and per-layer density of one run")
    plot.add_argument("run_dir", metavar="RUN_DIR")
    plot.add_argument("--output", help="PNG to write; default: RUN_DIR/training.png")
    plot.set_defaults(run=_plot_run)
    return parser


def _sample(options: argparse.Namespace) -> None:
    from dash_megatron.training.sample import sample_from_run

    text = sample_from_run(
        options.run_dir,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        step=options.step,
    )
    print(options.prompt + text)


def _plot_run(options: argparse.Namespace) -> None:
    from dash_megatron.studies.plot_run import plot_run

    print(plot_run(options.run_dir, options.output))


if __name__ == "__main__":
    sys.exit(main())
