"""Group-relative advantages against closed forms."""

import math

import pytest
import torch

from kernels import group_advantages


def test_advantages_of_a_binary_group_match_the_closed_form() -> None:
    got = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), group_size=4)
    want = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    torch.testing.assert_close(got, torch.tensor([want, -want, -want, want]))


def test_advantages_sum_to_zero_in_each_group() -> None:
    rewards_S = torch.randn(24, generator=torch.Generator().manual_seed(0))
    for scale in ("group", "batch", "none"):
        got_PG = group_advantages(rewards_S, group_size=8, scale=scale).view(3, 8)
        torch.testing.assert_close(got_PG.sum(1), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_without_spread_are_exactly_zero(scale: str) -> None:
    rewards_S = torch.tensor([0.1] * 7 + [5.0])
    groups = torch.tensor([0] * 7 + [1])
    got = group_advantages(rewards_S, group_ids=groups, scale=scale, eps=0.0)
    assert torch.equal(got, torch.zeros(8))


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_nan_reward_leaves_the_group_as_if_it_were_absent(ddof: int) -> None:
    got = group_advantages(torch.tensor([1.0, math.nan, 3.0, 5.0]), group_size=4, ddof=ddof)
    want = group_advantages(torch.tensor([1.0, 3.0, 5.0]), group_size=3, ddof=ddof)
    assert got[1] == 0
    torch.testing.assert_close(got[[0, 2, 3]], want)


def test_batch_scale_divides_by_the_std_of_all_rewards() -> None:
    rewards_S = torch.tensor([0.0, 1.0, 4.0, 8.0])
    got = group_advantages(rewards_S, group_size=2, scale="batch", eps=0.0)
    want = torch.tensor([-0.5, 0.5, -2.0, 2.0]) / rewards_S.std()
    torch.testing.assert_close(got, want)


def test_group_ids_in_any_order_equal_consecutive_groups() -> None:
    rewards_S = torch.randn(12, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    groups = torch.arange(12) // 4 * 10 - 3
    got = group_advantages(rewards_S[order], group_ids=groups[order])
    torch.testing.assert_close(got, group_advantages(rewards_S, group_size=4)[order])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"group_size": 3}, "expected a divisor of the 4 rewards, got 3"),
        ({"group_size": 0}, "expected a divisor"),
        ({"group_size": 2, "scale": "std"}, "expected one of group, batch, none"),
        ({"group_size": 2, "ddof": 2}, "expected 0 or 1"),
        ({"group_ids": torch.zeros(3)}, "expected shape"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(4), **arguments)
