"""The Triton kernels on sequences so long that 32-bit offsets overflow, a few tokens against float64."""

import pytest
import torch
import torch.nn.functional as F

from dash_megatron.ops.entmax import entmax
from dash_megatron.ops.kernels import dash
from dash_megatron.ops.types import Router
from tests.ops.kernels_under_test import CUDA, DEVICE, TOLERANCE, relative_error
from tests.ops.quick_interpreter import quicken

SIGMA = 2.0


def _attend_token(q_HGD, k_NHD, v_NHD, w_HD, token, C, scaling_factor, sigma):
    """Output [H, G, D] of one token of one document, in the dtype of the inputs and with nothing but its own scores."""
    own, scale = token // C, q_HGD.shape[-1] ** -0.5
    k_cCHD = k_NHD[: own * C].unflatten(0, (own, C))
    weight_cCH = (torch.einsum("cthd,hd->cth", k_cCHD, w_HD) * scale).softmax(1)
    summary_cHD = torch.einsum("cth,cthd->chd", weight_cCH, k_cCHD)
    p_Hc = entmax(torch.einsum("hgd,chd->hgc", q_HGD, summary_cHD) * (scaling_factor * scale)).mean(1)
    outputs = []
    for h, p_c in enumerate(p_Hc):
        selected = p_c.nonzero()[:, 0]
        log_p = p_c[selected].log()
        prior = ((log_p - log_p.detach().mean()) / sigma).repeat_interleave(C)
        seen = (selected[:, None] * C + torch.arange(C, device=selected.device)).flatten()
        seen = torch.cat([seen, torch.arange(own * C, token + 1, device=seen.device)])
        scores = q_HGD[h] @ k_NHD[seen, h].T * scale + F.pad(prior, (0, token + 1 - own * C))
        outputs.append(scores.softmax(-1) @ v_NHD[seen, h])
    return torch.stack(outputs)


LONG = {
    "short": (16 * 12 + 7, {"Hq": 4, "Hkv": 2, "D": 16, "C": 16, "topics": 4}),
    # 32-bit offsets into scores of heads x tokens x chunks overflow here
    "128K": (2**17, {"Hq": 32, "Hkv": 2, "D": 128, "C": 64, "topics": 40}),
    # and here into q itself
    "1M": (2**20, {"Hq": 32, "Hkv": 2, "D": 128, "C": 64, "topics": 40}),
}


@pytest.mark.parametrize("name", LONG)
def test_single_tokens_of_long_sequences_equal_float64(name, monkeypatch):
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        quicken(monkeypatch)
    N, shape = LONG[name]
    if name != "short" and not (CUDA and torch.cuda.get_device_properties(0).total_memory > 120e9):
        pytest.skip("needs a CUDA GPU with more than 120 GB of memory")
    Hq, Hkv, D, C, topics = shape.values()
    dtype, G = torch.bfloat16 if CUDA else torch.float32, Hq // Hkv
    generator = torch.Generator(DEVICE).manual_seed(0)

    def noise(*size):
        return torch.randn(*size, generator=generator, device=DEVICE, dtype=dtype)

    def topic(run):
        pick = torch.randint(topics, (-(-N // run), Hkv), generator=generator, device=DEVICE)
        return directions[torch.arange(Hkv, device=DEVICE), pick].repeat_interleave(run, dim=0)[:N]

    directions = noise(Hkv, topics, D)
    k, v, w = noise(N, Hkv, D).add_(topic(C)), noise(N, Hkv, D), 0.1 * noise(Hkv, D)
    q = noise(N, Hkv, G, D).mul_(0.35).add_(topic(32)[:, :, None])
    tokens = [N // 2 + 3, N - 3 * C, N - 1]
    upstream = torch.zeros_like(q)
    upstream[tokens] = noise(len(tokens), Hkv, G, D)
    leaves = [x.requires_grad_() for x in (q.view(1, N, Hq, D), k[None], v[None], w)]
    out, _ = dash.dash_attention_triton(
        *leaves, Router(chunk_size=C, scaling_factor=1.0, sigma=SIGMA), cu_seqlens=None
    )
    grads = torch.autograd.grad(out, leaves, upstream.view(1, N, Hq, D))

    doubles = [x.detach().double().requires_grad_() for x in (q[tokens], k, v, w)]
    expected = [
        _attend_token(doubles[0][i], *doubles[1:], token, C, 1.0, SIGMA) for i, token in enumerate(tokens)
    ]
    expected_grads = torch.autograd.grad(torch.stack(expected), doubles, upstream[tokens].double())
    allowed_out, allowed_grad = TOLERANCE[dtype]
    assert relative_error(out.view(q.shape)[tokens], torch.stack(expected)) <= allowed_out
    assert relative_error(grads[0].view(q.shape)[tokens], expected_grads[0]) <= allowed_grad
    assert int(grads[0].view(N, -1).any(1).sum()) == len(tokens)
    for grad, wanted in zip(grads[1:], expected_grads[1:], strict=True):
        assert relative_error(grad.view(wanted.shape), wanted) <= allowed_grad
