"""Grading while others are sampled; completions without a reward in group and loss."""

import math
import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from trainer.config import (
    LossOptions,
    OptimizerOptions,
    RewardOptions,
    TrainConfig,
)
from trainer.fsdp import World
from trainer.packing import UpdateSample
from trainer.policy import Policy
from trainer.policy_update import PolicyUpdate
from trainer.rewards import Scorer
from trainer.rewards.scoring import Reward
from trainer.rollout import Completion
from trainer.rollout.transformers_sampler import TransformersSampler
from trainer.samples import Prompter, ScoredCompletion, Scoring, rollout
from trainer.tasks import Problem
from trainer.templates import template_by_name
from trainer.testing import bigram_model, bigram_tokenizer
from trainer.train import with_advantages
from trainer.weight_update import make_optimizer

TINY = template_by_name("tiny")
FIVE = Problem(problem_id="five", question="2 + 3", answer="5")


def completion(text: str, finish_reason: str = "stop") -> Completion:
    ids = bigram_tokenizer().encode(text)
    return Completion(
        token_ids=np.array(ids),
        logprobs=np.full(len(ids), -1.0, dtype=np.float32),
        finish_reason=finish_reason,  # type: ignore[arg-type]
    )


def make_prompter(scorer: Scorer) -> Prompter:
    return Prompter(bigram_tokenizer(), TINY, scorer, max_prompt_tokens=20, limit="none")


def test_rewards_are_the_same_whatever_was_graded_before() -> None:
    generator = random.Random(0)
    problems = [
        Problem(problem_id=str(n), question=f"{n} + 1", answer=str(n + 1)) for n in range(8)
    ]
    completions_PG = [
        [
            completion(
                f"<think> {'so ' * generator.randrange(4)}</think> <answer> {answer} </answer>",
                generator.choice(["stop", "stop", "length"]),
            )
            for answer in (n, n + 1, "1 0", n + 1)
        ]
        for n in range(8)
    ]
    options = RewardOptions(
        length_weight=1.0, length_reward="linear", repetition_weight=1.0, grader_timeout=30.0
    )
    with Scorer(options, TINY, max_new_tokens=16) as scorer:
        prompter = make_prompter(scorer)
        expected = [
            [one.reward for one in group] for group in prompter.score(problems, completions_PG)
        ]
        for _ in range(5):
            scoring = Scoring(prompter, problems)
            for place in generator.sample(range(8), generator.randrange(9)):
                scoring.add(place, completions_PG[place])
            scored = scoring.finish(completions_PG)
            assert [[one.reward for one in group] for group in scored] == expected
    assert len({reward.total for group in expected for reward in group}) > 3


def test_groups_are_graded_while_others_are_sampled() -> None:
    graded = threading.Event()

    def verifier(answer: str | None) -> float:
        graded.set()
        return 1.0

    class HandsOver:
        """Goes on sampling until the group that it handed over is graded."""

        def generate(
            self, prompts: Sequence[Sequence[int]], keys_PG: np.ndarray, **options: object
        ) -> list[list[Completion]]:
            answer = [completion("<think> so </think> <answer> 5 </answer>")]
            on_group = options["on_group"]
            assert callable(on_group)
            on_group(1, answer)
            assert graded.wait(timeout=60)
            return [answer for _ in prompts]

    problems = [FIVE, replace(FIVE, answer="", verifier=verifier), FIVE]
    with Scorer(RewardOptions(grader="exact"), TINY, max_new_tokens=16) as scorer:
        prompter = make_prompter(scorer)
        scoring = Scoring(prompter, problems)
        completions_PG = rollout(
            HandsOver(),  # type: ignore[arg-type]
            prompter,
            problems,
            num_samples=1,
            max_new_tokens=16,
            temperature=1.0,
            stream=(0, "test", 1),
            first_prompt=0,
            on_group=scoring.add,
        )
        assert list(scoring.started) == [1]
        scored = scoring.finish(completions_PG)
    assert [one.reward.total for (one,) in scored] == [1.2] * 3


