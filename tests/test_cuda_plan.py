"""What the CUDA backend decides on the host: how rows are cut, which kernel takes them, what fits
on chip."""

from typing import Any

import pytest

from kernels import native_backend

if native_backend.cpp_unavailable_reason() is not None:
    pytest.skip(f"{native_backend.cpp_unavailable_reason()}", allow_module_level=True)
from kernels import _native

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Compute capability, and the bytes of shared memory that a block can ask for.
H200, B200, A100 = (9, 232448), (10, 232448), (8, 166912)
MULTIPROCESSOR_BYTES = 228 * 1024
RESERVED_BYTES = 1024
WIDTHS = [1, 2, 31, 8191, 32000, 38136, 38137, 50257, 76281, 128256, 151936, 152064, 248320, 2**20]


def view(
    width: int, dtype: str = "bfloat16", *, rows: int = 64, address: int = 1 << 20, stride: int = 0
) -> Any:
    """Rows that nobody reads; `stride` columns apart, by default as wide as they are."""
    stride = stride or width
    sizes, strides = [1, rows, width], [rows * stride, stride, 1]
    return _native.LogitsView(address, getattr(_native.DType, dtype), sizes, strides)


def plan(logits: Any, grad: Any = None, device: tuple[int, int] = H200) -> Any:
    major, shared_per_block = device
    return _native.plan_rows(logits, grad, major=major, shared_per_block=shared_per_block)


@pytest.mark.parametrize("dtype", ELEMENT_SIZE)
@pytest.mark.parametrize("width", WIDTHS)
def test_parts_cover_the_row_and_none_is_empty(width: int, dtype: str) -> None:
    cut = plan(view(width, dtype))
    assert cut.parts in (1, 2, 4)
    assert (cut.parts - 1) * cut.part_columns < width <= cut.parts * cut.part_columns
    assert cut.part_columns * ELEMENT_SIZE[dtype] % 16 == 0


@pytest.mark.parametrize("dtype", ELEMENT_SIZE)
@pytest.mark.parametrize("width", WIDTHS)
def test_cut_depends_on_width_and_element_size_alone(width: int, dtype: str) -> None:
    want = plan(view(width, dtype))
    size = ELEMENT_SIZE[dtype]
    others = [
        plan(view(width, dtype), device=A100),
        plan(view(width, dtype), device=(12, 101376)),
        plan(view(width, dtype, rows=1)),
        plan(view(width, dtype, address=(1 << 20) + size, stride=width + 3)),
        plan(view(width, dtype), view(width, dtype, address=(1 << 30) + size)),
    ]
    for other in others:
        assert (other.parts, other.part_columns) == (want.parts, want.part_columns)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("width", [32000, 50257, 128256, 151936, 152064])
def test_three_blocks_of_a_usual_vocabulary_share_a_multiprocessor(width: int, dtype: str) -> None:
    for device in (H200, B200):
        made = plan(view(width, dtype), device=device)
        assert made.resident
        assert 3 * (made.shared_bytes + RESERVED_BYTES) <= MULTIPROCESSOR_BYTES


def test_fewest_parts_are_taken() -> None:
    for width in (38137, 76281, 151936):
        made = plan(view(width))
        part_bytes = made.part_columns * 2
        with_half_the_parts = made.shared_bytes + part_bytes + RESERVED_BYTES
        assert made.parts > 1 and 3 * with_half_the_parts > MULTIPROCESSOR_BYTES
    assert [plan(view(width)).parts for width in (32000, 50257, 151936)] == [1, 2, 4]


@pytest.mark.parametrize(
    ("width", "dtype", "device", "resident"),
    [
        (248320, "bfloat16", H200, True),
        (151936, "float32", H200, True),
        (231000, "float32", H200, True),
        (248320, "float32", H200, False),
        (2**20, "bfloat16", H200, False),
        (151936, "bfloat16", B200, True),
        (151936, "bfloat16", A100, False),
        (1, "bfloat16", A100, False),
        (151936, "bfloat16", (12, 101376), True),
        (248320, "bfloat16", (12, 101376), False),
    ],
)
def test_row_stays_on_chip_where_a_cluster_holds_it(
    width: int, dtype: str, device: tuple[int, int], resident: bool
) -> None:
    made = plan(view(width, dtype), device=device)
    assert made.resident == resident
    if resident:
        part_bytes = made.part_columns * ELEMENT_SIZE[dtype]
        # A shifted row starts up to 15 bytes into its slot.
        assert part_bytes + 15 <= made.slot_bytes <= made.shared_bytes <= device[1]


@pytest.mark.parametrize(
    ("address", "stride", "aligned"),
    [(0, 1024, True), (2, 1024, False), (0, 1025, False), (16, 1032, True), (8, 1032, False)],
)
def test_alignment_is_that_of_every_row(address: int, stride: int, aligned: bool) -> None:
    logits = view(1000, address=(1 << 20) + address, stride=stride)
    assert plan(logits).aligned == aligned
    assert plan(view(1000, stride=1008), logits).aligned == aligned


@pytest.mark.parametrize(
    ("address", "stride", "resident"),
    [(2, 50257, True), (2 + 16, 50257 + 8, True), (0, 50257, False), (2, 50258, False)],
)
def test_gradient_stays_on_chip_where_it_is_shifted_as_its_logits(
    address: int, stride: int, resident: bool
) -> None:
    logits = view(50257, address=(1 << 20) + 2)
    grad = view(50257, address=(1 << 30) + address, stride=stride)
    assert plan(logits, grad).resident == resident


def test_stride_of_a_single_row_says_nothing() -> None:
    grad = view(1000, rows=1, address=1 << 30, stride=1003)
    made = plan(view(1000, rows=1, stride=1001), grad)
    assert made.resident and made.aligned


def test_impossible_rows_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"columns of logits: expected at most 268435456, got"):
        plan(view(2**28 + 1))
    with pytest.raises(ValueError, match=r"rows of logits: expected at most 536870911, got"):
        plan(view(8, rows=2**29))
    with pytest.raises(ValueError, match=r"columns of the gradient: expected 64, got 65"):
        plan(view(64), view(65))
    with pytest.raises(ValueError, match=r"element size of the gradient: expected 2, got 4"):
        plan(view(64), view(64, "float32"))
