"""The `cpp` backend: hands tensors to the C++ kernels as addresses, sizes and strides.

Allocates the outputs and nothing else; `csrc/` computes. The functions have the signatures of
`kernels.backends.Backend` and leave validation to `kernels.ops`.

Shapes as in `kernels.reference`: N packed tokens, W this rank's columns of the vocabulary, S
sequences, logits_OIW a view [outer, inner, W] of the logits with N = outer * inner.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.loss_metrics import METRIC_NAMES
from kernels.native_arguments import (
    address,
    float32,
    import_extension,
    loss_spec,
    row_scale,
    view,
)
from kernels.spec import LossSpec
from kernels.token_loss import FusedLoss, TokenBatch

if TYPE_CHECKING:
    from kernels.decoder_layer import DecoderWeights

_NATIVE = import_extension("_native")


def cpp_unavailable_reason() -> str | None:
    """Why the C++ kernels cannot run in this process; None where they can."""
    return _NATIVE if isinstance(_NATIVE, str) else None


def _native() -> Any:
    if isinstance(_NATIVE, str):
        raise RuntimeError(_NATIVE)
    return _NATIVE


def row_stats(
    logits_OIW: Tensor, token_ids_N: Tensor, inv_temperature: Tensor | float, softcap: float
) -> Tensor:
    """Row maximum, sum of exp, weighted sum and target logit, float32 [4, N]; see `reference`."""
    native = _native()
    token_ids_N = token_ids_N.contiguous()
    inv_temperature = float32(inv_temperature)
    stats_4N = torch.empty(4, len(token_ids_N), dtype=torch.float32)
    native.row_stats(
        view(native, logits_OIW),
        token_ids_N.data_ptr(),
        row_scale(native, inv_temperature, softcap),
        stats_4N.data_ptr(),
        torch.get_num_threads(),
    )
    return stats_4N


def grad_logits(
    logits_OIW: Tensor,
    token_ids_N: Tensor,
    inv_temperature: Tensor | float,
    softcap: float,
    row_max_N: Tensor,
    log_sum_N: Tensor,
    entropy_N: Tensor,
    coef_logprob_N: Tensor,
    coef_entropy_N: Tensor,
    out_OIW: Tensor,
) -> None:
    """Writes the gradient of the logits to `out_OIW`, which may be the logits; see `reference`."""
    native = _native()
    token_ids_N = token_ids_N.contiguous()
    inv_temperature = float32(inv_temperature)
    inputs = [
        values_N.to(torch.float32).contiguous()
        for values_N in (row_max_N, log_sum_N, entropy_N, coef_logprob_N, coef_entropy_N)
    ]
    native.grad_logits(
        view(native, logits_OIW),
        token_ids_N.data_ptr(),
        row_scale(native, inv_temperature, softcap),
        *(values_N.data_ptr() for values_N in inputs),
        view(native, out_OIW),
        torch.get_num_threads(),
    )


def scale_(grad_OIW: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient by a 0-d factor in place; leaves it alone for a factor of 1."""
    native = _native()
    native.scale_rows(view(native, grad_OIW), factor.item(), torch.get_num_threads())


