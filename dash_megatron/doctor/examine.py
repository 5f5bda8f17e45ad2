"""Runs the doctor's checks on all processes of a launch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from dash_megatron.config import Config
from dash_megatron.doctor.bandwidth import check_bandwidth
from dash_megatron.doctor.disk import check_disk
from dash_megatron.doctor.inputs import check_data_files, check_versions
from dash_megatron.doctor.kernels import check_kernels
from dash_megatron.doctor.leak import check_leak
from dash_megatron.doctor.parity import check_parity
from dash_megatron.doctor.resume import START_SECONDS, check_resume
from dash_megatron.doctor.runner import (
    Check,
    Result,
    merge_equal,
    merge_largest,
    merge_smallest,
    rank_list,
    run_checks,
)
from dash_megatron.doctor.session import Session
from dash_megatron.exit_codes import machine_name
from dash_megatron.parallel import destroy_process_groups, read_launch
from dash_megatron.training.setup import set_up_logging

# what communicates comes after what does not, and what takes longest last
CHECKS = (
    Check("versions", 60, check_versions, merge_equal, stops_others=True),
    Check("data", 300, check_data_files, merge_equal),
    Check("disk", 300, check_disk, merge_smallest),
    Check("kernels", 600, check_kernels, merge_largest, of_one_machine=True),
    Check("leak", 600, check_leak, merge_largest),
    Check("bandwidth", 300, check_bandwidth, merge_smallest),
    Check("parity", 900, check_parity, merge_largest),
    Check("resume", 2 * START_SECONDS + 300, check_resume, merge_largest),
)


def choose_checks(only: str | None) -> list[Check]:
    """Select the checks to run, in their order.

    Args:
        only: names with commas between; `versions`, without which the others mean nothing, is added. None: all checks.

    Raises:
        ValueError: there is no check of a name.
    """
    if only is None:
        return list(CHECKS)
    names = [name.strip() for name in only.split(",")]
    known = [check.name for check in CHECKS]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(
            f"--only {only} names {wrong[0]!r}, which is no check; choose from {','.join(known)}"
        )
    return [check for check in CHECKS if check.name in names or check.stops_others]


def examine(config: Config, only: str | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Run checks on all processes of the launch; rank 0 prints a line for each as soon as its result is known.

    Args:
        config: the run.
        only: see `choose_checks`.
        environment: variables of the launcher.

    Returns:
        0, or 1 where a check failed.

    Raises:
        ValueError: the config does not fit the number of processes, or there is no check of that name.
    """
    checks, launch = choose_checks(only), read_launch(environment)
    config.accumulation_steps(launch.world_size)
    set_up_logging(launch.rank == 0)
    with _leaving_nothing(Path(config.run_dir)):
        session = Session(config, launch)
        hosts = session.gather(machine_name())
        is_main = session.rank == 0
        if is_main:
            print(_introduction(session, hosts), flush=True)

        def report(result: Result) -> None:
            if is_main:
                print(result, flush=True)

        results, lost = run_checks(session, checks, report)
    failed = [result.name for result in results if result.status == "failed"]
    if is_main:
        print(f"failed: {', '.join(failed)}" if failed else "nothing failed", flush=True)
    if lost:
        # leaving the groups would wait for who is lost
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    destroy_process_groups()
    return 1 if failed else 0


@contextlib.contextmanager
def _leaving_nothing(run_dir: Path) -> Iterator[None]:
    """Remove the run's folder at the end if it was not there; let checks clean up when a launcher ends this process.

    It must be entered before processes meet, so that none sees a folder that another has made.
    """
    missing = [folder for folder in (run_dir, *run_dir.parents) if not os.path.exists(folder)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _introduction(session: Session, hosts: list[str]) -> str:
    config, parallel = session.config, session.config.parallel
    where = {host: rank_list(rank for rank, other in enumerate(hosts) if other == host) for host in hosts}
    return (
        f"{config.run_dir}: {session.size} process(es) on {session.device.type}, "
        f"{config.data_parallel_size(session.size)} data x {parallel.context} context x {parallel.tensor} tensor "
        f"parallel; {'; '.join(f'rank {ranks} on {host}' for host, ranks in where.items())}"
    )
