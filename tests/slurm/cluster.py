"""A SLURM of three nodes on this machine: munge, slurmctld and three slurmd, all in one temporary folder."""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue")
NODES = ("node1", "node2", "node3")
# of NODES, taken first by jobs that may run anywhere: a test crashes it. It stays down, because SLURM keeps signals to
# a dead node's steps, and would send them to the same steps of a job's next start there.
FRAIL = "node3"

# Times are the smallest that SLURM keeps to on a loaded machine: a dead node is noticed after SlurmdTimeout, a requeued
# job waits for cred_expire, and processes get KillWait seconds between SIGTERM and SIGKILL. MessageTimeout is
# how late answers may be, and MinJobAge how late one may ask what became of a job.
SLURM_CONF = """\
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
MessageTimeout=30
MinJobAge=3600
KillWait=20
InactiveLimit=0
CompleteWait=0
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs that a cluster needs and this machine has not."""
    return [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]


def _search_path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Cluster:
    """Daemons and jobs that end with this process, however it ends.

    Args:
        folder: where they keep everything; its path is short, as it becomes a socket's.
        cpus: CPUs that each node claims to have.

    Raises:
        RuntimeError: the daemons do not come up; with the ends of their logs.
    """

    def __init__(self, folder: Path, cpus: int = 16) -> None:
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _search_path()}
        self._cpus = cpus
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # waits for the end of this process: its standard input closes then
        self._reaper = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, start_new_session=True
        )

    def start(self, attempts: int = 5) -> None:
        """Start all daemons; again with other ports where another program took one meanwhile."""
        self._start_munge()
        for attempt in range(attempts):
            self._write_conf()
            self._daemon("slurmctld", "-D", "-i")
            for node in NODES:
                # all that runs there can be told by this variable
                self._daemon("slurmd", "-D", "-N", node, name=node, SLURMD_NODENAME=node)
            if wait_until(lambda: self.states() == {"idle"}, 60, give_up=self._someone_died):
                return
            for name in ("slurmctld", *NODES):
                self._end(name)
            print(f"slurm did not start (attempt {attempt + 1} of {attempts})\n{self.logs()}")
        raise RuntimeError(f"slurm did not start in {attempts} attempts\n{self.logs()}")

    def stop(self) -> None:
        """Kill all jobs and daemons, and remove the folder."""
        self._reaper.communicate(timeout=60)
        for name in list(self._daemons):
            self._end(name)

    def crash_node(self, node: str) -> None:
        """Kill (-9) a node's slurmd and all its processes, as a power cut would."""
        self._end(node)
        _kill_all(f"SLURM_CONF={self.folder}/slurm.conf", f"SLURMD_NODENAME={node}")

    def run(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command, up to three times where the controller is too busy to answer; its standard output."""
        for _ in range(3):
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
            if not (done.returncode and "timed out" in done.stderr):
                break
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}\n{self.logs()}")
        return done.stdout.strip()

    def states(self) -> set[str]:
        """States of the nodes, such as {"idle"}."""
        return set(self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split())

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells of a job."""
        fields = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.partition("=")[::2] for field in fields)

    def logs(self, lines: int = 30) -> str:
        """The ends of the daemons' logs."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {path.name}", *tail]))
        return "\n".join(parts)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "munged", "seed-file": "seed"}
        names = [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]
        # --force: it is content with a folder in /tmp
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *names)
        if not wait_until((self.folder / "munge.socket").exists, 30, give_up=self._someone_died):
            raise RuntimeError(f"munged did not start\n{self.logs()}")

    def _write_conf(self) -> None:
        host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
        port, *node_ports = _free_ports(1 + len(NODES))
        text = SLURM_CONF.format(
            first_job=random.randrange(1, 1000) * 1000, host=host, port=port, user=user, folder=self.folder
        )
        for node, node_port in zip(NODES, node_ports, strict=True):
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={self._cpus} "
                f"RealMemory=1000 Weight={1 if node == FRAIL else 2} State=UNKNOWN\n"
            )
            (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(text)

    def _daemon(self, program: str, *arguments: str, name: str | None = None, **variables: str) -> None:
        output: IO[bytes] = (self.folder / f"{name or program}.output.log").open("ab")
        with output:
            self._daemons[name or program] = subprocess.Popen(
                [program, *arguments],
                env=self.environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _someone_died(self) -> bool:
        return any(daemon.poll() is not None for daemon in self._daemons.values())

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait(timeout=30)


def wait_until(
    condition: Callable[[], object], seconds: float, give_up: Callable[[], bool] = lambda: False
) -> bool:
    """Wait for a condition; False when time is up or `give_up` says that it will not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or give_up():
            return False
        time.sleep(0.25)
    return True


def _kill_all(*variables: str) -> bool:
    """Kill (-9) all processes that have these NAME=value in their environment, but this one; False where none has.

    A slurmstepd is killed before its tasks, of whose death it would tell.
    """
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            command = Path(f"/proc/{pid}/comm").read_text()
            if pid != os.getpid() and set(variables) <= set(environment):
                found.append((not command.startswith("slurmstepd"), pid))
    for _, pid in sorted(found):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(found)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


if __name__ == "__main__":
    sys.stdin.read()
    wait_until(lambda: not _kill_all(f"SLURM_CONF={sys.argv[1]}/slurm.conf"), 30)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
