"""The hard cases of losses and rewards, on every backend: groups 8, 9, 12, 13, 19 and 20.

`test_hard_cases.py` says what the numbers are. The truth is a closed form, or plain PyTorch in
float64.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LossSpec
from kernels.testing import grpo_batch, logits_with_logprobs, relative_error

EPS = torch.finfo(torch.float32).eps


def one_loss(
    logits: Tensor, old: Tensor | None, advantages: list[float], spec: LossSpec, **options: Any
) -> kernels.PolicyLoss:
    """Loss of tokens with id 0, each a sequence with an advantage of its own."""
    num_tokens = len(logits)
    return kernels.policy_loss(
        logits,
        torch.zeros(num_tokens, dtype=torch.long, device=logits.device),
        old,
        spec=spec,
        advantages=torch.tensor(advantages, device=logits.device),
        cu_seqlens=torch.arange(num_tokens + 1, device=logits.device),
        **options,
    )


def target_logits(logprobs: list[float], device: str) -> Tensor:
    """A leaf whose column 0 has these log-probs."""
    logits_NV = logits_with_logprobs(logprobs, 9, torch.float32)
    return logits_NV.to(device).requires_grad_()


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "gmpo", "vespo"])
def test_08_every_token_masked(backend: str, device: str, preset: str) -> None:
    leaf = target_logits([-1.5] * 6, device)
    out = kernels.policy_loss(
        leaf,
        torch.zeros(6, dtype=torch.long, device=device),
        torch.full((6,), -1.0, device=device),
        spec=LossSpec.preset(preset, kl="k3", kl_weight=0.1, entropy_weight=0.1),
        rewards=torch.tensor([0.0, 1.0], device=device),
        group_size=2,
        cu_seqlens=torch.tensor([0, 4, 6], device=device),
        ref_logprobs=torch.full((6,), -2.0, device=device),
        mask=torch.zeros(6, device=device),
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.item() == 0 and bool((leaf.grad == 0).all())
    assert all(bool(value.isfinite()) for value in out.metrics.values())


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_policy_loss"])
def test_08_linear_head_without_tokens(backend: str, device: str, op: str) -> None:
    hidden = torch.zeros(0, 4, device=device, requires_grad=True)
    weight = torch.randn(10, 4, device=device, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.long, device=device)
    if op == "linear_policy_loss":
        advantages = torch.ones(1, device=device)
        total = kernels.linear_policy_loss(
            hidden, weight, ids, None, spec=LossSpec(), advantages=advantages, backend=backend
        ).loss
    else:
        total = kernels.linear_token_logprobs(hidden, weight, ids, backend=backend).logprobs.sum()
    total.backward()
    assert total.item() == 0
    assert hidden.grad.shape == (0, 4) and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("op", ["policy_loss", "linear_token_logprobs", "linear_policy_loss"])
@pytest.mark.parametrize("wrong", [10, -1])
def test_09_token_beyond_the_vocabulary_raises(op: str, wrong: int) -> None:
    features = (torch.zeros(2, 4), torch.zeros(10, 4))
    if op == "policy_loss":
        features = (torch.zeros(2, 10),)
    arguments = dict(old_logprobs=None, spec=LossSpec(), advantages=torch.zeros(1))
    with pytest.raises(ValueError, match=rf"ids in \[0, 10\) or -100, got {wrong} at token 1"):
        getattr(kernels, op)(
            *features,
            token_ids=torch.tensor([0, wrong]),
            **(arguments if op.endswith("policy_loss") else {}),
        )


def test_12_ignored_slots_hold_anything(backend: str, device: str) -> None:
    """A padded batch whose padding breaks naive code equals the packed batch without any."""
    batch = grpo_batch(20, 77, torch.float32, device=device)
    lengths = batch.cu_seqlens.diff().tolist()
    packed = batch.logits_NV.clone().requires_grad_()
    arguments = dict(
        spec=LossSpec.preset(
            "dapo", kl="k3", kl_weight=0.1, sampler_correction="token_truncate", entropy_weight=0.1
        ),
        rewards=batch.rewards_S,
        group_size=4,
        backend=backend,
    )
    sampler_N = batch.old_logprobs_N + 0.3 * (batch.ref_logprobs_N + 1).sin()
    want = kernels.policy_loss(
        packed,
        batch.token_ids_N,
        batch.old_logprobs_N,
        cu_seqlens=batch.cu_seqlens,
        ref_logprobs=batch.ref_logprobs_N,
        sampler_logprobs=sampler_N,
        **arguments,
    )
    want.loss.backward()

    def padded(values: Tensor, fill: float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(values.split(lengths)), batch_first=True, padding_value=fill
        )

    mask = padded(torch.ones(20, device=device), 0.0).bool()
    for logit, old, other in (
        (math.nan, -1e4, math.nan),
        (math.inf, 200.0, -math.inf),
        (-math.inf, math.nan, math.inf),
    ):
        leaf = padded(batch.logits_NV, logit).requires_grad_()
        got = kernels.policy_loss(
            leaf,
            padded(batch.token_ids_N, 0),
            padded(batch.old_logprobs_N, old),
            mask=mask,
            ref_logprobs=padded(batch.ref_logprobs_N, other),
            sampler_logprobs=padded(sampler_N, other),
            **arguments,
        )
        got.loss.backward()
        assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
        torch.testing.assert_close(leaf.grad[mask], packed.grad, rtol=1e-6, atol=1e-9)
        for values in (leaf.grad, got.logprobs, got.entropy):
            assert bool((values[~mask] == 0).all())
        for name, value in want.metrics.items():
            assert got.metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_12_overflowing_ratios_of_clipped_tokens(backend: str, device: str) -> None:
    """exp(2000) is infinite; clipped, its gradient is exactly 0 and its loss finite."""
    leaf = target_logits([-1.0, -1.0], device)
    old = torch.tensor([-2001.0, -2001.0], device=device)
    for spec, want in ((LossSpec(dual_clip=3.0), -1.2 + 3.0), (LossSpec(ratio_cap=4.0), -1.2 + 4)):
        out = one_loss(leaf, old, [1.0, -1.0], spec, backend=backend)
        assert out.loss.item() == pytest.approx(want / 2, rel=1e-6)
        assert bool((torch.autograd.grad(out.loss, leaf)[0] == 0).all())


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler_correction": "token_truncate"},
        {"sampler_correction": "token_mask"},
        {"sampler_correction": "sequence_mask"},
        {"off_policy_threshold": 0.1},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)
def test_12_overflowing_ratios_of_dropped_tokens(
    backend: str, device: str, fields: dict[str, Any]
) -> None:
    """What the sampler correction or the off-policy mask drops is 0, not 0 * inf."""
    leaf = target_logits([-2.0, -2.0], device)
    old = torch.tensor([-2000.0, -2.0], device=device)
    sampler = torch.tensor([-0.5, -2.0], device=device)
    out = one_loss(
        leaf, old, [-1.0, -1.0], LossSpec(**fields), sampler_logprobs=sampler, backend=backend
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.5, rel=1e-6)
    assert bool((leaf.grad[0] == 0).all()) and bool((leaf.grad[1] != 0).all())


SURROGATES = ["clip", "cispo", "sapo", "gmpo", "vespo", "reinforce"]


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_12_nan_in_an_active_row_shows(
    backend: str, device: str, surrogate: str, on_policy: bool
) -> None:
    """In the loss, in the gradient of its row, and in the metrics; other rows have a gradient."""
    leaf = target_logits([-1.0, -2.0], device)
    with torch.no_grad():
        leaf[1, 5] = math.nan
    old = None if on_policy else torch.tensor([-1.1, -1.9], device=device)
    out = one_loss(leaf, old, [1.0, -1.0], LossSpec(surrogate=surrogate), backend=backend)
    out.loss.backward()
    assert bool(out.loss.isnan()) and bool(out.metrics["ratio/mean"].isnan())
    assert bool(leaf.grad[1].isnan().all()) and bool(leaf.grad[0].isfinite().all())


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("zero", [0.0, -0.0], ids=["0", "-0"])
def test_12_no_advantage_is_no_gradient(
    backend: str, device: str, surrogate: str, zero: float
) -> None:
    """Also where the ratio overflows, vanishes, or the token had no probability before."""
    leaf = target_logits([-1.0, -200.0, -1.0, -1.0], device)
    old = torch.tensor([-2000.0, 0.0, -1.0, -math.inf], device=device)
    out = one_loss(leaf, old, [zero] * 4, LossSpec(surrogate=surrogate), backend=backend)
    out.loss.backward()
    assert out.loss.item() == 0 and bool((leaf.grad == 0).all())
    assert out.metrics["zero_gradient_fraction"].item() == 1


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_12_ratio_exactly_at_both_clips(backend: str, device: str, advantage: float) -> None:
    """At a ratio of 1 = 1 - 0 = 1 + 0, what autograd makes of -min(r A, clamp(r) A)."""
    leaf = target_logits([-0.7], device)
    ids = torch.zeros(1, dtype=torch.long, device=device)
    old = kernels.token_logprobs(leaf, ids, backend=backend).logprobs.detach()
    spec = LossSpec(clip_low=0.0, clip_high=0.0)
    out = one_loss(leaf, old, [advantage], spec, backend=backend)
    out.loss.backward()
    assert out.loss.item() == -advantage
    assert out.metrics["clip_fraction"].item() == 0
    logprob = old.double().requires_grad_()
    ratio = (logprob - old.double()).exp()
    plain = -torch.min(ratio * advantage, ratio.clamp(1.0, 1.0) * advantage).sum()
    plain.backward()
    want = logprob.grad.item() * -torch.expm1(old.double()).item()
    assert leaf.grad[0, 0].item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("bound", "advantage", "spec"),
    [
        (1.25, 1.0, LossSpec(clip_high=0.25)),
        (0.75, -1.0, LossSpec(clip_low=0.25)),
        (4.0, -1.0, LossSpec(ratio_cap=4.0)),
        (3.0, -1.0, LossSpec(dual_clip=3.0)),
    ],
    ids=["1 + high", "1 - low", "ratio cap", "dual clip"],
)
def test_12_ratio_at_a_bound(
    backend: str, device: str, bound: float, advantage: float, spec: LossSpec
) -> None:
    """The loss is continuous there; its slope is the free one inside and exactly 0 outside."""
    leaf = target_logits([-0.7], device)
    ids = torch.zeros(1, dtype=torch.long, device=device)
    logprob = kernels.token_logprobs(leaf, ids, backend=backend).logprobs.detach().double()
    inwards = -1.0 if bound > 1 else 1.0
    slopes = []
    for step in (1e-9, 0.0, -1e-9):
        old = logprob - math.log(bound) - inwards * step
        out = one_loss(leaf, old, [advantage], spec, backend=backend)
        assert out.loss.item() == pytest.approx(-advantage * bound, rel=1e-6)
        slopes.append(torch.autograd.grad(out.loss, leaf)[0][0, 0].item())
    free = -advantage * bound * -math.expm1(logprob.item())
    assert slopes[0] == pytest.approx(free, rel=1e-6)
    # Which side the logarithm of the bound itself rounds to is not ours to say.
    assert slopes[1] in (slopes[0], 0.0) and slopes[2] == 0


@pytest.mark.parametrize(
    "correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_12_tokens_the_sampler_did_not_score(
    backend: str, device: str, correction: str, on_policy: bool
) -> None:
    """A NaN sampler log-prob counts as that of the policy itself."""
    batch = grpo_batch(16, 101, torch.float32, device=device)
    own = kernels.token_logprobs(batch.logits_NV, batch.token_ids_N, backend=backend).logprobs
    scored = (own if on_policy else batch.old_logprobs_N).clone()
    scored[::3] += 0.2
    unscored = scored.clone()
    unscored[1::3] = math.nan
    results = []
    for sampler in (scored, unscored):
        leaf = batch.logits_NV.clone().requires_grad_()
        out = kernels.policy_loss(
            leaf,
            batch.token_ids_N,
            None if on_policy else batch.old_logprobs_N,
            spec=LossSpec(sampler_correction=correction, sampler_high=1.5),
            rewards=batch.rewards_S,
            group_size=4,
            cu_seqlens=batch.cu_seqlens,
            sampler_logprobs=sampler,
            backend=backend,
        )
        out.loss.backward()
        results.append((out.loss.detach(), leaf.grad, torch.stack([*out.metrics.values()])))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, -1e-3, -1e-6, -1e-9])
def test_13_k3_near_the_reference(backend: str, device: str, gap: float) -> None:
    """expm1(u) - u is u^2/2 + u^3/6 + ...: never negative, right in all its digits."""
    leaf = target_logits([-0.7], device)
    ids = torch.zeros(1, dtype=torch.long, device=device)
    logprob = kernels.token_logprobs(leaf, ids, backend=backend).logprobs.detach().double()
    spec = LossSpec(kl="k3", kl_weight=1.0)
    out = one_loss(leaf, None, [0.0], spec, ref_logprobs=logprob + gap, backend=backend)
    u = (logprob + gap - logprob).item()
    assert out.loss.item() == pytest.approx(u**2 / 2 + u**3 / 6, rel=1e-5, abs=0)
    out.loss.backward()
    want = -(u + u**2 / 2) * -math.expm1(logprob.item())
    assert leaf.grad[0, 0].item() == pytest.approx(want, rel=1e-5, abs=0)


REWARDS: dict[str, tuple[Tensor, int]] = {
    "groups of one": (torch.tensor([3.0, 5.0]), 1),
    "all equal": (torch.tensor([0.1] * 7), 7),
    "all equal, odd": (torch.tensor([1e6 / 3] * 3 + [0.0, 1.0, 2.0]), 3),
    "one NaN": (torch.tensor([1.0, math.nan, 3.0, 5.0]), 4),
    "all but one NaN": (torch.tensor([math.nan, math.nan, 2.0, 7.0, 8.0, 9.0]), 3),
    "only NaN": (torch.tensor([math.nan] * 2 + [0.0, 1.0]), 2),
    "1e6 and 1e6 + 1": (torch.tensor([1e6, 1e6 + 1, 1e6, 1e6]), 4),
    "1e6 -+ 1e-3": (torch.tensor([1e6 - 1e-3, 1e6 + 1e-3, 1e6], dtype=torch.float64), 3),
    "integers": (torch.tensor([0, 3, 1, 1]), 2),
    "bfloat16": (torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.bfloat16), 4),
}


def plain_advantages(rewards: list[float], group_size: int, scale: str, eps: float) -> list[float]:
    """(R - mean) / (std + eps) without the NaN rewards, in exact sums of Python floats."""
    present = [reward for reward in rewards if not math.isnan(reward)]
    centre = math.fsum(present) / len(present)
    result: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        known = [reward for reward in group if not math.isnan(reward)]
        if len(set(known)) < 2:
            result += [0.0] * len(group)
            continue
        mean = math.fsum(known) / len(known)
        over, middle = (known, mean) if scale == "group" else (present, centre)
        variance = math.fsum((reward - middle) ** 2 for reward in over) / (len(over) - 1)
        divisor = 1.0 if scale == "none" else math.sqrt(variance) + eps
        result += [0.0 if math.isnan(reward) else (reward - mean) / divisor for reward in group]
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("name", REWARDS)
def test_19_rewards(backend: str, device: str, name: str, scale: str) -> None:
    """Raw rewards to the gradient, which with two equal logits is -advantage / 2."""
    rewards, group_size = REWARDS[name]
    num_sequences = len(rewards)
    want = torch.tensor(
        plain_advantages(rewards.double().tolist(), group_size, scale, eps=1e-6),
        dtype=torch.float64,
    )
    leaf = torch.zeros(num_sequences, 2, device=device, requires_grad=True)
    out = kernels.policy_loss(
        leaf,
        torch.zeros(num_sequences, dtype=torch.long, device=device),
        None,
        spec=LossSpec(
            surrogate="reinforce", aggregation="sum", advantage_scale=scale, advantage_eps=1e-6
        ),
        rewards=rewards.to(device),
        group_size=group_size,
        cu_seqlens=torch.arange(num_sequences + 1, device=device),
        backend=backend,
    )
    out.loss.backward()
    got = kernels.group_advantages(rewards.to(device), group_size=group_size, scale=scale, eps=1e-6)
    for advantages in (got.double(), -2 * leaf.grad[:, 0].double()):
        torch.testing.assert_close(advantages.cpu(), want, rtol=2e-6, atol=0)
        assert bool((advantages[want == 0] == 0).all())


def test_20_weight_gradient_of_many_chunks(backend: str, device: str) -> None:
    """48 chunks add up in float32: the bfloat16 result is off by its own rounding alone."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 8, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(16, 8, generator=generator).to(device, torch.bfloat16)
    ids = torch.randint(0, 16, (48,), generator=generator).to(device)
    advantages = (1 + torch.rand(48, generator=generator)).to(device)
    exact = weight.double().requires_grad_()
    logprobs = (hidden.double() @ exact.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (-advantages.double() * logprobs).sum().backward()
    leaf = weight.clone().requires_grad_()
    kernels.linear_policy_loss(
        hidden,
        leaf,
        ids,
        None,
        spec=LossSpec(surrogate="reinforce", aggregation="sum"),
        advantages=advantages,
        chunk_tokens=1,
        backend=backend,
    ).loss.backward()
    rounding = relative_error(exact.grad.bfloat16(), exact.grad)
    assert relative_error(leaf.grad, exact.grad) <= 1.01 * rounding
