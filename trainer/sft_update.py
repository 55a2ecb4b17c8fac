"""The update of supervised fine-tuning: the mean cross entropy of a batch's completion tokens.

The mean is over the tokens of the whole batch, so neither the number of ranks nor the size of the
micro-batches changes what is computed, only its rounding.

Shapes: N packed completion tokens, D model width, W rows of the output layer on this rank.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import kernels
from trainer.fsdp import World, sum_over_ranks
from trainer.packing import (
    NO_SAMPLE,
    TokenSequence,
    micro_batches_of_rank,
    pack_token_ids,
    pack_tokens,
)
from trainer.policy import Policy
from trainer.sft_config import SftConfig
from trainer.weight_update import scheduled_learning_rate, update_weights


class SupervisedUpdate:
    """Updates a policy from the sequences of a step.

    Args:
        policy: sharded already; its weights are updated in place.
        optimizer: of the policy's parameters.
        config: of the run.
        world: the ranks it is sharded over.
        total_steps: of the run, for the schedule.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        config: SftConfig,
        world: World,
        total_steps: int,
    ) -> None:
        self.policy, self.optimizer, self.config = policy, optimizer, config
        self.world, self.total_steps = world, total_steps

    def __call__(self, sequences: Sequence[TokenSequence], step: int) -> dict[str, float | None]:
        """Makes the update of a step, from 1; returns its metrics.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; the weights are those before.

        Collectives: those of the sharded forward and backward, and two small ones.
        """
        tokens = count_tokens(sequences)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for part in self._losses(sequences):
            (part / tokens).backward()
            total += self._counted(part.detach())
        options = self.config.optimizer
        learning_rate = scheduled_learning_rate(
            options, step, updates=self.total_steps, least=options.least_learning_rate
        )
        updated = update_weights(
            self.policy.trained(),
            self.optimizer,
            step=step,
            loss=sum_over_ranks(self.world, total).item() / tokens,
            learning_rate=learning_rate,
            max_grad_norm=options.max_grad_norm,
            keeps_gradients=self.policy.keeps_gradients,
        )
        return {**updated, "tokens": float(tokens)}

    @torch.no_grad()
    def mean_loss(self, sequences: Sequence[TokenSequence]) -> float:
        """The loss of sequences that are not learned from.

        Collectives: those of the sharded forward, and a small one.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for part in self._losses(sequences):
            total += self._counted(part)
        # The whole weights of the root are not the sharded ones that are saved.
        self.policy.reshard()
        return sum_over_ranks(self.world, total).item() / count_tokens(sequences)

    def _losses(self, sequences: Sequence[TokenSequence]) -> Iterator[Tensor]:
        """Of each of this rank's micro-batches the sum over its tokens, a 0-d float64 tensor."""
        batches = micro_batches_of_rank(
            sequences,
            range(len(sequences)),
            self.world,
            self.config.optimizer.micro_batch_tokens,
            shares_head=self.policy.vocab is not None,
        )
        for batch in batches:
            own, in_head = (
                [NO_SAMPLE if index is None else sequences[index] for index in indices]
                for indices in (batch.own, batch.head)
            )
            token_ids_N = pack_token_ids(in_head, self.world.device)

            def head(
                hidden_ND: Tensor,
                weight_WD: Tensor,
                bias_W: Tensor | None,
                token_ids_N: Tensor = token_ids_N,
            ) -> Tensor:
                return kernels.linear_token_logprobs(
                    hidden_ND,
                    weight_WD,
                    token_ids_N,
                    bias=bias_W,
                    softcap=self.policy.softcap,
                    vocab=self.policy.vocab,
                    backend=self.config.backend,
                ).logprobs

            packed = pack_tokens(own, self.world.device)
            yield -self.policy(packed, head, batch.rows_of_ranks).double().sum()

    def _counted(self, part: Tensor) -> Tensor:
        """With a sharded head every rank has the sum over all; one of them counts."""
        is_counted = self.policy.vocab is None or self.world.is_main
        return part if is_counted else torch.zeros_like(part)


def count_tokens(sequences: Sequence[TokenSequence]) -> int:
    """Completion tokens."""
    return sum(len(one.token_ids) for one in sequences)
