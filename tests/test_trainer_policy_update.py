"""The update: its gradient against plain PyTorch, its split into parts, and what stops it."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from kernels import LossSpec
from trainer.config import (
    LossOptions,
    NonFiniteError,
    OptimizerOptions,
    RolloutOptions,
    TrainConfig,
)
from trainer.fsdp import World
from trainer.packing import MicroBatch, UpdateSample, pack_targets, pack_tokens
from trainer.policy import Policy
from trainer.policy_update import PolicyUpdate
from trainer.testing import WORDS, bigram_model
from trainer.weight_update import make_optimizer, scheduled_learning_rate

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
PROMPTS = [[2, 11, 8, 12, 3], [3], [2, 2, 3]]


def make_config(loss: LossOptions, **options: object) -> TrainConfig:
    return TrainConfig(
        preset="test",
        backend="reference",
        rollout=RolloutOptions(num_prompts=3, group_size=4, max_new_tokens=16, temperature=0.8),
        loss=loss,
        optimizer=OptimizerOptions(**{"learning_rate": 1e-2, **options}),
    )


def make_samples(count: int = 12) -> list[UpdateSample]:
    generator = np.random.default_rng(0)
    return [
        UpdateSample(
            prompt_ids=PROMPTS[index % 3],
            token_ids=generator.integers(0, len(WORDS), size=int(generator.integers(1, 17))),
            sampler_logprobs=np.zeros(0, dtype=np.float32),
            advantage=float(generator.normal()),
        )
        for index in range(count)
    ]


def with_sampler_logprobs(samples: list[UpdateSample], value: float) -> list[UpdateSample]:
    return [
        dataclasses.replace(
            one, sampler_logprobs=np.full(len(one.token_ids), value, dtype=np.float32)
        )
        for one in samples
    ]


SAMPLES = with_sampler_logprobs(make_samples(), -1.0)


def make_update(
    config: TrainConfig, model: LlamaForCausalLM, reference: LlamaForCausalLM | None = None
) -> PolicyUpdate:
    policy = Policy(model)
    frozen = None if reference is None else Policy(reference).requires_grad_(False)
    return PolicyUpdate(policy, frozen, make_optimizer(policy, config.optimizer), config, ALONE)


def sequence_logprobs(model: LlamaForCausalLM, one: UpdateSample) -> Tensor:
    token_ids = torch.tensor([[*one.prompt_ids, *one.token_ids]])
    logits = model(token_ids).logits[0, len(one.prompt_ids) - 1 : -1] / 0.8
    return logits.log_softmax(-1).gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]


def plain_gradient(model: LlamaForCausalLM, spec: LossSpec, samples: list[UpdateSample]) -> Tensor:
    """Gradient of -sum(weight * advantage * logprob), one sequence at a time, in float64."""
    model = copy.deepcopy(model).double()
    tokens = sum(len(one.token_ids) for one in samples)
    for one in samples:
        weight = {
            "sequence_mean": 1 / (len(one.token_ids) * len(samples)),
            "token_mean": 1 / tokens,
            "constant": 1 / (len(samples) * 16),
        }[spec.aggregation]
        (-weight * one.advantage * sequence_logprobs(model, one).sum()).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


class GradientRecorder(torch.optim.SGD):
    """Keeps the gradient of each update, as it was before clipping, instead of using it."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.parameters(), lr=0.0)
        self.gradients: list[Tensor] = []

    def step(self, closure: None = None) -> None:
        self.gradients.append(
            torch.cat([each.grad.flatten().clone() for each in self.param_groups[0]["params"]])
        )


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("budget", [1, 40, 10**6], ids=["one_by_one", "some", "all_at_once"])
def test_gradient_is_that_of_plain_pytorch_for_any_micro_batch_size(loss: str, budget: int) -> None:
    config = make_config(LossOptions(loss=loss), micro_batch_tokens=budget, max_grad_norm=1e9)
    model = bigram_model(noise=0.1)
    expected = plain_gradient(model, config.loss_spec, SAMPLES)
    update = make_update(config, model)
    update.optimizer = recorder = GradientRecorder(update.policy)
    metrics = update(SAMPLES, step=1)
    error = (recorder.gradients[0] - expected).norm() / expected.norm()
    assert error < 2e-6
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)


def test_gradient_is_clipped_to_the_norm() -> None:
    config = make_config(LossOptions(loss="grpo"), max_grad_norm=1e-3)
    update = make_update(config, bigram_model())
    update.optimizer = recorder = GradientRecorder(update.policy)
    metrics = update(SAMPLES, step=1)
    assert metrics["grad_norm"] > 1e-3
    assert recorder.gradients[0].norm() == pytest.approx(1e-3, rel=1e-3)


def test_minibatches_split_all_samples_and_share_old_logprobs() -> None:
    config = make_config(
        LossOptions(loss="grpo", clip_low=1e-6, clip_high=1e-6), minibatches=3, inner_epochs=2
    )
    update = make_update(config, bigram_model(noise=0.1))
    seen: list[list[int]] = []
    ratios: list[float] = []
    original = update._update

    def spy(samples, chosen, *rest):  # noqa: ANN001, ANN202
        metrics = original(samples, chosen, *rest)
        seen.append(list(chosen))
        ratios.append(metrics["clip_fraction"])
        return metrics

    update._update = spy
    update(SAMPLES, step=1)
    assert [len(chosen) for chosen in seen] == [4] * 6
    for epoch in (seen[:3], seen[3:]):
        assert sorted(index for chosen in epoch for index in chosen) == list(range(12))
    assert seen[:3] != seen[3:]
    # The first minibatch is on-policy up to rounding; an update of 0.01 moves the ratios.
    assert ratios[0] < 0.3 < min(ratios[1:])


