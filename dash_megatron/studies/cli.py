"""`python -m dash_megatron study ...`: arguments, and what each command prints. docs/studies.md shows them at work."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any


def add_study(tools: Any) -> None:
    """Add `study` and its commands to the front door's subparsers."""
    commands = tools.add_parser("study", help="plan, train and compare many runs; draw one").add_subparsers(
        required=True, metavar="COMMAND"
    )
    plan = _add(commands, "plan", "every run with its size, length, FLOPs and cost", _plan)
    plan.add_argument("--json", action="store_true", help="print JSON")

    text = "train what is not finished, here or as a SLURM array"
    submit = commands.add_parser("submit", help=text, description=text)
    submit.add_argument(
        "studies",
        metavar="STUDY",
        nargs="+",
        help="YAML files, see docs/studies.md; runs of several wait in one queue",
    )
    submit.set_defaults(run=_submit)
    submit.add_argument(
        "--processes", type=int, default=1, help="processes of each run on this machine; default: 1"
    )
    submit.add_argument(
        "--at-once",
        type=_places,
        default=1,
        metavar="N",
        help="runs that train on this machine at the same time; each takes the next of its GPUs, and shares them "
        "where there are too few; gpus: as many as there are GPUs for; default: 1",
    )
    submit.add_argument(
        "--restarts",
        type=int,
        default=2,
        help="how often a run is started again after faults, on this machine; default: 2",
    )
    submit.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="names of runs, such as 'dash_25*' or, of one of several studies, 'scaling/*'; trained in this order; "
        "default: all",
    )
    submit.add_argument(
        "--slurm",
        type=shlex.split,
        metavar="ARGUMENTS",
        help="one array through slurm/submit.py, with its arguments as one word: "
        '--slurm="--nodes 1 --gpus-per-node 8 --time 12:00:00"',
    )

    collect = _add(commands, "collect", "results of all runs as a table, JSON and CSV", _collect)
    collect.add_argument("--json", action="store_true", help="print JSON instead of the table")
    _add(commands, "fit", "loss against parameters, tokens and compute, with intervals", _fit)
    plot = _add(commands, "plot", "pictures of the study", _plot)
    report = _add(commands, "report", "one HTML page with everything; of branches also Markdown", _report)
    report.add_argument("--output", help="page to write; default: <output>/report.html")
    for parser in (collect, plot, report):
        text = "of a study of branches: compare with this arm instead, into <output>/against_ARM"
        parser.add_argument("--reference", metavar="ARM", help=text)

    plot_run = commands.add_parser("plot-run", help="draw losses and per-layer density of one run")
    plot_run.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run")
    plot_run.add_argument("--output", help="PNG to write; default: RUN_DIR/training.png")
    plot_run.set_defaults(run=_plot_run)
    _add_routing(commands)


def _add_routing(commands: Any) -> None:
    text = "measure and draw which chunks the routers of a checkpoint select in one long document"
    routing = commands.add_parser("routing", help=text, description=text)
    routing.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run")
    routing.add_argument(
        "--output", metavar="DIR", help="folder of the results; default: RUN_DIR/routing/step_..."
    )
    text = "also write which chunks every token selected, bit-packed as in benchmarks/choices: an .npz"
    routing.add_argument("--dump", metavar="FILE", help=text)
    routing.set_defaults(run=_routing)
    text = "how probability over chunks disperses as context grows: entmax against softmax"
    dispersion = commands.add_parser("dispersion", help=text, description=text)
    dispersion.add_argument(
        "run_dir", metavar="RUN_DIR", nargs="?", help="also measure this run's queries and summaries"
    )
    dispersion.add_argument(
        "--output", metavar="DIR", default="dispersion", help="folder of the results; default: dispersion"
    )
    dispersion.add_argument("--seed", type=int, default=0, help="seed of the made-up inputs; default: 0")
    dispersion.set_defaults(run=_dispersion)
    for parser in (routing, dispersion):
        parser.add_argument("--step", type=int, help="checkpoint of this step instead of the newest")
        parser.add_argument(
            "--length", type=int, help="most tokens of the document; default: data.seq_length"
        )
        parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")


def _add(commands: Any, name: str, text: str, run: Any) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("study", metavar="STUDY", help="YAML file, see docs/studies.md")
    parser.set_defaults(run=run)
    return parser


def _places(text: str) -> int | None:
    if text == "gpus":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} must be a number or `gpus`")
    return int(text)


def _plan(options: argparse.Namespace) -> None:
    from dash_megatron.studies.plan import plan_study

    print(plan_study(options.study, options.json))


def _submit(options: argparse.Namespace) -> int:
    from dash_megatron.studies.submit import submit_studies

    return submit_studies(
        options.studies,
        options.processes,
        options.restarts,
        options.slurm,
        only=options.only,
        at_once=options.at_once,
    )


def _opened(options: argparse.Namespace) -> tuple[Any, Path]:
    """A study, and the folder of what compares its runs."""
    from dash_megatron.studies.study_file import load_study

    study = load_study(options.study)
    if options.reference is None:
        return study, Path(study.output)
    return study.against(options.reference), Path(study.output) / f"against_{options.reference}"


