"""Machines that faults name: the job's script keeps the next start from them, and submit.py later jobs; without SLURM."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path

import pytest
import submit  # of slurm/, see conftest.py

from tests.slurm.test_submit import CONFIG, SIZE, TIME, dry_run, options_of, program, site_file

HANG = "1\\tno progress\\nbad\\tnode3\\tno progress\\n"


def days_ago(days: float) -> str:
    time = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def note(run: Path, *lines: tuple[float, str]) -> None:
    """Lines of days ago and a machine in the list of a run."""
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    text = "".join(f"{days_ago(days)}\t{node}\t4\thang\n" for days, node in lines)
    (run / "slurm/bad_nodes.tsv").write_text(text)


class Player:
    """A job of some machines, whose srun ends with code 1, and a stand-in for SLURM that notes what it is asked."""

    def __init__(self, folder: Path, script: str) -> None:
        self.folder, self.run, self.script = folder, folder / "run", script
        self.excluded = folder / "excluded"
        self.excluded.touch()
        for name, lines in {
            "srun": 'printf "%b" "$SAID" >> "$DASH_EXIT_FILE"\neval "$SRUN"\nexit 1',
            "squeue": f'case "$*" in *%x*) echo "nodes=$(cat {self.excluded})" ;; *%r*) echo TimeLimit ;; esac',
            "sbatch": f'echo "sbatch $*" >> {folder}/asked\n[ -z "$FULL" ] || {{ echo $FULL >&2; exit 1; }}',
            "sleep": "",
            "scontrol": f"""
                case $1 in
                    show) echo "$3" | tr , '\\n'; exit ;;
                    requeue) kill -TERM 0 ;;
                    update) [ -z "$REFUSED" ] || {{ echo Access denied >&2; exit 1; }}
                        echo "$3" | sed s/ExcNodeList=// > {self.excluded} ;;
                esac
                echo "$*" >> {folder}/asked""",
        }.items():
            program(folder / "bin", name, lines)

    def __call__(
        self, said: str = "", nodes: int = 4, restart: int = 0, code: int = 0, **variables: str
    ) -> list[list[str]]:
        """Names and details of the events after the start."""
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "5",
            "SLURM_JOB_NODELIST": ",".join(f"node{node}" for node in range(1, nodes + 1)),
            "SLURM_RESTART_COUNT": str(restart),
            "SAID": said,
            "SRUN": "",
            **variables,
        }
        # SLURM sends signals to all processes of the script
        done = subprocess.run(
            ["bash"], input=self.script, env=environment, text=True, timeout=60, start_new_session=True
        )
        assert done.returncode == code
        events = [line.split("\t")[3:] for line in (self.run / "slurm/events.tsv").read_text().splitlines()]
        return events[[name for name, _ in events].index("started") + 1 :]

    def asked(self) -> list[str]:
        """What SLURM was asked to do, or whether it could."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def play(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Player:
    script = dry_run(
        capsys, *CONFIG, *SIZE, *TIME, *site_file(tmp_path, restarts=9), f"run_dir={tmp_path / 'run'}"
    )
    return Player(tmp_path, script)


def test_a_machine_that_a_fault_names_is_noted_and_kept_from_the_job_that_is_queued_again(
    play: Player,
) -> None:
    play.excluded.write_text("node9\n")
    (requeued, reason), (excluded, detail) = play(HANG)
    assert (requeued, reason, excluded) == ("requeued", "no progress", "excluded")
    assert detail.startswith("node3,node9; to take machines again, delete their lines of ")
    test, requeue, update = play.asked()
    assert test.startswith("sbatch --test-only --nodes=4 --exclude=node3,node9 ")
    assert (requeue, update) == ("requeue 5", "update JobId=5 ExcNodeList=node3,node9")
    (line,) = (play.run / "slurm/bad_nodes.tsv").read_text().splitlines()
    assert line.split("\t")[1:] == ["node3", "5", "no progress"]
    assert (
        abs(datetime.datetime.fromisoformat(line[:20]).timestamp() - datetime.datetime.now().timestamp()) < 60
    )


