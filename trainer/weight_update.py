"""From a gradient to new weights, whatever the loss was: AdamW, its schedule, clipping, and the
check that stops a value which is not finite."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.config import NonFiniteError, UpdateOptions
from trainer.fsdp import full_tensor, gradient_norm
from trainer.policy import Policy

BETAS = (0.9, 0.95)


def make_optimizer(policy: Policy, options: UpdateOptions) -> torch.optim.AdamW:
    """AdamW over what the policy trains, sharded as it is."""
    if policy.keeps_gradients:
        for _, weight in policy.trained():
            weight.grad = torch.zeros_like(weight)
    return torch.optim.AdamW(
        [weight for _, weight in policy.trained()],
        lr=options.learning_rate,
        betas=BETAS,
        weight_decay=options.weight_decay,
        fused=True,
    )


def scheduled_learning_rate(
    options: UpdateOptions, update: int, *, updates: int, least: float
) -> float:
    """Learning rate of the `update`-th update, from 1, of `updates`, the last of which has `least`
    unless the schedule is constant."""
    if update <= options.warmup_updates:
        return options.learning_rate * update / options.warmup_updates
    if options.schedule == "constant":
        return options.learning_rate
    done = (update - options.warmup_updates) / max(1, updates - options.warmup_updates)
    left = 1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return least + (options.learning_rate - least) * left


def update_weights(
    trained: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    loss: float,
    learning_rate: float,
    max_grad_norm: float,
    keeps_gradients: bool = False,
) -> dict[str, float]:
    """Clips the gradients that are there, uses and forgets them; the metrics of the update.

    Args:
        trained: what the optimizer updates, by the names it has in the model.
        optimizer: of these parameters.
        step: of the run, for the message.
        loss: the gradient is of.
        learning_rate: of this update.
        max_grad_norm: the gradient is scaled down to this norm.
        keeps_gradients: their memory is not given back.

    Raises:
        NonFiniteError: the loss or a gradient is not finite; the weights are those before.

    Collectives: one all-reduce where the gradient is sharded.
    """
    weights = [weight for _, weight in trained]
    norm = gradient_norm(weights)
    _require_finite(trained, step, loss, norm)
    nn.utils.clip_grads_with_norm_(weights, max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keeps_gradients)
    return {"loss": loss, "grad_norm": norm.item(), "learning_rate": learning_rate}


def _require_finite(
    trained: Sequence[tuple[str, nn.Parameter]], step: int, loss: float, norm: Tensor
) -> None:
    loss_is_finite = math.isfinite(loss)
    if loss_is_finite and bool(torch.isfinite(norm)):
        return
    what = f"the loss ({loss})"
    if loss_is_finite:
        names = [name for name, weight in trained if _gradient_is_broken(weight)]
        what = f"the gradient of {names[0]}" if names else f"the gradient norm ({norm.item()})"
    raise NonFiniteError(f"step {step}: expected finite values, got {what} before the update")


def _gradient_is_broken(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    return not bool(torch.isfinite(full_tensor(gradient)).all())
