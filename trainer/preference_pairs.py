"""Preference pairs: two completions of a prompt, of which one is better.

A row has `prompt`, `chosen` and `rejected`, all texts. What a reward model reads is the
conversation of prompt and completion in the tokenizer's chat template, or the one on a line after
the other where it has none.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from trainer.config import UsageError
from trainer.data_records import DataError, kind_of, open_records, text_of
from trainer.seeds import derive_key

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Token ids of a prompt with the better completion, and with the other."""

    prompt: str
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longer one."""
        return max(len(self.chosen_ids), len(self.rejected_ids))


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> list[list[int]]:
    """Token ids of each prompt with its completion, as a reward model reads them."""
    if not prompts:
        return []
    pairs = list(zip(prompts, completions, strict=True))
    has_template = tokenizer.chat_template is not None
    texts = [f"{prompt}\n{completion}" for prompt, completion in pairs]
    if has_template:
        texts = [
            str(
                tokenizer.apply_chat_template(
                    [
                        {"role": "user", "content": prompt},
                        {"role": "assistant", "content": completion},
                    ],
                    tokenize=False,
                )
            )
            for prompt, completion in pairs
        ]
    # A template writes the special tokens itself.
    return tokenizer(texts, add_special_tokens=not has_template, verbose=False)["input_ids"]


def read_texts(source: str, split: str) -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected text of all pairs of a source.

    Raises:
        UsageError: the source cannot be read, has other columns, or has no pair.
    """
    rows: list[tuple[str, str, str]] = []
    try:
        for place, _, content in open_records(source, split)[0]:
            if not isinstance(content, dict):
                raise DataError(f"{place}: expected an object, got {kind_of(content)}")
            missing = [name for name in COLUMNS if name not in content]
            if missing:
                raise DataError(
                    f"{place}: expected the columns {', '.join(COLUMNS)}, got no {missing[0]}"
                )
            prompt, chosen, rejected = (text_of(content, name, place) for name in COLUMNS)
            if chosen == rejected:
                raise DataError(f"{place}: expected two different completions, got the same twice")
            rows.append((prompt, chosen, rejected))
    except DataError as error:
        raise UsageError(f"--dataset: {error}") from error
    if not rows:
        raise UsageError(f"--dataset: {source}: expected at least one pair, got none")
    return rows


def read_pairs(
    source: str, split: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[list[Pair], int]:
    """All pairs of a source whose sequences have at most `max_tokens`, and how many are longer.

    Raises:
        UsageError: the source cannot be read, has other columns, or leaves no pair.
    """
    rows = read_texts(source, split)
    prompts, chosen_texts, rejected_texts = zip(*rows, strict=True)
    pairs = [
        Pair(prompt=prompt, chosen_ids=chosen_ids, rejected_ids=rejected_ids)
        for prompt, chosen_ids, rejected_ids in zip(
            prompts,
            conversation_ids(tokenizer, prompts, chosen_texts),
            conversation_ids(tokenizer, prompts, rejected_texts),
            strict=True,
        )
    ]
    kept = [pair for pair in pairs if pair.longest <= max_tokens]
    if not kept:
        shortest = min(pair.longest for pair in pairs)
        raise UsageError(
            f"--max-tokens: expected at least {shortest}, the tokens of the shortest pair of "
            f"{source}, got {max_tokens}"
        )
    return kept, len(pairs) - len(kept)


def length_balanced(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """As many of the pairs as can be kept so that length says nothing of which is better.

    Among pairs whose lengths differ by about as much (between the same powers of two) the chosen
    one is the longer as often as the rejected one; what is too many on one side is left out at
    random. Pairs of the same length stay.

    Source: DeepSeek-R1 (2501.12948 v2), section 3.1, which balances lengths and leaves open how.
    """
    sides: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    kept: list[int] = []
    for index, pair in enumerate(pairs):
        excess = len(pair.chosen_ids) - len(pair.rejected_ids)
        if excess:
            sides[abs(excess).bit_length()][excess > 0].append(index)
        else:
            kept.append(index)
    for size, (shorter, longer) in sides.items():
        count = min(len(shorter), len(longer))
        draw = random.Random(derive_key(seed, "length balance", size))
        kept += draw.sample(shorter, count) + draw.sample(longer, count)
    return [pairs[index] for index in sorted(kept)]
