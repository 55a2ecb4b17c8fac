"""The linear layer of a decoding step, on every instruction set of this machine.

Accuracy is held to the bound of the sum's order (64 products, and the sums of those), and to
`torch.nn.functional.linear` in float32, whose error may be exceeded by ERROR_FACTOR.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels import few_rows_linear, native_backend

if native_backend.cpp_unavailable_reason() is not None:
    pytest.skip(f"{native_backend.cpp_unavailable_reason()}", allow_module_level=True)

from kernels import _native

ERROR_FACTOR = 1.5
UNIT_ROUNDOFF = 2.0**-24


@pytest.fixture(params=_native.supported_cpu_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, forced."""
    before = _native.cpu_level()
    _native.set_cpu_level(request.param)
    yield request.param
    _native.set_cpu_level(before)


def random_arguments(
    rows: int, depth: int, outputs: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, depth), (outputs, depth), (outputs,))
    x_RD, weight_VD, bias_V = (torch.randn(shape, generator=generator) for shape in shapes)
    return x_RD, weight_VD, bias_V


# Outputs that fill no tile and several, a depth of no whole block, rows of one group and more.
@pytest.mark.parametrize("outputs", [1, 47, 48, 200])
@pytest.mark.parametrize("depth", [1, 63, 200])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 40])
def test_values_are_those_of_float64(level: str, rows: int, depth: int, outputs: int) -> None:
    x_RD, weight_VD, bias_V = random_arguments(rows, depth, outputs)
    exact_RV = linear(x_RD.double(), weight_VD.double(), bias_V.double())
    magnitude_RV = linear(x_RD.double().abs(), weight_VD.double().abs(), bias_V.double().abs())
    additions = 64 + math.ceil(depth / 64) + 1
    error_RV = (few_rows_linear(x_RD, weight_VD, bias_V) - exact_RV).abs()
    assert (error_RV <= additions * UNIT_ROUNDOFF * magnitude_RV).all()


def test_rounding_grows_with_the_depth_no_more_than_in_plain_torch(level: str) -> None:
    x_RD, weight_VD, _ = random_arguments(16, 9000, 96)
    exact_RV = x_RD.double() @ weight_VD.double().T
    errors = [
        (result_RV - exact_RV).square().mean().sqrt()
        for result_RV in (few_rows_linear(x_RD, weight_VD), linear(x_RD, weight_VD))
    ]
    assert errors[0] <= ERROR_FACTOR * errors[1]


def test_a_row_does_not_depend_on_the_others_or_on_the_threads(level: str) -> None:
    x_RD, weight_VD, _ = random_arguments(40, 129, 331)
    together_RV = few_rows_linear(x_RD, weight_VD)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows in (slice(0, 1), slice(3, 12), slice(39, 40)):
            assert torch.equal(few_rows_linear(x_RD[rows], weight_VD), together_RV[rows])
    finally:
        torch.set_num_threads(before)


def test_leading_dimensions_and_strides_of_x_are_kept() -> None:
    x_RD, weight_VD, bias_V = random_arguments(6, 20, 10)
    expected_RV = few_rows_linear(x_RD, weight_VD, bias_V)
    assert torch.equal(
        few_rows_linear(x_RD.view(3, 2, 20), weight_VD, bias_V), expected_RV.view(3, 2, 10)
    )
    assert torch.equal(few_rows_linear(x_RD.T.contiguous().T, weight_VD, bias_V), expected_RV)
    assert few_rows_linear(x_RD[:0], weight_VD).shape == (0, 10)


def test_values_that_are_not_finite_stay_in_their_row(level: str) -> None:
    x_RD, weight_VD, _ = random_arguments(5, 70, 13)
    expected_RV = few_rows_linear(x_RD, weight_VD)
    x_RD[1, 3], x_RD[2, 69] = math.nan, math.inf
    result_RV = few_rows_linear(x_RD, weight_VD)
    assert result_RV[1].isnan().all() and not result_RV[2].isfinite().any()
    assert torch.equal(result_RV[[0, 3, 4]], expected_RV[[0, 3, 4]])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.bfloat16)}, "x: expected float32 on cpu, got"),
        ({"weight_VD": torch.zeros(3, 5)}, r"weight: expected \[V, 4\] for x"),
        ({"weight_VD": torch.zeros(4, 3).T}, "weight: expected a contiguous tensor"),
        ({"bias_V": torch.zeros(4)}, r"bias: expected \[3\], got \[4\]"),
        ({"x": torch.zeros(2, 4, requires_grad=True)}, "x: expected no gradient"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict[str, Tensor], sentence: str) -> None:
    arguments = {"x": torch.zeros(2, 4), "weight_VD": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=sentence):
        few_rows_linear(**arguments)
