"""What tests of several folders share: a tiny corpus ready to train on, run configs, and processes to run them in."""

import gc
import importlib
import multiprocessing
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

# before torch is imported anywhere: tests share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.tiny import FORKED_WITH, make_tiny_chats, make_tiny_data, tiny_tree

# whatever the machine has; DeepSpeed's choice would be inherited from a test that had a GPU
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# of devices, which DeepSpeed else asks a program for, at every reduction under ZeRO 3
NO_GPU |= {"LOCAL_SIZE": "1"}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import Triton and all kernels: whether they are interpreted is settled by the environment of that moment, for good."""
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return  # this process runs no tests: its workers do
    import torch

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        package = importlib.import_module("dash_megatron.ops.kernels")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: looking through it again and again takes time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_tiny_data`."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture(scope="session")
def tiny_chats(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_tiny_chats`."""
    return make_tiny_chats(tmp_path_factory.mktemp("tiny_chats"), tiny_data / "tokenizer.model")


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """See `tiny_tree`."""
    return tiny_tree(tiny_data, tmp_path / "run")


@pytest.fixture(autouse=True)
def end_engines() -> Iterator[None]:
    """End what trained in this process: DeepSpeed's engines keep their process groups, and the threads of those wake up 100 times a second."""
    yield
    if "deepspeed" in sys.modules and len(os.listdir("/proc/self/task")) > 50:
        import deepspeed
        import torch.distributed

        if not torch.distributed.is_initialized():
            for engine in [x for x in gc.get_objects() if type(x) is deepspeed.DeepSpeedEngine]:
                # its own `destroy` would ask the groups, which are gone
                for hook in getattr(engine.optimizer, "_grad_acc_hooks", ()):
                    hook.remove()
            gc.collect()


def share_gloo_threads() -> None:
    """Let all process groups made from now on wait in one thread: each has its own, which wakes up 100 times a second."""
    from torch.distributed import ProcessGroupGloo, Store, distributed_c10d

    device = ProcessGroupGloo.create_default_device()

    class OnOneDevice(ProcessGroupGloo):
        def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnOneDevice


def _entry(
    function: Callable[..., None], environment: dict[str, str], arguments: tuple[Any, ...], log: str
) -> None:
    gc.freeze()  # what was imported before the fork: looking through it again and again takes seconds
    os.environ.clear()  # of the fork server, which may have been started under another test
    os.environ.update(environment)
    with open(log, "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        os.dup2(file.fileno(), 2)  # for what is not written by Python
        try:
            share_gloo_threads()
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def _context(cuda: bool) -> multiprocessing.context.BaseContext:
    """Starts processes that have not used CUDA; without it, by forking one that has imported what takes seconds."""
    if cuda:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKED_WITH)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_GPU.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


