"""The update: from scored completions to new weights.

Every rank sees all samples of the step. Minibatches are drawn from all of them, and each is dealt
out to the ranks by length; so neither the number of ranks nor the size of the micro-batches changes
what is computed, only its rounding.

Shapes: S samples, B rows and T positions of a right-padded micro-batch, N packed completion tokens,
V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

import kernels
from trainer.config import NonFiniteError, TrainConfig
from trainer.fsdp import (
    World,
    full_tensor,
    gather_in_order,
    gradient_norm,
    shard_model,
    sum_over_ranks,
)
from trainer.seeds import derive_shuffle

BETAS = (0.9, 0.95)
IGNORED_TOKEN = -100
# Metrics of kernels.policy_loss that are means over tokens, under the names they are logged by.
TOKEN_MEANS = {
    "entropy": "entropy",
    "kl": "kl",
    "kl_old": "kl_old",
    "ratio/mean": "ratio/mean",
    "clip_fraction": "clip_fraction",
    "clip_fraction/low": "clip_fraction/low",
    "clip_fraction/high": "clip_fraction/high",
    "sampler/gap_mean": "sampler/logprob_gap_mean",
    "zero_gradient_fraction": "zero_gradient_fraction",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSample:
    """One completion as the update needs it."""

    prompt_ids: Sequence[int]
    token_ids: np.ndarray
    """int64 `[n]`, the completion."""
    sampler_logprobs: np.ndarray
    """float32 `[n]`."""
    advantage: float
    masked: bool = False
    """Its tokens are left out of the loss; as a sequence it counts on."""

    @property
    def num_positions(self) -> int:
        """Positions of its forward pass; the last token is only ever a target."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


class Policy(nn.Module):
    """A transformers model as a function from token ids to the logits of chosen positions only.

    The prompt's logits, which nothing reads, are never made.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids_BT: Tensor, positions_N: Tensor) -> Tensor:
        """Logits `[N, V]` that follow the positions `positions_N` of the flattened `[B * T]` batch.

        Padding must be on the right, where causal attention needs no mask to look past it.
        """
        hidden_BTD = self.model.get_decoder()(
            input_ids=token_ids_BT, use_cache=False
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, positions_N)
        return self.model.get_output_embeddings()(hidden_ND)

    def shard(self, world: World, dtype: torch.dtype) -> None:
        """Shards the weights over the ranks, a decoder layer at a time."""
        shard_model(self, self.model.get_decoder().layers, world, dtype)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Hugging Face names and the weights, sharded where the policy is."""
        return self.model.named_parameters()

    @torch.no_grad()
    def copy_weights(self, other: "Policy") -> None:
        """Takes the weights of a policy of the same shape and sharding."""
        for (_, mine), (_, theirs) in zip(self.weights(), other.weights(), strict=True):
            mine.copy_(theirs)

    @property
    def softcap(self) -> float:
        """Tanh soft cap of the final logits, 0 for none."""
        return getattr(self.model.config, "final_logit_softcapping", None) or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _MicroBatch:
    """Some samples, right padded, and their completion tokens, packed."""

    token_ids_BT: Tensor
    positions_N: Tensor
    target_ids_N: Tensor
    cu_seqlens: Tensor
    advantages_S: Tensor
    sampler_logprobs_N: Tensor


