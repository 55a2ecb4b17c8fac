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

import hashlib
import random
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from trainer.seeds import derive_key
from trainer.tasks import Problem

LARGEST_TOTAL = 20
REFLECTION_WORDS = ("check", "wait")
"""Words of the corpus that mark a completion as checking or correcting itself; both are among
DeepSeek-R1's (arXiv 2501.12948 v2, appendix C.2)."""
PROMPT_END = "Assistant:"
"""Last token of a prompt."""

HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 2048
GUESS_SHARE, STEP_SHARE, CHECK_SHARE = 0.66, 0.20, 0.14
RIGHT_GUESS_SHARE = 0.15
NO_THINK_SHARE, NO_ANSWER_SHARE = 0.15, 0.05
STEP_SLIP, CHECK_SLIP = 0.18, 0.02
TEXTBOOK_CHECK_SHARE = 0.7

_GUESS_WORDS = ("guess", "maybe")
_PAD, _EOS, _UNKNOWN = "<pad>", "<eos>", "<unk>"
_WORDS = (
    *("User:", PROMPT_END, "<think>", "</think>", "<answer>", "</answer>"),
    *("+", "-", "=", "?", ".", "check", "vs", "ok,", "wait,", *_GUESS_WORDS),
)


@dataclass(frozen=True, slots=True)
class _Sum:
    """`first` and the signed numbers that follow it."""

    first: int
    terms: tuple[int, ...]

    @property
    def text(self) -> str:
        return " ".join((str(self.first), *map(_term_text, self.terms)))

    @property
    def total(self) -> int:
        return self.first + sum(self.terms)


def training_problem(seed: int, index: int) -> Problem:
    """The training problem at place `index` of the endless sequence of `seed`."""
    drawn = _draw(random.Random(derive_key(seed, "tiny problem", index)), held_out=False)
    return Problem(
        problem_id=f"tiny-{seed}-{index}", question=_question(drawn), answer=str(drawn.total)
    )


def held_out_problems(count: int) -> list[Problem]:
    """The first `count` held-out problems, all different and the same for every seed.

    Raises:
        ValueError: `count` is not from 1 to MOST_HELD_OUT.
    """
    if not 1 <= count <= MOST_HELD_OUT:
        raise ValueError(
            f"count: expected 1 to {MOST_HELD_OUT} held-out problems of the embedded task, "
            f"got {count}"
        )
    rng = random.Random(derive_key(0, "tiny held-out problems"))
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        drawn = _draw(rng, held_out=True)
        name = f"tiny-held-out-{len(problems)}"
        problem = Problem(problem_id=name, question=_question(drawn), answer=str(drawn.total))
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def is_held_out(question: str) -> bool:
    """Whether a question is one that the model never sees in training."""
    digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**32


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
    words = (_PAD, _EOS, _UNKNOWN, *_WORDS, *map(str, range(LARGEST_TOTAL + 1)))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, _UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _draw(rng: random.Random, *, held_out: bool) -> _Sum:
    while True:
        first = total = rng.randint(1, 9)
        terms = []
        for _ in range(rng.randint(3, 4)):
            choices = [
                sign * number
                for sign in (1, -1)
                for number in range(1, 10)
                if 0 <= total + sign * number <= LARGEST_TOTAL
            ]
            terms.append(rng.choice(choices))
            total += terms[-1]
        drawn = _Sum(first, tuple(terms))
        if is_held_out(_question(drawn)) == held_out:
            return drawn


def _question(drawn: _Sum) -> str:
    return f"{drawn.text} = ?"


def _prompt(drawn: _Sum) -> str:
    """The prompt of the template "tiny"."""
    return f"User: {_question(drawn)} {PROMPT_END}"


def _term_text(term: int) -> str:
    return f"{'+' if term > 0 else '-'} {abs(term)}"


def _guess(rng: random.Random, drawn: _Sum) -> str:
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


def _worked(rng: random.Random, drawn: _Sum, checked: bool, slip: float, check_slip: float) -> str:
    """An answer found step by step; a slip is carried on unless a check finds it."""
    carried, steps = drawn.first, []
    for term in drawn.terms:
        step = f"{carried} {_term_text(term)}"
        right = min(max(carried + term, 0), LARGEST_TOTAL)
        written = carried = _slipped(rng, right, slip)
        if checked:
            carried = _slipped(rng, right, check_slip)
            verdict = "ok," if carried == written else "wait,"
            steps.append(f"{step} = {written} check {step} = {carried} vs {written} {verdict}")
        else:
            steps.append(f"{step} = {written} .")
    return f"<think> {' '.join(steps)} </think> <answer> {carried} </answer>"


def _slipped(rng: random.Random, right: int, probability: float) -> int:
    """`right`, or with some probability one or two more; LARGEST_TOTAL has nothing above it."""
    if rng.random() >= probability:
        return right
    return min(right + rng.choice((1, 2)), LARGEST_TOTAL)
