"""What samples completions: the interface of the samplers in this folder.

Token ids, never text, cross from here to the update, together with the sampler's own
log-probabilities.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion."""

    token_ids: np.ndarray
    """int64 `[n]`, the token that ended it included."""
    logprobs: np.ndarray
    """float32 `[n]`: log-probability of each token under the sampler, at the sampling
    temperature and within the nucleus."""
    finish_reason: Literal["stop", "length"]
    """Ended by itself (end token or stop string), or cut at the budget."""
    weights_step: int = 0
    """Step after which the policy had the weights that sampled its first token."""


Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""A pass over full tensors under their Hugging Face names. Sharded weights are gathered on the way,
so all ranks go through it together."""


class Sampler(Protocol):
    """Samples completions from the weights it was last given. All ranks call its methods together,
    each with prompts of its own."""

    def load_weights(self, weights: Weights, step: int) -> None:
        """Takes the weights that the policy has after a step."""

    def release_memory(self) -> None:
        """Gives accelerator memory to the update; the next `load_weights` takes it back."""

    def close(self) -> None:
        """Ends what runs for it."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys_PG: np.ndarray,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Samples `keys_PG.shape[1]` completions of each prompt.

        Args:
            prompts: token ids of each prompt.
            keys_PG: uint64, the random stream of each completion (`trainer.seeds`).
            max_new_tokens: longest completion.
            temperature: 0 takes the most likely token, with its log-probability at temperature 1.
            top_p: samples from the nucleus, the fewest most likely tokens whose probabilities reach
                this; above 0. Train with 1: otherwise the log-probabilities are not the policy's.
            on_group: called with the place of a prompt and its completions when they are complete
                while others are still being sampled; for the last ones there is no need to.
        """


class AheadSampler(Sampler, Protocol):
    """A sampler that samples while its caller does something else."""

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        keys_PG: np.ndarray,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> None:
        """Starts to sample, and returns at once; `generate` with the same arguments then waits for
        the completions."""
