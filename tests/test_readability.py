"""The filters of the R1 pipeline, on texts made by hand."""

from dataclasses import replace

import pytest

from trainer.readability import (
    REASONS,
    ReadabilityLimits,
    has_code_block,
    longest_paragraph,
    repeated_share,
    select_readable,
    thought_consistency,
    why_unreadable,
    words_of,
)
from trainer.run_log import Sample
from trainer.templates import template_by_name

R1 = template_by_name("r1")
LIMITS = ReadabilityLimits(
    most_words=60, most_paragraph_words=20, code_blocks=False, repetition_words=4
)
THOUGHT = "I add two and three, which is five, and five is less than nine."
GOOD = f"<think> {THOUGHT} </think> <answer> 5 </answer>"
SAMPLE = Sample(
    problem_id="1",
    question="What is two plus three?",
    answer="5",
    prompt="",
    completion=GOOD,
    extracted="5",
    status="ok",
    reward=1.0,
    parts={},
    correct=True,
    length=20,
    finish_reason="stop",
    mean_logprob=None,
)


def unreadable(thought: str, question: str = SAMPLE.question) -> str | None:
    completion = f"<think> {thought} </think> <answer> 5 </answer>"
    return why_unreadable(question, completion, R1, LIMITS)


def test_words_of_chinese_are_characters_and_those_of_english_are_written_apart() -> None:
    assert words_of("So 2 plus three, isn't it?") == ["So", "2", "plus", "three", ",", "isn't"] + [
        "it",
        "?",
    ]
    assert words_of("所以 是 12") == ["所", "以", "是", "12"]


def test_repeated_share_counts_ngrams_that_occurred_before() -> None:
    # Of the 3-grams abc bca cab abc bca, the last two occurred before.
    assert repeated_share("a b c a b c a", 3) == pytest.approx(2 / 5)
    assert repeated_share("a b c d e f g", 3) == 0
    assert repeated_share("一 二 一 二 一 二", 2) == pytest.approx(3 / 5)


def test_longest_paragraph_ends_at_a_blank_line_alone() -> None:
    assert longest_paragraph("one two\nthree\n\nfour") == 3
    assert longest_paragraph("one\n \t\ntwo three") == 2
    assert longest_paragraph("") == 0


@pytest.mark.parametrize(
    ("text", "is_code"),
    [
        ("so\n```python\nx = 1\n```", True),
        ("  ~~~\nx\n~~~", True),
        ("we write `x` in a line", False),
        ("a ``` within a line", False),
    ],
)
def test_code_block_is_a_fence_at_the_start_of_a_line(text: str, is_code: bool) -> None:
    assert has_code_block(text) is is_code


def test_thought_is_measured_in_the_language_of_the_question() -> None:
    thought = "<think> 我们 先 加 二 和 三 然后 检查 </think> <answer> 5 </answer>"
    assert thought_consistency("二加三是多少？", thought, R1) == 1
    assert thought_consistency(SAMPLE.question, thought, R1) == 0
    # What follows the thought is not part of it.
    assert thought_consistency(SAMPLE.question, f"{GOOD} 我们先加二和三然后检查", R1) == 1
    assert thought_consistency(SAMPLE.question, "<think> 5 </think> 5", R1) is None


@pytest.mark.parametrize(
    ("thought", "reason"),
    [
        (THOUGHT, None),
        ("yes", None),
        ("word " * 61, "length"),
        ("no, it is five. " * 5, "repetition"),
        ("I add two and three, 然后我们检查这个答案是否正确，是五", "language"),
        (" ".join(f"word{number} plain{'x' * number}" for number in range(12)), "paragraph"),
        (f"{THOUGHT}\n\n```\nprint(5)\n```", "code"),
    ],
)
def test_completion_is_unreadable_for_one_reason(thought: str, reason: str | None) -> None:
    assert unreadable(thought) == reason


def test_format_comes_before_all_other_reasons_and_a_rule_after_them() -> None:
    assert why_unreadable("?", "no tags at all", R1, LIMITS) == "format"
    refuse = why_unreadable(SAMPLE.question, GOOD, R1, LIMITS, lambda question, text: False)
    assert refuse == "rule"


def test_every_limit_can_be_left_out() -> None:
    anything = ReadabilityLimits(least_consistency=None, most_repetition=None)
    for thought in ("wort " * 500, "然后我们检查这个答案是否正确", "```\nx\n```"):
        completion = f"<think>\n{thought}\n</think> <answer> 5 </answer>"
        assert why_unreadable(SAMPLE.question, completion, R1, anything) is None


def test_selection_counts_what_it_drops_and_keeps_the_order() -> None:
    other = GOOD.replace("less than nine", "more than four")
    samples = [
        SAMPLE,
        replace(SAMPLE, correct=False),
        replace(SAMPLE, correct=False, finish_reason="length"),
        replace(SAMPLE, completion="5"),
        SAMPLE,
        replace(SAMPLE, completion=other),
        replace(SAMPLE, question="What is three plus two?"),
    ]
    chosen = select_readable(samples, R1, LIMITS)
    assert chosen.kept == [samples[0], samples[5], samples[6]]
    expected = {"wrong": 1, "truncated": 1, "format": 1, "duplicate": 1}
    assert chosen.dropped == expected
    assert set(chosen.dropped) <= set(REASONS)
    assert len(chosen.kept) + sum(chosen.dropped.values()) == len(samples)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"least_consistency": 1.5}, "least_consistency: expected a share from 0 to 1, got 1.5"),
        ({"most_words": -1}, "most_words: expected a number >= 0"),
        ({"repetition_words": 0}, "repetition_words: expected a number >= 1"),
    ],
)
def test_limit_that_makes_no_sense_is_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReadabilityLimits(**changed)  # type: ignore[arg-type]
