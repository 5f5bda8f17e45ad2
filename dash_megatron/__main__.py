"""The front door: `python -m dash_megatron plan | doctor | sample | evaluate | convert | study ...`."""

import argparse
import sys
from typing import Any

from dash_megatron.evaluation.arguments import add_evaluate
from dash_megatron.studies.cli import add_study

# where a path leads to nothing, to a file or folder that should be the other, or to what may not be read or written
_WRONG_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(arguments: list[str] | None = None) -> int:
    """Run one tool; 2 where an argument or a file is wrong, 1 where the tool found a fault."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:2] == ["doctor", "replay"]:
        options = _replay_parser().parse_args(arguments[2:])
    else:
        options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
    except (ValueError, *_WRONG_FILES) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code or 0


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

    add_evaluate(tools)
    convert = tools.add_parser("convert", help="to and from Hugging Face folders")
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")
    to_hf = directions.add_parser("to-hf", help="export a run's checkpoint for transformers")
    to_hf.add_argument("run_dir", metavar="RUN_DIR")
    to_hf.add_argument("output", metavar="OUT", help="folder to make")
    to_hf.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
    to_hf.add_argument("--dtype", default="bfloat16", help="of the weights: bfloat16 (default) or float32")
    to_hf.set_defaults(run=_to_hf)
    from_hf = directions.add_parser(
        "from-hf", help="weights for training.init_from from a Llama-shaped model"
    )
    from_hf.add_argument("source", metavar="DIR", help="folder with config.json and safetensors")
    from_hf.add_argument("output", metavar="OUT", help="folder to make")
    from_hf.set_defaults(run=_from_hf)

    plan = tools.add_parser("plan", help="layouts of a config on a number of GPUs, ranked by estimated speed")
    plan.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    plan.add_argument("--gpus", required=True, type=int, help="processes, one a GPU")
    plan.add_argument(
        "--density",
        type=float,
        help="pairs attended over causal pairs; default: the config's last attention.target_density, or 0.1",
    )
    plan.add_argument(
        "--peak-density",
        type=float,
        default=1.0,
        help="largest of the run, for memory; default: 1, at random weights",
    )
    plan.add_argument(
        "--locality",
        type=float,
        default=0.0,
        help="probability that queries want what the ones before them wanted",
    )
    plan.add_argument(
        "--listed",
        type=float,
        default=1.04,
        help="pairs that tiles visit over pairs selected, as `study routing` measures them; default: 1.04, where neighbours "
        "agree; the routers measured so far had 3 to 6",
    )
    plan.add_argument(
        "--imbalance", type=float, default=1.0, help="busiest context rank's attention over the mean"
    )
    plan.add_argument(
        "--gpu", default="H200", help="B200, H200, H100, H800, A100 or L40S; default: H200, the one timed"
    )
    plan.add_argument("--memory-gib", type=float, help="memory of a GPU; default: what data sheets say")
    plan.add_argument("--price", type=float, default=3.0, help="of one GPU for an hour; default: 3")
    plan.add_argument(
        "--profile",
        metavar="RUN_DIR",
        help="a short run on one such GPU or more: corrects the speed of compute and the memory of activations",
    )
    plan.add_argument("--top", type=int, default=10, help="layouts to show")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the config")
    plan.set_defaults(run=_plan)

    _add_doctor(tools)
    add_study(tools)
    return parser


def _add_doctor(tools: Any) -> None:
    text = "examine the machines, data and layout of a run, under the launcher that train.py will have"
    doctor = tools.add_parser(
        "doctor", help=text, description=text, epilog="`doctor replay RUN_DIR STEP` computes a batch again"
    )
    doctor.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    doctor.add_argument("--only", metavar="NAME,...", help="checks to run, see docs/doctor.md; default: all")
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the config")
    doctor.set_defaults(run=_doctor)


def _replay_parser() -> argparse.ArgumentParser:
    """`doctor` has a config and overrides, `doctor replay` none: argparse cannot tell them apart by itself."""
    replay = argparse.ArgumentParser(
        prog="python -m dash_megatron doctor replay",
        description="Compute a batch again that gave a wrong loss or gradient; name the sample and the module.",
    )
    replay.add_argument("run_dir", metavar="RUN_DIR")
    replay.add_argument("step", metavar="STEP", type=int, help="of <RUN_DIR>/faults/step_...")
    replay.set_defaults(run=_replay)
    return replay


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


def _to_hf(options: argparse.Namespace) -> None:
    from dash_megatron.hf.export import export_run

    report = export_run(options.run_dir, options.output, step=options.step, dtype=options.dtype)
    print(
        f"{options.output}: on {report.num_tokens} tokens the same chunks in every layer as the training model, logits "
        f"within {report.logits_difference:.1e}; rounding weights changed logits by {report.rounding:.2%}"
    )


def _from_hf(options: argparse.Namespace) -> None:
    from dash_megatron.hf.folder import MODEL_SECTIONS
    from dash_megatron.hf.importing import import_folder

    tokenizer = import_folder(options.source, options.output).tokenizer
    print(
        f"{options.output}: start a run with training.init_from={options.output} and the sections in "
        f"{options.output}/{MODEL_SECTIONS}"
    )
    if tokenizer is None:
        print(
            "no tokenizer was found that training takes (tokenizer.model, or tokenizer.json with tokenizer_config.json): "
            "data.tokenizer must be the one that the model was trained with"
        )
    else:
        print(f"tokenize with, and set, data.tokenizer={tokenizer}")


def _plan(options: argparse.Namespace) -> None:
    from dash_megatron.config import load_config
    from dash_megatron.planning.cli import plan
    from dash_megatron.planning.layout import Hardware
    from dash_megatron.planning.step_time import Routing

    density = options.density
    if density is None:
        config = load_config(options.config, options.overrides)
        density = config.attention.final_density(config.model.layers) or Routing.density
    routing = Routing(
        density=density,
        peak_density=options.peak_density,
        locality=options.locality,
        listed_over_selected=options.listed,
        imbalance=options.imbalance,
    )
    print(
        plan(
            options.config,
            options.gpus,
            options.overrides,
            routing=routing,
            hardware=Hardware.of(options.gpu, options.memory_gib),
            price=options.price,
            profile=options.profile,
            top=options.top,
            as_json=options.json,
        )
    )


def _doctor(options: argparse.Namespace) -> int:
    from dash_megatron.config import load_config

    config = load_config(options.config, options.overrides)
    # imported late, so that a wrong config is told at once
    from dash_megatron.doctor.cli import examine

    return examine(config, options.only)


def _replay(options: argparse.Namespace) -> int:
    from dash_megatron.doctor.replay import replay_step

    return replay_step(options.run_dir, options.step)


if __name__ == "__main__":
    sys.exit(main())