class PolicyUpdate:
    """Updates a policy from the samples of a step.

    Args:
        policy: sharded already; its weights are updated in place.
        reference: frozen, sharded like the policy; needed if the loss has a KL term.
        optimizer: of the policy's parameters (`make_optimizer`).
        config: of the run.
        world: the ranks it is sharded over.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        world: World,
    ) -> None:
        self.policy, self.reference, self.optimizer = policy, reference, optimizer
        self.config, self.spec, self.world = config, config.loss_spec, world

    def __call__(self, samples: Sequence[UpdateSample], step: int) -> dict[str, float | None]:
        """Makes the step's updates; returns its metrics, means over tokens or over updates.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the weights are those before that
                update.

        Collectives: those of the sharded forward and backward, and a few small ones per update.
        """
        everyone = list(range(len(samples)))
        old = None if self.config.on_policy else self._logprobs(self.policy, samples, everyone)
        ref = None if self.reference is None else self._logprobs(self.reference, samples, everyone)
        options = self.config.optimizer
        per_update = []
        for epoch in range(options.inner_epochs):
            order = derive_shuffle(len(samples), self.config.seed, "minibatches", step, epoch)
            for part in range(options.minibatches):
                bounds = [len(order) * edge // options.minibatches for edge in (part, part + 1)]
                number = (epoch * options.minibatches) + part
                per_update.append(
                    self._update(samples, order[slice(*bounds)], old, ref, step, number)
                )
        return _mean_over_updates(per_update)

    def _update(
        self,
        samples: Sequence[UpdateSample],
        chosen: Sequence[int],
        old: list[np.ndarray] | None,
        ref: list[np.ndarray] | None,
        step: int,
        number: int,
    ) -> dict[str, float]:
        # At least one, for a minibatch whose samples are all masked.
        tokens = max(1, sum(len(samples[i].token_ids) for i in chosen if not samples[i].masked))
        totals = dict.fromkeys(("loss", "tokens", *TOKEN_MEANS), 0.0)
        for indices in self._plan(samples, chosen):
            result = self._backward(samples, indices, old, ref, tokens, len(chosen))
            measured = result.metrics["tokens"].item()
            totals["loss"] += result.loss.item()
            totals["tokens"] += measured
            for name in TOKEN_MEANS:
                totals[name] += result.metrics[name].item() * measured
        totals = dict(zip(totals, sum_over_ranks(self.world, totals.values()), strict=True))
        norm = gradient_norm(self.policy.parameters())
        self._require_finite(step, totals["loss"], norm)
        nn.utils.clip_grads_with_norm_(
            self.policy.parameters(), self.config.optimizer.max_grad_norm, norm
        )
        learning_rate = self._learning_rate(step, number)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics = {TOKEN_MEANS[name]: totals[name] / tokens for name in TOKEN_MEANS}
        return metrics | {
            "loss": totals["loss"],
            "grad_norm": norm.item(),
            "learning_rate": learning_rate,
        }

    def _backward(
        self,
        samples: Sequence[UpdateSample],
        indices: Sequence[int],
        old: list[np.ndarray] | None,
        ref: list[np.ndarray] | None,
        tokens: int,
        sequences: int,
    ) -> kernels.PolicyLoss:
        batch = make_micro_batch(samples, indices, self.world.device)
        denominators = {"token_mean": tokens, "sum": None}
        result = kernels.policy_loss(
            self.policy(batch.token_ids_BT, batch.positions_N),
            batch.target_ids_N,
            _packed(old, indices, batch),
            spec=self.spec,
            advantages=batch.advantages_S,
            cu_seqlens=batch.cu_seqlens,
            ref_logprobs=_packed(ref, indices, batch),
            sampler_logprobs=batch.sampler_logprobs_N,
            temperature=self.config.rollout.temperature,
            softcap=self.policy.softcap,
            denominator=denominators.get(self.spec.aggregation, sequences),
            inplace_backward=True,
            backend=self.config.backend,
        )
        result.loss.backward()
        return result

    @torch.no_grad()
    def _logprobs(
        self, model: Policy, samples: Sequence[UpdateSample], chosen: Sequence[int]
    ) -> list[np.ndarray]:
        """Log-probabilities of the chosen samples' tokens, float32 `[n]` each, on every rank."""
        mine: list[tuple[int, np.ndarray]] = []
        for indices in self._plan(samples, chosen):
            batch = make_micro_batch(samples, indices, self.world.device)
            logprobs_N = kernels.token_logprobs(
                model(batch.token_ids_BT, batch.positions_N),
                batch.target_ids_N,
                temperature=self.config.rollout.temperature,
                softcap=model.softcap,
                backend=self.config.backend,
            ).logprobs
            pieces = np.split(logprobs_N.cpu().numpy(), batch.cu_seqlens[1:-1].tolist())
            mine += zip(indices, pieces, strict=False)
        # Without a backward to do it, the root's weights would stay whole, and be no longer the
        # sharded ones that are saved and copied.
        if isinstance(model, FSDPModule):
            model.reshard()
        by_index = dict(gather_in_order(self.world, mine))
        return [by_index[index] for index in chosen]

    def _plan(self, samples: Sequence[UpdateSample], chosen: Sequence[int]) -> list[list[int]]:
        lengths = [samples[index].num_positions for index in chosen]
        budget = self.config.optimizer.micro_batch_tokens
        plan = plan_micro_batches(lengths, self.world.size, budget)[self.world.rank]
        return [[chosen[place] for place in places] for places in plan]

    def _learning_rate(self, step: int, number: int) -> float:
        options = self.config.optimizer
        updates = (step - 1) * options.minibatches * options.inner_epochs + number + 1
        return options.learning_rate * min(1.0, updates / max(1, options.warmup_updates))

    def _require_finite(self, step: int, loss: float, norm: Tensor) -> None:
        loss_is_finite = bool(np.isfinite(loss))
        if loss_is_finite and bool(torch.isfinite(norm)):
            return
        what = f"the loss ({loss})"
        if loss_is_finite:
            named = self.policy.weights()
            names = [name for name, weight in named if self._gradient_is_broken(weight)]
            what = f"the gradient of {names[0]}" if names else f"the gradient norm ({norm.item()})"
        raise NonFiniteError(f"step {step}: expected finite values, got {what} before the update")

    def _gradient_is_broken(self, parameter: Tensor) -> bool:
        gradient = parameter.grad
        if gradient is None:
            return False
        return not bool(torch.isfinite(full_tensor(gradient)).all())


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the policy's parameters, sharded as they are."""
    return torch.optim.AdamW(
        policy.parameters(),
        lr=config.optimizer.learning_rate,
        betas=BETAS,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )


