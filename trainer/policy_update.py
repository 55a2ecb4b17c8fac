"""The update: from scored completions to new weights.

Every rank sees all samples of the step. Minibatches are drawn from all of them, and each is dealt
out to the ranks by length; so neither the number of ranks nor the size of the micro-batches changes
what is computed, only its rounding.

Shapes: N packed completion tokens, D model width, V vocabulary (W this rank's rows of it).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

import kernels
from trainer.config import TrainConfig
from trainer.fsdp import World, gather_in_order, max_over_ranks, sum_over_ranks
from trainer.host_memory import return_free_memory
from trainer.packing import (
    NO_SAMPLE,
    MicroBatch,
    UpdateSample,
    micro_batches_of_rank,
    pack_targets,
    pack_tokens,
)
from trainer.parity import HeadCheck
from trainer.policy import Policy
from trainer.seeds import derive_key, derive_shuffle
from trainer.weight_update import scheduled_learning_rate, update_weights

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
LARGEST_GAP = "sampler/logprob_gap_max"


class PolicyUpdate:
    """Updates a policy from the samples of a step.

    Args:
        policy: sharded already; its weights are updated in place.
        reference: frozen, sharded like the policy; needed if the loss has a KL term, unless the
            policy has adapters: then it is the policy without them.
        optimizer: of what the policy trains (`make_optimizer`).
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
        """Makes the step's updates; returns its metrics: means over tokens and updates, and the
        largest gap between the log-probabilities of sampler and trainer.

        A minibatch without samples makes no update, a step without any has no metrics.

        Raises:
            NonFiniteError, ParityError: a loss or gradient is not finite, or is not what float64
                says it is; the weights are those before that update.

        Collectives: those of the sharded forward and backward, and a few small ones per update.
        """
        if not samples:
            return {}
        if self.policy.returns_memory:
            # What sampling left free in the heap is in pieces that fit nothing here.
            return_free_memory()
        old = self._old_logprobs(samples)
        ref = self._ref_logprobs(samples)
        options = self.config.optimizer
        per_update = []
        for epoch in range(options.inner_epochs):
            order = derive_shuffle(len(samples), self.config.seed, "minibatches", step, epoch)
            for part in range(options.minibatches):
                bounds = [len(order) * edge // options.minibatches for edge in (part, part + 1)]
                number = (epoch * options.minibatches) + part
                if chosen := order[slice(*bounds)]:
                    per_update.append(self._update(samples, chosen, old, ref, step, number))
        return _over_updates(per_update)

    def _old_logprobs(self, samples: Sequence[UpdateSample]) -> list[np.ndarray] | None:
        """Log-probabilities that ratios are relative to, float32 `[n]` each; None stands for those
        of the one update there is."""
        if self.config.old_is_sampler:
            return [sample.sampler_logprobs for sample in samples]
        return None if self.config.on_policy else self._logprobs(self.policy, samples)

    def _ref_logprobs(self, samples: Sequence[UpdateSample]) -> list[np.ndarray] | None:
        """Log-probabilities under the reference, float32 `[n]` each; None where there is none."""
        if self.reference is not None:
            return self._logprobs(self.reference, samples)
        if self.policy.adapters is None or not self.spec.kl_weight:
            return None
        with self.policy.adapters.disabled():
            return self._logprobs(self.policy, samples)

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
        sums = torch.zeros(1 + len(TOKEN_MEANS), dtype=torch.float64, device=self.world.device)
        largest_gap = torch.zeros((), device=self.world.device)
        check = self._head_check(step, number)
        parity: dict[str, float] = {}
        for batch in self._plan(samples, chosen):
            result = self._backward(samples, batch, old, ref, tokens, len(chosen), check)
            if check is not None:
                parity = check.compare(step)
                check = None
            means = torch.stack([result.metrics[name] for name in TOKEN_MEANS])
            largest_gap = torch.maximum(largest_gap, result.metrics["sampler/gap_max"])
            # With a sharded head every rank measures the same tokens.
            if self.policy.vocab is None or self.world.is_main:
                sums[0] += result.loss.detach()
                sums[1:] += means * result.metrics["tokens"]
        loss, *totals = sum_over_ranks(self.world, sums).tolist()
        updated = update_weights(
            self.policy.trained(),
            self.optimizer,
            step=step,
            loss=loss,
            learning_rate=self._learning_rate(step, number),
            max_grad_norm=self.config.optimizer.max_grad_norm,
            keeps_gradients=self.policy.keeps_gradients,
        )
        named = zip(TOKEN_MEANS.values(), totals, strict=True)
        metrics = {name: total / tokens for name, total in named}
        metrics[LARGEST_GAP] = max_over_ranks(self.world, largest_gap).item()
        return metrics | parity | updated

    def _learning_rate(self, step: int, number: int) -> float:
        options = self.config.optimizer
        per_step = options.minibatches * options.inner_epochs
        return scheduled_learning_rate(
            options,
            (step - 1) * per_step + number + 1,
            updates=options.updates,
            least=options.min_learning_rate,
        )

    def _backward(
        self,
        samples: Sequence[UpdateSample],
        batch: MicroBatch,
        old: list[np.ndarray] | None,
        ref: list[np.ndarray] | None,
        tokens: int,
        sequences: int,
        check: HeadCheck | None = None,
    ) -> kernels.PolicyLoss:
        policy_loss = check or partial(
            kernels.linear_policy_loss, spec=self.spec, vocab=self.policy.vocab
        )
        targets = pack_targets(_samples(samples, batch.head), self.world.device)
        denominators = {"token_mean": tokens, "sum": None}

        def head(hidden_ND: Tensor, weight_WD: Tensor, bias_W: Tensor | None) -> kernels.PolicyLoss:
            return policy_loss(
                hidden_ND,
                weight_WD,
                targets.target_ids_N,
                self._packed(old, batch.head),
                bias=bias_W,
                advantages=targets.advantages_S,
                cu_seqlens=targets.cu_seqlens,
                ref_logprobs=self._packed(ref, batch.head),
                sampler_logprobs=targets.sampler_logprobs_N,
                temperature=self.config.rollout.temperature,
                softcap=self.policy.softcap,
                denominator=denominators.get(self.spec.aggregation, sequences),
                backend=self.config.backend,
            )

        packed = pack_tokens(_samples(samples, batch.own), self.world.device)
        result = self.policy(packed, head, batch.rows_of_ranks)
        result.loss.backward()
        return result

    def _head_check(self, step: int, number: int) -> HeadCheck | None:
        """What checks the first micro-batch of an update against float64, in the steps that do."""
        every = self.config.parity_every
        if every == 0 or (step - 1) % every:
            return None
        seed = derive_key(self.config.seed, "parity", step, number)
        return HeadCheck(self.spec, self.policy.vocab, self.world, seed)

    @torch.no_grad()
    def _logprobs(self, model: Policy, samples: Sequence[UpdateSample]) -> list[np.ndarray]:
        """Log-probabilities of all samples' tokens, float32 `[n]` each, on every rank."""
        mine: list[tuple[int, np.ndarray]] = []
        for batch in self._plan(samples, range(len(samples))):
            targets = pack_targets(_samples(samples, batch.head), self.world.device)

            def head(
                hidden_ND: Tensor,
                weight_WD: Tensor,
                bias_W: Tensor | None,
                target_ids_N: Tensor = targets.target_ids_N,
            ) -> Tensor:
                return kernels.linear_token_logprobs(
                    hidden_ND,
                    weight_WD,
                    target_ids_N,
                    bias=bias_W,
                    temperature=self.config.rollout.temperature,
                    softcap=model.softcap,
                    vocab=model.vocab,
                    backend=self.config.backend,
                ).logprobs

            packed = pack_tokens(_samples(samples, batch.own), self.world.device)
            logprobs_N = model(packed, head, batch.rows_of_ranks).float().cpu().numpy()
            pieces = np.split(logprobs_N, targets.cu_seqlens[1:-1].tolist())
            mine += [
                (index, piece)
                for index, piece in zip(batch.head, pieces, strict=True)
                if index is not None and index in batch.own
            ]
        # The whole weights of the root are not the sharded ones that are saved and copied.
        model.reshard()
        by_index = dict(gather_in_order(self.world, mine))
        return [by_index[index] for index in range(len(samples))]

    def _plan(self, samples: Sequence[UpdateSample], chosen: Sequence[int]) -> list[MicroBatch]:
        """This rank's micro-batches of the chosen samples."""
        return micro_batches_of_rank(
            samples,
            chosen,
            self.world,
            self.config.optimizer.micro_batch_tokens,
            shares_head=self.policy.vocab is not None,
        )

    def _packed(
        self, per_sample: list[np.ndarray] | None, indices: Sequence[int | None]
    ) -> Tensor | None:
        if per_sample is None:
            return None
        nothing = NO_SAMPLE.sampler_logprobs
        pieces = [nothing if index is None else per_sample[index] for index in indices]
        return torch.from_numpy(np.concatenate(pieces)).to(self.world.device)


def _samples(samples: Sequence[UpdateSample], indices: Sequence[int | None]) -> list[UpdateSample]:
    return [NO_SAMPLE if index is None else samples[index] for index in indices]


def _over_updates(per_update: Sequence[dict[str, float]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {
        name: sum(metrics[name] for metrics in per_update) / len(per_update)
        for name in per_update[0]
    }
    return means | {LARGEST_GAP: max(metrics[LARGEST_GAP] for metrics in per_update)}
