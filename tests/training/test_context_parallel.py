"""Context-parallel processes train as one process would, with every exchange, beside tensor parallelism and ZeRO."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.training.metrics import read_metrics
from tests.conftest import run_in_processes
from tests.gpus import NEEDS_TWO_GPUS, in_float32_on, on_two_gpus
from tests.tiny import tiny_tree
from tests.training.test_global_batch import assert_same_step, relative_error, with_changes
from tests.training.workers import one_step, one_step_on_one_gpu, steps_with_an_idle_rank, train_all

# the second update has the moments of the first
STEPS, KERNEL_STEPS = 2, 10
# float32, sums in another order
TOLERANCE = 1e-5
# of weights after so many updates
WEIGHT_TOLERANCE = 1e-6 * STEPS
# the kernels' products of float32 on tensor cores, and atomics
KERNEL_TOLERANCE = 1e-4
# 8 bits of mantissa; a chunk at the threshold may be selected on one side and not on the other
BF16_TOLERANCE, BF16_GRADIENTS = 0.01, 0.1

DOCUMENTS = {"packed": True, "long": False}
EXCHANGES = {
    "dash": ["all_gather", "a2a", "p2p", "sparse"],
    "full": ["a2a"],
    "mixed": ["a2a"],
    "infllmv2": ["a2a"],
}
INFLLMV2 = {"kernel_size": 8, "kernel_stride": 4, "top_k": 1, "initial_blocks": 1, "local_blocks": 1}
# context, tensor and data-parallel size
LAYOUTS = {
    "context-2": (2, 1, 1),
    "context-4": (4, 1, 1),
    "context-2-tensor-2": (2, 2, 1),
    "context-2-data-2": (2, 1, 2),
}


def tree_of(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """A run whose router drops chunks and whose updates keep the gradient's size: clipped, and with a large epsilon.

    Adam's own normalisation would hide a gradient of the wrong size, and magnify rounding where it is near 0.
    """
    return with_changes(
        tiny_config,
        model={"heads": 8, "kv_heads": 4, "head_dim": 16, "qk_norm": True},
        attention={"scaling_factor": 4.0},
        optimizer={"lr": 0.1, "eps": 1e-2, "grad_clip": 0.1},
        training={"steps": STEPS, "global_batch": 2},
        evaluation={"every": STEPS, "samples": 3},
    )


@pytest.fixture
def tree(tiny_config: dict[str, Any], tiny_chats: Path) -> dict[str, Any]:
    """See `tree_of`."""
    return with_chats(tree_of(tiny_config), tiny_chats)


def with_chats(tree: dict[str, Any], chats: Path) -> dict[str, Any]:
    """Every other row is one of conversations, of which the answers alone are learnt."""
    blend = [f"0.5 {tree['data']['train'][0]}", f"0.5 {chats / 'train'}"]
    return with_changes(tree, data={"train": blend, "valid": [*tree["data"]["valid"], str(chats / "valid")]})


def documents_of(tree: dict[str, Any], documents: str, kind: str) -> dict[str, Any]:
    attention: dict[str, Any] = {"kind": "dash", "full_layers": [0]} if kind == "mixed" else {"kind": kind}
    attention["infllmv2"] = INFLLMV2
    if documents == "packed":
        attention |= {"learned_scaling": True, "local_chunks": 1, "query_pool": 5}
        attention |= {"pool_heads": True, "router_projections": kind == "dash"}
    return with_changes(tree, data={"pack_documents": DOCUMENTS[documents]}, attention=attention)


@pytest.fixture(scope="module")
def expected(
    tiny_data: Path, tiny_chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], dict[tuple[str, str], dict[str, Any]]]:
    """What one process gives, on the CPU or on a GPU; computed once."""

    @functools.cache
    def on(cuda: bool) -> dict[tuple[str, str], dict[str, Any]]:
        folder = tmp_path_factory.mktemp("one_process")
        tree = with_chats(tree_of(tiny_tree(tiny_data, folder / "run")), tiny_chats)
        tree = in_float32_on(cuda, tree)
        keys = list(itertools.product(DOCUMENTS, EXCHANGES))
        cases = [(f"one_{documents}_{kind}", documents_of(tree, documents, kind)) for documents, kind in keys]
        run_in_processes(folder, 1, one_step, cases, str(folder), None, STEPS, cuda=cuda)
        return {key: loaded(folder / f"{name}.pt") for key, (name, _) in zip(keys, cases, strict=True)}

    return on


def loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu")


def covering_cases(layout: str) -> dict[str, tuple[str, str, str, int]]:
    """Every kind, exchange and way of documents, with ZeRO stages that differ from layout to layout.

    Beside another kind of parallelism the two context ranks are those of "context-2": there each exchange has one way of
    documents and one stage.
    """
    shift = list(LAYOUTS).index(layout)
    cases = {}
    combinations = [(kind, comm, d) for kind in EXCHANGES for comm in EXCHANGES[kind] for d in DOCUMENTS]
    for number, (kind, comm, documents) in enumerate(combinations):
        stage = 1 + (number // 2 + number + shift) % 3
        if LAYOUTS[layout][1:] != (1, 1):
            if (number // 2 + number + shift) % 2:
                continue
            stage = 1 + (number // 2 + shift) % 3
        cases[f"{kind}_{comm}_{documents}_zero_{stage}"] = (kind, comm, documents, stage)
    return cases


@pytest.mark.parametrize(
    ("layout", "cuda"), [*((layout, False) for layout in LAYOUTS), on_two_gpus("context-2")]
)
def test_loss_gradients_and_weights_are_those_of_one_process(
    layout: str, cuda: bool, tree: dict[str, Any], expected: Any, run_processes: Any, tmp_path: Path
) -> None:
    context, tensor, data = LAYOUTS[layout]
    cases = covering_cases(layout)
    trees = []
    for name, (kind, comm, documents, stage) in cases.items():
        parallel = {"context": context, "tensor": tensor, "sequence": tensor > 1, "context_comm": comm}
        sections = {"parallel": parallel, "zero": {"stage": stage}}
        case = with_changes(documents_of(tree, documents, kind), **sections)
        trees.append((name, in_float32_on(cuda, case)))
    run_processes(context * tensor * data, one_step, trees, str(tmp_path), None, STEPS, cuda=cuda)
    for name, (kind, _, documents, _) in cases.items():
        found, one = loaded(tmp_path / f"{name}.pt"), expected(cuda)[documents, kind]
        assert_same_step(found, one, TOLERANCE)
        assert found["validation"] == pytest.approx(one["validation"], rel=TOLERANCE), name
        if kind in ("dash", "infllmv2"):
            assert found["density"] == pytest.approx(one["density"], rel=TOLERANCE), name
        for parameter, weight in one["weights"].items():
            assert relative_error(found["weights"][parameter], weight) <= WEIGHT_TOLERANCE, (name, parameter)
        copies = [loaded(tmp_path / f"{name}_{rank}.pt") for rank in range(context * tensor * data)]
        assert copies[0]
        for parameter in copies[0]:
            assert all(torch.equal(copies[0][parameter], other[parameter]) for other in copies), parameter


@NEEDS_TWO_GPUS
def test_two_gpus_train_as_one_in_bf16_with_the_kernels_at_8k(
    tiny_config: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = with_changes(
        tree_of(tiny_config),
        model={"hidden_size": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "ffn_hidden_size": 1408},
        attention={"chunk_size": 64, "local_chunks": 2, "query_pool": 16},
        data={"seq_length": 8192, "pack_documents": False},
        training={"steps": STEPS, "global_batch": 2, "precision": "bf16"},
        # normal updates: rounding to bf16 is larger than what tiny ones change
        optimizer={"lr": 1e-3, "eps": 1e-8, "grad_clip": 1.0},
        evaluation={"every": 0},
    )
    run_processes(1, one_step, [("one", tree)], str(tmp_path), cuda=True)
    one = loaded(tmp_path / "one.pt")
    assert max(one["density"]) < 0.95, "every chunk is selected"
    cases = {comm: {"context": 2, "context_comm": comm} for comm in EXCHANGES["dash"]}
    trees = [(name, with_changes(tree, parallel=parallel)) for name, parallel in cases.items()]
    run_processes(2, one_step, trees, str(tmp_path), cuda=True)
    # processes keep the groups of their first layout
    tensor = with_changes(tree, parallel={"tensor": 2, "sequence": True})
    run_processes(2, one_step, [("tensor", tensor)], str(tmp_path), cuda=True)
    for name in [*cases, "tensor"]:
        found = loaded(tmp_path / f"{name}.pt")
        errors = {p: relative_error(found["gradients"][p], g) for p, g in one["gradients"].items()}
        print(f"{name}: loss {found['loss'] / one['loss'] - 1:.1e}, largest error {max(errors.values()):.1e}")
        assert found["loss"] == pytest.approx(one["loss"], rel=BF16_TOLERANCE), name
        assert found["norm"] == pytest.approx(one["norm"], rel=BF16_TOLERANCE), name
        assert max(errors.values()) <= BF16_GRADIENTS, (name, errors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("layout", ["context-4", "context-2-tensor-2"])
def test_ranks_that_share_a_gpu_train_as_one_with_the_kernels(
    layout: str, tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = with_changes(
        tree,
        attention={"scaling_factor": 1.0},
        data={"num_workers": 0},
        training={"steps": KERNEL_STEPS},
        evaluation={"every": KERNEL_STEPS},
    )
    trees = {d: documents_of(tree, d, "dash") for d in DOCUMENTS}
    run_processes(1, one_step_on_one_gpu, list(trees.items()), str(tmp_path), None, KERNEL_STEPS, cuda=True)
    expected = {d: torch.load(tmp_path / f"{d}.pt", map_location="cpu") for d in DOCUMENTS}
    context, tensor, _ = LAYOUTS[layout]
    cases = {n: c for n, c in covering_cases(layout).items() if c[0] == "dash"}
    sections = {
        n: {
            "parallel": {"context": context, "tensor": tensor, "sequence": tensor > 1, "context_comm": comm},
            "zero": {"stage": stage},
        }
        for n, (_, comm, _, stage) in cases.items()
    }
    several = [(n, with_changes(trees[cases[n][2]], **sections[n])) for n in cases]
    run_processes(
        context * tensor, one_step_on_one_gpu, several, str(tmp_path), None, KERNEL_STEPS, cuda=True
    )
    for name, (_, _, documents, _) in cases.items():
        found, one = torch.load(tmp_path / f"{name}.pt", map_location="cpu"), expected[documents]
        errors = [relative_error(found["gradients"][p], g) for p, g in one["gradients"].items()]
        errors += [relative_error(found["weights"][p], w) for p, w in one["weights"].items()]
        print(f"{layout} {name}: loss {found['loss'] / one['loss'] - 1:.1e}, largest error {max(errors):.1e}")
        assert_same_step(found, one, KERNEL_TOLERANCE)
        assert max(errors) <= KERNEL_TOLERANCE, name


def test_recomputation_leaves_gradients_alone(
    tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    # with all that a projection of queries, keys and values may have
    tree = with_changes(
        tree,
        model={"qkv_bias": True, "qk_norm": True},
        attention={"local_chunks": 1, "query_pool": 5, "pool_heads": True, "router_projections": True},
    )
    run_processes(1, one_step, [("one", tree)], str(tmp_path))
    cases = []
    for mode, comm in itertools.product(("selective", "attention", "full"), EXCHANGES["dash"]):
        # every exchange with both stages
        stage = 3 if (mode == "selective") == (comm in ("a2a", "p2p")) else 1
        sections = {"parallel": {"context": 2, "context_comm": comm}, "zero": {"stage": stage}}
        cases.append((f"{mode}_{comm}", with_changes(tree, training={"recompute": mode}, **sections)))
    run_processes(2, one_step, cases, str(tmp_path))
    for name, _ in cases:
        assert_same_step(torch.load(tmp_path / f"{name}.pt"), torch.load(tmp_path / "one.pt"), TOLERANCE)


def test_a_rank_without_targets_neither_hangs_nor_changes_the_step(
    tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    run_processes(1, steps_with_an_idle_rank, [with_changes(tree, parallel={"context": 1})], str(tmp_path))
    comms = EXCHANGES["dash"]
    trees = [with_changes(tree, parallel={"context": 2, "context_comm": comm}) for comm in comms]
    run_processes(2, steps_with_an_idle_rank, trees, str(tmp_path))
    one = torch.load(tmp_path / "idle_1_all_gather.pt")
    for comm in comms:
        found = torch.load(tmp_path / f"idle_2_{comm}.pt")
        assert_same_step(found, one, TOLERANCE)
        for name, weight in one["weights"].items():
            assert relative_error(found["weights"][name], weight) <= TOLERANCE, (comm, name)


def test_metrics_report_balance_and_bytes_without_validation(
    tree: dict[str, Any], run_processes: Any, tmp_path: Path
) -> None:
    tree = with_changes(
        tree,
        training={"steps": 2},
        evaluation={"every": 1},
        data={"pack_documents": False},
        parallel={"context": 2},
        attention={"query_pool": 5},
    )
    run_processes(2, train_all, [(tree, None)])
    kv = 2 * 64 * 4 * 16 * 4  # K and V of 64 tokens, 4 heads of 16, float32
    summaries = 4 * 4 * 16 * 4
    queries = 4 * 8 * 16 * 4  # of the 4 tokens before the one border that each rank has to the other's piece
    for line in read_metrics(tree["run_dir"]):
        # two micro-batches; keys are gathered in both passes, gradients return in the backward
        assert line["context_bytes_forward_per_layer"] == [2 * (kv + summaries + queries)] * 2
        assert line["context_bytes_backward_per_layer"] == [2 * (2 * kv + summaries + queries)] * 2
        assert 1 <= line["context_imbalance"] < 1.2
