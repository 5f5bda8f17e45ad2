"""Tasks scored while a run trains: the numbers of `evaluate`, in every layout."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dash_megatron.__main__ import main
from dash_megatron.config import TASK_NAMES, config_from_dict
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.items import make_sample
from dash_megatron.evaluation.tasks import TASKS
from dash_megatron.layers.argmax import is_argmax
from dash_megatron.parallel import Launch, destroy_process_groups, init_process_groups
from dash_megatron.parallel.groups import destroy_model_groups, make_model_groups
from dash_megatron.training.metrics import read_metrics
from dash_megatron.training.task_scores import TaskScorer
from dash_megatron.training.validation import Validator
from tests.training.test_global_batch import with_changes
from tests.training.workers import keep_process_groups

LENGTHS = [100, 128]
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"zero": {"stage": 3}},
    "tensor": {"parallel": {"tensor": 2, "sequence": True}},
    "context": {"parallel": {"context": 2}},
}
# float32, sums in another order, after a few updates
TOLERANCE = 1e-4
# logits of two tokens over six rows, the last of which only pad the table
LOGITS = torch.tensor([[0.0, 3.0, 1.0, 3.0, 2.0, 9.0], [5.0, torch.nan, 1.0, 2.0, 0.0, 0.0]])
# by label: the first of equal ones, no padding of the table, and nothing where a logit is NaN
ARGMAX = {vocab_size: [[label == 1, 0] for label in range(6)] for vocab_size in ("5", "3")}


@pytest.fixture
def tree(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """80 samples in micro-batches of 3, so that some rows are padding."""
    return with_changes(
        tiny_config,
        training={"steps": 3, "global_batch": 6, "micro_batch": 3},
        evaluation={
            "tasks": ["associative_recall", "copy"],
            "tasks_every": 2,
            "task_samples": 20,
            "task_lengths": LENGTHS,
        },
    )


def score_halves(folder: str) -> None:
    """Which labels are the argmax to processes that hold equal parts of `LOGITS`; each leaves what it found."""
    rank, part = dist.get_rank(), LOGITS.shape[1] // dist.get_world_size()
    logits_NBV = LOGITS[:, None, rank * part : (rank + 1) * part].contiguous()
    found = {
        vocab_size: [
            is_argmax(logits_NBV, torch.full((1, 2), label), vocab_size, dist.group.WORLD)[0].tolist()
            for label in range(LOGITS.shape[1])
        ]
        for vocab_size in (5, 3)  # the last process has some of them, or none
    }
    (Path(folder) / f"argmax_{rank}.json").write_text(json.dumps(found))


def train_layouts(trees: list[dict[str, Any]], folder: str) -> None:
    """Train runs of different layouts after one another, then `score_halves`."""
    module = keep_process_groups()
    for number, tree in enumerate(trees):
        config = config_from_dict(tree)
        if number:
            destroy_model_groups()
            make_model_groups(config.parallel)
        module.Trainer(config).run()
    score_halves(folder)
    destroy_process_groups()


def assert_same_tasks(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for task, lengths in expected.items():
        assert found[task].keys() == lengths.keys()
        for length, means in lengths.items():
            assert found[task][length]["score"] == pytest.approx(means["score"], abs=1e-12), (task, length)
            assert found[task][length]["nll"] == pytest.approx(means["nll"], rel=TOLERANCE), (task, length)


def test_scores_in_every_layout_are_those_of_evaluate(
    tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    trees = [
        {**with_changes(tree, **sections), "run_dir": str(tmp_path / name)}
        for name, sections in LAYOUTS.items()
    ]
    run_processes(2, train_layouts, trees, str(tmp_path))
    scores = []
    for name in LAYOUTS:
        first, second, last = (line["tasks"] for line in read_metrics(tmp_path / name))
        assert first is None
        assert_same_tasks(second, read_metrics(tmp_path / "data")[1]["tasks"])
        arguments = ["--tasks", "associative_recall,copy", "--lengths", "100,128", "--samples", "20"]
        # one process with all weights
        assert main(["evaluate", str(tmp_path / name), "--output", str(tmp_path / name), *arguments]) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert_same_tasks(last, results["tasks"])
        scores += [means["score"] for means in last["copy"].values()]
    assert min(scores) > 0, "nothing is right anywhere"
    for rank in (0, 1):
        assert json.loads((tmp_path / f"argmax_{rank}.json").read_text()) == ARGMAX


@pytest.fixture
def one_process(tree: dict[str, Any]) -> Iterator[torch.device]:
    yield init_process_groups(Launch(rank=0, world_size=1, local_rank=0), config_from_dict(tree).parallel)
    destroy_process_groups()


def test_an_answer_is_right_if_all_of_its_tokens_are(tree: dict[str, Any], one_process: torch.device) -> None:
    config = config_from_dict(tree)
    tokenizer = Tokenizer(config.data.tokenizer)
    scorer = TaskScorer(config, tokenizer, one_process)
    recall, copy = (
        [
            make_sample(task, length, (index, None), scorer.rows.text, tokenizer)
            for length in LENGTHS
            for index in range(20)
        ]
        for task in ("associative_recall", "copy")
    )
    # of these samples a token is wrong: the last one of the answer, and the one before the first
    wrong = {
        (0, recall[0].spans[0][1] - 1),
        (1, recall[1].spans[0][0] - 1),
        (41, copy[1].spans[0][0]),
        (41, copy[1].spans[31][0]),
    }
    assert len(recall[0].ids) > recall[0].spans[0][0] + 1, "an answer of one token"

    def forward(tokens: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, *_: Any) -> torch.Tensor:
        found = torch.stack([torch.full(tokens.shape, 2.5), torch.ones(tokens.shape)], dim=-1)
        for row in range(3):
            for number, place in wrong:
                start, ids = row * 128, [*recall, *copy][number].ids
                if tokens[0, start : start + len(ids) - 1].tolist() == ids[:-1]:
                    assert labels[0, start + place - 1] == ids[place]
                    found[0, start + place - 1] = torch.tensor([5.0, 0.0])
        return found

    engine: Any = SimpleNamespace(model=torch.nn.Module(), forward=forward)
    beats: list[None] = []
    found = scorer.score(engine, lambda: beats.append(None))
    assert len(beats) == 27  # of three rows
    assert found["associative_recall"]["100"]["score"] == pytest.approx(19 / 20)
    assert found["associative_recall"]["128"] == {"score": 1.0, "nll": 2.5}
    assert found["copy"]["100"]["score"] == pytest.approx(1 - 2 / 32 / 20)
    assert found["copy"]["100"]["nll"] == pytest.approx(2.5 + 2.5 * 2 / 32 / 20)
    assert found["copy"]["128"] == {"score": 1.0, "nll": 2.5}


def test_one_process_scores_labels_as_several_do(one_process: torch.device, tmp_path: Path) -> None:
    score_halves(str(tmp_path))
    assert json.loads((tmp_path / "argmax_0.json").read_text()) == ARGMAX


def test_what_has_no_sample_is_told_before_training(tree: dict[str, Any], one_process: torch.device) -> None:
    config = config_from_dict(with_changes(tree, evaluation={"tasks": ["copy", "needle"]}))
    with pytest.raises(
        ValueError, match=r"evaluation\.task_lengths=\[100, 128\]: task needle: length 100 must"
    ):
        TaskScorer(config, Tokenizer(config.data.tokenizer), one_process)


def test_tasks_that_are_never_scored_are_told(
    tree: dict[str, Any], one_process: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_from_dict(with_changes(tree, evaluation={"tasks": ["copy"], "tasks_every": 0}))
    Validator(config, Tokenizer(config.data.tokenizer), one_process)
    assert "evaluation.tasks=['copy'] is ignored, since evaluation.tasks_every is 0" in caplog.text


def test_the_config_knows_every_task() -> None:
    assert tuple(TASKS) == TASK_NAMES
