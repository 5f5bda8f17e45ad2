"""What dash_attention refuses, and which backend it takes."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from dash_megatron.ops import backend, dash_attention
from dash_megatron.ops.backend import keep_triton_cache, pick_backend


def _fail_to_import():
    raise ImportError("No module named 'triton'")


def test_auto_on_cpu_is_the_reference_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_announced", set())
    inputs = torch.randn(1, 8, 4, 8), *torch.randn(2, 1, 8, 2, 8), torch.randn(2, 8)
    with caplog.at_level(logging.INFO, logger="dash_megatron"):
        outs = [dash_attention(*inputs, chunk_size=4, backend="auto") for _ in range(2)]
    assert torch.equal(outs[0], dash_attention(*inputs, chunk_size=4, backend="reference"))
    assert [r.message for r in caplog.records if r.name == "dash_megatron"] == [
        "dash_attention: backend 'auto' is 'reference' (tensors are float32 on cpu)"
    ]


def test_triton_that_cannot_be_imported_is_a_value_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "_import_triton_kernels", _fail_to_import)
    inputs = torch.randn(1, 8, 4, 8), *torch.randn(2, 1, 8, 2, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"backend='triton'.*No module named 'triton'.*backend='reference'"):
        dash_attention(*inputs, backend="triton")


def test_auto_on_cuda_is_triton_if_it_can_be_imported_and_otherwise_the_reference(monkeypatch):
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(backend, "_import_triton_kernels", lambda: None)
    assert pick_backend("auto", q) == "triton"
    monkeypatch.setattr(backend, "_import_triton_kernels", _fail_to_import)
    assert pick_backend("auto", q) == "reference"


def test_float64_takes_the_reference_on_cuda_too_and_triton_refuses_it(monkeypatch):
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float64)
    monkeypatch.setattr(backend, "_import_triton_kernels", lambda: None)
    assert pick_backend("auto", q) == "reference"
    with pytest.raises(ValueError, match=r"q.dtype=torch.float64 must be float32.*backend='reference'"):
        pick_backend("triton", q)


def test_triton_refuses_cpu_tensors_unless_interpreted_and_chunks_too_small_for_it(monkeypatch):
    monkeypatch.setattr(backend, "_import_triton_kernels", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = torch.randn(1, 8, 4, 8), *torch.randn(2, 1, 8, 2, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"backend='triton' must have CUDA tensors.*backend='reference'"):
        dash_attention(*inputs, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        ValueError, match=r"chunk_size=8 must be one of \[16, 32, 64, 128\].*backend='reference'"
    ):
        dash_attention(*inputs, chunk_size=8, backend="triton")


_Q, _KV, _W = torch.zeros(1, 8, 4, 8), torch.zeros(1, 8, 2, 8), torch.zeros(2, 8)
_EMPTY = torch.zeros(1, 0, 2, 8)
WRONG = [
    ("q", {"q": None}),
    ("q", {"q": _Q[0]}),
    ("q", {"q": _Q.long()}),
    ("q", {"q": torch.zeros(1, 0, 4, 8), "k": _EMPTY, "v": _EMPTY}),
    ("q", {"q": torch.zeros(1, 8, 3, 8)}),
    ("k", {"k": [1.0]}),
    ("k", {"k": torch.zeros(1, 9, 2, 8)}),
    ("k", {"k": torch.zeros(1, 8, 2, 4)}),
    ("k", {"k": _KV.double()}),
    ("k", {"k": _KV.to("meta")}),
    ("v", {"v": torch.zeros(1, 8, 1, 8)}),
    ("v", {"v": torch.zeros(2, 8, 2, 8)}),
    ("v", {"v": _KV.bfloat16()}),
    ("summary_query", {"summary_query": torch.zeros(16)}),
    ("summary_query", {"summary_query": torch.zeros(4, 8)}),
    ("summary_query", {"summary_query": _W.bfloat16()}),
    ("summary_query", {"q": _Q.double(), "k": _KV.double(), "v": _KV.double()}),
    *(("chunk_size", {"chunk_size": x}) for x in (0, -16, 24, 256, 16.0, "64", None, True)),
    *(
        (name, {name: x})
        for name in ("scaling_factor", "sigma")
        for x in (0, -1.0, math.inf, math.nan, "1", None, True, torch.tensor(1.0))
    ),
    *(("estimate_diagonal", {"estimate_diagonal": x}) for x in (1, None, "yes")),
    *(
        ("scaling_factor", {"scaling_factor": x})
        for x in (
            torch.ones(3),
            torch.ones(2, dtype=torch.int64),
            torch.tensor([1.0, 0.0]),
            torch.ones(2, device="meta"),
        )
    ),
    *(("local_chunks", {"local_chunks": x}) for x in (-1, 1.0, "2", None, True)),
    *(("pool_heads", {"pool_heads": x}) for x in (0, 1, None, "yes")),
    *(("query_pool", {"query_pool": x}) for x in (0, 129, 4.0, "2", None, True)),
    *(("alpha", {"alpha": x}) for x in (1.0, 2.5, math.nan, None)),
    ("cu_seqlens", {"cu_seqlens": [0, 8]}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 8])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([[0, 8]], dtype=torch.int32)}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0], dtype=torch.int32)}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32, device="meta")}),
    *(
        ("cu_seqlens", {"cu_seqlens": torch.tensor(x, dtype=torch.int32)})
        for x in ([1, 8], [0, 7], [0, 9], [0, 4, 4, 8], [0, 6, 3, 8])
    ),
    (
        "cu_seqlens",
        {
            "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32),
            **{n: x.repeat(2, 1, 1, 1) for n, x in zip("qkv", [_Q, _KV, _KV], strict=True)},
        },
    ),
    *(("backend", {"backend": x}) for x in ("cuda", None)),
    ("return_routing", {"return_routing": 1}),
]


@pytest.mark.parametrize(("name", "changes"), WRONG, ids=[f"{i}-{name}" for i, (name, _) in enumerate(WRONG)])
def test_every_wrong_argument_is_a_value_error_that_names_it_and_a_remedy(name, changes):
    arguments = {"q": _Q, "k": _KV, "v": _KV, "summary_query": _W, **changes}
    # field and value first, then the rule, then after a semicolon what to do
    with pytest.raises(ValueError, match=rf"^{name}.*(must|runs from).*; \w+"):
        dash_attention(**arguments)


def test_a_misspelt_argument_fails():
    with pytest.raises(TypeError, match="chunksize"):
        dash_attention(_Q, _KV, _KV, _W, chunksize=64)


def test_the_folder_of_compiled_kernels_is_tritons_own_and_stays(monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    home = knobs.cache.dir
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")  # so that the test's end undoes what follows
    assert keep_triton_cache() == "elsewhere"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert keep_triton_cache() == home == knobs.cache.dir


@pytest.mark.parametrize(
    ("max_seqlen", "message"),
    [
        (0, "max_seqlen=0 must be an int of at least 1"),
        (5.0, r"max_seqlen=5\.0 must be an int of at least 1"),
        (4, "max_seqlen=4 must be at least the 5 tokens of the longest document in cu_seqlens"),
    ],
)
def test_a_bound_on_documents_must_hold(max_seqlen, message):
    inputs = torch.randn(1, 8, 4, 8), *torch.randn(2, 1, 8, 2, 8), torch.randn(2, 8)
    packed = {"chunk_size": 4, "cu_seqlens": torch.tensor([0, 5, 8], dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        dash_attention(*inputs, **packed, max_seqlen=max_seqlen)
    assert torch.equal(dash_attention(*inputs, **packed), dash_attention(*inputs, **packed, max_seqlen=5))
