"""Samples that fill a length, for any filler."""

import random

import pytest

from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.evaluation.samples import Prompt, fit_to_length


class Letters(Tokenizer):
    """A token for each letter, and how many texts were encoded."""

    def __init__(self) -> None:
        self.letters: list[int] = []

    def encode(self, text: str | bytes) -> list[int]:
        self.letters.append(len(text))
        return [ord(letter) for letter in str(text)]


@pytest.mark.parametrize("longest", [1, 40, 400])
@pytest.mark.parametrize("template", [4, 300])
def test_a_sample_fills_its_length_to_within_1_64_or_one_unit(longest: int, template: int) -> None:
    generator = random.Random(longest)
    units = ["x" * generator.randint(1, longest) for _ in range(20_000)]
    units[3000:6000] = ["y"] * 3000

    def build(size: int) -> Prompt:
        return Prompt("?" * template + "".join(units[:size]), ["12"])

    for length in (8192, 1024, 10_000):
        tokenizer = Letters()
        sample = fit_to_length(build, (1, len(units)), length, tokenizer)
        left = length - len(sample.ids)
        used = len(sample.ids) - template - len(" 12")
        assert left >= 0
        assert left <= length // 64 or left < longest
        assert "".join(map(chr, sample.ids[-3:])) == " 12"
        assert sample.prompt_tokens == template + used
        assert sample.spans == [(len(sample.ids) - 2, len(sample.ids))]
        # a handful of texts as long as the sample, two for where the answer begins among them
        assert sum(tokenizer.letters) < 10 * max(length, longest)


def test_what_no_size_fits_is_told() -> None:
    def build(size: int) -> Prompt:
        return Prompt("x" * size, ["12"])

    with pytest.raises(ValueError, match="--lengths 8 must be at least 13"):
        fit_to_length(build, (10, 100), 8, Letters())
    with pytest.raises(ValueError, match="all of it makes a sample of 103 tokens"):
        fit_to_length(build, (10, 100), 128, Letters())
    assert len(fit_to_length(build, (10, 100), 110, Letters()).ids) == 103