@pytest.mark.parametrize(
    ("nodes", "named", "fits"), [(4, 2, False), (1, 1, True), (32, 2, True), (32, 3, False), (64, 4, True)]
)
def test_a_fault_that_names_more_than_one_machine_in_sixteen_excludes_none(
    nodes: int, named: int, fits: bool, play: Player
) -> None:
    said = "".join(f"bad\\tnode{node}\\thang\\nbad\\tnode{node}\\thang\\n" for node in range(1, named + 1))
    events = play(said, nodes=nodes)
    assert [name for name, _ in events] == ["requeued", "excluded" if fits else "not_excluded"]
    assert "requeue 5" in play.asked()
    if not fits:
        names = ",".join(f"node{node}" for node in range(1, named + 1))
        assert events[-1][1] == f"{names}: {named} of the job's machines are named, more than {named - 1}"
        assert not (play.run / "slurm/bad_nodes.tsv").exists()


def test_names_that_are_no_machine_of_the_job_are_no_evidence(play: Player) -> None:
    assert [name for name, _ in play("bad\\tlogin1\\thang\\n")] == ["requeued"]
    assert play.asked() == ["requeue 5"]


def test_a_gpu_that_tells_of_an_uncorrectable_error_names_its_machine(play: Player) -> None:
    log = '"$(dirname "$DASH_EXIT_FILE")/../logs/5.0/rank_00017.log"'
    srun = f'printf "on node2\\nCUDA error: uncorrectable ECC error encountered\\n" > {log}'
    assert [name for name, _ in play(SRUN=srun)] == ["requeued", "excluded"]
    assert play.excluded.read_text() == "node2\n"


@pytest.mark.parametrize(
    ("variable", "answer", "told"),
    [
        ("REFUSED", "1", "node3: Access denied"),
        ("FULL", "not available", "node3: SLURM could not start the job without: not available"),
        ("FULL", " ", "node3: SLURM could not start the job without: no answer"),
    ],
)
def test_where_slurm_refuses_or_could_not_start_the_job_it_is_queued_again_without(
    variable: str, answer: str, told: str, play: Player
) -> None:
    events = play(HANG, **{variable: answer})
    assert [name for name, _ in events] == ["requeued", "not_excluded"]
    assert events[-1][1] == told
    assert play.asked()[-1] == "requeue 5"
    # the next fault tries again
    assert [name for name, _ in play(restart=1)][2:] == ["started", "requeued", "excluded"]


def test_at_the_time_limit_nothing_is_asked_before_the_job_is_queued_again(play: Player) -> None:
    assert [name for name, _ in play(HANG, SRUN="kill -TERM $PPID")] == ["requeued"]
    assert play.asked() == ["requeue 5"]


def test_machines_are_taken_again_after_some_days_or_for_newer_ones_or_when_a_person_deletes_their_lines(
    play: Player,
) -> None:
    note(play.run, (8, "node5"), (6, "node6"), (5, "node7"), (4, "node8"), (3, "node7"))
    play.excluded.write_text("node9\n")
    play()
    assert play.excluded.read_text() == "node7,node8,node9\n"
    note(play.run, (5, "node7"))
    play(restart=1)
    assert play.excluded.read_text() == "node7,node9\n"
    asked = len(play.asked())
    play(restart=2)
    assert play.asked()[asked:] == ["requeue 5"]
    (play.run / "slurm/bad_nodes.tsv").unlink()
    play(restart=3)
    assert play.excluded.read_text() == "node9\n"


