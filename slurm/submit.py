"""Submit training to SLURM: `python slurm/submit.py --config FILE --nodes N --gpus-per-node G --time T`.

Writes a batch script into the run's folder and submits it. The script is `pretrain.sbatch` with its first parts filled in
from the arguments and from `site.yaml`; docs/slurm.md tells what it does.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from bad_nodes import excluded_by, read_bad_nodes, with_exclusions
from query import NO_ANSWER, query_slurm

# the rules that are checked here are those of the train.py that will run, not of another installed version
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from site_file import Site, load_site

from dash_megatron.command_line import ending_with_reader, parse_with_overrides
from dash_megatron.config import Config, load_config
from dash_megatron.files import error_text

FOLDER = Path(__file__).resolve().parent
TEMPLATE = FOLDER / "pretrain.sbatch"
REST_OF_TEMPLATE = "# ==== the job"

_PLAIN_PATH = re.compile(r"[\w./@:+,=-]+")
# how sbatch says that it is there without a cluster
_NO_CLUSTER = re.compile(r"configuration source|slurm\.conf")
_LATER = "with --inputs-later, or --dependency on the job that makes it, what a job reads need not be here when it is submitted"
_ELSEWHERE = "submit it where SLURM is, or train on this machine: `python train.py --config FILE`, of a study `study submit` without --slurm"


@dataclass(frozen=True)
class Job:
    """What SLURM is asked for."""

    name: str
    nodes: int
    processes_per_node: int
    gpus_per_node: int
    time: str
    dependency: str | None = None
    at_once: int | None = None
    """Tasks of an array that may run at the same time; None: all."""
    left_out: tuple[str, ...] = ()
    """Machines that it is to do without, as faults of its runs named them."""


@dataclass(frozen=True)
class Run:
    """One run of a job, or of a task of its array."""

    config: Config
    folder: Path
    """Its `run_dir`, absolute."""

    def frozen_config(self, stamp: str) -> Path:
        """Where the config is kept that this submission trains, whatever becomes of the file it was read from."""
        return self.folder / "slurm" / f"{stamp}.yaml"


def read_run(path: str, overrides: list[str], processes: int) -> Run:
    """Read a config and check it for a number of processes.

    Raises:
        ValueError: a broken rule of the config, or a `run_dir` that cannot stand in a batch script or has imported weights.
    """
    from dash_megatron.checkpoint.folder import check_own_folder

    config = load_config(path, overrides)
    config.accumulation_steps(processes)
    folder = Path(config.run_dir).absolute()
    if _PLAIN_PATH.fullmatch(str(folder)) is None:
        raise ValueError(
            f"run_dir={config.run_dir} ({folder}) must be of letters, digits and . _ - + = , @ : only, "
            "because SLURM gives other signs a meaning; choose another"
        )
    check_own_folder(folder)
    return Run(config, folder)


def limit_in_seconds(time: str) -> int:
    """Length of a time limit in one of SLURM's forms, such as 90, 24:00:00 or 7-00.

    Raises:
        ValueError: another form.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ValueError(
            f"--time {time} must be minutes, hours:minutes:seconds or days-hours, such as 24:00:00"
        )
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match.group(1) is not None or match.group(4) is not None:  # days-hours:minutes:seconds
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def render(job: Job, runs: list[Run], site: Site, stamp: str, command: str) -> str:
    """The batch script of a job.

    Raises:
        ValueError: the time limit leaves no time to train before the warning.
    """
    if limit_in_seconds(job.time) <= site.warning_seconds:
        raise ValueError(
            f"--time {job.time} must be longer than warning_seconds={site.warning_seconds} of the site file, the time to "
            "save in; ask for more, or lower it"
        )
    rest = TEMPLATE.read_text().partition(REST_OF_TEMPLATE)
    parts = [
        "#!/usr/bin/env bash",
        f"# {command}",
        "",
        "# ==== what SLURM is asked for",
        *[f"#SBATCH {option}" for option in _sbatch_options(job, runs, site)],
        "",
        "# ==== the run: one entry, or one for each task of a job array",
        _array("CONFIGS", [str(run.frozen_config(stamp)) for run in runs]),
        _array("RUN_DIRS", [str(run.folder) for run in runs]),
        "OVERRIDES=()",
        "",
        "# ==== the site",
        f"MAX_RESTARTS={site.restarts}",
        f"BAD_NODE_DAYS={site.bad_node_days}",
        f"SCRATCH={shlex.quote(site.scratch)}",
        _array("TRAIN", [*site.container, site.python or sys.executable, str(FOLDER.parent / "train.py")]),
        _array("SRUN_OPTIONS", [f"--cpus-per-task={site.cpus_per_process}", *site.srun]),
        "prepare() {",
        *[f"    {line}" for line in _preparation(job, site)],
        "}",
        "",
    ]
    return "\n".join(parts) + "\n" + "".join(rest[1:])


