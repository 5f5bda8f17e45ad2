"""Steps over several small chunks at a time give what steps over one give, which other tests hold to the reference."""

import pytest
import torch
import torch.nn.functional as F

from dash_megatron.ops.kernels import backward_q, configs, dash
from dash_megatron.ops.topk import triton as topk_triton
from dash_megatron.ops.topk.infllmv2 import infllmv2_attention
from dash_megatron.topk_selection import Selection
from tests.ops.kernels_under_test import CUDA, DEVICE, TOLERANCE, with_router

find_launches = configs.find_launches

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _in_steps_of(keys, monkeypatch, kernel=configs.PLAIN, **of_queries):
    """From now on attend, by the kernel given, and queries, with what else is given, take `keys` keys a step."""

    def launches(*args, **kwargs):
        usual = find_launches(*args, **kwargs)
        attend = usual.attend._replace(keys=keys, kernel=kernel)
        return usual._replace(attend=attend, queries=usual.queries._replace(keys=keys, **of_queries))

    for module in (dash, topk_triton):
        monkeypatch.setattr(module, "find_launches", launches)


def _inputs(N, Hq, Hkv, D, dtype, lengths):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, N, Hq, D), (1, N, Hkv, D), (1, N, Hkv, D), (Hkv, D), (1, N, Hq, D)
    *leaves, upstream = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    cu_seqlens = None
    if lengths is not None:
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(DEVICE)
    return [x.requires_grad_() for x in leaves], upstream, cu_seqlens


def _results(N=75, Hq=4, Hkv=2, D=16, C=16, dtype=torch.float32, lengths=None, **router):
    """Output and gradients."""
    leaves, upstream, cu_seqlens = _inputs(N, Hq, Hkv, D, dtype, lengths)
    settings = {"chunk_size": C, "scaling_factor": 2.0, "sigma": 2.0, "alpha": 1.5, "cu_seqlens": cu_seqlens}
    out, _ = dash.dash_attention_triton(*leaves, **with_router(settings | router), deterministic=True)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def _check(expected, results, dtype=torch.float32):
    allowed = 1e-5 if dtype == torch.float32 else TOLERANCE[dtype][1]
    for name, x, y in zip("oqkvw", results, expected, strict=False):
        assert not x.isnan().any(), name
        assert (x - y).norm() <= allowed * y.norm(), name


SHAPES = {
    "two chunks, an odd and an even number of them": ({"N": 70}, 32),
    "four chunks": ({"N": 90, "Hkv": 1}, 64),
    "shorter than a chunk": ({"N": 5}, 64),
    "one head a group": ({"N": 50, "Hq": 1, "Hkv": 1}, 32),
    "three heads a group, head dim 24": ({"N": 50, "Hq": 3, "Hkv": 1, "D": 24}, 32),
    "sixteen heads a group": ({"N": 50, "Hq": 16, "Hkv": 1}, 64),
    "two chunks of 32": ({"N": 110, "C": 32, "Hq": 2, "Hkv": 1}, 64),
    "bfloat16": ({"N": 50, "dtype": torch.bfloat16}, 32),
    "alpha 1.7, prior not centred": ({"N": 50, "Hkv": 1, "alpha": 1.7, "estimate_diagonal": False}, 32),
    "packed": ({"lengths": (9, 1, 16, 49)}, 32),
    "four chunks, packed": ({"lengths": (9, 66)}, 64),
    "everything selected": ({"Hkv": 1, "scaling_factor": 0.01}, 64),
    "local chunks, pooled queries": ({"Hq": 3, "Hkv": 1, "local_chunks": 1, "query_pool": 3}, 32),
}


@pytest.mark.parametrize(("shape", "keys"), SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_in_wide_steps_equal_those_in_steps_of_a_chunk(shape, keys, monkeypatch):
    if CUDA and "lengths" not in shape:
        shape = {**shape, "N": 20 * shape.get("N", 75) + 5}
    _in_steps_of(shape.get("C", 16), monkeypatch)
    expected = _results(**shape)
    _in_steps_of(keys, monkeypatch)
    _check(expected, _results(**shape), shape.get("dtype", torch.float32))


def test_wide_steps_give_the_same_bits_in_every_run(monkeypatch):
    _in_steps_of(64, monkeypatch)
    first, again = (_results(N=2005 if CUDA else 75, Hkv=1) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_limit_of_registers_reaches_the_kernel_of_queries(monkeypatch):
    limits = []

    class Recorded:
        def __getitem__(self, grid, kernel=backward_q._dq_kernel):
            def launch(*args, **options):
                limits.append(options["maxnreg"])
                return kernel[grid](*args, **options)

            return launch

    _in_steps_of(32, monkeypatch)
    expected = _results()
    monkeypatch.setattr(backward_q, "_dq_kernel", Recorded())
    _in_steps_of(32, monkeypatch, maxnreg=128)
    _check(expected, _results())
    assert limits == [128]


@pytest.mark.skipif(not CUDA, reason="needs a Hopper GPU: Gluon is not interpreted")
@pytest.mark.parametrize("kernel", [configs.HOPPER, configs.HOPPER_OVERLAP])
@pytest.mark.parametrize("lengths", [None, (1, 31, 33, 64, 500, 97, 3, 1000)], ids=["one document", "packed"])
@pytest.mark.parametrize(("D", "Hq"), [(128, 8), (64, 8), (128, 16), (128, 32), (64, 12)])
def test_two_chunks_a_step_of_the_hopper_kernel_equal_steps_of_a_chunk(D, Hq, lengths, kernel, monkeypatch):
    N = 1701 if lengths is None else sum(lengths)
    shape = {"N": N, "Hq": Hq, "D": D, "C": 32, "dtype": torch.bfloat16, "lengths": lengths}
    _in_steps_of(32, monkeypatch)
    expected = _results(**shape)
    _in_steps_of(64, monkeypatch, kernel)
    first, again = _results(**shape), _results(**shape)
    _check(expected, first, torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("lengths", [None, (3, 16, 70, 1)], ids=["one document", "packed"])
def test_lists_of_other_selections_in_wide_steps_give_the_same(lengths, monkeypatch):
    selection = Selection(kernel_size=8, kernel_stride=4, top_k=1, initial_blocks=1, local_blocks=2)
    leaves, upstream, cu_seqlens = _inputs(90, 4, 2, 16, torch.float32, lengths)

    def results():
        q, k, v, _ = leaves
        out, _ = infllmv2_attention(
            q, k, v, selection, chunk_size=16, cu_seqlens=cu_seqlens, backend="triton"
        )
        return out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)

    _in_steps_of(16, monkeypatch)
    expected = results()
    _in_steps_of(64, monkeypatch)
    _check(expected, results())
