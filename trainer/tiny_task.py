"""The embedded task: sums and differences of small numbers, and the corpus of its base model.

A problem is `7 + 8 - 4 + 9`: four or five numbers from 1 to 9, read from left to right, every
running total from 0 to 20. One problem in ten, chosen by a hash of its text, is held out: it occurs
in no training problem and in no document.

A document is a prompt and one answer to it. What people write is the mixture of
`corpus_document`, in which the base model can find every behaviour, but seldom a good one:

- 66 % answer at once, right 15 times in 100. One in seven of them has no <think>, one in twenty
  no <answer>: the format is for the reward to teach.
- 20 % go step by step (`7 + 8 = 15 .`); each step comes out one or two too high with probability
  18 %.
- 14 % also check: each step is computed again and compared (`7 + 8 = 16 check 7 + 8 = 15 vs 16
  wait,`), and the second result, too high with probability 2 %, is carried on. Without the repeated
  result the base model never learnt which comparisons agree.

So thinking longer pays, checking pays more, and most documents do neither. `textbook_document`
teaches arithmetic first: it always goes step by step, and seven times in ten it checks. A model
trained on the mixture alone needs several times as long to learn the steps.
"""

import random

from transformers import PreTrainedTokenizerFast

from trainer.drawn_sums import (
    DrawnSum,
    different_problems,
    draw_sum,
    is_held_out,
    slipped,
    word_tokenizer,
)
from trainer.seeds import derive_key
from trainer.tasks import Problem

LARGEST_TOTAL = 20
REFLECTION_WORDS = ("check", "wait")
"""Words of the corpus that mark a completion as checking or correcting itself; both are among
DeepSeek-R1's (arXiv 2501.12948 v2, appendix C.2)."""
PROMPT_END = "Assistant:"
"""Last token of a prompt."""

GUESS_SHARE, STEP_SHARE, CHECK_SHARE = 0.66, 0.20, 0.14
RIGHT_GUESS_SHARE = 0.15
NO_THINK_SHARE, NO_ANSWER_SHARE = 0.15, 0.05
STEP_SLIP, CHECK_SLIP = 0.18, 0.02
TEXTBOOK_CHECK_SHARE = 0.7

_GUESS_WORDS = ("guess", "maybe")
_WORDS = (
    *("User:", PROMPT_END, "<think>", "</think>", "<answer>", "</answer>"),
    *("+", "-", "=", "?", ".", "check", "vs", "ok,", "wait,", *_GUESS_WORDS),
)


def training_problem(seed: int, index: int) -> Problem:
    """The training problem at place `index` of the endless sequence of `seed`."""
    drawn = _draw(random.Random(derive_key(seed, "tiny problem", index)), held_out=False)
    return _problem(f"tiny-{seed}-{index}", drawn)


def held_out_problems(count: int) -> list[Problem]:
    """The first `count` held-out problems, all different and the same for every seed.

    Raises:
        ValueError: `count` is not from 1 to MOST_HELD_OUT.
    """
    rng = random.Random(derive_key(0, "tiny held-out problems"))

    def draw(index: int) -> Problem:
        return _problem(f"tiny-held-out-{index}", _draw(rng, held_out=True))

    return different_problems(count, draw)


def corpus_document(rng: random.Random) -> str:
    """A document of the mixture that the base model imitates, without the end-of-text token."""
    drawn = _draw(rng, held_out=False)
    kind = rng.random()
    if kind < GUESS_SHARE:
        return f"{_prompt(drawn)} {_guess(rng, drawn)}"
    checked = kind < GUESS_SHARE + CHECK_SHARE
    return f"{_prompt(drawn)} {_worked(rng, drawn, checked, STEP_SLIP, CHECK_SLIP)}"


def textbook_document(rng: random.Random) -> str:
    """A document that goes step by step, and mostly checks, without ever slipping in a check."""
    drawn = _draw(rng, held_out=False)
    checked = rng.random() < TEXTBOOK_CHECK_SHARE
    return f"{_prompt(drawn)} {_worked(rng, drawn, checked, STEP_SLIP, 0.0)}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of the corpus and per number from 0 to LARGEST_TOTAL."""
    return word_tokenizer((*_WORDS, *map(str, range(LARGEST_TOTAL + 1))))


def _draw(rng: random.Random, *, held_out: bool) -> DrawnSum:
    return draw_sum(rng, LARGEST_TOTAL, lambda drawn: is_held_out(_question(drawn)) == held_out)


def _problem(problem_id: str, drawn: DrawnSum) -> Problem:
    return Problem(problem_id=problem_id, question=_question(drawn), answer=str(drawn.total))


def _question(drawn: DrawnSum) -> str:
    return " ".join((str(drawn.first), *map(_term_text, drawn.terms), "= ?"))


def _prompt(drawn: DrawnSum) -> str:
    """The prompt of the template "tiny"."""
    return f"User: {_question(drawn)} {PROMPT_END}"


def _term_text(term: int) -> str:
    return f"{'+' if term > 0 else '-'} {abs(term)}"


def _guess(rng: random.Random, drawn: DrawnSum) -> str:
    """An answer at once; a wrong one is the answer to another problem."""
    right = rng.random() < RIGHT_GUESS_SHARE
    total = drawn.total if right else _draw(rng, held_out=False).total
    shape = rng.random()
    if shape < NO_THINK_SHARE:
        return f"<answer> {total} </answer>"
    think = f"<think> {rng.choice(_GUESS_WORDS)} </think>"
    if shape < NO_THINK_SHARE + NO_ANSWER_SHARE:
        return f"{think} {total}"
    return f"{think} <answer> {total} </answer>"


def _worked(
    rng: random.Random, drawn: DrawnSum, checked: bool, slip: float, check_slip: float
) -> str:
    """An answer found step by step; a slip is carried on unless a check finds it."""
    carried, steps = drawn.first, []
    for term in drawn.terms:
        step = f"{carried} {_term_text(term)}"
        right = min(max(carried + term, 0), LARGEST_TOTAL)
        written = carried = slipped(rng, right, slip, LARGEST_TOTAL)
        if checked:
            carried = slipped(rng, right, check_slip, LARGEST_TOTAL)
            verdict = "ok," if carried == written else "wait,"
            steps.append(f"{step} = {written} check {step} = {carried} vs {written} {verdict}")
        else:
            steps.append(f"{step} = {written} .")
    return f"<think> {' '.join(steps)} </think> <answer> {carried} </answer>"