def test_lines_that_a_person_wrote_count_with_blanks_for_tabs_ends_of_another_system_or_none_and_a_heading_does_not(
    play: Player, capsys: pytest.CaptureFixture[str]
) -> None:
    def submitted() -> list[str]:
        script = dry_run(
            capsys, *CONFIG, *TIME, "--nodes", "32", "--gpus-per-node", "8", f"run_dir={play.run}"
        )
        return [option for option in options_of(script) if option.startswith("--exclude")]

    path = play.run / "slurm/bad_nodes.tsv"
    path.parent.mkdir(parents=True)
    heading = "time\tmachine\r\n# by hand\n"
    path.write_text(f"{heading}{days_ago(4)}  node5  -  slow\r\n{days_ago(6)}\tnode6\r\n{days_ago(3)}\tnode7")
    play(nodes=32)
    assert play.excluded.read_text() == "node5,node6,node7\n"
    assert submitted() == ["--exclude=node7,node5,node6"]
    play("bad\\tnode3\\tno \\0377\\n", nodes=32, restart=1)
    assert play.excluded.read_text() == "node3,node5,node6,node7\n"
    assert submitted() == ["--exclude=node3,node7,node5,node6"]


def test_machines_that_others_exclude_stay_excluded_though_the_list_had_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: Player
) -> None:
    note(play.run, (3, "node7"), (4, "node8"), (5, "node9"))
    play.excluded.write_text("node7\n")
    play()
    assert play.excluded.read_text() == "node7,node8,node9\n"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    site = site_file(tmp_path, sbatch=["--exclude=node[7]"])
    program(tmp_path / "bin", "squeue", "")
    program(tmp_path / "bin", "sbatch", "echo 5")
    program(tmp_path / "bin", "scontrol", "echo node7")
    assert submit.main([*CONFIG, *SIZE, *TIME, *site, "--inputs-later", f"run_dir={play.run}"]) == 0
    assert capsys.readouterr().err.startswith("it leaves out node8,node9: ")
    assert (play.run / "slurm/excluded.5").read_text() == "node8\nnode9\n"


def test_the_fault_after_which_a_job_is_not_queued_again_is_noted_for_later_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*site_file(tmp_path, restarts=0), f"run_dir={tmp_path / 'run'}"]
    play = Player(tmp_path, dry_run(capsys, *CONFIG, *SIZE, *TIME, *words))
    assert [name for name, _ in play(HANG, code=1)] == ["stopped"]
    assert "\tnode3\t5\tno progress\n" in (play.run / "slurm/bad_nodes.tsv").read_text()


def test_a_submission_leaves_out_what_the_script_would(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def excluded(*arguments: str) -> list[str]:
        script = dry_run(capsys, *CONFIG, *TIME, f"run_dir={tmp_path / 'run'}", *arguments)
        return [option for option in options_of(script) if option.startswith("--exclude")]

    assert excluded(*SIZE) == []
    note(tmp_path / "run", (8, "node5"), (6, "node6"), (5, "node7"), (4, "node8"), (3, "node7"))
    assert excluded(*SIZE) == ["--exclude=node7,node8"]
    assert excluded("--nodes", "32", "--gpus-per-node", "8") == ["--exclude=node7,node8,node6"]
    assert excluded(*SIZE, *site_file(tmp_path, sbatch=["--exclude=a[1-2]"])) == [
        "--exclude=a[1-2],node7,node8"
    ]
    assert excluded(*SIZE, *site_file(tmp_path, bad_node_days=0)) == []


def test_a_submission_says_which_machines_it_leaves_out_and_they_can_be_taken_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: Player
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    note(play.run, (3, "node7"))
    words = [*CONFIG, *SIZE, *TIME, "--inputs-later", f"run_dir={play.run}"]
    program(tmp_path / "bin", "squeue", "")
    for answer, code in (("echo 5", 0), ("echo Invalid node name specified >&2; exit 1", 2)):
        program(tmp_path / "bin", "sbatch", answer)
        assert submit.main(words) == code
        told = (
            "leaves out node7: to take machines again, delete their lines of slurm/bad_nodes.tsv in run_dir\n"
        )
        assert capsys.readouterr().err.endswith(told)
    assert (play.run / "slurm/excluded.5").read_text() == "node7\n"
