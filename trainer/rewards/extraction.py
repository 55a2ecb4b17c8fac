"""Reads a completion: the final answer in it, and whether it keeps to the template's format.

Only completions come in here, never prompts, so tags or boxes inside a question have no effect.
Every function takes time linear in the length of its text and returns a value for any string.

Declared choices: `\\boxed 5` (no braces), `\\fbox{5}`, `\\\\boxed{5}` (a line break, then the
word) and `\\boxed{5\\}` (escaped brace, never closed) are not boxes; an empty thought or an empty
answer breaks the format; a turn with a NUL or a lone surrogate in it has no answer, and one with
U+FFFD, which stands for bytes that are no text, breaks the format.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from trainer.templates import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    Template,
    template_by_name,
)

_BRACE_OR_BOX = re.compile(r"\\boxed(?![A-Za-z])\s*\{|\\.|[{}]", re.DOTALL)
_SPECIAL_TOKEN = re.compile(r"<[|｜][^<>\s]{1,60}[|｜]>|</?s>|<(?:eos|bos|pad|end_of_turn)>")
_SPECIAL_TOKEN_MAX_CHARS = 64
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
_UNDECODABLE = re.compile("[\x00\ud800-\udfff\ufffd]")


class _Parts(NamedTuple):
    """A completion cut at its tags."""

    before: str
    thought: str
    rest: str


class _Box(NamedTuple):
    """Offsets of a complete box and of the content it stands for."""

    start: int
    end: int
    content_start: int
    content_end: int


def extract_boxed(text: str) -> str | None:
    """The content of the last complete, non-empty \\boxed{} after </think>.

    A box that encloses another counts as one, and `\\boxed{\\boxed{5}}` is read as 5. None when
    the last complete box is empty, when there is none, or when a thought is still open at the end
    of the text.
    """
    answer_part = text.rpartition(THINK_CLOSE)[2]
    if THINK_OPEN in answer_part:
        return None
    return _last_box(answer_part) or None


def extract_answer(completion: str, template: Template | str) -> str | None:
    """The final answer as the template, given as such or by name, wants it; None where there is
    none.

    With answer tags: the text of the only <answer> block, which must follow the only closed
    thought (two blocks are no answer, wherever they stand); a \\boxed{} inside is unwrapped.
    Otherwise the last complete \\boxed{} after the thought. Special-token text is stripped at the
    end of the answer only.
    """
    template = _named(template)
    turn = _first_turn(completion, template)
    parts = _split_thought(turn, template)
    if parts is None or _NO_TEXT.search(turn):
        return None
    if template.answer_in == "boxed":
        answer = extract_boxed(parts.rest)
    else:
        answer = _tagged_answer(turn, parts)
        if answer is not None and "\\boxed" in answer:
            answer = extract_boxed(answer) or answer
    if answer is None:
        return None
    return answer[: _end_without_special_tokens(answer)].strip() or None


def format_reward(completion: str, template: Template | str, *, needs_answer: bool = True) -> float:
    """1.0 when the completion keeps to the template's format, else 0.0.

    With answer tags: exactly one non-empty <think> block (its opening tag left out when the prompt
    holds it), then exactly one non-empty <answer> block, with nothing but white space and end
    tokens around them. With boxes: the thought, if there is one or the prompt opened it, is
    written the same way, and a complete, non-empty \\boxed{} follows it; where no answer is
    needed, the thought must be there, and any text after it will do.

    Source: DeepSeek-R1, arXiv 2501.12948, section 2.2 (format reward).
    """
    template = _named(template)
    turn = _first_turn(completion, template)
    turn = turn[: _end_without_special_tokens(turn)]
    parts = _split_thought(turn, template)
    if parts is None or not _is_blank(parts.before) or _UNDECODABLE.search(turn):
        return 0.0
    has_thought = template.opens_think or THINK_CLOSE in turn
    if has_thought and _is_blank(parts.thought):
        return 0.0
    if template.answer_in == "boxed":
        if not needs_answer:
            return float(has_thought and not _is_blank(parts.rest))
        return 1.0 if extract_boxed(parts.rest) is not None else 0.0
    answer = _tagged_answer(turn, parts)
    rest = parts.rest.strip()
    encloses_all = rest.startswith(ANSWER_OPEN) and rest.endswith(ANSWER_CLOSE)
    return 1.0 if answer is not None and not _is_blank(answer) and encloses_all else 0.0


def thought(completion: str, template: Template) -> str:
    """The first turn up to </think>; all of it where no thought is closed."""
    return _first_turn(completion, template).partition(THINK_CLOSE)[0]


def _named(template: Template | str) -> Template:
    return template_by_name(template) if isinstance(template, str) else template


def _first_turn(completion: str, template: Template) -> str:
    cuts = [at for mark in template.turn_marks if (at := completion.find(mark)) >= 0]
    return completion[: min(cuts)] if cuts else completion


def _split_thought(turn: str, template: Template) -> _Parts | None:
    """The text before, in and after the thought; None when it is missing, repeated or nested."""
    opened, closed = turn.count(THINK_OPEN), turn.count(THINK_CLOSE)
    if template.answer_in == "boxed" and not template.opens_think and opened == closed == 0:
        return _Parts("", "", turn)
    if closed != 1 or opened != (0 if template.opens_think else 1):
        return None
    head, _, rest = turn.partition(THINK_CLOSE)
    if template.opens_think:
        return _Parts("", head, rest)
    before, tag, thought = head.partition(THINK_OPEN)
    return _Parts(before, thought, rest) if tag else None


def _tagged_answer(turn: str, parts: _Parts) -> str | None:
    if turn.count(ANSWER_OPEN) != 1 or turn.count(ANSWER_CLOSE) != 1:
        return None
    head, _, tail = parts.rest.partition(ANSWER_OPEN)
    answer, close, _ = tail.partition(ANSWER_CLOSE)
    return answer if close and ANSWER_CLOSE not in head else None


def _last_box(text: str) -> str | None:
    """Content of the box that closes last; one that holds only a box has the content of that."""
    open_braces: list[tuple[int, int] | None] = []
    last: _Box | None = None
    for match in _BRACE_OR_BOX.finditer(text):
        piece = match.group()
        if piece == "{":
            open_braces.append(None)
        elif piece == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None:
                last = _closed_box(text, opened, match.start(), last)
        elif piece.startswith("\\boxed"):
            open_braces.append(match.span())
    return None if last is None else text[last.content_start : last.content_end].strip()


def _closed_box(text: str, opened: tuple[int, int], close: int, previous: _Box | None) -> _Box:
    # Only the white space next to the braces is scanned, so that deep nesting stays linear.
    start, content_start = opened
    if (
        previous is not None
        and _after_space(text, content_start) == previous.start
        and _after_space(text, previous.end) == close
    ):
        return _Box(start, close + 1, previous.content_start, previous.content_end)
    return _Box(start, close + 1, content_start, close)


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _end_without_special_tokens(text: str) -> int:
    """Length of the text without trailing white space and special tokens such as <|im_end|>."""
    end = len(text)
    while True:
        while end > 0 and text[end - 1].isspace():
            end -= 1
        start = text.rfind("<", max(0, end - _SPECIAL_TOKEN_MAX_CHARS), end)
        if start < 0 or _SPECIAL_TOKEN.fullmatch(text, start, end) is None:
            return end
        end = start


def _is_blank(text: str) -> bool:
    """Nothing visible: only white space and format characters such as a zero-width space."""
    return all(char.isspace() or unicodedata.category(char) == "Cf" for char in text)
