"""A run goes on in another layout of processes than the one that saved it, and reads the same samples."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.checkpoint.weights import load_weights
from dash_megatron.training.metrics import read_metrics
from tests.training.test_resume import run_of, samples_of
from tests.training.workers import train_all

STEPS, SAVED = 4, 2
# name: processes and what of the config they need
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one_zero0": (1, {"zero": {"stage": 0}}),
    "data2_zero1": (2, {"zero": {"stage": 1}}),
    "data2_zero2": (2, {"zero": {"stage": 2}}),
    "data2_zero3": (2, {"zero": {"stage": 3}}),
    "tensor2_zero1": (2, {"parallel": {"tensor": 2}, "zero": {"stage": 1}}),
    "tensor2_zero3": (2, {"parallel": {"tensor": 2, "sequence": True}, "zero": {"stage": 3}}),
    "context2_zero3": (2, {"parallel": {"context": 2}, "zero": {"stage": 3}}),
    "data2_tensor2_zero1": (4, {"parallel": {"tensor": 2}, "zero": {"stage": 1}}),
}
# from each kind of layout to each; every change of data, tensor, context and ZeRO stage is there
MOVES = [
    ("data2_zero1", "one_zero0"),
    ("data2_zero1", "tensor2_zero1"),
    ("data2_zero1", "data2_zero3"),
    ("data2_zero3", "data2_zero2"),
    ("data2_zero3", "context2_zero3"),
    ("data2_zero3", "tensor2_zero3"),
    ("data2_tensor2_zero1", "data2_zero1"),
    ("data2_tensor2_zero1", "tensor2_zero3"),
]


def layout_of(tree: dict[str, Any], folder: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    return run_of(tree, folder, **LAYOUTS[name][1], **sections)


def start_in_turn(runs: list[tuple[str, dict[str, Any], int | None]], run_processes: Any) -> None:
    """Runs of one layout share processes."""
    for name in dict.fromkeys(layout for layout, _, _ in runs):
        mine = [(tree, last) for layout, tree, last in runs if layout == name]
        run_processes(LAYOUTS[name][0], train_all, mine)


def test_losses_and_weights_go_on_as_in_one_layout(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "training": {"steps": STEPS},
        "checkpoint": {"every": SAVED},
        "schedule": {"warmup_steps": 2},
        "optimizer": {"lr": 3e-3, "eps": 1e-4},
        "attention": {
            **tiny_config["attention"],
            "learned_scaling": True,
            "local_chunks": 1,
            "query_pool": 5,
        },
    }
    whole = layout_of(tiny_config, tmp_path / "whole", "one_zero0", **sections)
    sources = dict.fromkeys(source for source, _ in MOVES)
    first = [
        (source, layout_of(tiny_config, tmp_path / source, source, **sections), SAVED) for source in sources
    ]
    start_in_turn([("one_zero0", whole, None), *first], run_processes)
    second = []
    for source, target in MOVES:
        folder = tmp_path / f"{source}-{target}"
        shutil.copytree(tmp_path / source, folder)
        second.append((target, layout_of(tiny_config, folder, target, **sections), None))
    start_in_turn(second, run_processes)

    expected, weights = read_metrics(tmp_path / "whole"), load_weights(tmp_path / "whole")[2]
    order = samples_of(tmp_path / "whole", 0)
    for source, target in MOVES:
        folder = tmp_path / f"{source}-{target}"
        found = read_metrics(folder)
        assert [line["step"] for line in found] == list(range(1, STEPS + 1))
        for one, other in zip(expected, found, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), (source, target, one["step"])
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        for name, weight in load_weights(folder)[2].items():
            error = (weight - weights[name]).norm() / weights[name].norm().clamp_min(1e-3)
            assert error < 1e-4, (source, target, name)
        readers = range(2) if target.startswith("data2") else range(1)
        ranks = [samples_of(folder, rank * (2 if "tensor2" in target else 1)) for rank in readers]
        for step in range(SAVED + 1, STEPS + 1):
            assert sorted(index for rank in ranks for index in rank[step]) == sorted(order[step])


@torch.no_grad()
def test_moments_are_carried_over_and_not_made_anew(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    """Without them the first update after a resume is one of the size of the learning rate in every weight."""
    from dash_megatron.checkpoint.folder import checkpoint_folder, tag_of
    from dash_megatron.checkpoint.stored import StoredState

    saved = layout_of(tiny_config, tmp_path / "run", "data2_zero1", training={"steps": 3})
    run_processes(2, train_all, [(saved, None)])
    before = StoredState(checkpoint_folder(tmp_path / "run") / tag_of(3))
    shutil.copytree(tmp_path / "run", tmp_path / "on")
    # a resumed run that has nothing left to do saves what it loaded
    moved = layout_of(tiny_config, tmp_path / "on", "tensor2_zero3", training={"steps": 3})
    run_processes(2, save_again, moved)
    after = StoredState(checkpoint_folder(tmp_path / "on") / tag_of(3))
    assert before.facts["adam_steps"] == after.facts["adam_steps"] == 3
    assert after.facts["layout"] == {"data": 1, "context": 1, "tensor": 2, "zero": 3}
    for name in before.shapes:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(before.whole(kind, name), after.whole(kind, name)), (kind, name)


def save_again(tree: dict[str, Any]) -> None:
    from dash_megatron.config import config_from_dict
    from dash_megatron.parallel import destroy_process_groups
    from dash_megatron.training.trainer import Trainer

    trainer = Trainer(config_from_dict(tree))
    trainer.resume()
    trainer.reporter.start(trainer.step, trainer.commit)
    trainer.maybe_save()
    destroy_process_groups()
