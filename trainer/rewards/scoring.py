"""From completions to rewards: named parts, each with its weight, and their sum.

| part | value | source |
|---|---|---|
| accuracy | 1 for a right answer, else 0; what the problem's verifier says, if it has one | R1 |
| code | for a problem with tests: 1 for a program that passes all of them, else 0 | R1 |
| format | 1 for a completion in the template's format, else 0 | R1 |
| language | share of the thought's words that are in the target language | R1 |
| overlong | 0 to -1 over the last tokens before the longest completion | DAPO |
| length | by length and correctness: cosine, or linear within the group | Yeo et al., Kimi k1.5 |
| repetition | minus the share of repeated n-grams of tokens | Yeo et al. |
| helpful, harmless | a reward model's score of a general prompt's completion | R1 |
| user's functions | what they return; None leaves a completion out | TRL |

A part whose weight is 0 is not computed, except accuracy and format, which every run logs.

Source: DeepSeek-R1, arXiv 2501.12948, section 2.2 and eq. 8: rewards are added. What a part would
add to the reward of a completion that ran into the length limit is 0, as in Dr. GRPO (arXiv
2503.20783); or that completion has no reward at all and is left out of the loss, as in DAPO's
overlong filtering (arXiv 2503.14476).

Shapes: P prompts, G completions per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from trainer.config import RewardOptions, UsageError
from trainer.rewards.extraction import format_reward, thought
from trainer.rewards.grading import AnswerGrader, Attempt, Outcome
from trainer.rewards.language import (
    QUESTION,
    SCRIPTS,
    language_consistency,
    language_of,
)
from trainer.rewards.penalties import (
    cosine_length_reward,
    linear_length_rewards,
    overlong_penalty,
    repetition_penalty,
)
from trainer.rewards.preference import preference_rewards
from trainer.rewards.user_reward import UserReward, load_user_rewards
from trainer.templates import Template

PARTS = ("accuracy", "code", "format", "language", "overlong", "length", "repetition")
"""The parts that are no user's and no reward model's; a problem has either accuracy or code, or,
where it is a general prompt, none of the two."""

Parts = dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What one completion earned, part by part."""

    total: float | None
    """Sum of the parts times their weights; None where no part with a weight has a value: the
    completion is left out of its group and of the loss."""
    parts: Parts
    """Value of each part by name, without its weight; None: left out of this part."""
    extracted: str | None
    """The answer that was graded; None when there is none or the completion was cut off."""
    correct: bool
    """Whether the answer is right."""
    status: str
    """How the grade came about, one of `grading.STATUSES`."""


@dataclass(frozen=True, slots=True)
class Graded:
    """An attempt after all parts but the user's."""

    outcome: Outcome
    parts: Parts


GradedGroup = list[Graded]


def check_rewards(options: RewardOptions) -> list[UserReward]:
    """The reward models and the user's functions, imported, once all that the options name is known
    to be there.

    Raises:
        UsageError: a reward model, a user's function, a target language or a detector that cannot
            be used.
    """
    if options.target_language not in (QUESTION, *SCRIPTS):
        raise UsageError(
            f"--target-language: expected one of "
            f"{', '.join((*sorted(SCRIPTS), QUESTION))}, got {options.target_language!r}"
        )
    if options.language_weight and options.language_detector == "py3langid":
        try:
            language_consistency("", detector="py3langid")
        except ModuleNotFoundError as error:
            raise UsageError(f"--language-{error}") from error
    preferences = preference_rewards(options)
    taken = (*PARTS, *(reward.name for reward in preferences))
    return [*preferences, *load_user_rewards(options.reward, taken)]


