"""Checks of the arguments of `ops`, and their canonical forms.

Each failure is one sentence, "name: expected X, got Y". Values that lie on a GPU (token ids,
offsets, temperatures) are checked there, without a host sync: a wrong one stops the device with an
assertion, as in PyTorch's own indexing. Shape legend: `ops.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.advantages import segment_index
from kernels.arguments import HeadArguments, LossArguments, RowArguments
from kernels.backends import select_backend
from kernels.linear_head import HeadSettings
from kernels.passes import Scaling
from kernels.reference import IGNORED, compute_dtype
from kernels.sharding import VocabShard, check_plain_tensors, localize
from kernels.spec import LossSpec
from kernels.token_loss import TokenBatch


class Rows(NamedTuple):
    """The tokens of a call."""

    token_ids_N: Tensor
    """int64 global ids; masked tokens are IGNORED."""
    shape: torch.Size
    """Of the caller's token ids."""

    @property
    def row_tokens(self) -> int | None:
        """Tokens of each row of a padded batch; None for packed tokens."""
        return self.shape[1] if len(self.shape) == 2 else None


def known_width(logits: Tensor, vocab: VocabShard | None) -> int | None:
    """The size of the vocabulary, where this rank holds all of it."""
    return logits.shape[-1] if vocab is None else None


def flat(values: Tensor) -> Tensor:
    """A tensor a token as [N]."""
    return values if values.dim() == 1 else values.reshape(-1)


def like_tokens(values_N: Tensor, rows: Rows) -> Tensor:
    """[N] in the shape of the caller's token ids."""
    return values_N if len(rows.shape) == 1 else values_N.view(rows.shape)


def checked_rows(
    features: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    vocab: VocabShard | None,
    num_columns: int | None,
) -> Rows:
    """Flat token ids that fit `features` (logits or hidden states), masked ones IGNORED.

    `num_columns` bounds the ids; None where only the process group knows the vocabulary.
    """
    if features.dim() not in (2, 3) or features.shape[-1] == 0:
        raise ValueError(
            "logits or hidden: expected shape [N, width] or [B, T, width] with width > 0, "
            f"got {list(features.shape)}"
        )
    check_like_tokens("token_ids", token_ids, features.shape[:-1])
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token_ids: expected dtype int64 or int32, got {token_ids.dtype}")
    if vocab is not None and features.shape[-1] < vocab.width:
        raise ValueError(
            f"logits: expected at least the {vocab.width} columns of the vocabulary shard, "
            f"got {features.shape[-1]}"
        )
    token_ids_N = flat(token_ids).long()
    if mask is not None:
        check_like_tokens("mask", mask, token_ids.shape)
        token_ids_N = torch.where(flat(mask).bool(), token_ids_N, IGNORED)
    check_id_range(token_ids_N, num_columns)
    return Rows(token_ids_N, token_ids.shape)


def require(holds: Tensor, name: str, message: Callable[[], str]) -> None:
    """Raises ValueError with the message unless a 0-d condition holds; see the module's text."""
    if holds.device.type == "cpu":
        if not holds:
            raise ValueError(f"{name}: {message()}")
    else:
        torch._assert_async(holds, f"{name}: a value is out of range")


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    """Where the tensors lie is checked before a custom op sees them, which is chosen by it."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_float32_on_cpu(**tensors: Tensor | None) -> None:
    """For what has C++ kernels in one type only."""
    for name, tensor in tensors.items():
        if tensor is None or (tensor.dtype, tensor.device.type) == (torch.float32, "cpu"):
            continue
        raise ValueError(f"{name}: expected float32 on cpu, got {tensor.dtype} on {tensor.device}")


def check_contiguous(**tensors: Tensor | None) -> None:
    """For tensors that are read where they lie."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def checked_layout(logits: Tensor, inplace: bool = False) -> Tensor:
    """Logits as [outer, inner, W] with contiguous rows; a layout without them is copied once."""
    logits_OIW = logits.unsqueeze(0) if logits.dim() == 2 else logits
    if logits.is_contiguous():
        return logits_OIW
    overlaps = any(
        size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)
    )
    scattered = logits.stride(-1) != 1 and logits.shape[-1] > 1
    if not (overlaps or scattered):
        return logits_OIW
    if inplace:
        raise ValueError(
            "inplace_backward: expected logits whose rows are contiguous and do not overlap, "
            f"got strides {list(logits.stride())}"
        )
    return logits_OIW.contiguous()