def test_sampler_hands_over_every_group_but_those_that_finish_last() -> None:
    sampler = TransformersSampler(
        bigram_model(), bigram_tokenizer(), TINY, dtype=torch.float32, rows_per_batch=4
    )
    prompts = [[2, 11, 3], [2, 11, 8, 12, 3], [3], [2, 3], [2, 2, 3]]
    keys_PG = np.arange(10, dtype=np.uint64).reshape(5, 2)
    early: dict[int, list[Completion]] = {}
    completions_PG = sampler.generate(
        prompts, keys_PG, max_new_tokens=8, temperature=1.0, on_group=early.__setitem__
    )
    # Two prompts at a time, shortest first; the longest is sampled last.
    assert set(early) == {0, 2, 3, 4}
    for place, completions_G in early.items():
        assert completions_G is completions_PG[place]


def test_error_while_grading_in_the_background_is_raised() -> None:
    def broken(answer: str | None) -> float:
        raise KeyError("verifier")

    with Scorer(RewardOptions(grader="exact"), TINY, max_new_tokens=16) as scorer:
        scoring = Scoring(make_prompter(scorer), [replace(FIVE, verifier=broken)])
        completions_PG = [[completion("<think> so </think> <answer> 5 </answer>")]]
        scoring.add(0, completions_PG[0])
        with pytest.raises(KeyError, match="verifier"):
            scoring.finish(completions_PG)


def scored(total: float | None) -> ScoredCompletion:
    return ScoredCompletion(
        problem=FIVE,
        prompt_ids=[3],
        completion=completion("so 5"),
        text="so 5",
        reward=Reward(total=total, parts={}, extracted=None, correct=False, status="no_answer"),
    )


def test_completion_without_reward_leaves_its_group_and_the_loss() -> None:
    config = TrainConfig(preset="test", loss=LossOptions(loss="grpo", advantage_scale="none"))
    config = replace(config, rollout=replace(config.rollout, group_size=4, num_prompts=2))
    groups = [[scored(total) for total in totals] for totals in ((1.0, 0.0, None, 0.5), [None] * 4)]
    samples = with_advantages(groups, config)
    assert [one.advantage for one in samples] == [0.5, -0.5, 0.0, 0.0, *[0.0] * 4]
    assert [one.masked for one in samples] == [False, False, True, False, *[True] * 4]


@pytest.mark.parametrize("aggregation", ["token_mean", "constant", "sequence_mean"])
def test_masked_sample_has_no_part_in_the_update(aggregation: str) -> None:
    def weights_after(masked_ids: list[int]) -> list[torch.Tensor]:
        loss = LossOptions(
            loss="grpo", aggregation=aggregation, kl="k3", kl_weight=0.5, entropy_weight=0.1
        )
        optimizer = OptimizerOptions(learning_rate=1e-2, minibatches=2)
        config = TrainConfig(preset="test", backend="reference", loss=loss, optimizer=optimizer)
        policy, reference = Policy(bigram_model()), Policy(bigram_model(seed=1))
        samples = [
            UpdateSample(
                prompt_ids=[3],
                token_ids=np.array(ids),
                sampler_logprobs=np.full(len(ids), -1.0, dtype=np.float32),
                advantage=advantage,
                masked=masked,
            )
            for ids, advantage, masked in (
                ([4, 5], 1.0, False),
                (masked_ids, 0.0, True),
                ([6, 11, 7], -1.0, False),
                (masked_ids, 0.0, True),
            )
        ]
        world = World(rank=0, size=1, device=torch.device("cpu"))
        update = PolicyUpdate(
            policy, reference, make_optimizer(policy, config.optimizer), config, world
        )
        metrics = update(samples, 1)
        assert math.isfinite(metrics["loss"] or 0.0)
        return [weight.detach() for _, weight in policy.weights()]

    start = [weight.detach() for _, weight in Policy(bigram_model()).weights()]
    one, other = weights_after([4, 10, 10]), weights_after([12, 13, 14])
    for before, first, second in zip(start, one, other, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert not torch.equal(before, first)
