"""Full attention: documents of a row apart, whatever implementation is here."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from dash_megatron.ops import full
from dash_megatron.ops.full import (
    IMPLEMENTATIONS,
    PREFERENCE,
    packed_attention,
    pick_implementation,
    why_unavailable,
)

LENGTHS = (37, 1, 200, 18)


def inputs_of(head_dim: int, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """Queries of 6 heads, keys and values of 2, and where documents start."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    qkv = [torch.randn(tokens, heads, head_dim, generator=generator) for heads in (6, 2, 2)]
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=device)
    return [x.to(device, dtype).requires_grad_() for x in qkv], starts


def by_definition(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One softmax over all tokens with a mask, in the inputs' dtype."""
    number = torch.bucketize(torch.arange(len(q), device=q.device), cu_seqlens[1:].long(), right=True)
    seen = (number[:, None] == number) & torch.ones(len(q), len(q), device=q.device).tril().bool()
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def test_documents_attend_within_themselves() -> None:
    qkv, starts = inputs_of(8, torch.float64)
    out, expected = packed_attention(*qkv, starts, max(LENGTHS)), by_definition(*qkv, starts)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((x * weight).sum(), qkv) for x in (out, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_implementation_that_a_gpu_has_gives_the_same(name: str, head_dim: int) -> None:
    qkv, starts = inputs_of(head_dim, torch.bfloat16, "cuda")
    if reason := why_unavailable(name, qkv[0]):
        pytest.skip(reason)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out, expected = packed_attention(*qkv, starts, max(LENGTHS), name), by_definition(*exact, starts)
    weight = torch.randn_like(out)
    found = [out, *torch.autograd.grad((out * weight).sum(), qkv)]
    wanted = [expected, *torch.autograd.grad((expected * weight).sum(), exact)]
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() <= 1e-2 * y.norm()


def test_what_cannot_run_is_named_with_the_reason_and_the_remedy() -> None:
    qkv, starts = inputs_of(8, torch.bfloat16)
    with pytest.raises(ValueError, match=r"implementation='flash' must be one of .*'varlen'.*; try 'auto'"):
        packed_attention(*qkv, starts, max(LENGTHS), "flash")
    for name in IMPLEMENTATIONS.keys() - {"each"}:
        with pytest.raises(
            ValueError, match=f"'{name}' cannot run here: q is bfloat16 on cpu.*float16 or bfloat16 on CUDA"
        ):
            packed_attention(*qkv, starts, max(LENGTHS), name)
    assert pick_implementation(qkv[0]) == "each"
    assert IMPLEMENTATIONS.keys() >= set(PREFERENCE)


@pytest.mark.parametrize(
    ("installed", "capability", "picked"),
    [(False, 9, "flash2"), (True, 9, "flash3"), (True, 8, "flash2")],
    ids=["torch alone", "Hopper", "Ampere"],
)
def test_a_gpu_takes_flash_attention_3_where_it_is_installed(
    installed: bool, capability: int, picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        assert arguments["causal"]
        assert arguments["max_seqlen_q"] == arguments["max_seqlen_k"] == 200
        return q, None

    module = ModuleType("flash_attn_interface")
    if installed:
        module.flash_attn_varlen_func = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(full, "_flash3_function", full._flash3_function.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    q: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda")
    assert pick_implementation(q) == picked
    if picked == "flash3":
        assert packed_attention(q, q, q, torch.zeros(2), 200) is q
    elif not installed:
        with pytest.raises(ValueError, match="no module flash_attn_interface"):
            pick_implementation(q, "flash3")


@pytest.mark.parametrize("grouped", [False, True], ids=["repeated", "grouped"])
def test_heads_are_repeated_only_for_a_torch_that_takes_no_groups(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = []

    def first_release(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, is_causal: bool
    ) -> Any:
        heads.append((k.shape[1], is_causal))
        return q

    def later_release(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int,
        window_size: tuple[int, int], enable_gqa: bool,
    ) -> Any:  # fmt: skip
        heads.append((k.shape[1], window_size == (-1, 0) and enable_gqa))
        return q

    monkeypatch.setattr(varlen, "varlen_attn", later_release if grouped else first_release)
    qkv, starts = inputs_of(8, torch.bfloat16)
    IMPLEMENTATIONS["varlen"](*qkv, starts, max(LENGTHS))
    assert heads == [(2 if grouped else 6, True)]