def _collect(options: argparse.Namespace) -> None:
    from dash_megatron.json_lines import strict_json
    from dash_megatron.planning.table import table
    from dash_megatron.studies.collect import collect, missed_targets, write_table
    from dash_megatron.studies.page import results_table
    from dash_megatron.studies.runs import expand

    study, folder = _opened(options)
    rows = collect(study)
    paths = write_table(study, rows)
    columns, lines = results_table(rows)
    text, written, found = table(lines, columns), [*paths], rows
    if study.branches:
        from dash_megatron.studies.branch_tables import as_text, remarks, tables
        from dash_megatron.studies.branches import as_rows, compare_branches, write_comparisons

        compared = compare_branches(study)
        written += write_comparisons(study, compared, folder)
        found = as_rows(study, compared)
        text += [line for one in tables(study, rows, compared) for line in ["", *as_text(one)]]
        said = remarks(study, rows)
    else:
        said = missed_targets(expand(study), rows)
    text += [line for remark in said for line in ["", remark]]
    if options.json:
        print(strict_json(found, indent=2))
    else:
        print("\n".join([*text, "", *map(str, written)]))


def _fit(options: argparse.Namespace) -> None:
    from dash_megatron.studies.fit import render_fits
    from dash_megatron.studies.study_file import load_study

    study = load_study(options.study)
    if study.branches:
        raise ValueError(
            "branches of a base follow no scaling law, so there is nothing to fit; `study report` compares them"
        )
    _, fits, path = _fitted(study)
    print("\n".join([*render_fits(fits), str(path)]))
    if not any("values" in fit for fits_of in fits["variants"].values() for fit in fits_of.values()):
        raise ValueError("no variant has the runs that a fit needs; the lines above say what is missing")


def _fitted(study: Any) -> tuple[list[dict[str, Any]], dict[str, Any], Path]:
    from dash_megatron.files import write_whole
    from dash_megatron.studies.collect import collect, write_table
    from dash_megatron.studies.fit import fit_study

    rows = collect(study)
    write_table(study, rows)
    fits = fit_study(rows)
    output = Path(study.output) / "fits.json"
    write_whole(output, json.dumps(fits, indent=2) + "\n", make_folder=True)
    return rows, fits, output


def _plot(options: argparse.Namespace) -> None:
    _, pictures, _ = _drawn(options)
    for path, text in pictures.items():
        print(f"{path}: {text}")


def _drawn(options: argparse.Namespace) -> tuple[Path, dict[Path, str], dict[str, str]]:
    """The folder of a study's reports, its pictures with a sentence each, and the reports by the end of their names."""
    from dash_megatron.studies.page import render_page
    from dash_megatron.studies.pictures import draw_study

    study, folder = _opened(options)
    if study.branches:
        return _drawn_branches(study, folder, options.study)
    rows, fits, _ = _fitted(study)
    drawn = draw_study(study, rows, fits, folder / "plots")
    pictures = {folder / "plots" / name: text for name, text in drawn.items()}
    return folder, pictures, {".html": render_page(study, options.study, rows, fits, pictures)}


def _drawn_branches(study: Any, folder: Path, source: str) -> tuple[Path, dict[Path, str], dict[str, str]]:
    from dash_megatron.studies.branch_page import render_branches_page, render_branches_text
    from dash_megatron.studies.branch_pictures import draw_branches
    from dash_megatron.studies.branches import compare_branches, write_comparisons
    from dash_megatron.studies.collect import collect, write_table

    rows, compared = collect(study), compare_branches(study)
    write_table(study, rows)
    write_comparisons(study, compared, folder)
    drawn = draw_branches(study, compared, folder / "plots")
    pictures = {folder / "plots" / name: text for name, text in drawn.items()}
    page = render_branches_page(study, source, rows, compared, pictures)
    return folder, pictures, {".html": page, ".md": render_branches_text(study, rows, compared)}


def _report(options: argparse.Namespace) -> None:
    from dash_megatron.files import write_whole

    folder, _, reports = _drawn(options)
    path = Path(options.output) if options.output else folder / "report.html"
    for suffix, text in reports.items():
        output = path if suffix == ".html" else path.with_suffix(suffix)
        write_whole(output, text, make_folder=True)
        print(output)


def _plot_run(options: argparse.Namespace) -> None:
    from dash_megatron.studies.plot_run import plot_run

    print(plot_run(options.run_dir, options.output))


def _routing(options: argparse.Namespace) -> None:
    from dash_megatron.studies.routing import routing_table, study_routing

    places = {"step": options.step, "length": options.length, "device": options.device}
    written = study_routing(options.run_dir, output=options.output, dump=options.dump, **places)
    report = json.loads(written[0].read_text(encoding="utf-8"))
    print(*routing_table(report), "", *written, sep="\n")


def _dispersion(options: argparse.Namespace) -> None:
    from dash_megatron.studies.dispersion import study_dispersion

    places = {"step": options.step, "length": options.length, "device": options.device}
    print(*study_dispersion(options.run_dir, output=options.output, seed=options.seed, **places), sep="\n")