class Scorer:
    """Computes the rewards of a run; a context manager that ends its worker processes.

    Args:
        options: which rewards, with which weights.
        template: where the answer is read from and which format is asked for.
        max_new_tokens: longest completion.
        runs_code: some problems have tests; opens the sandbox.

    Raises:
        UsageError: as `check_rewards`, or the sandbox cannot be had.
    """

    def __init__(
        self,
        options: RewardOptions,
        template: Template,
        *,
        max_new_tokens: int,
        runs_code: bool = False,
    ) -> None:
        self.options, self.template, self.max_new_tokens = options, template, max_new_tokens
        self.user_rewards = check_rewards(options)
        self.weights = {name: getattr(options, f"{name}_weight") for name in PARTS}
        self.weights |= {reward.name: reward.weight for reward in self.user_rewards}
        self.grader = AnswerGrader(options, template, runs_code=runs_code)
        self._threads = ThreadPoolExecutor(options.grader_workers, thread_name_prefix="scoring")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends threads and worker processes; nothing is scored any more."""
        self._threads.shutdown(cancel_futures=True)
        self.grader.close()

    def score(self, attempts_PG: Sequence[Sequence[Attempt]]) -> list[list[Reward]]:
        """Rewards of the completions of each problem, `[P][G]`.

        Raises:
            UsageError: a user's function returned something else than numbers.
        """
        return self._with_user_rewards(attempts_PG, self._grade(attempts_PG))

    def answers_agree(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the two answers of each pair are equal, the first taken as the gold."""
        return self.grader.answers_agree(pairs)

    def start(self, attempts_G: Sequence[Attempt]) -> Future[GradedGroup]:
        """Grades one group in the background, to be given to `finish`."""
        return self._threads.submit(lambda: self._grade([attempts_G])[0])

    def finish(
        self,
        attempts_PG: Sequence[Sequence[Attempt]],
        started: dict[int, Future[GradedGroup]],
    ) -> list[list[Reward]]:
        """As `score`; the groups at the places that are keys of `started` are being graded already.

        Raises:
            UsageError: as `score`.
        """
        rest = [place for place in range(len(attempts_PG)) if place not in started]
        graded = dict(zip(rest, self._grade([attempts_PG[place] for place in rest]), strict=True))
        graded |= {place: future.result() for place, future in started.items()}
        return self._with_user_rewards(
            attempts_PG, [graded[place] for place in range(len(attempts_PG))]
        )

    def _grade(self, attempts_PG: Sequence[Sequence[Attempt]]) -> list[list[Graded]]:
        outcomes = iter(self.grader.grade([one for group in attempts_PG for one in group]))
        graded_PG = []
        for attempts_G in attempts_PG:
            outcomes_G = [next(outcomes) for _ in attempts_G]
            lengths_G = self._length_rewards(attempts_G, [each.correct for each in outcomes_G])
            graded_PG.append(
                [
                    self._graded(attempt, outcome, length)
                    for attempt, outcome, length in zip(
                        attempts_G, outcomes_G, lengths_G, strict=True
                    )
                ]
            )
        return graded_PG

    def _length_rewards(
        self, attempts_G: Sequence[Attempt], correct_G: Sequence[bool]
    ) -> Sequence[float | None]:
        lengths_G = [len(attempt.token_ids) for attempt in attempts_G]
        if not self.weights["length"]:
            return [None] * len(lengths_G)
        if self.options.length_reward == "linear":
            return linear_length_rewards(lengths_G, correct_G)
        return [
            cosine_length_reward(length, max_length=self.max_new_tokens, correct=correct)
            for length, correct in zip(lengths_G, correct_G, strict=True)
        ]

    def _graded(self, attempt: Attempt, outcome: Outcome, length: float | None) -> Graded:
        options = self.options
        parts: Parts = {} if outcome.part is None else {outcome.part: outcome.value}
        parts["format"] = self._format(attempt, outcome)
        if self.weights["language"]:
            parts["language"] = self._language(attempt)
        if self.weights["overlong"]:
            parts["overlong"] = overlong_penalty(
                len(attempt.token_ids),
                max_length=self.max_new_tokens,
                buffer=options.overlong_tokens(self.max_new_tokens),
            )
        if self.weights["length"]:
            parts["length"] = length
        if self.weights["repetition"]:
            parts["repetition"] = repetition_penalty(
                attempt.token_ids.tolist(), ngram=options.repetition_ngram
            )
        return Graded(outcome, parts)

    def _language(self, attempt: Attempt) -> float | None:
        """None where the target is the language of a question that has no words."""
        target, detector = self.options.target_language, self.options.language_detector
        if target == QUESTION:
            found = language_of(attempt.problem.question, detector=detector)
            if found is None:
                return None
            target = found
        return language_consistency(thought(attempt.text, self.template), target, detector=detector)

    def _format(self, attempt: Attempt, outcome: Outcome) -> float:
        if outcome.part == "code" and self.template.answer_in == "boxed":
            # A program stands in a fenced block instead of a box.
            return float(outcome.extracted is not None)
        needs_answer = not attempt.problem.is_general
        return format_reward(attempt.text, self.template, needs_answer=needs_answer)

    def _with_user_rewards(
        self, attempts_PG: Sequence[Sequence[Attempt]], graded_PG: Sequence[Sequence[Graded]]
    ) -> list[list[Reward]]:
        attempts = [one for group in attempts_PG for one in group]
        of_user = {reward.name: iter(reward(attempts)) for reward in self.user_rewards}
        return [
            [
                self._reward(
                    attempt, graded, {name: next(values) for name, values in of_user.items()}
                )
                for attempt, graded in zip(attempts_G, graded_G, strict=True)
            ]
            for attempts_G, graded_G in zip(attempts_PG, graded_PG, strict=True)
        ]

    def _reward(self, attempt: Attempt, graded: Graded, of_user: Parts) -> Reward:
        parts = graded.parts | of_user
        is_masked = attempt.truncated and self.options.truncated == "mask"
        if attempt.truncated and not is_masked:
            parts = {
                name: 0.0 if value is not None and self.weights[name] * value > 0 else value
                for name, value in parts.items()
            }
        weighted = [
            self.weights[name] * value
            for name, value in parts.items()
            if value is not None and self.weights[name]
        ]
        return Reward(
            total=None if is_masked or not weighted else sum(weighted),
            parts=parts,
            extracted=graded.outcome.extracted,
            correct=graded.outcome.correct,
            status=graded.outcome.status,
        )
