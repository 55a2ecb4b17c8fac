"""What a loss does to the length of wrong answers, in expectation over all their lengths."""

import math

import pytest
import torch

import kernels

MORE, STOP = 0, 1
MAX_TOKENS = 40


def expected_gradient(loss: str, more_share: float) -> float:
    """Gradient with respect to the logit of "more" in wrong answers, of groups of a right answer of
    one certain token and a wrong one that says "more" until it stops or is cut off."""
    logit = torch.tensor(math.log(more_share / (1 - more_share)), dtype=torch.float64)
    max_tokens = MAX_TOKENS if loss == "dr_grpo" else None
    spec = kernels.LossSpec.preset(loss, max_tokens=max_tokens)
    total = 0.0
    for said in range(MAX_TOKENS + 1):
        is_cut = said == MAX_TOKENS
        ids = [STOP, *[MORE] * said, *[STOP] * (not is_cut)]
        more = logit.clone().requires_grad_()
        row = torch.stack((more, torch.zeros((), dtype=torch.float64)))
        certain = torch.tensor([-50.0, 50.0], dtype=torch.float64)
        logits_NV = torch.stack([certain, *[row] * (len(ids) - 1)])
        ids_N = torch.tensor(ids)
        out = kernels.policy_loss(
            logits_NV,
            ids_N,
            logits_NV.detach().log_softmax(1).gather(1, ids_N[:, None])[:, 0],
            spec=spec,
            rewards=torch.tensor([1.0, 0.0]),
            group_size=2,
            cu_seqlens=torch.tensor([0, 1, len(ids)], dtype=torch.int32),
        )
        probability = more_share**said * (1.0 if is_cut else 1 - more_share)
        total += probability * float(torch.autograd.grad(out.loss, more)[0])
    return total


@pytest.mark.parametrize("more_share", [0.5, 0.9])
def test_dr_grpo_is_indifferent_to_the_length_of_wrong_answers(more_share: float) -> None:
    # What is summed are terms of up to MAX_TOKENS / MAX_TOKENS in size, in float64.
    assert expected_gradient("dr_grpo", more_share) == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("more_share", [0.5, 0.9])
def test_grpo_lengthens_wrong_answers(more_share: float) -> None:
    stop = 1 - more_share
    # d log p / d logit is `stop` for each "more" and -more_share for the stop; over the length.
    mean_push = sum(
        more_share**said * stop * (said * stop - more_share) / (said + 1)
        for said in range(MAX_TOKENS)
    ) + more_share**MAX_TOKENS * (MAX_TOKENS * stop / MAX_TOKENS)
    # Rewards 1 and 0: deviation 0.5 from the mean, standard deviation sqrt(0.5); two answers.
    spec = kernels.LossSpec.preset("grpo")
    advantage = -0.5 / (math.sqrt(0.5) + spec.advantage_eps)
    found = expected_gradient("grpo", more_share)
    assert found == pytest.approx(-advantage * mean_push / 2, rel=1e-9)
    # Descent raises the logit of "more".
    assert found < 0
