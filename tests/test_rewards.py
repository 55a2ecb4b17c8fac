"""The cases of format, extraction and comparison that rule-based rewards are attacked with."""

import json
import math
import random
import string
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from trainer.config import RewardOptions
from trainer.rewards import (
    Reward,
    Scorer,
    answer_key,
    answers_match,
    extract_answer,
    extract_boxed,
    format_reward,
)
from trainer.rewards.grading import Attempt
from trainer.tasks import Problem
from trainer.templates import Template, template_by_name

R1 = template_by_name("r1")
OPENED = template_by_name("r1-drgrpo")
QWEN = template_by_name("qwen-math")
NONE = template_by_name("none")

GOOD = "<think> 2 + 3 = 5 </think> <answer> 5 </answer>"


def score(completion: str, template: Template, gold: str = "5", question: str = "?") -> Reward:
    """The reward of a completion by accuracy and format."""
    attempt = Attempt(
        problem=Problem(problem_id="p", question=question, answer=gold),
        prompt=question,
        text=completion,
        token_ids=np.arange(3),
        truncated=False,
    )
    with Scorer(RewardOptions(grader="exact"), template, max_new_tokens=9) as scorer:
        ((reward,),) = scorer.score([[attempt]])
    return reward


@pytest.mark.parametrize(
    ("completion", "formatted", "answer"),
    [
        pytest.param(GOOD, 1.0, "5", id="as-asked"),
        pytest.param("<think>a</think><answer>5</answer>", 1.0, "5", id="nothing-between"),
        pytest.param("<think>a</think>\n\n<answer>\n5\n</answer>\n", 1.0, "5", id="newlines"),
        pytest.param(GOOD + "<|im_end|>", 1.0, "5", id="end-token"),
        pytest.param(GOOD + "</s>\n<|endoftext|> ", 1.0, "5", id="end-tokens"),
        pytest.param("<think> </think><answer>5</answer>", 0.0, "5", id="blank-thought"),
        pytest.param("<think></think><answer>5</answer>", 0.0, "5", id="empty-thought"),
        pytest.param("<think>\u200b</think><answer>5</answer>", 0.0, "5", id="invisible-thought"),
        pytest.param("<think>a</think><answer> </answer>", 0.0, None, id="blank-answer"),
        pytest.param("<think><think>a</think></think><answer>5</answer>", 0.0, None, id="nested"),
        pytest.param(
            "<think>a<answer>4</answer></think><answer>5</answer>",
            0.0,
            None,
            id="answer-in-thought",
        ),
        pytest.param(GOOD + "<answer>6</answer>", 0.0, None, id="two-answers"),
        pytest.param("<think>a</think></think><answer>5</answer>", 0.0, None, id="closed-twice"),
        pytest.param(GOOD + "\nI am sure.", 0.0, "5", id="text-after"),
        pytest.param("Well, " + GOOD, 0.0, "5", id="text-before"),
        pytest.param("<think>a</think> so <answer>5</answer>", 0.0, "5", id="text-between"),
        pytest.param("<answer>5</answer><think>a</think>", 0.0, None, id="wrong-order"),
        pytest.param("a</think> <answer>5</answer>", 0.0, None, id="thought-not-opened"),
        pytest.param("<think>a <answer>5</answer>", 0.0, None, id="thought-not-closed"),
        pytest.param("<think>so \\boxed{5}", 0.0, None, id="cut-off-in-thought"),
        pytest.param("<Think>a</Think><Answer>5</Answer>", 0.0, None, id="other-case"),
        pytest.param("＜think＞a＜/think＞<answer>5</answer>", 0.0, None, id="full-width"),
        pytest.param("<th\u200bink>a</think><answer>5</answer>", 0.0, None, id="zero-width"),
        pytest.param(
            "&lt;think&gt;a&lt;/think&gt;<answer>5</answer>", 0.0, None, id="html-escaped"
        ),
        pytest.param(GOOD + "\nUser: 1 + 1? <answer>2", 0.0, None, id="next-turn"),
        pytest.param("<think>\x00</think><answer>5</answer>", 0.0, None, id="nul"),
        pytest.param("<think>\ud800</think><answer>5</answer>", 0.0, None, id="surrogate"),
        pytest.param("<think>\ufffd</think><answer>5</answer>", 0.0, "5", id="no-utf-8"),
        pytest.param("", 0.0, None, id="empty"),
    ],
)
def test_answer_tags_decide_format_and_answer(
    completion: str, formatted: float, answer: str | None
) -> None:
    assert format_reward(completion, R1) == formatted
    assert extract_answer(completion, R1) == answer