def _float64(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().to(torch.float64).contiguous()


def policy_loss(
    logits_OIW: Tensor,
    batch: TokenBatch,
    spec: LossSpec,
    inv_temperature: Tensor | float,
    softcap: float,
    out_OIW: Tensor | None,
) -> FusedLoss:
    """From raw rewards or advantages to loss, metrics and gradient, reading each row once.

    Writes d loss / d logits to `out_OIW`, which may be the logits; None leaves it out.
    """
    native = _native()
    assert native.NUM_POLICY_METRICS == len(METRIC_NAMES)
    num_tokens = len(batch.token_ids_N)
    token_ids_N, offsets = batch.token_ids_N.contiguous(), batch.offsets.contiguous()
    inv_temperature = float32(inv_temperature)
    old, ref, sampler, advantages, rewards = (
        _float64(values)
        for values in (
            batch.old_logprobs_N,
            batch.ref_logprobs_N,
            batch.sampler_logprobs_N,
            batch.advantages_N,
            batch.rewards_S,
        )
    )
    loss = torch.empty((), dtype=torch.float32)
    logprobs_N = torch.empty(num_tokens, dtype=torch.float32)
    entropy_N = torch.empty_like(logprobs_N)
    metrics = torch.empty(len(METRIC_NAMES), dtype=torch.float32)
    native.policy_loss(
        view(native, logits_OIW),
        row_scale(native, inv_temperature, softcap),
        loss_spec(native, spec),
        token_ids=token_ids_N.data_ptr(),
        offsets=offsets.data_ptr(),
        num_sequences=len(offsets) - 1,
        old_logprobs=address(old),
        ref_logprobs=address(ref),
        sampler_logprobs=address(sampler),
        advantages=address(advantages),
        rewards=address(rewards),
        group_size=batch.group_size or 0,
        denominator=0.0 if batch.denominator is None else float(batch.denominator),
        loss=loss.data_ptr(),
        logprobs=logprobs_N.data_ptr(),
        entropy=entropy_N.data_ptr(),
        metrics=metrics.data_ptr(),
        grad=None if out_OIW is None else view(native, out_OIW),
        threads=torch.get_num_threads(),
    )
    return FusedLoss(loss=loss, logprobs_N=logprobs_N, entropy_N=entropy_N, metrics=metrics)


def few_rows_linear(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """x @ weight^T + bias, float32 [..., V]; see `kernels.few_rows`."""
    native = _native()
    x = x.contiguous()
    outputs, depth = weight_VD.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    rows = x.numel() // depth if depth else 0
    native.few_rows_linear(
        x.data_ptr(),
        rows,
        weight_VD.data_ptr(),
        outputs,
        depth,
        address(bias_V),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Output like x, and 1 / rms of each row; see `kernels.layers`."""
    native = _native()
    rows, width = _rows_of(x)
    out, inverse_R = torch.empty_like(x), x.new_empty(rows)
    native.rms_norm(
        x.data_ptr(),
        rows,
        weight_D.data_ptr(),
        width,
        epsilon,
        out.data_ptr(),
        inverse_R.data_ptr(),
        torch.get_num_threads(),
    )
    return out, inverse_R


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    native = _native()
    grad = grad.contiguous()
    rows, width = _rows_of(x)
    grad_x, grad_weight_D = torch.empty_like(x), torch.empty_like(weight_D)
    native.rms_norm_backward(
        grad.data_ptr(),
        x.data_ptr(),
        rows,
        weight_D.data_ptr(),
        width,
        inverse_R.data_ptr(),
        grad_x.data_ptr(),
        grad_weight_D.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x, grad_weight_D


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up; see `kernels.layers`."""
    native = _native()
    out = torch.empty_like(gate)
    native.gated_silu(
        gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr(), torch.get_num_threads()
    )
    return out


def gated_silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    native = _native()
    grad = grad.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    native.gated_silu_backward(
        grad.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        gate.numel(),
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_gate, grad_up


def _rows_of(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return (x.numel() // width if width else 0), width


def decoder_layer(
    weights: "DecoderWeights", *, sizes: tuple[int, int, int, int], scale: float, epsilon: float
) -> Any:
    """The native layer of `kernels.decoder_layer`, which holds addresses of the weights; sizes are
    of model, query heads, key-value heads, and one head."""
    width, heads, key_value_heads, head_width = sizes
    linears = (
        weights.query,
        weights.key,
        weights.value,
        weights.output,
        weights.gate,
        weights.up,
        weights.down,
    )
    norms = (weights.attention_norm, weights.query_norm, weights.key_norm, weights.mlp_norm)
    return _native().DecoderLayer(
        width=width,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=head_width,
        inner_width=len(weights.gate.weight),
        scale=scale,
        epsilon=epsilon,
        norms=[address(norm) for norm in norms],
        linears=[(address(each.weight), address(each.bias)) for each in linears],
    )


def decode_layer(
    layer: Any,
    x_BD: Tensor,
    cosines_BC: Tensor,
    sines_BC: Tensor,
    starts_B: Tensor,
    position: int,
    keys_BKRC: Tensor,
    values_BKRC: Tensor,
) -> None:
    """See `kernels.decoder_layer.DecoderLayer`."""
    _native().decode_layer(
        layer,
        x_BD.data_ptr(),
        len(x_BD),
        cosines_BC.data_ptr(),
        sines_BC.data_ptr(),
        starts_B.data_ptr(),
        position,
        keys_BKRC.shape[2],
        keys_BKRC.data_ptr(),
        values_BKRC.data_ptr(),
        torch.get_num_threads(),
    )
