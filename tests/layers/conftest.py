"""Megatron's groups for tests that build models in the test's own process."""

from collections.abc import Iterator

import pytest

from dash_megatron.config import ParallelConfig
from dash_megatron.parallel import Launch, destroy_process_groups, init_process_groups


@pytest.fixture
def single_process() -> Iterator[None]:
    init_process_groups(Launch(rank=0, world_size=1, local_rank=0), ParallelConfig())
    yield
    destroy_process_groups()
