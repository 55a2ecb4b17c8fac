"""RMSNorm and gated SiLU as one kernel each, on every instruction set of this machine.

Bounds follow from the order of the sums and from the error of the kernels' exponential (simd.h:
1.7e-7 + 1.4e-8 |x|), against float64.
"""

import pytest
import torch
from test_few_rows import UNIT_ROUNDOFF, level  # noqa: F401
from torch import Tensor
from torch.nn.functional import silu

from kernels import gated_silu, rms_norm

EPSILON = 1e-5
# Rows of one part of the work and of several; widths of no whole group of lanes, and of many.
SHAPES = [(1, 1), (3, 7), (33, 100), (700, 576)]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradient(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rms_norm_and_its_gradient_are_those_of_float64(rows: int, width: int) -> None:
    x_RD, weight_D, grad_RD = (
        normal(rows, width, scale=3.0),
        normal(width, seed=1),
        normal(rows, width, seed=2),
    )
    x, weight = with_gradient(x_RD, weight_D)
    out = rms_norm(x, weight, EPSILON)
    out.backward(grad_RD)

    exact_x, exact_weight = with_gradient(x_RD.double(), weight_D.double())
    inverse_R1 = (exact_x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    exact = exact_x * inverse_R1 * exact_weight
    exact.backward(grad_RD.double())

    # A lane sums every eighth column at least; then a few products, and the root.
    unit = (width / 8 + 12) * UNIT_ROUNDOFF
    assert ((out - exact).abs() <= unit * exact.abs()).all()
    grad, inverse_R1 = grad_RD.double(), inverse_R1.detach()
    direct = (grad * weight_D).abs() * inverse_R1
    along = (grad * weight_D * x_RD).abs().mean(-1, keepdim=True) * x_RD.abs() * inverse_R1**3
    assert ((x.grad - exact_x.grad).abs() <= unit * (direct + along)).all()
    # Rows of one part are summed in float32: 16,384 numbers.
    rows_of_part = min(rows, max(1, 16384 // width))
    unit += rows_of_part * UNIT_ROUNDOFF
    magnitude_D = (grad * x_RD * inverse_R1).abs().sum(0)
    assert ((weight.grad - exact_weight.grad).abs() <= unit * magnitude_D).all()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_gated_silu_and_its_gradient_are_those_of_float64(rows: int, width: int) -> None:
    # Gates from where the sigmoid is nothing to where it is 1.
    gate_RD, up_RD, grad_RD = (
        normal(rows, width, scale=20.0),
        normal(rows, width, seed=1),
        normal(rows, width, seed=2),
    )
    gate, up = with_gradient(gate_RD, up_RD)
    out = gated_silu(gate, up)
    out.backward(grad_RD)
    exact_gate, exact_up = with_gradient(gate_RD.double(), up_RD.double())
    exact = silu(exact_gate) * exact_up
    exact.backward(grad_RD.double())

    size = gate_RD.double().abs()
    unit = 1.7e-7 + 1.4e-8 * size + 6 * UNIT_ROUNDOFF
    # Below exp(-88) the sigmoid is 0.
    nothing = 1e-37 * (1 + size) * (1 + up_RD.abs()) * (1 + grad_RD.abs())
    assert ((out - exact).abs() <= unit * exact.abs() + nothing).all()
    assert ((up.grad - exact_up.grad).abs() <= unit * exact_up.grad.abs() + nothing).all()
    # 1 + x (1 - sigmoid) cancels where the SiLU turns.
    share = gate_RD.double().sigmoid()
    magnitude = (grad_RD * up_RD).abs() * share * (1 + size * (1 - share))
    assert ((gate.grad - exact_gate.grad).abs() <= 2 * unit * magnitude + nothing).all()


@pytest.mark.usefixtures("level")
def test_values_that_are_not_finite_stay_so() -> None:
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 200.0, -200.0])
    ones = torch.ones(5)
    assert torch.equal(gated_silu(gate, ones).isnan(), silu(gate).isnan())
    assert gated_silu(gate, ones)[1] == torch.inf
    assert gated_silu(gate, ones)[3:].tolist() == [200.0, 0.0]
    x_RD = normal(3, 20)
    x_RD[1, 4] = torch.nan
    out_RD = rms_norm(x_RD, torch.ones(20), EPSILON)
    assert out_RD.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.usefixtures("level")
def test_bits_do_not_depend_on_the_threads_or_on_other_rows() -> None:
    x_RD, weight_D, grad_RD = normal(300, 130), normal(130, seed=1), normal(300, 130, seed=2)

    def results(rows: slice) -> list[Tensor]:
        x, weight, up = with_gradient(x_RD[rows], weight_D, grad_RD[rows])
        normed = rms_norm(x, weight, EPSILON)
        (gated_silu(normed, up) * grad_RD[rows]).sum().backward()
        return [normed.detach(), x.grad, up.grad, weight.grad]

    together = results(slice(None))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert all(map(torch.equal, results(slice(None)), together))
    finally:
        torch.set_num_threads(before)
    for alone, of_all in zip(results(slice(7, 20))[:3], together[:3], strict=True):
        assert torch.equal(alone, of_all[7:20])


def test_rows_may_lie_apart_in_memory() -> None:
    x_RD, weight_D = normal(6, 40), normal(20)
    apart_RD = x_RD[:, ::2]
    assert torch.equal(
        rms_norm(apart_RD, weight_D, EPSILON), rms_norm(apart_RD.clone(), weight_D, EPSILON)
    )
    assert torch.equal(gated_silu(apart_RD, apart_RD), gated_silu(*[apart_RD.clone()] * 2))
    assert rms_norm(x_RD.view(2, 3, 40), normal(40), EPSILON).shape == (2, 3, 40)
    assert rms_norm(torch.empty(0, 20), weight_D, EPSILON).shape == (0, 20)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(4), EPSILON), r"weight: expected \[3\]"),
        (lambda: rms_norm(torch.ones(()), torch.ones(4), EPSILON), r"weight: expected \[D\]"),
        (lambda: rms_norm(torch.ones(2, 3).half(), torch.ones(3), EPSILON), "x: expected float32"),
        (lambda: gated_silu(torch.ones(2), torch.ones(3)), r"up: expected \[2\] as gate"),
        (lambda: gated_silu(torch.ones(2), torch.ones(2).double()), "up: expected float32 on cpu"),
    ],
)
def test_bad_arguments_get_one_sentence(call: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
