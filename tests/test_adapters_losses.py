"""The losses under verl's and OpenRLHF's names: ours against the equations of the papers, and
against the real losses where they are installed."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adapters import openrlhf, verl

NUM_ROWS, NUM_POSITIONS = 4, 6


def real(module: str) -> Any:
    """Another package's module; skips where it does not import."""
    return pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)


def assert_same(got: Tensor, want: Tensor, leaf: Tensor) -> None:
    """Equal losses with equal gradients."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


class LossBatch(SimpleNamespace):
    """Log-probs with ratios on both sides of every clip, some beyond any bound, a row masked."""

    old: Tensor
    new: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor


def loss_batch(*, extreme: bool = False) -> LossBatch:
    generator = torch.Generator().manual_seed(2)
    shape = (NUM_ROWS, NUM_POSITIONS)
    old = -2 + 0.3 * torch.randn(shape, generator=generator)
    step = 0.6 * torch.randn(shape, generator=generator)
    if extreme:
        step[0, 0], step[1, 1] = 25.0, -25.0
    lengths = torch.tensor([6, 3, 0, 5])
    return LossBatch(
        old=old,
        new=(old + step).requires_grad_(),
        advantages=torch.randn(shape, generator=generator),
        mask=(torch.arange(NUM_POSITIONS) < lengths[:, None]).int(),
        weights=torch.rand(shape, generator=generator) * 2,
    )


class VerlConfig(SimpleNamespace):
    """What verl's losses read of its actor config."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def verl_config(**global_batch_info: Any) -> VerlConfig:
    return VerlConfig(
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
        clip_ratio_c=2.5,
        tau_pos=1.0,
        tau_neg=1.05,
        global_batch_info=global_batch_info,
    )


MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
INFOS: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {
        "dp_size": 2,
        "batch_num_tokens": 31,
        "global_batch_size": 9,
        "loss_scale_factor": 12,
    },
}


