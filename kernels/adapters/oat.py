"""oat's fused LM head (oat/utils/lm_head.py, read at commit eb88ce4).

    from kernels.adapters.oat import FusedLinear

Shape legend: `common.py`.
"""

import torch
from torch import Tensor

from kernels.adapters.common import head_logprobs


class FusedLinear(torch.nn.Module):
    """Log-probs and entropy of tokens from hidden states and the LM-head weight.

    Unlike oat's, both are float32 and logits are never rounded to the dtype of the hidden states.
    """

    def __init__(self, chunk_size: int = 512, compute_entropy: bool = True) -> None:
        """
        Args:
            chunk_size: tokens whose logits exist at a time.
            compute_entropy: whether the entropy carries a gradient. oat returns a placeholder
                without; here it is the entropy either way.
        """
        super().__init__()
        self.chunk_size = chunk_size
        self.compute_entropy = compute_entropy

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: [N, D] or [B, T, D].
            vocab_weights: [V, D].
            input_ids: integers [N] or [B, T], the tokens that the hidden states predict.
            temperature: above 0; divides the logits.

        Returns:
            Log-probs and entropy in nats, float32, shaped like `input_ids`.

        Raises:
            ValueError, TypeError: an argument does not fit.
        """
        out = head_logprobs(
            hidden_states,
            vocab_weights,
            None,
            input_ids.long(),
            temperature=temperature,
            chunk_tokens=self.chunk_size,
        )
        assert out.entropy is not None
        return out.logprobs, out.entropy if self.compute_entropy else out.entropy.detach()
