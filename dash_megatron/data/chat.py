"""Conversations as tokens: what a chat template renders, and which of its tokens are answers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dash_megatron.data.json_tokenizer import read_settings
from dash_megatron.data.tokenizer import Tokenizer
from dash_megatron.files import path_for_message

TEMPLATE_FILE = "chat_template.jinja"
"""Beside a tokenizer, in an exported folder and in the folder of a run that learnt conversations: the chat template."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + '\\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{{ '### Assistant\\n' if add_generation_prompt }}"
)
"""For tokenizers that come without a template: roles are headings, and the end of sequence ends each answer."""

MARKED_PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{{ '### Assistant\\n' if add_generation_prompt }}"
)
"""What exports have for `PLAIN_TEMPLATE`: it renders the same, and marks answers for trainers that learn them alone."""

ANSWER_ROLE = "assistant"
"""The role whose messages are learnt."""

Messages = Sequence[Mapping[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER_TEMPLATE = (
    "give a template that ends every answer alike, or split the conversation into ones of one answer"
)
# what every template must be able to render; it shows which token ends a turn
_EXAMPLE: Messages = ({"role": "user", "content": "Hello."}, {"role": ANSWER_ROLE, "content": "Good day."})


class Encoded(NamedTuple):
    """A document whose answers alone are learnt."""

    ids: list[int]
    answers: list[bool]
    """Which of the tokens belong to an answer, its end included."""


class ChatTemplate:
    """A chat template with the tokenizer that reads what it renders.

    Args:
        text: the template, in Jinja as transformers takes it.
        tokenizer: of the run.
        source: names the template in errors.

    Raises:
        ValueError: the template cannot render a question and its answer, or ends an answer with no special token.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, source: str = "the chat template") -> None:
        self.text = text
        self.tokenizer = tokenizer
        names = sorted(tokenizer.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        try:
            whole, spans = self._find_answers(_EXAMPLE)
            self.turn_end: int = tokenizer.special[self._special.findall(whole[: spans[-1][1]])[-1]]
            """The special token that ends an answer, at which generation stops."""
        except ValueError as error:
            raise ValueError(
                f"{source} must render a question and an answer that a special token of {tokenizer.path} ends, but {error}; "
                "give another template with --chat-template"
            ) from error

    def encode(self, messages: Messages) -> Encoded:
        """Encode a conversation up to its last answer, and mark the answers.

        Each answer runs from where generation would begin to the special token that ends the turn. Question and answer are
        encoded apart, as they are when the model is asked. The end of sequence follows, if it is not that token.

        Args:
            messages: each has `role` and `content`.

        Raises:
            ValueError: there is no answer or an empty one, a text has the name of a special token, or the template cannot
                render the conversation, or renders its beginning otherwise when more follows.
        """
        for number, message in enumerate(messages, 1):
            if found := self._special.search(message["content"]):
                raise ValueError(
                    f"message {number} has the text {found.group()!r}, which is the name of a special token and would be read as one"
                )
            if message["role"] == ANSWER_ROLE and not message["content"].strip():
                raise ValueError(f"message {number} is an empty answer")
        whole, spans = self._find_answers(messages)
        ids: list[int] = []
        answers: list[bool] = []
        place = 0
        for start, end in spans:
            for first, last, learnt in ((place, start, False), (start, end, True)):
                part = self._encode_part(whole, first, last)
                ids += part
                answers += [learnt] * len(part)
            if ids[-1] != self.turn_end:
                raise ValueError(
                    f"the template ends the answer {whole[start:end]!r} otherwise than others; {_OTHER_TEMPLATE}"
                )
            place = end
        return _ended(ids, answers, self.tokenizer.eod, learn_end=False)

    def encode_question(self, messages: Messages) -> list[int]:
        """Encode a conversation that waits for an answer.

        Raises:
            ValueError: the template cannot render it.
        """
        return self.tokenizer.encode_rendered(self._render(messages, ask=True)[0])

    def _encode_part(self, whole: str, first: int, last: int) -> list[int]:
        """Encode whole[first:last] as what stands behind whole[:first]."""
        before = [name for name in self.tokenizer.special if whole.endswith(name, 0, first)]
        if not before:
            return self.tokenizer.encode_rendered(whole[first:last], continues=first > 0)
        # some tokenizers put a space behind a special token
        return self.tokenizer.encode_rendered(max(before, key=len) + whole[first:last])[1:]

    def _find_answers(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """What the template renders, and where in it the answers are, each with the special token that ends it."""
        whole, spans = self._render(messages)
        if not _GENERATION.search(self.text):
            spans = self._spans_by_prefix(messages, whole)
        if not spans:
            raise ValueError(f"there is no message of role {ANSWER_ROLE!r} to learn")
        return whole, [(start, self._end_of_turn(whole, start, end)) for start, end in spans]

    def _spans_by_prefix(self, messages: Messages, whole: str) -> list[tuple[int, int]]:
        """Where in the rendered text the answers are, by what the template renders before each and up to each."""
        spans = []
        for number, message in enumerate(messages, 1):
            if message["role"] != ANSWER_ROLE:
                continue
            asked, _ = self._render(messages[: number - 1], ask=True)
            answered = whole if number == len(messages) else self._render(messages[:number])[0]
            if not (whole.startswith(answered) and answered.startswith(asked)):
                raise ValueError(self._why_not_prefixes(number, asked, answered, whole))
            spans.append((len(asked), len(answered)))
        return spans

    def _why_not_prefixes(self, number: int, asked: str, answered: str, whole: str) -> str:
        """What the template does to an answer, counted from 1, so that these three do not begin alike."""
        *_, end = [0, *(found.start() for found in self._special.finditer(answered))]
        if answered[:end].startswith(asked) and whole.startswith(answered[:end]):
            return (
                f"the template ends answer {number} with {answered[end:].strip()!r} only where no message follows, so that "
                f"nothing would teach a model to stop there; {_OTHER_TEMPLATE}"
            )
        return (
            f"the template renders what stands before or in answer {number} otherwise when more messages follow, so that no row "
            "could hold what is asked later; split the conversation into ones of one answer, or give a template that marks "
            "answers with {% generation %}"
        )

    def _end_of_turn(self, whole: str, start: int, end: int) -> int:
        """End of the special token that closes the answer whole[start:end]: its last token, white space aside, or the next."""
        last = max((found.end() for found in self._special.finditer(whole, start, end)), default=None)
        if last is not None and not whole[last:end].strip():
            return last
        if (behind := self._special.match(whole, end)) is not None:
            return behind.end()
        raise ValueError(f"the template ends the answer {whole[start:end]!r} with no special token")

    def _render(self, messages: Messages, ask: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and the places that `{% generation %}` marks."""
        # imported late: not every tool that tokenizes needs it
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        try:
            (text,), spans = render(
                [[dict(message) for message in messages]],
                chat_template=self.text,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=bool(_GENERATION.search(self.text)),
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # whatever a template raises
            raise ValueError(f"the template does not render it ({error})") from error
        return text, spans[0] if spans else []


def encode_pair(prompt: str, completion: str, tokenizer: Tokenizer) -> Encoded:
    """Encode a text and its continuation, which is learnt together with the end of sequence behind it.

    Names of special tokens in them are plain text.

    Raises:
        ValueError: one of them is empty.
    """
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not text.strip():
            raise ValueError(f"{name!r} is empty")
    asked, answer = tokenizer.encode(prompt), tokenizer.encode(completion, continues=True)
    return _ended(asked + answer, [False] * len(asked) + [True] * len(answer), tokenizer.eod, learn_end=True)


def _ended(ids: list[int], answers: list[bool], eod: int, *, learn_end: bool) -> Encoded:
    if ids[-1] == eod:
        return Encoded(ids, answers)
    return Encoded([*ids, eod], [*answers, learn_end])


def read_template(
    tokenizer: str | os.PathLike[str], file: str | os.PathLike[str] | None = None
) -> tuple[str, str]:
    """The chat template of a file, else the one that came with the tokenizer, else `PLAIN_TEMPLATE`; and where it is from.

    Args:
        tokenizer: path of the tokenizer, beside which `chat_template.jinja` or `tokenizer_config.json` may hold one.
        file: a template.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `tokenizer_config.json` is damaged.
    """
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"--chat-template={path_for_message(path)} does not exist")
        return path.read_text(encoding="utf-8"), str(path)
    found = template_beside(tokenizer)
    return found if found is not None else (PLAIN_TEMPLATE, "the plain chat template")


def template_of_run(run_dir: str | os.PathLike[str], tokenizer: str | os.PathLike[str]) -> str | None:
    """The chat template that a run learnt with, else the one that came with its tokenizer; None where there is neither.

    Raises:
        ValueError: as in `read_template`.
    """
    path = Path(run_dir) / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = template_beside(tokenizer)
    return None if found is None else found[0]


def template_beside(tokenizer: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The chat template that came with a tokenizer and the file it is in, or None; errors as in `read_template`."""
    path = Path(tokenizer).parent / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    path = path.with_name("tokenizer_config.json")
    template = read_settings(path).get("chat_template")
    if isinstance(template, list):  # several by name
        default = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = default[0].get("template") if default else None
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{path}, beside the tokenizer, has chat_template={template!r}, which must be text, or a list of mappings with `name` "
            "and `template`; correct it, or take it out"
        )
    return None if template is None else (template, str(path))