def plain_vanilla(batch: LossBatch, mode: str, info: dict[str, Any]) -> Tensor:
    """PPO with dual clip as in the papers, aggregated by loops."""
    rows_of_losses = []
    for b in range(NUM_ROWS):
        losses = []
        for t in range(NUM_POSITIONS):
            if batch.mask[b, t]:
                ratio, advantage = (batch.new - batch.old)[b, t].exp(), batch.advantages[b, t]
                loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
                if advantage < 0:
                    loss = torch.min(loss, -2.5 * advantage)
                losses.append(loss * batch.weights[b, t])
        if losses:
            rows_of_losses.append(torch.stack(losses))
    num_tokens = info.get("batch_num_tokens", sum(len(row) for row in rows_of_losses))
    num_rows = info.get("global_batch_size", len(rows_of_losses))
    total = torch.cat(rows_of_losses).sum()
    result = {
        "token-mean": total / num_tokens,
        "token-sum": total,
        "seq-mean-token-sum": total / num_rows,
        "seq-mean-token-sum-norm": total / num_rows / info.get("loss_scale_factor", NUM_POSITIONS),
        "seq-mean-token-mean": torch.stack([row.mean() for row in rows_of_losses]).sum() / num_rows,
    }[mode]
    return result * info.get("dp_size", 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", INFOS)
def test_verl_vanilla_matches_the_papers(mode: str, info: str) -> None:
    batch = loss_batch()
    got, _ = verl.compute_policy_loss_vanilla(
        batch.old,
        batch.new,
        batch.advantages,
        batch.mask,
        mode,
        verl_config(**INFOS[info]),
        batch.weights,
    )
    assert_same(got, plain_vanilla(batch, mode, INFOS[info]), batch.new)


def test_verl_gspo_gives_each_token_its_own_gradient() -> None:
    batch = loss_batch()
    mode = "seq-mean-token-sum"
    got, _ = verl.compute_policy_loss_gspo(
        batch.old, batch.new, batch.advantages, batch.mask, mode, verl_config()
    )
    (gradient,) = torch.autograd.grad(got, batch.new)
    log_ratio = ((batch.new - batch.old) * batch.mask).sum(1, keepdim=True)
    ratio = (log_ratio / batch.mask.sum(1, keepdim=True).clamp(min=1)).exp()
    binds = torch.where(batch.advantages > 0, ratio > 1.3, ratio < 0.8)
    wanted = -(ratio * batch.advantages).masked_fill(binds, 0.0) * batch.mask / 3
    torch.testing.assert_close(gradient, wanted)
    assert binds.any() and not binds.all()


def test_verl_sapo_and_cispo_match_the_papers() -> None:
    batch = loss_batch()
    active = batch.mask.bool()
    ratio = (batch.new - batch.old).exp()
    arguments = (batch.old, batch.new, batch.advantages, batch.mask, "token-mean", verl_config())
    weights = ratio.detach().clamp(0.8, 1.3)
    wanted = -(weights * batch.advantages * batch.new)[active].mean()
    assert_same(verl.compute_policy_loss_cispo(*arguments)[0], wanted, batch.new)
    tau = 1 + 0.05 * (batch.advantages <= 0)
    losses = -4 / tau / (1 + (-tau * (ratio - 1)).exp()) * batch.advantages
    wanted = torch.stack([losses[b][active[b]].mean() for b in (0, 1, 3)]).mean()
    assert_same(verl.compute_policy_loss_sapo(*arguments)[0], wanted, batch.new)


@pytest.mark.parametrize("name", verl.POLICY_LOSSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", INFOS)
def test_verl_losses_match_verl(name: str, mode: str, info: str) -> None:
    real("verl.trainer.ppo.core_algos")
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_high=0.3,
        clip_ratio_c=2.5,
        global_batch_info=INFOS[info],
    )
    batch = loss_batch(extreme=True)
    verl.register_policy_losses()
    results = [
        get_policy_loss_fn(registered)(
            old_log_prob=batch.old,
            log_prob=batch.new,
            advantages=batch.advantages,
            response_mask=batch.mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=batch.weights if info == "global" else None,
        )
        for registered in (f"onepass_{name}", name)
    ]
    (got, got_metrics), (want, want_metrics) = results
    assert_same(got, want, batch.new)
    assert got_metrics == pytest.approx(want_metrics, rel=1e-5)
    parameters = inspect.signature(get_policy_loss_fn(name)).parameters
    ours = inspect.signature(verl.POLICY_LOSSES[name]).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in parameters.values()
    ]


@pytest.mark.parametrize("name", verl.POLICY_LOSSES)
def test_verl_losses_do_not_see_masked_slots(name: str) -> None:
    batch = loss_batch()
    arguments = {"response_mask": batch.mask, "config": verl_config()}
    function = verl.POLICY_LOSSES[name]
    clean = function(batch.old, batch.new, batch.advantages, **arguments)
    hidden = batch.mask == 0
    old, advantages = (
        values.masked_fill(hidden, torch.nan) for values in (batch.old, batch.advantages)
    )
    new = batch.new.detach().masked_fill(hidden, torch.inf).requires_grad_()
    loss, metrics = function(old, new, advantages, **arguments)
    assert loss == clean[0] and metrics == clean[1]
    (gradient,) = torch.autograd.grad(loss, new)
    assert not gradient[hidden].any()
    assert torch.equal(gradient, torch.autograd.grad(clean[0], batch.new)[0])


def test_verl_refusals_are_one_sentence() -> None:
    batch = loss_batch()
    arguments = (batch.old, batch.new, batch.advantages, batch.mask)
    with pytest.raises(ValueError, match="^loss_agg_mode: expected one of .*, got 'mean'$"):
        verl.compute_policy_loss_vanilla(*arguments, "mean", verl_config())
    with pytest.raises(ValueError, match="batch_num_tokens.*expected a count, got None"):
        verl.compute_policy_loss_vanilla(*arguments, "token-mean", verl_config(dp_size=2))


def openrlhf_forward(
    kind: Callable[..., Any], batch: LossBatch, options: dict[str, Any], info: dict[str, Any]
) -> tuple[Any, ...]:
    return kind(clip_eps_high=0.3, **options)(
        batch.new,
        batch.old,
        batch.advantages,
        action_mask=batch.mask,
        rollout_log_probs=batch.old - batch.weights.log(),
        **info,
    )


