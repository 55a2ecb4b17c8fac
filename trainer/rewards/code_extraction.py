"""Reads the program out of a completion."""

from __future__ import annotations

import re

from trainer.rewards.code_tests import Language
from trainer.templates import THINK_CLOSE, THINK_OPEN, Template

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^`]*)")
_FENCE_NAMES: dict[Language, frozenset[str]] = {
    "python": frozenset(("", "python", "python3", "py", "py3")),
    "cpp": frozenset(("", "cpp", "c++", "cc", "cxx", "c++17", "c++20", "cpp17", "cpp20")),
}


def extract_code(completion: str, template: Template, language: Language = "python") -> str | None:
    """The content of the last complete fenced block after the thought, or None.

    The block's info string has to name the language or nothing: a last block in another language
    is no program, and the ones before it are not looked at. A thought that is still open holds no
    answer, and neither does a later turn. Takes time linear in the length of the completion.
    """
    marks = [at for mark in template.turn_marks if (at := completion.find(mark)) >= 0]
    turn = completion[: min(marks, default=len(completion))]
    thinks = template.opens_think or template.answer_in == "answer_tags" or THINK_OPEN in turn
    if thinks and THINK_CLOSE not in turn:
        return None
    answer = turn.rpartition(THINK_CLOSE)[2]
    if THINK_OPEN in answer:
        return None
    return _last_block(answer, _FENCE_NAMES[language])


def _last_block(text: str, names: frozenset[str]) -> str | None:
    fence, name = "", ""
    block: list[str] = []
    last: str | None = None
    for line in text.split("\n"):
        match = _FENCE.fullmatch(line.rstrip("\r"))
        if not fence:
            if match is not None:
                fence, block = match[1], []
                name = next(iter(match[2].split()), "").lower()
        elif match is not None and not match[2].strip() and match[1].startswith(fence):
            last = "\n".join(block) if name in names else None
            fence = ""
        else:
            block.append(line)
    return last