def plan_micro_batches(
    lengths_S: Sequence[int], num_ranks: int, budget_tokens: int
) -> list[list[list[int]]]:
    """Deals samples out to ranks and cuts each share into micro-batches.

    Longest first, back and forth over the ranks, so that the shares are alike; every rank gets the
    same number of micro-batches, as the collectives of a sharded model need, if need be empty ones.

    Args:
        lengths_S: positions of each sample.
        num_ranks: ranks to deal to.
        budget_tokens: most positions of a micro-batch, padding included; one sample may exceed it.

    Returns: indices into `lengths_S`, by rank and micro-batch.
    """
    order = sorted(range(len(lengths_S)), key=lambda index: -lengths_S[index])
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for place, index in enumerate(order):
        turn, rank = divmod(place, num_ranks)
        shares[rank if turn % 2 == 0 else num_ranks - 1 - rank].append(index)
    plans = []
    for share in shares:
        plan: list[list[int]] = []
        for index in share:
            # The share is in falling order, so the first of a micro-batch is its longest.
            if plan and lengths_S[plan[-1][0]] * (len(plan[-1]) + 1) <= budget_tokens:
                plan[-1].append(index)
            else:
                plan.append([index])
        plans.append(plan)
    most = max(map(len, plans))
    return [plan + [[]] * (most - len(plan)) for plan in plans]


def make_micro_batch(
    samples: Sequence[UpdateSample], indices: Sequence[int], device: torch.device
) -> _MicroBatch:
    """Pads and packs samples; no samples make a batch of one ignored token, for its collectives
    alone."""
    if not indices:
        nothing = UpdateSample(
            prompt_ids=[0],
            token_ids=np.array([IGNORED_TOKEN]),
            sampler_logprobs=np.zeros(1, dtype=np.float32),
            advantage=0.0,
        )
        return make_micro_batch([nothing], [0], device)
    chosen = [samples[index] for index in indices]
    longest = max(sample.num_positions for sample in chosen)
    token_ids_BT = np.zeros((len(chosen), longest), dtype=np.int64)
    positions = []
    for row, sample in enumerate(chosen):
        start, end = len(sample.prompt_ids), sample.num_positions
        token_ids_BT[row, :start] = sample.prompt_ids
        token_ids_BT[row, start:end] = sample.token_ids[:-1]
        positions.append(row * longest + np.arange(start - 1, end))
    lengths = [len(sample.token_ids) for sample in chosen]

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return _MicroBatch(
        token_ids_BT=on_device(token_ids_BT),
        positions_N=on_device(np.concatenate(positions)),
        target_ids_N=on_device(
            np.concatenate(
                [
                    np.full_like(sample.token_ids, IGNORED_TOKEN)
                    if sample.masked
                    else sample.token_ids
                    for sample in chosen
                ]
            )
        ),
        cu_seqlens=on_device(np.cumsum([0, *lengths], dtype=np.int32)),
        advantages_S=on_device(np.array([s.advantage for s in chosen], dtype=np.float32)),
        sampler_logprobs_N=on_device(np.concatenate([s.sampler_logprobs for s in chosen])),
    )


def _packed(
    per_sample: list[np.ndarray] | None, indices: Sequence[int], batch: _MicroBatch
) -> Tensor | None:
    if per_sample is None:
        return None
    if not indices:
        return torch.zeros_like(batch.sampler_logprobs_N)
    packed = np.concatenate([per_sample[index] for index in indices])
    return torch.from_numpy(packed).to(batch.target_ids_N.device)


def _mean_over_updates(per_update: Sequence[dict[str, float]]) -> dict[str, float | None]:
    return {
        name: sum(metrics[name] for metrics in per_update) / len(per_update)
        for name in per_update[0]
    }