def _sbatch_options(job: Job, runs: list[Run], site: Site) -> list[str]:
    log = "job_%j.log" if len(runs) == 1 else "array_%A_%a.log"
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes_per_node}",
        f"--cpus-per-task={site.cpus_per_process}",
    ]
    if job.gpus_per_node:
        options.append(site.gpus.format(gpus=job.gpus_per_node))
    options += [
        f"--time={job.time}",
        f"--signal=USR1@{site.warning_seconds}",
        "--requeue",
        "--open-mode=append",
        "--export=NONE",
        f"--chdir={shlex.quote(os.getcwd())}",
        f"--output={runs[0].folder}/logs/{log}",
    ]
    if job.dependency:
        options.append(f"--dependency={job.dependency}")
    if len(runs) > 1:
        options.append(f"--array=0-{len(runs) - 1}" + (f"%{job.at_once}" if job.at_once else ""))
    return options + with_exclusions(site.sbatch, job.left_out)


def _array(name: str, words: list[str]) -> str:
    return f"{name}=({' '.join(map(shlex.quote, words))})"


def _preparation(job: Job, site: Site) -> list[str]:
    lines = []
    if site.modules:
        lines.append("type module &> /dev/null || source /etc/profile")
        lines += [f"module load {shlex.quote(module)} || return" for module in site.modules]
    if not job.gpus_per_node:
        lines.append("export CUDA_VISIBLE_DEVICES=")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    return lines + site.setup.splitlines() + [":"]


def check_nobody_else_runs(runs: list[Run]) -> None:
    """Look for queued and running jobs of the same folders.

    Raises:
        ValueError: there is one.
    """
    queue = query_slurm("squeue", "--noheader", "--array", "--format=%i %T")
    if queue is None:
        return  # sbatch will tell
    alive = dict(line.split() for line in queue.splitlines())
    for run in runs:
        history = run.folder / "slurm" / "events.tsv"
        lines = history.read_text(errors="replace").splitlines() if history.exists() else []
        for job in dict.fromkeys(line.split("\t")[1] for line in lines if line.count("\t") == 4):
            if job in alive:
                raise ValueError(
                    f"run_dir={run.folder} is that of job {job}, which is {alive[job]}; cancel it, choose another "
                    f"run_dir, or go on after it with --dependency afterany:{job}"
                )


def check_inputs(config: Config) -> None:
    """Look for what a run reads: a job that misses it would say so only when its turn comes.

    Raises:
        ValueError: tokenizer, data or initial weights are missing, or are not what the config says.
        ImportError: this machine lacks what reads them.
    """
    # imported late, as they bring numpy and tokenizers
    from dash_megatron.checkpoint.folder import check_start_of
    from dash_megatron.data.blend import check_data_of

    try:
        check_data_of(config)
        check_start_of(config)
    except OSError as error:
        raise ValueError(f"{error_text(error)}; {_LATER}") from error


def submit(script: str, job: Job, runs: list[Run], stamp: str, command: str) -> str:
    """Write the script and the configs into the runs' folders, and submit; gives back the job's id.

    Raises:
        ValueError: sbatch is not here, or refuses.
        OSError: a folder cannot be written.
    """
    for run in runs:
        for folder in ("slurm", "logs"):  # SLURM opens the log before the script could make its folder
            (run.folder / folder).mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
        run.frozen_config(stamp).write_text(f"# {command}\n{text}")
        (run.folder / "slurm" / f"{stamp}.sbatch").write_text(script)
    # within a job, SLURM's variables describe that one
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    environment = {
        name: text for name, text in os.environ.items() if not name.startswith("SLURM_") or name in kept
    }
    batch = str(runs[0].folder / "slurm" / f"{stamp}.sbatch")
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", batch], env=environment, capture_output=True, text=True, timeout=300
        )
    except FileNotFoundError as error:
        raise ValueError(f"there is no sbatch on this machine; {batch} is written: {_ELSEWHERE}") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"sbatch {batch} gave no answer for 5 minutes; look with squeue before trying again"
        ) from error
    if done.returncode:
        message = done.stderr.strip()
        if NO_ANSWER.search(message):  # only the answer may be lost: a second sbatch could be a second job
            raise ValueError(f"sbatch {batch} got no answer: {message}; look with squeue before trying again")
        if _NO_CLUSTER.search(message):
            reason = message.splitlines()[-1]
            raise ValueError(f"sbatch knows no cluster here ({reason}); {batch} is written: {_ELSEWHERE}")
        raise ValueError(f"sbatch {batch} refused: {message}{_hint_of(job)}")
    number = done.stdout.strip().split(";")[0]
    time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for index, run in enumerate(runs):
        name = number if len(runs) == 1 else f"{number}_{index}"
        # what the script may take off again
        if job.left_out:
            (run.folder / "slurm" / f"excluded.{name}").write_text(
                "".join(f"{node}\n" for node in job.left_out)
            )
        with (run.folder / "slurm" / "events.tsv").open("a") as history:
            history.write(f"{time}\t{name}\t0\tsubmitted\t{batch}\n")
    return number