def checked_head(head: HeadArguments, rows: RowArguments, vocab: VocabShard | None) -> HeadSettings:
    """How the linear ops multiply and what follows."""
    hidden, weight, bias, product_dtype, chunk_tokens = head
    width, depth = (len(weight), hidden.shape[-1])
    if weight.dim() != 2 or weight.shape[1] != depth:
        raise ValueError(f"weight: expected shape [W, {depth}], got {list(weight.shape)}")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias: expected shape [{width}], got {list(bias.shape)}")
    if vocab is not None and width < vocab.width:
        raise ValueError(
            f"weight: expected at least the {vocab.width} rows of the vocabulary shard, got {width}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected a count > 0, got {chunk_tokens}")
    scaling = checked_scaling(rows.temperature, rows.token_ids, rows.softcap)
    compute = compute_dtype(hidden)
    return HeadSettings(
        inv_temperature=scaling.inv_temperature,
        softcap=scaling.softcap,
        vocab=vocab,
        backend=select_backend(rows.backend, hidden.device, compute),
        compute_dtype=compute,
        operand_dtype=product_dtype if hidden.is_cuda else compute,
        compact=not hidden.is_cuda,
    )


def checked_product_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype that hidden, weight and bias share, or autocast's if it is on and they differ.

    Asked before a custom op runs, where autocast is still what the caller set.
    """
    check_devices(hidden.device, weight=weight, bias=bias)
    check_plain_tensors(hidden=hidden, weight=weight, bias=bias)
    device, dtypes = hidden.device, {hidden.dtype}
    castable = torch.is_autocast_enabled(device.type)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        differs = tensor.dtype != hidden.dtype
        refused = differs and (not castable or torch.float64 in (tensor.dtype, hidden.dtype))
        if refused:
            raise ValueError(f"{name}: expected {hidden.dtype} like hidden, got {tensor.dtype}")
        dtypes.add(tensor.dtype)
    return hidden.dtype if len(dtypes) == 1 else torch.get_autocast_dtype(device.type)


def check_like_tokens(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def check_id_range(token_ids_N: Tensor, width: int | None) -> None:
    limit = torch.iinfo(torch.int64).max if width is None else width
    if token_ids_N.device.type == "cpu" and len(token_ids_N) > 0:
        # One pass decides the usual case.
        lowest, highest = torch.aminmax(token_ids_N)
        if lowest.item() >= 0 and highest.item() < limit:
            return
    wrong_N = ((token_ids_N < 0) & (token_ids_N != IGNORED)) | (token_ids_N >= limit)

    def message() -> str:
        first = int(wrong_N.nonzero()[0, 0])
        return (
            f"expected ids in [0, {'V' if width is None else width}) or {IGNORED}, "
            f"got {int(token_ids_N[first])} at token {first}"
        )

    require(~wrong_N.any(), "token_ids", message)


def checked_batch(
    rows: Rows, spec: LossSpec, vocab: VocabShard | None, call: LossArguments
) -> TokenBatch:
    """What the token loss reads, in canonical form."""
    check_spec_inputs(spec, call)
    offsets = checked_offsets(rows, call.cu_seqlens)
    num_sequences, advantages = len(offsets) - 1, call.advantages
    if (advantages is None) == (call.rewards is None):
        raise ValueError("advantages, rewards: expected exactly one of them")
    if call.rewards is not None:
        check_rewards(call.rewards, call.group_size, num_sequences)
    elif advantages is not None:
        if call.group_size is not None:
            raise ValueError("group_size: expected None with given advantages")
        if advantages.shape not in ((num_sequences,), rows.shape):
            raise ValueError(
                f"advantages: expected shape [{num_sequences}] or {list(rows.shape)}, "
                f"got {list(advantages.shape)}"
            )
        if advantages.shape == (num_sequences,):
            advantages = advantages[segment_index(offsets, len(rows.token_ids_N))]
        advantages = flat(advantages)
    return TokenBatch(
        token_ids_N=localize(rows.token_ids_N, vocab),
        offsets=offsets,
        old_logprobs_N=checked_logprobs("old_logprobs", call.old_logprobs, rows),
        ref_logprobs_N=checked_logprobs("ref_logprobs", call.ref_logprobs, rows),
        sampler_logprobs_N=checked_logprobs("sampler_logprobs", call.sampler_logprobs, rows),
        advantages_N=advantages,
        rewards_S=call.rewards,
        group_size=call.group_size,
        denominator=call.denominator,
    )


def checked_logprobs(name: str, logprobs: Tensor | None, rows: Rows) -> Tensor | None:
    """Given log-probs as [N]."""
    if logprobs is None:
        return None
    check_like_tokens(name, logprobs, rows.shape)
    return flat(logprobs)


def check_rewards(rewards: Tensor, group_size: int | None, num_sequences: int) -> None:
    if rewards.shape != (num_sequences,):
        raise ValueError(
            f"rewards: expected shape [{num_sequences}], one a sequence, got {list(rewards.shape)}"
        )
    if group_size is None:
        raise ValueError("group_size: expected the size of the reward groups, got None")
    check_group_size(group_size, num_sequences)


def check_spec_inputs(spec: LossSpec, call: LossArguments) -> None:
    if spec.kl != "none" and call.ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor with spec.kl={spec.kl!r}, got None")
    if spec.needs_sampler_logprobs and call.sampler_logprobs is None:
        raise ValueError(
            "sampler_logprobs: expected a tensor with spec.sampler_correction="
            f"{spec.sampler_correction!r} and spec.off_policy_threshold="
            f"{spec.off_policy_threshold!r}, got None"
        )
    if spec.aggregation == "constant" and spec.max_tokens is None:
        raise ValueError('spec.max_tokens: expected a count with aggregation "constant", got None')
    denominator = call.denominator
    if denominator is None:
        return
    if denominator.numel() != 1:
        raise ValueError(f"denominator: expected one number, got shape {list(denominator.shape)}")
    if spec.aggregation == "sum":
        raise ValueError('denominator: expected None with aggregation "sum", got one')
    require(
        (denominator > 0).all(),
        "denominator",
        lambda: f"expected a count > 0, got {denominator.item():g}",
    )


def checked_offsets(rows: Rows, cu_seqlens: Tensor | None) -> Tensor:
    device, num_tokens = rows.token_ids_N.device, len(rows.token_ids_N)
    if len(rows.shape) == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected None with padded logits [B, T, W]")
        return torch.arange(rows.shape[0] + 1, device=device) * rows.shape[1]
    if cu_seqlens is None:
        return torch.arange(2, device=device) * num_tokens
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens: expected integers [S+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    offsets = cu_seqlens.long()
    if offsets.device.type != "cpu":
        rising = (offsets.diff() >= 0).all() & (offsets[0] == 0) & (offsets[-1] == num_tokens)
        torch._assert_async(rising, "cu_seqlens: expected offsets rising to the number of tokens")
        return offsets
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens: expected offsets rising from 0 to {num_tokens}, the number of tokens, "
            f"got {bounds if len(bounds) < 9 else [*bounds[:4], '...']}"
        )
    return offsets


def check_group_size(group_size: int, num_sequences: int) -> None:
    if group_size < 1 or num_sequences % group_size:
        raise ValueError(
            f"group_size: expected a divisor of the {num_sequences} rewards, got {group_size}"
        )


def checked_scaling(temperature: Tensor, token_ids: Tensor, softcap: float) -> Scaling:
    """Inverse temperature, a number where the temperature is one on the CPU, and the soft cap."""
    if not softcap >= 0:
        raise ValueError(f"softcap: expected a number >= 0, got {softcap!r}")
    if temperature.dim() == 0 and temperature.device.type == "cpu":
        number = temperature.item()
        if not number > 0:
            raise ValueError(f"temperature: expected a number > 0, got {number!r}")
        return Scaling(1.0 / number, softcap)
    if temperature.dim() == 0:
        temperature = temperature.expand(token_ids.shape)
    check_like_tokens("temperature", temperature, token_ids.shape)
    require((temperature > 0).all(), "temperature", lambda: "expected numbers > 0 for every token")
    dtype = torch.float64 if temperature.dtype == torch.float64 else torch.float32
    return Scaling((1.0 / temperature.to(dtype)).reshape(-1), softcap)
