"""What the embedded tasks share: sums and differences of small numbers, drawn at random, which of
them are held out, slips, and a tokenizer of whole words."""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from trainer.tasks import Problem

HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 2048

_PAD, _EOS, _UNKNOWN = "<pad>", "<eos>", "<unk>"


@dataclass(frozen=True, slots=True)
class DrawnSum:
    """`first` and the signed numbers that follow it."""

    first: int
    terms: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.first + sum(self.terms)


def draw_sum(
    rng: random.Random, largest_total: int, is_wanted: Callable[[DrawnSum], bool]
) -> DrawnSum:
    """Four or five numbers from 1 to 9, read from left to right, every running total from 0 to
    `largest_total`; drawn again until one is wanted."""
    while True:
        first = total = rng.randint(1, 9)
        terms = []
        for _ in range(rng.randint(3, 4)):
            choices = [
                sign * number
                for sign in (1, -1)
                for number in range(1, 10)
                if 0 <= total + sign * number <= largest_total
            ]
            terms.append(rng.choice(choices))
            total += terms[-1]
        drawn = DrawnSum(first, tuple(terms))
        if is_wanted(drawn):
            return drawn


def is_held_out(question: str) -> bool:
    """Whether a question is one that the model never sees in training."""
    digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**32


def different_problems(count: int, draw: Callable[[int], Problem]) -> list[Problem]:
    """`count` problems, no question twice, of those that `draw` gives for the places 0, 1, ...

    Raises:
        ValueError: `count` is not from 1 to MOST_HELD_OUT.
    """
    if not 1 <= count <= MOST_HELD_OUT:
        raise ValueError(
            f"count: expected 1 to {MOST_HELD_OUT} held-out problems of the embedded task, "
            f"got {count}"
        )
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = draw(len(problems))
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def slipped(rng: random.Random, right: int, probability: float, largest_total: int) -> int:
    """`right`, or with some probability one or two more, but not above `largest_total`."""
    if rng.random() >= probability:
        return right
    return min(right + rng.choice((1, 2)), largest_total)


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word between spaces, and for padding, the end of the
    text, and what is none of the words."""
    every = dict.fromkeys((_PAD, _EOS, _UNKNOWN, *words))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(every)}, _UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