def _hint_of(job: Job) -> str:
    if not job.left_out:
        return ""
    names = ",".join(job.left_out)
    return f"; it leaves out {names}: to take machines again, delete their lines of slurm/bad_nodes.tsv in run_dir"


@ending_with_reader()
def main(arguments: list[str] | None = None) -> int:
    """Check, write and submit; 2 where something is wrong."""
    options = _parse(arguments)
    command = shlex.join(["python", "slurm/submit.py", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        job, runs, site = _what_to_submit(options)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        script = render(job, runs, site, stamp, command.replace("\n", " "))
        if options.dry_run:
            print(script, end="", flush=True)
        if not options.dependency:
            check_nobody_else_runs(runs)
        if not options.dependency and not options.inputs_later:
            for run in runs:
                check_inputs(run.config)
        if options.dry_run:
            return 0
        number = submit(script, job, runs, stamp, command.replace("\n", " "))
    except ImportError as error:
        print(f"error: {error}, to look at tokenizer and data; --inputs-later does without", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        return 2
    print(f"job {number}: {runs[0].folder}/slurm/{stamp}.sbatch")
    if hint := _hint_of(job):
        print(hint.removeprefix("; "), file=sys.stderr)
    return 0


def _what_to_submit(options: argparse.Namespace) -> tuple[Job, list[Run], Site]:
    gpus = options.gpus_per_node
    if gpus and options.processes_per_node not in (None, gpus):
        raise ValueError(
            f"--processes-per-node {options.processes_per_node} must be left out with --gpus-per-node {gpus}: "
            "there is one process for each GPU"
        )
    per_node = gpus or (1 if options.processes_per_node is None else options.processes_per_node)
    for option, number, least in (
        ("--nodes", options.nodes, 1),
        ("--gpus-per-node", gpus, 0),
        ("--processes-per-node", per_node, 1),
        ("--at-once", 1 if options.at_once is None else options.at_once, 1),
    ):
        if number < least:
            raise ValueError(f"{option} {number} must be at least {least}; ask for {least} or more")
    if options.at_once and not options.array:
        raise ValueError(f"--at-once {options.at_once} must go with --array; leave it out")
    site = load_site(Path(options.site))
    paths = [options.config] if options.config else options.array
    runs = [read_run(path, options.overrides, options.nodes * per_node) for path in paths]
    folders = [run.folder for run in runs]
    twice = [str(folder) for folder in folders if folders.count(folder) > 1]
    if twice:
        raise ValueError(f"run_dir={twice[0]} is that of several configs of --array; give each its own")
    name = options.job_name or (
        runs[0].folder.name if options.config else Path(paths[0]).resolve().parent.name
    )
    for option, text in (
        ("--job-name", name),
        ("--dependency", options.dependency or "none"),
    ):
        if re.fullmatch(r"[\w.,:?+@=()-]+", text) is None:
            raise ValueError(
                f"{option} {text!r} must be one word of letters, digits and _ . , : ? + @ = ( ) -; take out the others"
            )
    at_once = options.at_once if len(runs) > 1 else None
    left_out = read_bad_nodes(folders, options.nodes, site.bad_node_days, excluded_by(site.sbatch))
    job = Job(name, options.nodes, per_node, gpus, options.time, options.dependency, at_once, left_out)
    return job, runs, site


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="YAML file, see docs/configuration.md")
    what.add_argument(
        "--array", nargs="+", metavar="FILE", help="a study: one task of a job array for each config"
    )
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="machines of each run")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        required=True,
        metavar="G",
        help="GPUs, one process each; 0 trains on CPUs",
    )
    parser.add_argument("--processes-per-node", type=int, metavar="P", help="without GPUs; default: 1")
    parser.add_argument("--time", required=True, help="limit of one start of the job, such as 24:00:00")
    parser.add_argument(
        "--job-name", help="default: the name of run_dir, or of the folder of --array's configs"
    )
    parser.add_argument("--dependency", help="as sbatch takes it, such as afterok:123")
    parser.add_argument(
        "--inputs-later",
        action="store_true",
        help="submit though the data or training.init_from are not here, as with --dependency: the nodes will see them",
    )
    parser.add_argument("--at-once", type=int, metavar="K", help="tasks of --array that run at the same time")
    parser.add_argument(
        "--site", default=str(FOLDER / "site.yaml"), metavar="FILE", help="default: slurm/site.yaml"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the batch script, and what would keep it from being submitted; write and submit nothing",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    return parse_with_overrides(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
