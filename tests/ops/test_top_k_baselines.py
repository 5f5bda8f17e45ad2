"""InfLLM v2 and Native Sparse Attention against their formulas, token by token."""

import pytest
import torch

from dash_megatron.ops.topk import grid as grids
from dash_megatron.ops.topk import nsa, reference
from dash_megatron.ops.topk.infllmv2 import infllmv2_attention
from dash_megatron.ops.topk.nsa import Compression, nsa_attention
from dash_megatron.topk_selection import Selection
from tests.ops.top_k_by_hand import infllmv2_by_hand, nsa_by_hand

C = 8
SELECTION = Selection(kernel_size=4, kernel_stride=2, top_k=2, initial_blocks=1, local_blocks=2)
WINDOW = 16
HEADS, KV_HEADS, D = 4, 2, 4
SELECTIONS = [
    SELECTION,
    Selection(kernel_size=2, kernel_stride=2, top_k=1, initial_blocks=0, local_blocks=1),
    Selection(kernel_size=8, kernel_stride=4, top_k=0, initial_blocks=2, local_blocks=3),
    Selection(kernel_size=8, kernel_stride=2, top_k=3, initial_blocks=2, local_blocks=1),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several query blocks even for short sequences, and every one computed again in the backward."""
    monkeypatch.setattr(grids, "MAX_BLOCK_SCORES", {"cpu": 6000})
    monkeypatch.setattr(reference, "MAX_KEPT_SCORES", 6000)


def inputs(N, B=1, dtype=torch.float64, seed=0):
    """q, k, v, gates, and the six weights of the two compressions."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = noise(B, N, HEADS, D), noise(B, N, KV_HEADS, D), noise(B, N, KV_HEADS, D)
    with torch.no_grad():
        q *= 3  # so that the selection matters
    return [q, k, v, noise(B, N, HEADS, 3)]


def weights(selection=SELECTION, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(KV_HEADS, selection.kernel_size, D), (KV_HEADS, D, D), (KV_HEADS, D, D)] * 2
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def attend(kind, tokens, learned, selection=SELECTION, **options):
    """Output and routing of a baseline."""
    options = {"chunk_size": C, "selection": selection, **options}
    if kind == "infllmv2":
        return infllmv2_attention(*tokens[:3], **options)
    options.setdefault("window", WINDOW)
    return nsa_attention(*tokens, Compression(*learned[:3]), Compression(*learned[3:]), **options)


def by_hand(kind, tokens, learned, selection):
    tokens = [x[0] for x in tokens]
    if kind == "infllmv2":
        return infllmv2_by_hand(*tokens[:3], C, selection)
    return nsa_by_hand(*tokens, Compression(*learned[:3]), Compression(*learned[3:]), C, selection, WINDOW)


def leaves_of(kind, tokens, learned):
    return tokens[:3] if kind == "infllmv2" else [*tokens, *learned]


KINDS = pytest.mark.parametrize("kind", ["infllmv2", "nsa"])


@KINDS
@pytest.mark.parametrize("selection", SELECTIONS)
def test_output_selection_and_gradients_follow_the_formulas(kind, selection):
    tokens, learned = inputs(61), weights(selection)
    out, routing = attend(kind, tokens, learned, selection)
    expected, counts = by_hand(kind, tokens, learned, selection)
    torch.testing.assert_close(out[0], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(routing.chunks_selected[0], counts)
    available = torch.arange(61) // C + 1
    assert routing.density.item() == pytest.approx(
        counts.float().mean().item() / available.float().mean().item()
    )
    leaves, upstream = leaves_of(kind, tokens, learned), torch.randn_like(expected)
    found = torch.autograd.grad(out[0], leaves, upstream)
    for gradient, right in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-9)


@KINDS
def test_gradients_are_those_of_finite_differences(kind):
    tokens, learned = inputs(20), weights()
    torch.autograd.gradcheck(
        lambda *leaves: attend(kind, [*leaves[:3], *leaves[3:4]] if kind == "nsa" else leaves, leaves[4:])[0],
        leaves_of(kind, tokens, learned),
        fast_mode=True,
    )


@KINDS
def test_packed_documents_are_as_if_alone(kind):
    lengths = [1, 8, 30, 5, 23]
    tokens, learned = inputs(sum(lengths)), weights()
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    out, routing = attend(kind, tokens, learned, cu_seqlens=bounds)
    documents = zip(*(x.split(lengths, dim=1) for x in tokens), strict=True)
    alone = [attend(kind, list(document), learned) for document in documents]
    torch.testing.assert_close(out, torch.cat([one for one, _ in alone], dim=1))
    assert torch.equal(routing.chunks_selected, torch.cat([r.chunks_selected for _, r in alone], dim=1))


@KINDS
def test_rows_of_a_batch_are_as_if_alone(kind):
    tokens, learned = inputs(29, B=3), weights()
    out, _ = attend(kind, tokens, learned)
    alone = [attend(kind, [x[row : row + 1] for x in tokens], learned)[0] for row in range(3)]
    torch.testing.assert_close(out, torch.cat(alone))


def test_no_row_is_left_without_a_compressed_key(monkeypatch):
    """On a GPU torch's attention may answer such a row with NaN; on a CPU it does not."""
    attention = nsa.F.scaled_dot_product_attention
    rows = []

    def watch(*args, attn_mask):
        rows.append(attn_mask.any(-1))
        return attention(*args, attn_mask=attn_mask)

    monkeypatch.setattr(nsa.F, "scaled_dot_product_attention", watch)
    attend("nsa", inputs(61), weights())
    assert len(rows) > 1
    assert torch.cat(rows).all()


@KINDS
@pytest.mark.parametrize("changed", [9, 40, 47])
def test_later_tokens_do_not_change_outputs(kind, changed):
    tokens, learned = inputs(61), weights()
    later = [torch.cat([x[:, :changed], torch.randn_like(x[:, changed:])], dim=1) for x in tokens]
    before, after = (attend(kind, x, learned)[0] for x in (tokens, later))
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


@KINDS
def test_half_precision_is_near_and_keeps_its_dtype(kind):
    tokens, learned = inputs(61, dtype=torch.bfloat16), weights(dtype=torch.bfloat16)
    out, _ = attend(kind, tokens, learned)
    expected, _ = attend(kind, [x.double() for x in tokens], [x.double() for x in learned])
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.01 * expected.norm()
    out.sum().backward()
    assert tokens[0].grad.dtype == torch.bfloat16


@KINDS
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel_stride": 3}, "kernel_stride=3 must divide chunk_size=8"),
        ({"kernel_size": 3}, "kernel_size=3 must be a multiple of kernel_stride=2"),
        ({"kernel_size": 16}, "at most chunk_size=8"),
        ({"top_k": -1}, "top_k=-1 must be an int of at least 0"),
        ({"local_blocks": 0}, "local_blocks=0 must be an int of at least 1"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(kind, change, words):
    selection = Selection(**{**vars(SELECTION), **change})
    with pytest.raises(ValueError, match=words):
        attend(kind, inputs(20), weights(selection), selection)


def test_tensors_of_the_wrong_shape_are_refused():
    tokens, learned = inputs(20), weights()
    with pytest.raises(ValueError, match=r"gates.shape=\[1, 20, 4, 2\] must be \[1, 20, 4, 3\]"):
        attend("nsa", [*tokens[:3], tokens[3][..., :2]], learned)
    with pytest.raises(ValueError, match="window=12 must be a multiple of chunk_size=8"):
        attend("nsa", tokens, learned, window=12)
    with pytest.raises(ValueError, match=r"v.shape=\[1, 20, 1, 4\] must be \[1, 20, 2, 4\]"):
        infllmv2_attention(tokens[0], tokens[1], tokens[2][:, :, :1])


def test_blocks_cover_all_chunks_once_and_rather_begin_with_a_document_than_cut_it():
    bounds = torch.tensor([0, 5 * C, 8 * C, 9 * C, 30 * C, 31 * C], dtype=torch.int32)
    grid = grids.make_grid(1, 31 * C, C, bounds, "cpu")
    found = list(grid.blocks(1, most_rows=6 * C))
    assert [(b.start, b.end) for b in found] == [
        (0, 5),  # what follows would be cut
        (5, 9),
        (9, 15),  # longer than a block
        (15, 21),
        (21, 27),
        (27, 31),
    ]
    assert [b.first for b in found] == [0, 5, 9, 9, 9, 9]
    # less than half a block would be left of (0, 4)
    late = torch.tensor([0, 1 * C, 31 * C], dtype=torch.int32)
    grid = grids.make_grid(1, 31 * C, C, late, "cpu")
    assert next(iter(grid.blocks(1, most_rows=4 * C))) == (0, 0, 4)
