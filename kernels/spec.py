"""`LossSpec`: which policy-gradient loss to compute, as one frozen value.

Every field is checked when the value is made; a misspelt field or choice raises and names the
choices. What the fields mean, as equations, stands in `token_loss.py`; the values behind the
presets come from the papers named beside them.
"""

import math
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor

Surrogate = Literal["clip", "cispo", "sapo", "gmpo", "vespo", "reinforce"]
RatioLevel = Literal["token", "sequence"]
KlEstimator = Literal["none", "k1", "k2", "k3"]
Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum", "constant", "sum"]
AdvantageScale = Literal["group", "batch", "none"]
SamplerCorrection = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
]

CHOICES: dict[str, tuple[str, ...]] = {
    "surrogate": get_args(Surrogate),
    "ratio_level": get_args(RatioLevel),
    "kl": get_args(KlEstimator),
    "aggregation": get_args(Aggregation),
    "advantage_scale": get_args(AdvantageScale),
    "sampler_correction": get_args(SamplerCorrection),
}


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A policy-gradient loss. Ratios are r = exp(logprob - old_logprob) of the sampled token."""

    surrogate: Surrogate = "clip"
    """Policy term: PPO clip, CISPO, SAPO, GMPO, VESPO or plain REINFORCE."""
    ratio_level: RatioLevel = "token"
    """"sequence" replaces r by exp(mean log-ratio of the sequence), as GSPO does."""
    clip_low: float = 0.2
    """Lower clip: ratios below 1 - clip_low are clipped (for gmpo: log-ratios below -clip_low)."""
    clip_high: float = 0.2
    """Upper clip: ratios above 1 + clip_high are clipped (for gmpo: log-ratios above clip_high)."""
    dual_clip: float | None = None
    """Upper bound of the ratio where the advantage is negative; above 1."""
    ratio_cap: float | None = None
    """Upper bound of the ratio for either sign of the advantage; above 1 + clip_high."""
    sapo_temperature_pos: float = 1.0
    """SAPO gate temperature where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """SAPO gate temperature where the advantage is not positive."""
    kl: KlEstimator = "none"
    """Estimator of KL(policy || reference) on the sampled token."""
    kl_weight: float = 0.0
    """Weight of the KL term in the loss."""
    kl_ratio_weighted: bool = False
    """Multiply the KL term by the ratio, gradient through both (DeepSeek-V3.2, equation 7)."""
    entropy_weight: float = 0.0
    """loss -= entropy_weight * entropy, differentiable, aggregated like the rest."""
    aggregation: Aggregation = "sequence_mean"
    """How token losses become one number; "constant" divides by sequences * max_tokens (Dr.
    GRPO)."""
    max_tokens: int | None = None
    """Completion budget of the run; needed by, and only by, aggregation "constant"."""
    advantage_scale: AdvantageScale = "group"
    """Divide centred rewards by the std of their group, of the batch, or not at all."""
    advantage_ddof: int = 1
    """Degrees of freedom subtracted in that std: 1 (TRL, verl, Dr. GRPO) or 0."""
    advantage_eps: float = 1e-4
    """Added to that std."""
    sampler_correction: SamplerCorrection = "none"
    """Importance weight exp(old - sampler) on the policy term, truncated or masked."""
    sampler_low: float | None = None
    """Weights below are masked out (mask modes only)."""
    sampler_high: float | None = 2.0
    """Weights above are truncated to it, or masked out."""
    off_policy_threshold: float | None = None
    """Drop sequences with negative advantage whose mean(sampler - logprob) exceeds this (V3.2)."""
    numbers: Tensor = field(init=False, repr=False, compare=False)
    """All fields but the choices, float64, NaN for None. A traced program reads these: a graph
    holds for any values of a tensor, but only for one value of a number."""

    def __new__(cls, **given: Any) -> Self:
        known = [field.name for field in fields(cls) if field.init]
        for name in given:
            if name not in known:
                raise TypeError(f"LossSpec: no field {name!r}; the fields are {', '.join(known)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            check_choice(f"LossSpec.{name}", getattr(self, name), choices)
        for name in ("clip_low", "clip_high", "kl_weight", "advantage_eps"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"LossSpec.{name}: expected a number >= 0, got {value!r}")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"LossSpec.{name}: expected a number > 0, got {value!r}")
        if self.advantage_ddof not in (0, 1):
            raise ValueError(
                f"LossSpec.advantage_ddof: expected 0 or 1, got {self.advantage_ddof!r}"
            )
        if self.max_tokens is not None and not self.max_tokens > 0:
            raise ValueError(f"LossSpec.max_tokens: expected a count > 0, got {self.max_tokens!r}")
        self._check_ratio_bounds()
        self._check_terms()
        values = [getattr(self, name) for name in _number_fields()]
        numbers = [math.nan if value is None else float(value) for value in values]
        object.__setattr__(self, "numbers", torch.tensor(numbers, dtype=torch.float64))

    def _check_ratio_bounds(self) -> None:
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(
                f"LossSpec.dual_clip: expected None or a number > 1, got {self.dual_clip!r}"
            )
        if self.ratio_cap is not None and not self.ratio_cap > 1 + self.clip_high:
            raise ValueError(
                f"LossSpec.ratio_cap: expected None or a number > 1 + clip_high = "
                f"{1 + self.clip_high:g}, got {self.ratio_cap!r}"
            )
        for name in ("dual_clip", "ratio_cap"):
            if getattr(self, name) is not None and self.surrogate != "clip":
                raise ValueError(
                    f"LossSpec.{name}: expected None with surrogate {self.surrogate!r} "
                    f'(it bounds the ratio of "clip" only), got {getattr(self, name)!r}'
                )
        if self.ratio_level == "sequence" and self.surrogate not in ("clip", "sapo"):
            raise ValueError(
                'LossSpec.ratio_level: expected "token" with surrogate '
                f'{self.surrogate!r} (a sequence ratio is defined for "clip" and "sapo"), '
                'got "sequence"'
            )

    def _check_terms(self) -> None:
        if self.kl == "none" and (self.kl_weight != 0 or self.kl_ratio_weighted):
            raise ValueError(
                "LossSpec.kl: expected an estimator (k1, k2, k3) with kl_weight or "
                'kl_ratio_weighted set, got "none"'
            )
        low, high = self.sampler_low, self.sampler_high
        if self.sampler_correction.endswith("_truncate") and high is None:
            raise ValueError(
                "LossSpec.sampler_high: expected a number with sampler_correction "
                f"{self.sampler_correction!r}, got None"
            )
        if self.sampler_correction.endswith("_truncate") and low is not None:
            raise ValueError(
                "LossSpec.sampler_low: expected None with sampler_correction "
                f"{self.sampler_correction!r} (only masks have a lower bound), got {low!r}"
            )
        if low is not None and high is not None and not low <= high:
            raise ValueError(
                f"LossSpec.sampler_low: expected at most sampler_high = {high:g}, got {low:g}"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The loss of a paper by name, with fields replaced by `overrides`.

        Raises:
            ValueError: an unknown preset; the message names the known ones.
        """
        check_choice("LossSpec.preset", name, tuple(PRESETS))
        return cast(Self, replace(PRESETS[name], **overrides))

    @property
    def choices(self) -> str:
        """The fields with a choice of words, joined by commas; with `numbers`, the whole spec."""
        return ",".join(getattr(self, name) for name in CHOICES)

    @staticmethod
    def from_parts(choices: str, numbers: Tensor) -> "LossSpec":
        """The spec whose `choices` and `numbers` these are."""
        values = (None if math.isnan(number) else number for number in numbers.tolist())
        return _spec_from_parts(choices, *values)

    @property
    def needs_sampler_logprobs(self) -> bool:
        """Whether the loss reads the sampler's log-probabilities."""
        return self.sampler_correction != "none" or self.off_policy_threshold is not None

    @property
    def couples_tokens(self) -> bool:
        """Whether a token's gradient depends on the log-probs of other tokens of its sequence."""
        return (
            self.ratio_level == "sequence"
            or self.surrogate in ("gmpo", "vespo")
            or self.off_policy_threshold is not None
        )


def _number_fields() -> list[str]:
    return [field.name for field in fields(LossSpec) if field.init and field.name not in CHOICES]


@lru_cache(maxsize=64)
def _spec_from_parts(choices: str, *numbers: float | None) -> LossSpec:
    values: dict[str, Any] = dict(zip(CHOICES, choices.split(","), strict=True))
    values |= dict(zip(_number_fields(), numbers, strict=True))
    for name, kind in (("kl_ratio_weighted", bool), ("advantage_ddof", int), ("max_tokens", int)):
        if values[name] is not None:
            values[name] = kind(values[name])
    return LossSpec(**values)


PRESETS: dict[str, LossSpec] = {
    # Shao et al. 2024 (DeepSeekMath), equation 3. The paper adds kl="k3", kl_weight=0.04.
    "grpo": LossSpec(),
    # DeepSeek-R1 (2501.12948 v2), section 3.2.1.
    "r1": LossSpec(clip_low=10.0, clip_high=10.0, kl="k3", kl_weight=0.001),
    # Liu et al. 2025 (2503.20783), section 3.2; max_tokens is the run's completion budget.
    "dr_grpo": LossSpec(aggregation="constant", advantage_scale="none"),
    # Yu et al. 2025 (2503.14476).
    "dapo": LossSpec(clip_high=0.28, aggregation="token_mean"),
    # Zheng et al. 2025 (2507.18071).
    "gspo": LossSpec(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4),
    # 2602.05261.
    "luspo": LossSpec(
        ratio_level="sequence", clip_low=2e-3, clip_high=2.5e-3, aggregation="sequence_sum"
    ),
    # MiniMax-M1 with the one-sided absolute cap of 5 of ScaleRL and TRL.
    "cispo": LossSpec(surrogate="cispo", clip_low=1.0, clip_high=4.0, aggregation="token_mean"),
    # 2511.20347.
    "sapo": LossSpec(surrogate="sapo"),
    # Geometric-mean policy optimisation, clip in log space.
    "gmpo": LossSpec(surrogate="gmpo", clip_low=0.4, clip_high=0.4),
    # 2602.10693.
    "vespo": LossSpec(surrogate="vespo", aggregation="token_mean"),
    # PPO clip with the mean over all tokens of the batch.
    "bnpo": LossSpec(aggregation="token_mean"),
}
