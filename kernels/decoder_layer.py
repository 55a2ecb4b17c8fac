"""A decoder layer of the Llama family for one new token of each of a few sequences, on a CPU.

Shapes: B sequences, D model width, H query heads, K key-value heads, C head width, F inner width of
the MLP, R positions that the cache has room for.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels import native_backend
from kernels.checks import check_contiguous, check_float32_on_cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeights:
    """Of x @ weight^T + bias."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """Weights of one layer, float32, contiguous, on the CPU: attention with rotary positions, then
    a gated MLP with SiLU, each behind an RMSNorm and added to what it reads."""

    attention_norm: Tensor
    """[D]"""
    query: LinearWeights
    """[H C, D]"""
    key: LinearWeights
    """[K C, D]"""
    value: LinearWeights
    """[K C, D]"""
    output: LinearWeights
    """[D, H C]"""
    query_norm: Tensor | None = None
    """[C], RMSNorm of each head."""
    key_norm: Tensor | None = None
    """[C]"""
    mlp_norm: Tensor
    """[D]"""
    gate: LinearWeights
    """[F, D]"""
    up: LinearWeights
    """[F, D]"""
    down: LinearWeights
    """[D, F]"""

    def __post_init__(self) -> None:
        tensors: dict[str, Tensor | None] = {}
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, LinearWeights):
                tensors |= {name: value.weight, f"{name}.bias": value.bias}
            else:
                tensors[name] = value
        check_float32_on_cpu(**tensors)
        check_contiguous(**tensors)


class DecoderLayer:
    """Decoding steps of one layer.

    Each weight is read once, as by `few_rows_linear`, and nothing but that and the cache comes from
    memory. A sequence's result is the same bits whatever sequences are beside it.

    Args:
        weights: kept; what is written into their memory counts from then on.
        head_width: C.
        epsilon: of the norms.
        scale: of the attention scores; None is C ** -0.5.

    Raises:
        ValueError: weights whose shapes do not fit together.
        RuntimeError: the C++ kernels cannot run here.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        head_width: int,
        epsilon: float,
        scale: float | None = None,
    ) -> None:
        self.weights, self.head_width = weights, head_width
        self.width = len(weights.attention_norm)
        self.heads, self.key_value_heads = (
            len(linear.weight) // head_width for linear in (weights.query, weights.key)
        )
        self._check_shapes(len(weights.gate.weight))
        self._native = native_backend.decoder_layer(
            weights,
            sizes=(self.width, self.heads, self.key_value_heads, head_width),
            scale=head_width**-0.5 if scale is None else scale,
            epsilon=epsilon,
        )

    def _check_shapes(self, inner: int) -> None:
        width, head = self.width, self.head_width
        queries, keys = self.heads * head, self.key_value_heads * head
        expected = {
            "query": (queries, width),
            "key": (keys, width),
            "value": (keys, width),
            "output": (width, queries),
            "gate": (inner, width),
            "up": (inner, width),
            "down": (width, inner),
        }
        for name, shape in expected.items():
            linear = getattr(self.weights, name)
            if linear.weight.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(linear.weight.shape)}")
            if linear.bias is not None and linear.bias.shape != shape[:1]:
                raise ValueError(
                    f"{name}.bias: expected [{shape[0]}], got {list(linear.bias.shape)}"
                )
        norms = {"mlp_norm": width, "query_norm": head, "key_norm": head}
        for name, size in norms.items():
            norm = getattr(self.weights, name)
            if norm is not None and norm.shape != (size,):
                raise ValueError(f"{name}: expected [{size}], got {list(norm.shape)}")
        if head % 2 or self.heads % self.key_value_heads:
            raise ValueError(
                f"head_width: expected an even one that gives a multiple of the key-value heads, "
                f"got {head}, {self.heads} and {self.key_value_heads} heads"
            )

    def __call__(
        self,
        x_BD: Tensor,
        *,
        cosines_BC: Tensor,
        sines_BC: Tensor,
        keys_BKRC: Tensor,
        values_BKRC: Tensor,
        starts_B: Tensor,
        position: int,
    ) -> None:
        """Takes the new tokens through the layer.

        Args:
            x_BD: float32, replaced by the layer's output.
            cosines_BC, sines_BC: float32, rotary embedding of each new token.
            keys_BKRC, values_BKRC: float32 cache; the new token's are written at `position`.
            starts_B: int64, first position that each sequence sees, at most `position`.
            position: of the new token in the cache.

        Raises:
            ValueError: another type, device, layout or shape.
        """
        rows = len(x_BD)
        cache = (rows, self.key_value_heads, keys_BKRC.shape[2], self.head_width)
        for name, tensor, dtype, shape in (
            ("x", x_BD, torch.float32, (rows, self.width)),
            ("cosines", cosines_BC, torch.float32, (rows, self.head_width)),
            ("sines", sines_BC, torch.float32, (rows, self.head_width)),
            ("keys", keys_BKRC, torch.float32, cache),
            ("values", values_BKRC, torch.float32, cache),
            ("starts", starts_B, torch.int64, (rows,)),
        ):
            if (tensor.dtype, tensor.device.type) != (dtype, "cpu"):
                raise ValueError(
                    f"{name}: expected {dtype} on cpu, got {tensor.dtype} on {tensor.device}"
                )
            if tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: expected contiguous {list(shape)}, got {list(tensor.shape)} with "
                    f"strides {tensor.stride()}"
                )
        if not 0 <= position < cache[2]:
            raise ValueError(f"position: expected 0 to {cache[2] - 1}, got {position}")
        if rows and not 0 <= int(starts_B.min()) <= int(starts_B.max()) <= position:
            raise ValueError(
                f"starts: expected 0 to {position}, got {int(starts_B.min())} to "
                f"{int(starts_B.max())}"
            )
        native_backend.decode_layer(
            self._native, x_BD, cosines_BC, sines_BC, starts_B, position, keys_BKRC, values_BKRC
        )