OPENRLHF_OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dual-clip": {"dual_clip": 2.5},
    "sequence-mean": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo"},
    "gspo-corrected": {"policy_loss_type": "gspo", "is_correction_level": "token"},
    "token-mask": {"is_correction_level": "token"},
    "token-clip": {"is_correction_level": "token", "is_correction_mode": "clip"},
    "sequence-mask": {"is_correction_level": "seq", "is_correction_threshold": (0.6, 1.2)},
}
OPENRLHF_INFOS: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {"dp_size": 2, "batch_num_tokens": 31.0, "global_batch_size": 9.0},
}


@pytest.mark.parametrize("name", OPENRLHF_OPTIONS)
@pytest.mark.parametrize("info", OPENRLHF_INFOS)
def test_openrlhf_policy_loss_matches_openrlhf(name: str, info: str) -> None:
    theirs = real("openrlhf.models.loss").PolicyLoss
    batch = loss_batch(extreme=True)
    # Its sequence gate divides by the length, so its loss is NaN with a row of length 0.
    batch.mask[2, 0] = 1
    got, want = (
        openrlhf_forward(kind, batch, OPENRLHF_OPTIONS[name], OPENRLHF_INFOS[info])
        for kind in (openrlhf.PolicyLoss, theirs)
    )
    assert_same(got[0], want[0], batch.new)
    torch.testing.assert_close(got[1:], want[1:])
    for method in ("__init__", "forward"):
        ours, other = (
            [
                (p.name, p.default)
                for p in inspect.signature(getattr(kind, method)).parameters.values()
            ]
            for kind in (openrlhf.PolicyLoss, theirs)
        )
        assert ours == other


@pytest.mark.parametrize("info", OPENRLHF_INFOS)
def test_openrlhf_ppo_with_masked_correction_matches_the_papers(info: str) -> None:
    batch, given = loss_batch(), OPENRLHF_INFOS[info]
    # Rollout log-probs that make the batch's weights the importance weights; the gate is 0.5 to 5.
    got = openrlhf_forward(
        openrlhf.PolicyLoss,
        batch,
        {"dual_clip": 2.5, "is_correction_level": "token"},
        given,
    )
    outside = batch.weights < 0.5
    batch.weights = batch.weights.masked_fill(outside, 0.0)
    assert_same(got[0], plain_vanilla(batch, "token-mean", given), batch.new)
    active = batch.mask.bool()
    torch.testing.assert_close(got[4], outside[active].float().mean())


def test_openrlhf_gspo_matches_the_paper() -> None:
    batch = loss_batch()
    got = openrlhf_forward(openrlhf.PolicyLoss, batch, {"policy_loss_type": "gspo"}, {})
    rows_of_losses = []
    for b in (0, 1, 3):
        active = batch.mask[b].bool()
        ratio = (batch.new - batch.old)[b][active].mean().exp()
        advantages = batch.advantages[b][active]
        rows_of_losses.append(
            -torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages).mean()
        )
    assert_same(got[0], torch.stack(rows_of_losses).mean(), batch.new)
    assert got[3] is None and got[4] is None


@pytest.mark.parametrize(
    "options",
    [
        {"policy_loss_type": "a2c"},
        {"is_correction_level": "row"},
        {"is_correction_mode": "drop"},
        {"is_correction_level": "token", "is_correction_gating": "tv"},
        {"is_correction_level": "seq", "is_correction_mode": "clip"},
        {"dual_clip": 0.5},
    ],
    ids=str,
)
def test_openrlhf_option_that_is_not_computed_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{list(options)[-1]}: expected .*, got ") as refusal:
        openrlhf.PolicyLoss(**options)
    assert "\n" not in str(refusal.value)


def test_openrlhf_correction_needs_rollout_logprobs() -> None:
    batch = loss_batch()
    with pytest.raises(ValueError, match="rollout_log_probs: expected a tensor"):
        openrlhf.PolicyLoss(is_correction_level="token")(batch.new, batch.old, batch.advantages)
