"""The policy: a transformers model whose logits never exist beyond a chunk of tokens.

Its forward ends at the LM head: what is computed there (a loss, log-probabilities) is handed in and
gets the hidden states and the head's weight, which is how the head stays fused and sharded.

Shapes: N completion tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from kernels import VocabShard
from trainer.attention import PACKED
from trainer.config import ShardingOptions
from trainer.cpu_layers import LEAST_WIDTH, keeps_gradients, use_lean_embedding, use_lean_layers
from trainer.fsdp import World, shard_head, shard_model
from trainer.host_memory import return_free_memory
from trainer.lora import Adapters
from trainer.packing import PackedTokens
from trainer.stored_tensors import local_part

T = TypeVar("T")


class Policy(nn.Module):
    """A transformers model over packed token ids, whole until `shard`.

    Args:
        model: attends to packed sequences only from here on.
        adapters: those in the model, None where its weights are trained.
    """

    def __init__(self, model: PreTrainedModel, adapters: Adapters | None = None) -> None:
        super().__init__()
        model.set_attn_implementation(PACKED)
        self.model, self.adapters = model, adapters
        self.vocab: VocabShard | None = None
        self.keeps_gradients = False
        # Of the heap, between passes that leave it in pieces; it costs a small model too much time.
        self.returns_memory = False
        # Checkpointing makes all of a layer again, and would have to keep what this needs.
        self.pads_again = True

    def forward(
        self,
        tokens: PackedTokens,
        head: Callable[[Tensor, Tensor, Tensor | None], T],
        rows_of_ranks: Sequence[int] = (),
    ) -> T:
        """What `head` returns for the hidden states [N, D] before the completion tokens, and the
        weight and bias of the output layer.

        With a sharded head these are the states of all ranks in order, `rows_of_ranks` of each, and
        this rank's rows of the weight.

        Collectives: with a sharded head, an all-gather of the states.
        """
        hidden_1TD = self.model.get_decoder()(
            input_ids=tokens.token_ids_T[None],
            position_ids=tokens.packing.positions_T[None],
            use_cache=False,
            packing=tokens.packing,
            pads_again=self.pads_again,
        ).last_hidden_state
        hidden_ND = hidden_1TD[0].index_select(0, tokens.target_positions_N)
        if self.returns_memory and torch.is_grad_enabled():
            # What the layers left free lies between what they keep, and is too small for the head.
            return_free_memory()
        output = self.model.get_output_embeddings()
        weight, bias = output.weight, output.bias
        if self.vocab is not None:
            hidden_ND = _GatherRows.apply(hidden_ND, rows_of_ranks, self.vocab.group)
            weight = local_part(weight).to(hidden_ND.dtype)
            bias = None if bias is None else local_part(bias).to(hidden_ND.dtype)
        return head(hidden_ND, weight, bias)

    def shard(self, world: World, dtype: torch.dtype, options: ShardingOptions) -> None:
        """Shards the weights over the ranks, a decoder layer at a time; computes in `dtype`.

        Raises:
            UsageError: options that this model or this number of ranks cannot have.
        """
        layers = list(self.model.get_decoder().layers)
        if options.activation_checkpointing:
            self.pads_again = False
            self._enable_checkpointing({"use_reentrant": False})
            for layer in layers:
                # A layer recomputes itself in training mode only; its dropout stays off.
                layer.training = True
        is_float32_on_cpu = world.device.type == "cpu" and dtype == torch.float32
        if is_float32_on_cpu and not options.activation_checkpointing:
            use_lean_layers(self.model)
        width, on = self.model.config.get_text_config().hidden_size, world.device.type
        self.returns_memory = on == "cpu" and width >= LEAST_WIDTH
        self.keeps_gradients = keeps_gradients(width, dtype.itemsize, on, world.size)
        if self.keeps_gradients:
            use_lean_embedding(self.model)
        if options.shard_head:
            self.vocab = shard_head(self.model, world)
        shard_model(self, layers, world, dtype, options)

    def _enable_checkpointing(self, options: dict[str, bool]) -> None:
        # The name until transformers 5.19, which later versions warn of.
        old = self.model.gradient_checkpointing_enable
        getattr(self.model, "activation_checkpointing_enable", old)(options)

    def reshard(self) -> None:
        """Frees the whole weights of the root, which only a backward would free by itself."""
        if isinstance(self, FSDPModule):
            FSDPModule.reshard(self)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """Hugging Face names and the weights, adapters merged into them, sharded where the policy
        is.

        Collectives: with adapters, those of `Adapters.merged_weights`.
        """
        if self.adapters is not None:
            return self.adapters.merged_weights()
        return self.model.named_parameters()

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What updates change, by the names it has in the model."""
        named = self.model.named_parameters()
        return [(name, weight) for name, weight in named if weight.requires_grad]

    @torch.no_grad()
    def copy_weights(self, other: "Policy") -> None:
        """Takes the weights of a policy of the same shape and sharding."""
        for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            mine.copy_(theirs)

    @property
    def softcap(self) -> float:
        """Tanh soft cap of the final logits, 0 for none."""
        return getattr(self.model.config, "final_logit_softcapping", None) or 0.0


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks in order; their gradient, which each rank has whole, goes back as a part.

    Collectives: one all-gather in forward, none in backward.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_nD: Tensor,
        rows_of_ranks: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        rank, most = dist.get_rank(group), max(rows_of_ranks)
        start = sum(rows_of_ranks[:rank])
        ctx.own = slice(start, start + rows_of_ranks[rank])  # type: ignore[attr-defined]
        # A collective wants parts of one size.
        padded_mD = nn.functional.pad(hidden_nD, (0, 0, 0, most - len(hidden_nD)))
        parts = [torch.empty_like(padded_mD) for _ in rows_of_ranks]
        dist.all_gather(parts, padded_mD, group=group)
        return torch.cat([part[:rows] for part, rows in zip(parts, rows_of_ranks, strict=True)])

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_ND: Tensor
    ) -> tuple[Tensor, None, None]:
        return grad_ND[ctx.own], None, None  # type: ignore[attr-defined]
