"""File operations are tried again while that can help, and fail with a message that says what to do."""

import errno
from pathlib import Path

import pytest

from dash_megatron import retry as module
from dash_megatron.retry import make_writable_folder, retry


class Flaky:
    """Fails with `code` for `failures` calls, then gives back how often it was called."""

    def __init__(self, code: int, failures: int) -> None:
        self.code, self.failures, self.calls = code, failures, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError(self.code, "injected")
        return self.calls


def test_a_file_system_that_comes_back_costs_time_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    assert retry(Flaky(errno.EIO, failures=4), "write a file", seconds=60) == 5
    assert len(pauses) == 4
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[-1]


def test_an_error_that_lasts_is_raised_when_the_time_is_over() -> None:
    function = Flaky(errno.ESTALE, failures=1000)
    with pytest.raises(OSError, match="cannot write a file: injected") as caught:
        retry(function, "write a file", seconds=0.3)
    assert caught.value.errno == errno.ESTALE
    assert 2 <= function.calls <= 4


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE])
def test_an_error_that_waiting_cannot_mend_is_raised_at_once(code: int) -> None:
    function = Flaky(code, failures=1000)
    with pytest.raises(OSError, match="cannot write a file"):
        retry(function, "write a file", seconds=60)
    assert function.calls == 1


def test_a_full_disk_is_called_so_with_its_free_bytes(tmp_path: Path) -> None:
    with pytest.raises(
        OSError, match=r"disk full: .*[\d,]+ bytes are free.*free some space, or keep fewer checkpoints"
    ) as caught:
        retry(Flaky(errno.ENOSPC, failures=1000), "write metrics", seconds=0, path=tmp_path / "no" / "file")
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_keeps_no_file_of_the_trial_whether_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_but_not_filled(path: Path, text: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(Path, "write_text", made_but_not_filled)
    monkeypatch.setattr(module.time, "monotonic", iter([0.0, 1000.0]).__next__)
    with pytest.raises(OSError, match="disk full"):
        make_writable_folder(tmp_path, "run_dir")
    assert not list(tmp_path.iterdir())
