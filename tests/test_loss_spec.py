"""LossSpec refuses what it cannot mean, and its presets carry the papers' numbers."""

import copy
import pickle

import pytest

from kernels import LossSpec


def test_unknown_field_is_refused_with_the_choices() -> None:
    with pytest.raises(TypeError, match=r"no field 'clip_lo'.*clip_low, clip_high"):
        LossSpec(clip_lo=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"surrogate": "ppo"}, "expected one of clip, cispo, sapo, gmpo, vespo, reinforce"),
        ({"kl": "k4"}, "expected one of none, k1, k2, k3"),
        ({"aggregation": "mean"}, "expected one of sequence_mean"),
        ({"clip_low": -0.1}, "expected a number >= 0"),
        ({"clip_high": float("nan")}, "expected a number >= 0"),
        ({"dual_clip": 1.0}, "expected None or a number > 1"),
        ({"ratio_cap": 1.1}, "expected None or a number > 1 \\+ clip_high = 1.2"),
        ({"ratio_cap": 9.0, "surrogate": "sapo"}, "expected None with surrogate 'sapo'"),
        ({"ratio_level": "sequence", "surrogate": "cispo"}, 'expected "token"'),
        ({"kl_weight": 0.1}, "expected an estimator"),
        ({"advantage_ddof": 2}, "expected 0 or 1"),
        ({"max_tokens": 0}, "expected a count > 0"),
        ({"sampler_correction": "token_truncate", "sampler_high": None}, "expected a number"),
        ({"sampler_correction": "token_truncate", "sampler_low": 0.5}, "only masks"),
        ({"sampler_correction": "token_mask", "sampler_low": 3.0}, "expected at most"),
    ],
)
def test_meaningless_values_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSpec(**fields)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected one of grpo, r1, dr_grpo, dapo, gspo"):
        LossSpec.preset("ppo")


def test_presets_carry_the_papers_numbers() -> None:
    r1, dapo, gspo = (LossSpec.preset(name) for name in ("r1", "dapo", "gspo"))
    assert (r1.clip_low, r1.clip_high, r1.kl, r1.kl_weight) == (10.0, 10.0, "k3", 0.001)
    assert (dapo.clip_low, dapo.clip_high, dapo.aggregation) == (0.2, 0.28, "token_mean")
    assert (gspo.ratio_level, gspo.clip_low, gspo.clip_high) == ("sequence", 3e-4, 4e-4)
    dr_grpo = LossSpec.preset("dr_grpo", max_tokens=3000)
    assert (dr_grpo.advantage_scale, dr_grpo.aggregation) == ("none", "constant")
    assert dr_grpo.max_tokens == 3000


def test_spec_survives_copy_and_pickle() -> None:
    spec = LossSpec.preset("dapo", dual_clip=3.0)
    assert copy.copy(spec) == pickle.loads(pickle.dumps(spec)) == spec
