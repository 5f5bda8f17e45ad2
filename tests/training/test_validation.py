"""What a run finds out about its model at steps that validate."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from dash_megatron.data.batches import BatchSource
from dash_megatron.training.validation import validate
from tests.data.test_batches import EOD, row

SEQ_LENGTH = 300


class Documents:
    """Rows whose documents end after 100 tokens, and after 40 more."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = [10 + index] * (SEQ_LENGTH + 1)
        text[99] = text[139] = EOD
        return row(text)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_losses_are_averaged_by_position_without_padding_rows(
    one_process: None,
) -> None:
    def loss_by_position(tokens: torch.Tensor, positions: torch.Tensor, *_: object) -> torch.Tensor:
        return positions * tokens.float()  # rows have losses of their own

    source = BatchSource(Documents(), global_batch=4, micro_batch=2, eod=EOD, pad_last=True)
    found = validate(loss_by_position, source, SEQ_LENGTH, torch.device("cpu"))

    losses = [
        (position, position * (10 + index))
        for index in range(3)
        for length in (100, 40, 160)
        for position in range(length - (length != 160))  # nothing follows the end of a document
    ]
    expected = []
    for start, end in [(0, 64), (64, 128), (128, 256)]:
        inside = [loss for position, loss in losses if start <= position < end]
        expected.append({"from": start, "to": end, "loss": sum(inside) / len(inside)})
    # the last bucket, which no document reaches, is not listed
    assert found.by_position == [pytest.approx(part) for part in expected]
    assert found.loss == pytest.approx(sum(loss for _, loss in losses) / len(losses))
