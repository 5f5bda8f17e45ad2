"""The kernel for cross entropy against torch in float64: interpreted on CPU, compiled on a GPU."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from dash_megatron.ops import cross_entropy as in_torch
from dash_megatron.ops.kernels import cross_entropy as kernels
from tests.ops.kernels_under_test import CUDA, DEVICE


def cross_entropy(dtype):
    """Float64 is for torch alone."""
    return in_torch if dtype == torch.float64 else kernels


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def rows_of(num_rows, words, dtype, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(num_rows, words, generator=generator)
    labels = torch.randint(words, (num_rows,), generator=generator)
    labels[:2] = torch.tensor([0, words - 1])
    d_losses = torch.randn(num_rows, generator=generator)
    return logits.to(DEVICE, dtype), labels.to(DEVICE), d_losses.to(DEVICE)


def by_torch(logits, labels, d_losses):
    leaf = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(leaf, labels, reduction="none")
    losses.backward(d_losses.double())
    return losses.detach(), leaf.grad


def by_kernel(logits, labels, d_losses):
    lse, label_logits = kernels.score_labels(logits, labels)
    gradients = logits.clone(memory_format=torch.contiguous_format)
    kernels.replace_by_gradient(gradients, labels, lse, d_losses)
    return lse - label_logits, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("words", [5, 64, 4096, 4097, 10000])
def test_losses_and_gradients_are_torchs(words, dtype):
    operands = rows_of(7, words, dtype)
    losses, gradients = by_kernel(*operands)
    expected, d_expected = by_torch(*operands)
    assert losses.dtype == torch.float32
    assert gradients.dtype == dtype
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    # the interpreter cuts bits off where a GPU rounds
    eps = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    # half precision loses what is small against its smallest number
    torch.testing.assert_close(gradients.double(), d_expected, rtol=eps, atol=1e-7)


def test_large_logits_and_words_that_cannot_be_make_no_nan():
    logits, labels, d_losses = rows_of(4, 5000, torch.float32, scale=1e4)
    logits[:, 1:4097] = -torch.inf  # whole lanes, too
    labels[:] = torch.tensor([0, 4999, 4500, 0])
    losses, gradients = by_kernel(logits, labels, d_losses)
    expected, d_expected = by_torch(logits, labels, d_losses)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(gradients.double(), d_expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "torch"])
def test_processes_that_share_a_vocabulary_add_up_what_each_has(dtype):
    logits, labels, d_losses = rows_of(6, 100, dtype)
    borders = (0, 64, 100)
    # rows of wider ones
    parts = [(logits[:, i:j], labels - i) for i, j in pairwise(borders)]
    lse, label_logits = zip(*(cross_entropy(dtype).score_labels(*part) for part in parts), strict=True)
    lse = torch.stack(lse).logsumexp(0)
    expected, d_expected = by_torch(logits, labels, d_losses)
    torch.testing.assert_close((lse - sum(label_logits)).double(), expected, rtol=2e-6, atol=2e-6)
    for (part, own_labels), d_part in zip(parts, d_expected.split([64, 36], 1), strict=True):
        part = part.contiguous()
        cross_entropy(dtype).replace_by_gradient(part, own_labels, lse, d_losses)
        torch.testing.assert_close(part.double(), d_part, rtol=2e-6, atol=1e-7)


@pytest.mark.skipif(not CUDA, reason="needs a GPU: offsets beyond 2^31 take gigabytes")
def test_offsets_beyond_int32_are_right():
    logits = torch.zeros(2**15 + 1, 2**16, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 5] = 4.0
    labels = torch.full((len(logits),), 5, device=DEVICE)
    losses, gradients = by_kernel(logits, labels, torch.ones(len(logits), device=DEVICE))
    expected = F.cross_entropy(logits[-1:].detach().float(), labels[-1:])
    torch.testing.assert_close(losses[-1], expected)
    assert gradients[-1, 5] < -0.99


def test_what_is_no_number_stays_none():
    logits, labels, _ = rows_of(3, 70, torch.float32)
    logits[0, 3], logits[1, 4] = torch.nan, torch.inf
    lse, _ = kernels.score_labels(logits, labels)
    assert lse.isnan().tolist() == [True, True, False]