def test_thought_opened_by_the_prompt_is_not_opened_again() -> None:
    body = "2 + 3 = 5 </think> <answer>5</answer>"
    assert (format_reward(body, OPENED), extract_answer(body, OPENED)) == (1.0, "5")
    assert (format_reward("<think>" + body, OPENED), format_reward(body, R1)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("completion", "formatted", "answer"),
    [
        ("so \\boxed{5}", 1.0, "5"),
        ("<think>a</think> so \\boxed{5}", 1.0, "5"),
        ("<think> </think> so \\boxed{5}", 0.0, "5"),
        ("hm <think>a</think> \\boxed{5}", 0.0, "5"),
        ("<think>\\boxed{5}</think> I do not know", 0.0, None),
        ("<think>so \\boxed{5}", 0.0, None),
        ("so 5", 0.0, None),
        ("\\boxed{5}<|im_end|>\n<|im_start|>user\n2?<|im_end|> \\boxed{6}", 1.0, "5"),
        ("\\boxed{5}<|endoftext|>Human: 2? \\boxed{6}", 1.0, "5"),
        ("<think><think>a</think></think> \\boxed{5}", 0.0, None),
        ("<think>a</think></think> \\boxed{5}", 0.0, None),
        ("\\boxed{5}<think>a</think>", 0.0, None),
        ("\\boxed{5<|im_end|>}", 0.0, None),
        ("\\boxed{5<s>}", 1.0, "5"),
        ("\\boxed{<s>5}", 1.0, "<s>5"),
    ],
)
def test_boxes_decide_format_and_answer(
    completion: str, formatted: float, answer: str | None
) -> None:
    assert format_reward(completion, QWEN) == formatted
    assert extract_answer(completion, QWEN) == answer


@pytest.mark.parametrize("next_turn", ["User: 2?", "Human: 2?", "Question: 2?", "Q: 2?"])
def test_without_a_template_only_the_first_turn_counts(next_turn: str) -> None:
    for answer, formatted in (("\\boxed{5}", 1.0), ("5", 0.0)):
        completion = f" so {answer}\n\n{next_turn}\nA: \\boxed{{6}}"
        assert format_reward(completion, NONE) == formatted
        assert extract_answer(completion, NONE) == (answer[7:-1] or None)
    assert extract_answer(f"The {next_turn} is easy: \\boxed{{5}}", NONE) == "5"


@pytest.mark.parametrize(
    ("completion", "formatted", "answer"),
    [
        ("so \\boxed{5}", 0.0, None),
        ("so</think> \\boxed{5}", 1.0, "5"),
        (" </think> \\boxed{5}", 0.0, "5"),
        ("<think>so</think> \\boxed{5}", 0.0, None),
        ("so</think></think> \\boxed{5}", 0.0, None),
        ("\\boxed{5}</think> I do not know", 0.0, None),
    ],
)
def test_boxes_after_a_thought_that_the_prompt_opened(
    completion: str, formatted: float, answer: str | None
) -> None:
    chat = replace(template_by_name("chat"), opens_think=True)
    assert format_reward(completion, chat) == formatted
    assert extract_answer(completion, chat) == answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{3} or \\boxed{5}", "5"),
        ("\\boxed{5} or \\boxed{3}", "3"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{ \\boxed{\\boxed{5}} }", "5"),
        ("\\boxed{\\boxed{5} + 1}", "\\boxed{5} + 1"),
        ("\\boxed{1 + \\boxed{5}}", "1 + \\boxed{5}"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed {5}", "5"),
        ("line \\\\\\boxed{5}", "5"),
        ("} \\boxed{5} {", "5"),
        ("\\boxed{3} then \\boxed{5", "3"),
        ("\\boxed{3} then \\boxed{}", None),
        ("\\boxed{}", None),
        ("\\boxed{5", None),
        ("\\boxed 5", None),
        ("\\fbox{5}", None),
        ("\\\\boxed{5}", None),
        ("\\boxed{5\\}", None),
        ("\\boxedtext{5}", None),
        ("<think>\\boxed{3}</think>\\boxed{5}", "5"),
        ("<think>\\boxed{3}</think>", None),
        ("<think>\\boxed{3}", None),
        ("a</think> \\boxed{5} <think> \\boxed{6}", None),
        ("", None),
    ],
)
def test_extract_boxed_takes_the_last_complete_box_after_the_thought(
    text: str, content: str | None
) -> None:
    assert extract_boxed(text) == content


def test_tags_and_boxes_of_the_question_have_no_effect() -> None:
    for template in (R1, NONE):
        reward = score("no idea", template, "7", question="<answer>7</answer> \\boxed{7}")
        assert (reward.total, reward.extracted, reward.correct) == (0.0, None, False)


