"""Fused policy-gradient head: from logits to loss, metrics and gradient in one pass. `ops` is the
file to read."""

from importlib.metadata import PackageNotFoundError, distribution

from kernels.backends import available_backends
from kernels.decoder_layer import DecoderLayer, DecoderWeights, LinearWeights
from kernels.few_rows import few_rows_linear
from kernels.layers import gated_silu, rms_norm
from kernels.ops import (
    PolicyLoss,
    TokenLogprobs,
    group_advantages,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from kernels.sharding import VocabShard
from kernels.spec import LossSpec

# transformers probes a module of this name and takes versions from 0.9 up for Hugging Face's.
__version__ = "0.1.0"

__all__ = [
    "DecoderLayer",
    "DecoderWeights",
    "LinearWeights",
    "LossSpec",
    "PolicyLoss",
    "TokenLogprobs",
    "VocabShard",
    "available_backends",
    "few_rows_linear",
    "gated_silu",
    "group_advantages",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "rms_norm",
    "token_logprobs",
]


def _refuse_hugging_face_kernels() -> None:
    try:
        other = distribution("kernels")
    except PackageNotFoundError:
        return
    raise ImportError(
        f"Hugging Face's package 'kernels' {other.version} is installed beside onepass-rl, whose "
        "module has the same name, so neither can be imported reliably: run `pip uninstall kernels`"
    )


_refuse_hugging_face_kernels()