def test_kl_is_zero_against_itself_and_grows_with_the_distance() -> None:
    options = LossOptions(loss="grpo", kl="k3", kl_weight=0.1)
    model, far = bigram_model(), bigram_model(noise=0.3)
    against_itself = make_update(make_config(options), bigram_model(), bigram_model())
    assert against_itself(SAMPLES, 1)["kl"] < 1e-7
    expected = torch.cat(
        [(sequence_logprobs(far, one) - sequence_logprobs(model, one)).double() for one in SAMPLES]
    )
    measured = make_update(make_config(options), model, far)(SAMPLES, 1)["kl"]
    assert measured == pytest.approx((expected.exp() - 1 - expected).mean().item(), rel=1e-3)


def test_sampler_gap_is_the_distance_of_both_logprobs() -> None:
    model = bigram_model()
    exact = [
        dataclasses.replace(one, sampler_logprobs=sequence_logprobs(model, one).detach().numpy())
        for one in SAMPLES
    ]
    shifted = [
        dataclasses.replace(one, sampler_logprobs=one.sampler_logprobs + np.float32(0.25))
        for one in exact
    ]
    config = make_config(LossOptions(loss="grpo"))
    means, largest = (
        [
            make_update(config, copy.deepcopy(model))(samples, 1)[f"sampler/logprob_gap_{which}"]
            for samples in (exact, shifted)
        ]
        for which in ("mean", "max")
    )
    for gaps in (means, largest):
        assert gaps[0] < 1e-5 and gaps[1] == pytest.approx(0.25, abs=1e-5)


def test_largest_sampler_gap_is_that_of_one_token_of_the_step() -> None:
    model = bigram_model()
    samples = [
        dataclasses.replace(one, sampler_logprobs=sequence_logprobs(model, one).detach().numpy())
        for one in SAMPLES
    ]
    # One token of the minibatch that the other updates of the step do not see.
    samples[7].sampler_logprobs[-1] -= 3
    config = make_config(LossOptions(loss="grpo"), minibatches=3, micro_batch_tokens=20)
    metrics = make_update(config, model)(samples, 1)
    assert metrics["sampler/logprob_gap_max"] == pytest.approx(3, abs=1e-4)
    tokens = sum(len(one.token_ids) for one in samples)
    assert metrics["sampler/logprob_gap_mean"] < 3 * 3 / tokens


def test_head_gets_the_states_before_completion_tokens_only() -> None:
    chosen = [SAMPLES[index] for index in (0, 5, 7)]
    model = bigram_model(noise=0.1)
    expected = torch.cat([sequence_logprobs(model, one) for one in chosen])
    targets = pack_targets(chosen, ALONE.device)
    logits = Policy(model)(
        pack_tokens(chosen, ALONE.device), lambda hidden, weight, bias: hidden @ weight.T
    )
    assert logits.shape == (sum(len(one.token_ids) for one in chosen), len(WORDS))
    logprobs = (logits / 0.8).log_softmax(-1).gather(1, targets.target_ids_N[:, None])[:, 0]
    assert torch.allclose(logprobs, expected, atol=1e-5)


def test_non_finite_gradient_stops_before_the_weights_and_is_named() -> None:
    model = bigram_model()
    update = make_update(make_config(LossOptions(loss="grpo")), model)
    # Only the gradient breaks: the weight itself and the loss stay finite.
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(NonFiniteError, match=r"step 7: .*gradient of model\.norm\.weight"):
        update(SAMPLES, step=7)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_non_finite_loss_stops_before_the_weights() -> None:
    model = bigram_model()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="step 3: .*the loss"):
        make_update(make_config(LossOptions(loss="grpo")), model)(SAMPLES, step=3)


def test_learning_rate_rises_over_the_warm_up() -> None:
    config = make_config(LossOptions(loss="grpo"), warmup_updates=4, minibatches=2)
    update = make_update(config, bigram_model())
    rates = [update(SAMPLES, step)["learning_rate"] for step in (1, 2, 3)]
    # Two updates a step: quarters 1 and 2, then 3 and 4, then the whole rate.
    assert rates == pytest.approx([0.375e-2, 0.875e-2, 1e-2])


def test_learning_rate_falls_by_the_schedule() -> None:
    def rates(schedule: str) -> list[float]:
        options = OptimizerOptions(
            steps=5, minibatches=2, warmup_updates=2, learning_rate=1.0, schedule=schedule
        )  # fmt: skip
        assert options.updates == 10
        return [
            scheduled_learning_rate(options, update, updates=10, least=0.2)
            for update in range(1, 11)
        ]

    assert rates("linear") == pytest.approx([0.5, 1.0, *np.linspace(1.0, 0.2, 9)[1:]])
    assert rates("cosine")[5] == pytest.approx(0.6) and rates("cosine")[-1] == pytest.approx(0.2)
    assert rates("constant") == pytest.approx([0.5, *[1.0] * 9])


def test_rank_without_samples_has_no_gradient() -> None:
    update = make_update(make_config(LossOptions(loss="dr_grpo")), bigram_model())
    nothing = MicroBatch(own=[None], head=[None], rows_of_ranks=[1])
    result = update._backward(SAMPLES, nothing, None, None, 10, 4)
    assert result.loss.item() == 0.0
    assert all(not weight.grad.any() for weight in update.policy.parameters())