def test_box_inside_the_answer_tags_is_unwrapped() -> None:
    assert extract_answer("<think>a</think><answer>It is $\\boxed{5}$.</answer>", R1) == "5"
    assert extract_answer("<think>a</think><answer>\\boxed{5</answer>", R1) == "\\boxed{5"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "5.0"),
        ("5", "+5"),
        ("25", "025"),
        ("142.0", "142"),
        ("1/2", "0.5"),
        ("\\frac{14}{3}", "\\dfrac{28}{6}"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}"),
        ("\\frac12", "1/2"),
        ("1000000", "1,000,000"),
        ("10,\\!000", "10{,}000"),
        ("70000", "\\$70,000"),
        ("70000", "$70000"),
        ("5", "$5$"),
        ("$69$,$84$", "$69$, $84$"),
        ("18.90", "$\\$18.90$"),
        ("5", "\\(5\\)"),
        ("5", "5."),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("x^2 + 1", "x^2+1"),
        ("5", "\uff15"),
        ("-5", "\u22125"),
        ("5", "5\u202e\u200b"),
        ("1/2", "\u00bd"),
        ("x^{2}", "x\u00b2"),
        ("5", " " * 100_000 + "5"),
        ("7" * 100_000, "7" * 100_000),
    ],
)
def test_equal_answers_match_both_ways(gold: str, answer: str) -> None:
    assert answers_match(gold, answer)
    assert answers_match(answer, gold)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "4=5"),
        ("5", "5 \\text{ or } 6"),
        ("5", "1,2,3,4,5,6,7"),
        ("5", "-5"),
        ("0.0000001", "0.0000002"),
        ("1/3", "0.3333"),
        ("2", "2.0000001"),
        ("0.5", "50"),
        ("101_2", "101"),
        ("10_3", "10_4"),
        ("52", "5\u00b2"),
        ("11/2", "1\u00bd"),
        ("(1,2)", "\\{1,2\\}"),
        ("(1,2)", "[1,2]"),
        ("x^2", "X^2"),
        ("x>5", "x<5"),
        ("x", "\u0445"),
        ("5", "5\x00"),
        ("5", "5\ufffd"),
        ("5", "\u0665"),
        ("2", "\u221a4"),
        ("5", "\ud8005"),
        ("0", "1/0"),
        ("5", ""),
        ("2^{-98}", "2^{-99}"),
        ("5", "(lambda: 5)()"),
        ("5", "nan"),
        ("5", "1e400"),
        ("7" * 100_000, "7" * 99_999 + "8"),
    ],
)
def test_different_answers_do_not_match(gold: str, answer: str) -> None:
    assert not answers_match(gold, answer)
    assert not answers_match(answer, gold)


def test_answer_key_of_a_decimal_is_its_exact_value() -> None:
    generator = random.Random(0)
    for _ in range(200):
        whole, digits = generator.randrange(10**9), generator.randrange(1, 12)
        value = Fraction(generator.choice((-1, 1)) * whole, 10**digits)
        text = f"{'-' if value < 0 else ''}{whole // 10**digits:,}.{whole % 10**digits:0{digits}d}"
        assert answer_key(text) == value


@pytest.mark.parametrize(
    "bait",
    [
        "{" * 100_000,
        "\\boxed{" * 20_000 + "}" * 20_000,
        "\\boxed{ " * 20_000 + "6" + "} " * 20_000 + "x",
        "\\boxed" + " " * 100_000,
        "</s>" * 50_000 + "x",
        " " * 100_000 + "x" + " " * 100_000,
        "<think>" * 30_000,
        "</think>" * 30_000 + "<answer>" * 30_000,
        "\\frac" * 30_000,
        "1," * 50_000,
        "(" * 100_000,
        "9**9**9**9",
        "99999999!",
        "\ufdfa" * 50_000,
        "\u0301" * 100_000,
    ],
    ids=lambda bait: bait[:12].strip() or "spaces",
)
def test_attacks_on_resources_earn_nothing(bait: str) -> None:
    inside_tags = f"<think>a</think><answer>{bait}</answer>"
    for template in (R1, OPENED, QWEN, NONE):
        for completion in (bait, inside_tags, f"\\boxed{{{bait}}}"):
            assert not score(completion, template).correct
    assert not answers_match("5", bait)


def test_random_text_always_gets_a_finite_reward_that_json_holds() -> None:
    generator = random.Random(1)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "\\", "5", " "]
    pieces += ["\x00", "\ud83d", "\u202e", "$", ",", "/", "<|im_end|>", *string.punctuation]
    for _ in range(500):
        completion = "".join(generator.choices(pieces, k=generator.randrange(30)))
        for template in (R1, OPENED, QWEN, NONE):
            reward = score(completion, template)
            assert reward.total is not None and math.isfinite(reward.total)
            assert set(reward.parts.values()) <= {0.0, 1.0}
            assert json.loads(json.dumps(reward.extracted)) == reward.extracted


def test_template_may_be_given_by_name() -> None:
    completion = "<think> 2 + 3 </think> <answer> 5 </answer>"
    assert extract_answer(completion, "r1") == "5"
    assert format_reward(completion, "r1") == 1.0
    with pytest.raises(ValueError, match="template: expected one of"):
        extract_answer(completion, "r2")
