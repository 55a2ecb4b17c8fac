"""How the compiled modules kernels._native and kernels._cuda are handed tensors and a loss.

Both take addresses, sizes and strides, and both have the same types for views and losses. Shapes
as in `kernels.reference`.
"""

import math
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.spec import LossSpec


def import_extension(name: str) -> ModuleType | str:
    """The compiled module, or in one sentence why it cannot be imported."""
    try:
        return import_module(f"kernels.{name}")
    except ImportError as error:
        return f"the compiled module kernels.{name} cannot be imported ({error})"


def view(module: Any, logits_OIW: Tensor) -> Any:
    """The module's view of a tensor, which the caller keeps alive."""
    dtype = getattr(module.DType, str(logits_OIW.dtype).removeprefix("torch."))
    return module.LogitsView(logits_OIW.data_ptr(), dtype, logits_OIW.shape, logits_OIW.stride())


def float32(inv_temperature: Tensor | float) -> Tensor | float:
    """What `row_scale` takes."""
    if isinstance(inv_temperature, Tensor):
        return inv_temperature.to(torch.float32).contiguous()
    return inv_temperature


def row_scale(module: Any, inv_temperature: Tensor | float, softcap: float) -> Any:
    """How logits become z; takes the address of a tensor, which the caller keeps alive."""
    if isinstance(inv_temperature, Tensor):
        return module.RowScale(inv_temperature.data_ptr(), 1.0, softcap)
    return module.RowScale(0, inv_temperature, softcap)


def address(values: Tensor | None) -> int:
    """Of a contiguous tensor; 0 for none."""
    return 0 if values is None else values.data_ptr()


@lru_cache(maxsize=64)
def loss_spec(module: Any, spec: LossSpec) -> Any:
    """The module's form of a loss that it can compute."""
    native_spec = module.LossSpec()
    for field, enum in (
        ("surrogate", module.Surrogate),
        ("kl", module.KlEstimator),
        ("aggregation", module.Aggregation),
        ("advantage_scale", module.AdvantageScale),
        ("sampler_correction", module.SamplerCorrection),
    ):
        setattr(native_spec, field, getattr(enum, getattr(spec, field)))
    for field in (
        "clip_low",
        "clip_high",
        "sapo_temperature_pos",
        "sapo_temperature_neg",
        "kl_weight",
        "kl_ratio_weighted",
        "entropy_weight",
        "advantage_ddof",
        "advantage_eps",
    ):
        setattr(native_spec, field, getattr(spec, field))
    # An absent bound is an infinite one; an absent lower bound of a positive weight is 0.
    for field in ("dual_clip", "ratio_cap", "sampler_high"):
        value = getattr(spec, field)
        setattr(native_spec, field, math.inf if value is None else value)
    native_spec.sampler_low = 0.0 if spec.sampler_low is None else spec.sampler_low
    native_spec.max_tokens = 1.0 if spec.max_tokens is None else float(spec.max_tokens)
    return native_spec
