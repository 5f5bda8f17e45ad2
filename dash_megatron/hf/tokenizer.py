"""The tokenizer of a run as transformers loads it, and that of a folder as a run reads it."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dash_megatron.data.chat import (
    MARKED_PLAIN_TEMPLATE,
    PLAIN_TEMPLATE,
    TEMPLATE_FILE,
    ChatTemplate,
    template_beside,
)
from dash_megatron.data.json_tokenizer import SAME_DATA, TEMPLATE_BOS, read_settings
from dash_megatron.data.sentencepiece_model import SPACE_SYMBOL
from dash_megatron.data.tokenizer import Tokenizer as OurTokenizer
from dash_megatron.files import telling_errors_of_the_disk

logger = logging.getLogger(__name__)

# generated code, whose names no type checker sees
_format: Any = sentencepiece_model_pb2

# Texts on which tokenizers tend to differ.
_PROBE_TEXTS = (
    "", "a", " ", "  two  spaces ", "\t\n\n x\r\n", "    indented\n        more\n\n\n", "e\u0301 \u00e9 \uff21\ufb01",
    "1234567890 3.14", "</s><s><unk> <0x41> \u2581 \u2581\u2581x", "\u4f60\u597d \U0001f600\U0001f468\u200d\U0001f469", "\x00\x07\x7f",
    "def f(self, value):\n    return [value[i] for i in range(10)]\n",
)  # fmt: skip


# what lies beside a tokenizer.json
_BESIDE_JSON = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip


def export_tokenizer(
    ours: OurTokenizer, folder: Path, model: PreTrainedConfig, chat: ChatTemplate | None = None
) -> int:
    """Write the tokenizer of a run into a folder that has its config.json already.

    Args:
        ours: training's: of a sentencepiece model, of which a fast tokenizer is made, or of a tokenizer.json, which is copied
            with the files beside it, but for what it puts before texts.
        model: what config.json says; by its type transformers chooses a class where the tokenizer names none, and its length is
            that of `truncation=True`.
        chat: the template that the folder is to carry.

    Returns:
        The token that pads: what the tokenizer names, if training had it, or else the end of sequence.

    Raises:
        ValueError: transformers cannot load the result, or it does not encode as in training.
    """
    source = ours.path
    writes_bos = chat is not None and "bos_token" in chat.text
    if source.suffix == ".json":
        _copy_json(source, folder)
        if chat is None and (copied := template_beside(source)) is not None:
            writes_bos = "bos_token" in copied[0]
        if Tokenizer.from_file(str(source)).num_special_tokens_to_add(is_pair=False):
            _add_nothing(folder, ours)
        begin = ours.special_tokens_map.get("bos_token")
        if not writes_bos:
            # as below: nothing is to begin texts with what was never trained; a template that writes it needs its name
            kept = {} if begin is None else {TEMPLATE_BOS: begin}
            _name(folder, "bos_token", ours.special_tokens_map["eos_token"], **kept)
        elif begin is not None:
            _name(folder, "bos_token", begin)
    else:
        with telling_errors_of_the_disk(folder):
            build_tokenizer(source, begins=writes_bos).save_pretrained(folder)
        shutil.copyfile(source, folder / "tokenizer.model")
    # in place of the limit of the model that a tokenizer.json came from
    settings = folder / "tokenizer_config.json"
    _write(settings, {**read_settings(settings), "model_max_length": model.max_position_embeddings})
    if chat is not None:
        # read before a template in tokenizer_config.json
        text = MARKED_PLAIN_TEMPLATE if chat.text == PLAIN_TEMPLATE else chat.text
        (folder / TEMPLATE_FILE).write_text(text, encoding="utf-8")
    if source.suffix == ".json" or chat is not None:
        exported = _load(folder, source, model)
        check_tokenizer(exported, ours)
        if chat is not None:
            check_chat(exported, chat)
        # a name that tokenizer.json does not have becomes a token behind all others, which the model has no row for
        if exported.pad_token_id is not None and exported.pad_token_id < ours.vocab_size:
            return int(exported.pad_token_id)
        # in front, as texts that go on need it
        _name(folder, "pad_token", exported.eos_token, padding_side="left")
    return ours.eod


def _add_nothing(folder: Path, ours: OurTokenizer) -> None:
    """Let a tokenizer.json put no token, such as bos, before a text by itself: training read none."""
    path = folder / "tokenizer.json"
    _write(path, {**read_settings(path), "post_processor": None})
    settings = folder / "tokenizer_config.json"
    same = {OurTokenizer(path).fingerprint: ours.fingerprint}
    _write(settings, {**read_settings(settings), SAME_DATA: same})


def _name(folder: Path, role: str, token: str, **defaults: str) -> None:
    """Name a special token, and set what is not set yet beside it."""
    path = folder / "tokenizer_config.json"
    # special_tokens_map.json alone may name the end of sequence
    _write(path, {**defaults, **read_settings(path), role: token})
    # where both files name it, special_tokens_map.json counts
    path = folder / "special_tokens_map.json"
    if path.is_file():
        _write(path, {**read_settings(path), role: token})


def _write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _load(folder: Path, source: Path, model: PreTrainedConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, config=model)
    except Exception as error:  # what it raises depends on which key is wrong
        raise ValueError(
            f"transformers cannot load data.tokenizer={source} with the files beside it ({type(error).__name__}: {error}); correct "
            "tokenizer_config.json there, from which training read only the names of special tokens, and export again"
        ) from error
    return tokenizer


def import_tokenizer(source: Path, folder: Path) -> str | None:
    """Copy what data can be tokenized with, chat template included, and give the name of the file for `data.tokenizer`.

    None where the source has no tokenizer, or one that training refuses, for a reason that is logged.
    """
    found: dict[str, OurTokenizer] = {}
    for name in ("tokenizer.model", "tokenizer.json"):
        if (source / name).is_file():
            try:
                found[name] = OurTokenizer(source / name)
            except ValueError as error:
                logger.warning("%s is left out: %s", source / name, error)
    if not found:
        return None
    template = template_beside(source / "tokenizer")
    # tokens that were added to a sentencepiece model, such as those that end turns, are in the other file alone
    name = max(found, key=lambda name: len(found[name].special)) if template else next(iter(found))
    if name == "tokenizer.json":
        _copy_json(source / name, folder)
    else:
        shutil.copyfile(source / name, folder / name)
        if template:
            (folder / TEMPLATE_FILE).write_text(template[0], encoding="utf-8")
    return name


def _copy_json(source: Path, folder: Path) -> None:
    shutil.copyfile(source, folder / "tokenizer.json")
    for name in _BESIDE_JSON:
        if (source.parent / name).is_file():
            shutil.copyfile(source.parent / name, folder / name)


def check_chat(fast: PreTrainedTokenizerBase, chat: ChatTemplate) -> None:
    """Compare how a question is rendered and encoded.

    Raises:
        ValueError: `apply_chat_template` gives other tokens than training read.
    """
    messages = [{"role": "user", "content": "Two  lines,\n and an end."}]
    expected = chat.encode_question(messages)
    found = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if found != expected:
        raise ValueError(f"the exported tokenizer renders a question as {found}, but training as {expected}")


def build_tokenizer(path: str | Path, begins: bool = False) -> PreTrainedTokenizerFast:
    """Make a fast tokenizer from a sentencepiece BPE model with byte fallback.

    Pieces are kept with real spaces where sentencepiece writes U+2581, so that a U+2581 of the text is spelt in bytes,
    as in training. Names of control tokens inside a text are these tokens, unlike in training: templates write them, and trainers
    end texts with the name of the end of sequence.

    Args:
        path: the model.
        begins: whether a template writes the model's bos, so that the tokenizer is to name it.

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
    fast = _wrap(proto, ours, begins)
    check_tokenizer(fast, ours)
    return fast


