"""A transformers tokenizer that encodes as the sentencepiece model of a run does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dash_megatron.data.tokenizer import SPACE_SYMBOL
from dash_megatron.data.tokenizer import Tokenizer as OurTokenizer

# generated code, whose names no type checker sees
_format: Any = sentencepiece_model_pb2

# Texts on which tokenizers tend to differ.
_TEXTS = (
    "", "a", " ", "  two  spaces ", "\t\n\n x\r\n", "    indented\n        more\n\n\n", "e\u0301 \u00e9 \uff21\ufb01",
    "1234567890 3.14", "</s><s><unk> <0x41> \u2581 \u2581\u2581x", "\u4f60\u597d \U0001f600\U0001f468\u200d\U0001f469", "\x00\x07\x7f",
    "def f(self, value):\n    return [value[i] for i in range(10)]\n",
)  # fmt: skip


def build_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Make a fast tokenizer from a sentencepiece BPE model with byte fallback.

    Pieces are kept with real spaces where sentencepiece writes U+2581, so that a U+2581 of the text is spelt in bytes,
    as in training. Names of control tokens inside a text are text.

    Raises:
        ValueError: the model is of another kind, or the result does not encode as the model does.
    """
    ours = OurTokenizer(path)
    proto = _format.ModelProto()
    proto.ParseFromString(Path(path).read_bytes())
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ValueError(
            f"data.tokenizer={path} must be a BPE model to be exported; train one with "
            "`python -m data_tools.train_tokenizer`"
        )
    fast = _wrap(proto, ours)
    check_tokenizer(fast, ours)
    return fast


def _wrap(proto: Any, ours: OurTokenizer) -> PreTrainedTokenizerFast:
    kinds = _format.ModelProto.SentencePiece
    vocabulary, scores, control = {}, {}, []
    for index, piece in enumerate(proto.pieces):
        text = piece.piece
        if piece.type == kinds.NORMAL:
            text = text.replace(SPACE_SYMBOL, " ")
            scores[text] = piece.score
        elif piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            control.append(text)
        vocabulary[text] = index
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(scores, vocabulary),
        unk_token=control[0],
        byte_fallback=True,
        fuse_unk=False,
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    names = {index: text for text, index in vocabulary.items()}
    end = names[ours.eod]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=names[proto.trainer_spec.unk_id],
        bos_token=names.get(ours.bos, end),
        eos_token=end,
        pad_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, in the order in which sentencepiece prefers the pieces."""
    ranked = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def check_tokenizer(fast: PreTrainedTokenizerFast, ours: OurTokenizer) -> None:
    """Compare on texts that tend to differ, and on random ones made of the vocabulary's pieces and of characters.

    Raises:
        ValueError: a text is encoded otherwise, or does not come back.
    """
    generator = random.Random(0)
    pieces = [ours.decode([index]) for index in range(ours.vocab_size)]
    texts = list(_TEXTS)
    for _ in range(200):
        texts.append("".join(generator.choices(pieces, k=generator.randrange(1, 60))))
        texts.append(
            "".join(chr(generator.choice([32, 32, 97, 10, 0xE9, 0x4E2D, 0x1F600])) for _ in range(40))
        )
    for text in texts:
        expected, found = ours.encode(text), fast.encode(text)
        if found != expected:
            raise ValueError(
                f"the exported tokenizer encodes {text!r} as {found}, but {ours.path} as {expected}; its model cannot "
                "be written as merges"
            )
        if fast.decode(found) != text:
            raise ValueError(f"the exported tokenizer turns {text!r} into {fast.decode(found)!r}")
