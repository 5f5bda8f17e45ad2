from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from dash_megatron.data.index_file import read_lengths, write_index
from dash_megatron.data.row_order import PASS_ARRAYS, order_of_pass


def megatrons_own(prefix: str, seq_length: int, seed: int, split: Split) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(["unused"], None),
        split="1,0,0",
        path_to_cache="",
        tokenizer=SimpleNamespace(vocab_size=320, eod=2, pad=-1, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(prefix, config)
    return GPTDataset(indexed, "data", np.arange(len(indexed), dtype=np.int32), None, split, config)


@pytest.mark.parametrize("split", [Split.train, Split.valid], ids=lambda split: split.name)
@pytest.mark.parametrize(("count", "longest"), [(1, 40), (2, 40), (500, 8), (3000, 90)])
@pytest.mark.parametrize("empty", [0.0, 0.3], ids=["no-empty", "some-empty"])
def test_the_order_of_a_pass_is_megatrons_bit_for_bit(count, longest, empty, split, tmp_path):
    for seed, seq_length in ((0, 16), (1, 7), (2**32 - 1, 1)):
        drawn = np.random.default_rng(seed)
        lengths = drawn.integers(1, longest + 1, count) * (drawn.random(count) >= empty)
        lengths[-1] = longest  # one row at least
        write_index(tmp_path / "a.idx", lengths, np.dtype(np.uint16))
        np.zeros(lengths.sum(), dtype=np.uint16).tofile(tmp_path / "a.bin")
        made = order_of_pass(read_lengths(tmp_path / "a")[0], seq_length, seed)
        own = megatrons_own(str(tmp_path / "a"), seq_length, seed, split)
        assert tuple(made) == PASS_ARRAYS
        for name, array in made.items():
            expected = getattr(own, name)
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
            assert (array == expected).all(), name