def _wrap(proto: Any, ours: OurTokenizer, begins: bool) -> PreTrainedTokenizerFast:
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
    steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if ours.has_prefix:
        tokenizer.normalizer = normalizers.Prepend(" ")
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    names = {index: text for text, index in vocabulary.items()}
    end = names[ours.eod]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=names[proto.trainer_spec.unk_id],
        # no document begins with a bos that no template writes, and lm-eval would begin texts with what was never trained
        bos_token=names.get(ours.bos, end) if begins else end,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
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


def check_tokenizer(fast: PreTrainedTokenizerBase, ours: OurTokenizer) -> None:
    """Compare on texts that tend to differ, and on random ones made of the vocabulary's pieces and of characters.

    Raises:
        ValueError: a text is encoded or decoded otherwise, or the end of sequence is another.
    """
    generator = random.Random(0)
    pieces = [" ", *(ours.decode([index]) for index in range(ours.vocab_size))]
    texts = list(_PROBE_TEXTS)
    for _ in range(200):
        texts.append("".join(generator.choices(pieces, k=generator.randrange(1, 60))))
        texts.append(
            "".join(chr(generator.choice([32, 32, 97, 10, 0xE9, 0x4E2D, 0x1F600])) for _ in range(40))
        )
    for text in texts:
        expected = ours.encode(text)
        found = fast.encode(text, add_special_tokens=False, split_special_tokens=True)
        if found != expected:
            raise ValueError(
                f"the exported tokenizer encodes {text!r} as {found}, but {ours.path} as {expected}: transformers does "
                "not read the model as training does"
            )
        shown = fast.decode(found, skip_special_tokens=True)
        if shown != ours.decode(expected):
            raise ValueError(
                f"the exported tokenizer decodes {text!r} as {shown!r}, but {ours.path} as {ours.decode(expected)!r}"
            )
    if fast.eos_token_id != ours.eod:
        raise ValueError(
            f"the exported tokenizer ends texts with {fast.eos_token_id}, but {ours.path} with {ours.eod}"
        )