class Started:
    """A function in a process of its own, forked from one that has imported what takes seconds, its output in a file.

    Args:
        log: the file.
        function: module-level; an exception of it ends the process with code 1.
        arguments: of the function.
        environment: variables beside this process's; GPUs are hidden.
    """

    def __init__(self, log: Path, function: Callable[..., None], *arguments: Any, **environment: str) -> None:
        self.log = log
        self.log.touch()
        variables = {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1", **environment}
        self.process = _context(cuda=False).Process(
            target=_entry, args=(function, variables, arguments, str(log)), daemon=False
        )
        self.process.start()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until a line of the output begins with `text`."""
        deadline = time.monotonic() + seconds
        while True:
            ended = not self.process.is_alive()
            output = self.log.read_text()
            if any(line.startswith(text) for line in output.splitlines()):
                return
            if ended or time.monotonic() > deadline:
                pytest.fail(f"the process ended, or took too long, before {text!r}:\n{output}")
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 120) -> tuple[int | None, str]:
        """Wait for the end; gives the exit code, negative after a signal and None after `seconds`, and all output."""
        self.process.join(seconds)
        code = self.process.exitcode
        self.kill()
        return code, self.log.read_text()

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self.process.kill()
        self.process.join()


class ForkedPython:
    """`subprocess.Popen` of a command of Python, in a process forked from one that has imported what takes seconds.

    Args:
        command: `sys.executable`, and a script, or `-m` and a module, with its arguments.
        stdout: a file, to whose end output is written.
        stderr: a file, or `subprocess.STDOUT`.
        env: variables; GPUs are hidden.
        cwd: folder that it runs in; this process's if not given.
        others: `stdin` and `start_new_session` of those who start a process with input from nowhere and such a session.
    """

    def __init__(
        self, command: Sequence[str], stdout: Any, stderr: Any, env: Mapping[str, str], cwd: Any = None, **others: Any
    ) -> None:  # fmt: skip
        assert command[0] == sys.executable
        files = stdout.name, (stdout if stderr == subprocess.STDOUT else stderr).name
        arguments = command[1:], {**env, **NO_GPU}, str(cwd or Path.cwd()), files
        self._process = _context(cuda=False).Process(target=_run_python, args=arguments, daemon=False)
        self._process.start()

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, negative after a signal and None after `seconds`."""
        self._process.join(seconds)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        if self._process.is_alive():
            assert self._process.pid is not None
            os.kill(self._process.pid, number)


def _run_python(
    command: Sequence[str], environment: Mapping[str, str], folder: str, files: Sequence[str]
) -> None:
    gc.freeze()  # as in `_entry`
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate((os.devnull, *files)):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.ops.quick_interpreter import quicken

        quicken(pytest.MonkeyPatch())
    share_gloo_threads()
    os.chdir(folder)
    module = command[0] == "-m"
    sys.argv = [*command[module:]]
    sys.path.insert(0, folder if module else str(Path(command[0]).resolve().parent))
    if module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


def run_python(
    *command: str, cwd: Path, seconds: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Exit code and output of `python COMMAND`, run as `ForkedPython` does."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as errors:
        process = ForkedPython([sys.executable, *command], out, errors, {**os.environ, **environment}, cwd)
        code = process.wait(seconds)
        if code is None:
            process.send_signal(signal.SIGKILL)
            pytest.fail(f"{command} took more than {seconds} s")
        return subprocess.CompletedProcess(command, code, *(Path(x.name).read_text() for x in (out, errors)))


def train_command(*arguments: str) -> None:
    """What `python train.py` does with arguments; for `Started`."""
    import train

    sys.argv = ["train.py", *arguments]
    code = train.main()
    sys.stdout.flush()
    os._exit(code)


def run_in_processes(
    folder: Path,
    count: int,
    function: Callable[..., None],
    *arguments: Any,
    seconds: float = 480,
    cuda: bool = False,
) -> None:
    """Run a function in `count` processes that torchrun could have made; their output goes to `<folder>/rank_*.log`.

    The function is module-level and leaves its results in files. One that fails, or hangs past the time limit, fails
    the test with its output. GPUs are hidden unless `cuda`.
    """
    from torch.distributed import TCPStore

    context = _context(cuda)
    common = {**os.environ, "WORLD_SIZE": str(count)}
    if not cuda:
        # several processes cannot share a GPU over NCCL: these tests are of gloo, on any machine
        common |= NO_GPU
    # Listens before any process starts, as torchrun's agent does: a port found free could be taken by then.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes, logs = [], []
    for rank in range(count):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        logs.append(str(folder / f"rank_{rank}.log"))
        target = (function, environment, arguments, logs[-1])
        processes.append(context.Process(target=_entry, args=target, daemon=False))
        processes[-1].start()
    deadline = time.monotonic() + seconds
    try:
        while any(process.is_alive() for process in processes):
            failed = any(process.exitcode for process in processes)
            if failed or time.monotonic() > deadline:
                break  # the others would wait for the one that failed
            time.sleep(0.05)
        codes = [process.exitcode for process in processes]
    finally:
        # also when the test itself is out of time
        for process in processes:
            process.kill()
            process.join()
    if any(codes) or None in codes:
        output = "\n".join(f"--- rank {rank}\n{Path(log).read_text()}" for rank, log in enumerate(logs))
        pytest.fail(f"exit codes {codes} (None: killed at the time limit or after another failed)\n{output}")


@pytest.fixture
def run_processes(tmp_path: Path) -> Callable[..., None]:
    """`run_in_processes` with the test's folder."""
    return partial(run_in_processes, tmp_path)
