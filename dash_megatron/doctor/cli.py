"""Arguments of `python -m dash_megatron doctor` and `doctor replay`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dash_megatron.launcher import check_processes, launch


def add_doctor(tools: Any) -> None:
    """Add `doctor` to the front door's subparsers."""
    text = "examine the machines, data and layout of a run, under the launcher that train.py will have"
    doctor = tools.add_parser(
        "doctor", help=text, description=text, epilog="`doctor replay RUN_DIR STEP` computes a batch again"
    )
    doctor.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    doctor.add_argument("--only", metavar="NAME,...", help="checks to run, see docs/doctor.md; default: all")
    doctor.add_argument("--processes", type=int, help="start so many on this machine, such as one a GPU")
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the config")
    doctor.set_defaults(run=_doctor)


def replay_parser() -> argparse.ArgumentParser:
    """The parser of what follows `doctor replay`.

    `doctor` has a config and overrides, `doctor replay` has neither: argparse cannot tell them apart by itself.
    """
    replay = argparse.ArgumentParser(
        prog="python -m dash_megatron doctor replay",
        description="Compute a batch again that gave a wrong loss or gradient; name the sample and the module.",
    )
    replay.add_argument("run_dir", metavar="RUN_DIR")
    replay.add_argument("step", metavar="STEP", type=int, help="of <RUN_DIR>/faults/step_...")
    replay.set_defaults(run=_replay)
    return replay


def _doctor(options: argparse.Namespace) -> int:
    from dash_megatron.config import load_config

    config = load_config(options.config, options.overrides)
    check_processes(config, options.processes)
    if options.processes is not None:
        command = [sys.executable, "-m", "dash_megatron", "doctor", "--config", options.config]
        only = [] if options.only is None else ["--only", options.only]
        return launch([*command, *only, *options.overrides], options.processes)
    # imported late, so that a wrong config is told at once
    from dash_megatron.doctor.examine import examine

    return examine(config, options.only)


def _replay(options: argparse.Namespace) -> int:
    from dash_megatron.doctor.replay import replay_step

    return replay_step(options.run_dir, options.step)
