"""Which samples a person would want to read: the filters of the R1 pipeline, as pure functions.

DeepSeek-R1 (arXiv 2501.12948 v2, B.3.2 and section 3) keeps right answers that are readable: no
repetition, no mixed languages, and, for rejection sampling, no long paragraphs and no code blocks
in the thought. It states no limits; those here are options. Every function takes time linear in the
length of its text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex

from trainer.config import check_at_least
from trainer.monitors import language_share
from trainer.rewards.extraction import format_reward, thought
from trainer.rewards.penalties import repetition_penalty
from trainer.run_log import Sample
from trainer.templates import Template

REASONS = (
    *("wrong", "truncated", "format", "length", "repetition"),
    *("language", "paragraph", "code", "rule", "duplicate"),
)
"""Why a sample is dropped; of several reasons the first one counts."""
ReadableRule = Callable[[str, str], Any]
"""Tells of question and completion whether the task calls it readable."""
# Han and kana stand for words of their own; marks of punctuation count too.
_WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|\p{L}[\p{L}\p{M}\p{N}'’_-]*|\p{N}+|\S")
_PARAGRAPH_END = regex.compile(r"\n\s*\n")
_FENCE = regex.compile(r"^[ \t]*(?:```|~~~)", regex.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadabilityLimits:
    """What a readable sample keeps to; None lets everything pass."""

    least_consistency: float | None = 0.9
    """Share of the thought's words that are in the question's language, at least."""
    repetition_words: int = 6
    """Length of the n-grams whose repetition is counted, in words."""
    most_repetition: float | None = 0.3
    """Share of n-grams that occurred before in the completion, at most."""
    most_words: int | None = None
    """Words of a completion, at most."""
    most_paragraph_words: int | None = None
    """Words between two blank lines of the thought, at most."""
    code_blocks: bool = True
    """Whether fenced code may stand in the thought."""

    def __post_init__(self) -> None:
        check_at_least("repetition_words", self.repetition_words, 1)
        for name in ("most_words", "most_paragraph_words"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("least_consistency", "most_repetition"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a filter left of its samples."""

    kept: list[Sample]
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of samples by the reason they were dropped for, in the order of REASONS."""


def words_of(text: str) -> list[str]:
    """The words of a text; a character of Chinese or Japanese is one, as is a punctuation mark."""
    return _WORD.findall(text)


def repeated_share(text: str, ngram: int) -> float:
    """Share of a text's n-grams of words that occurred in it before, 0 to 1."""
    return abs(repetition_penalty(words_of(text), ngram=ngram))


def longest_paragraph(text: str) -> int:
    """Words of the longest stretch of text without a blank line."""
    return max(len(words_of(paragraph)) for paragraph in _PARAGRAPH_END.split(text))


def has_code_block(text: str) -> bool:
    """Whether a line opens a fenced block of code."""
    return _FENCE.search(text) is not None


def thought_consistency(question: str, completion: str, template: Template) -> float | None:
    """Share of the thought's words that are in the question's language, by script; English where
    the question has no words. None for a thought of too few words.

    Source: DeepSeek-R1, arXiv 2501.12948 v2, eq. 7.
    """
    return language_share(thought(completion, template), question)


def why_unreadable(
    question: str,
    completion: str,
    template: Template,
    limits: ReadabilityLimits,
    rule: ReadableRule | None = None,
) -> str | None:
    """The first of REASONS for which a completion is not readable, whatever its answer; None for
    one that is. A rule asks for something more."""
    if format_reward(completion, template) < 1:
        return "format"
    if limits.most_words is not None and len(words_of(completion)) > limits.most_words:
        return "length"
    repeated = limits.most_repetition
    if repeated is not None and repeated_share(completion, limits.repetition_words) > repeated:
        return "repetition"
    if limits.least_consistency is not None:
        consistency = thought_consistency(question, completion, template)
        if consistency is not None and consistency < limits.least_consistency:
            return "language"
    thoughts, longest = thought(completion, template), limits.most_paragraph_words
    if longest is not None and longest_paragraph(thoughts) > longest:
        return "paragraph"
    if not limits.code_blocks and has_code_block(thoughts):
        return "code"
    return None if rule is None or rule(question, completion) else "rule"


def select_readable(
    samples: Sequence[Sample],
    template: Template,
    limits: ReadabilityLimits,
    rule: ReadableRule | None = None,
) -> Selection:
    """The right and readable samples, in their order, each completion of a question once.

    Args:
        samples: of any number of questions.
        template: whose format they should be in.
        limits, rule: what is readable.
    """
    kept: list[Sample] = []
    dropped: Counter[str] = Counter()
    seen: dict[str, set[str]] = {}
    for sample in samples:
        texts = seen.setdefault(sample.question, set())
        reason = _why_dropped(sample, template, limits, rule)
        if reason is None and sample.completion in texts:
            reason = "duplicate"
        if reason is None:
            texts.add(sample.completion)
            kept.append(sample)
        else:
            dropped[reason] += 1
    return Selection(kept=kept, dropped={name: dropped[name] for name in REASONS if dropped[name]})


def _why_dropped(
    sample: Sample, template: Template, limits: ReadabilityLimits, rule: ReadableRule | None
) -> str | None:
    if sample.finish_reason == "length":
        return "truncated"
    if not sample.correct:
        return "wrong"
    return why_unreadable(sample.question, sample.completion, template, limits, rule)
