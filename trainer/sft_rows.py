"""Rows of a data set for supervised fine-tuning, as the texts that are tokenized.

A row is prompt and completion, or a question from which the template makes the prompt, or a
conversation, of which each turn of the assistant is a completion of its own: what came before it is
its prompt, written as the model would see it. So a loss on completions is a loss on the assistant's
turns alone, also with chat templates that write earlier turns differently from the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainer.config import UsageError
from trainer.data_records import DataError, RecordContent, kind_of, text_of
from trainer.templates import THINK_OPEN, Template

Message = dict[str, Any]
# Stands for an answer where a chat template is asked what it writes after one.
PROBE = "onepass-probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A prompt and what is to be learned after it."""

    prompt: str
    is_chat: bool
    """A chat template wrote the prompt, with its special tokens."""
    completion: str
    place: str
    """Of its row, for messages."""


class RowReader:
    """Makes exchanges of rows.

    Args:
        template: for rows with a question.
        tokenizer: its chat template writes lists of messages.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template, self.tokenizer = template, tokenizer

    def __call__(self, record: object, place: str) -> list[Exchange]:
        """The exchanges of a row, at least one.

        Raises:
            DataError: it has other columns, or something else in them.
        """
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected an object with columns, got {kind_of(record)}")
        columns = {name for name, value in record.items() if value is not None}
        if "messages" in columns:
            return self._of_messages(_messages(record, "messages", place), place)
        if {"prompt", "completion"} <= columns:
            return [self._of_prompt(record, place)]
        if {"question", "completion"} <= columns:
            return [self._of_question(record, place)]
        raise DataError(
            f"{place}: expected the columns prompt and completion, question and completion, or "
            f"messages, got {', '.join(sorted(columns)) or 'none'}"
        )

    def _of_messages(self, messages: Sequence[Message], place: str) -> list[Exchange]:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise DataError(
                f"{place}: expected a turn of the assistant after one of another role in column "
                f"'messages', got the roles {', '.join(each['role'] for each in messages)}"
            )
        return [self._after_messages(messages[:i], messages[i]["content"], place) for i in turns]

    def _of_prompt(self, record: RecordContent, place: str) -> Exchange:
        completion = _completion(record, place)
        if isinstance(record["prompt"], list):
            messages = _messages(record, "prompt", place)
            if messages[-1]["role"] == "assistant":
                raise DataError(
                    f"{place}: expected a prompt that ends with a turn of another role, got one "
                    f"of the assistant"
                )
            return self._after_messages(messages, completion, place)
        prompt = _text(record["prompt"], "prompt", place)
        return Exchange(prompt=prompt, is_chat=False, completion=completion, place=place)

    def _of_question(self, record: RecordContent, place: str) -> Exchange:
        question, completion = text_of(record, "question", place), _completion(record, place)
        try:
            prompt = self.template.prompt(_text(question, "question", place), self.tokenizer)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        return Exchange(
            prompt=prompt,
            is_chat=self.template.text is None,
            completion=_without_second_think(prompt, completion),
            place=place,
        )

    def _after_messages(self, messages: Sequence[Message], completion: str, place: str) -> Exchange:
        prompt = chat_text(self.tokenizer, messages, place, add_generation_prompt=True)
        return Exchange(
            prompt=prompt,
            is_chat=True,
            completion=_without_second_think(prompt, completion),
            place=place,
        )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the chat template ends a turn of the assistant; without a chat template,
    or where that ends it with none, the tokenizer's end token.

    Raises:
        UsageError: the tokenizer has none.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        text = chat_text(tokenizer, messages, "--model", add_generation_prompt=False)
        after = tokenizer.encode(text.rpartition(PROBE)[2], add_special_tokens=False)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends = [token_id for token_id in after if token_id in special]
        if ends:
            return ends[0]
    return end_token(tokenizer)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's end token.

    Raises:
        UsageError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError("--model: expected a tokenizer with an end token, got one without")
    return int(tokenizer.eos_token_id)


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    place: str,
    *,
    add_generation_prompt: bool,
) -> str:
    """The text that the chat template makes of messages.

    Raises:
        UsageError: there is no chat template.
        DataError: it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            f"{place}: chat messages need a model whose tokenizer has a chat template, got "
            f"{tokenizer.name_or_path or 'one without'}"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise DataError(f"{place}: the chat template refuses the messages ({error})") from error
    assert isinstance(text, str)
    return text


def _completion(record: RecordContent, place: str) -> str:
    if not isinstance(record["completion"], list):
        return _text(record["completion"], "completion", place)
    messages = _messages(record, "completion", place)
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise DataError(
            f"{place}: expected one turn of the assistant in column 'completion', got the roles "
            f"{', '.join(roles)}"
        )
    return str(messages[0]["content"])


def _messages(record: RecordContent, column: str, place: str) -> list[Message]:
    messages = record[column]
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{place}: expected a list of messages in column {column!r}, got {kind_of(messages)}"
        )
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{place}: expected messages with role and content in column {column!r}, got "
                f"{kind_of(message)}"
            )
        _text(message.get("content"), f"{column}: content", place)
    # A parquet file has every field in every message.
    return [{name: value for name, value in each.items() if value is not None} for each in messages]


def _text(value: object, column: str, place: str) -> str:
    """A text as it is, spaces around it included."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{place}: expected a non-empty text in column {column!r}, got {kind_of(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: expected Unicode text in column {column!r}, got half a surrogate pair at "
            f"character {error.start + 1}"
        ) from error
    return value


def _without_second_think(prompt: str, completion: str) -> str:
    """A completion that begins with the <think> that its prompt ends in goes without it."""
    bare = completion.lstrip()
    if prompt.rstrip().endswith(THINK_OPEN) and bare.startswith(THINK_OPEN):
        return bare.removeprefix(THINK_OPEN)
    return completion
