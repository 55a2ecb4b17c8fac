"""The emulation that the CUDA kernels are tested with finds the faults that it is there to find."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from cuda_emulation.emulator import HERE, SOURCES, Emulator, build_examples, compiler
from torch import Tensor

if compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

SEEDS = range(12)
# What the launch says, or None where the fault shows as a wrong result.
FAULTS = {
    "reverse": None,
    "diverge": "32 threads of block 0 wait for __syncthreads",
    "use_before_arrival": None,
    "wait_for_too_many_bytes": "64 threads of block 0 wait for an mbarrier",
    "overwrite_before_read": None,
    "store_without_fence": "that a thread did not fence",
    "write_beyond_shared": "a write beyond the dynamic shared memory of block 0",
    "exchange": None,
    "send_before_start": "an mbarrier is used that was not initialised",
    "leave_before_arrival": "a block ended before all that it was sent had arrived",
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return build_examples(tmp_path_factory.mktemp("examples"))


def run_example(emulator: Emulator, name: str, *, faulty: bool) -> tuple[str, Tensor, Tensor]:
    """Why the launch failed ("" if it did not), what it is to write, and what it wrote."""
    given = torch.arange(64, dtype=torch.float32)
    written = torch.full((64,), torch.nan)
    message = emulator.library.run_example(
        name.encode(),
        ctypes.c_bool(faulty),
        ctypes.c_void_p(given.data_ptr()),
        ctypes.c_void_p(written.data_ptr()),
    )
    return message.decode(), 2 * given.flip(0), written


@pytest.mark.parametrize("name", FAULTS)
def test_a_sound_kernel_is_right_in_every_order(examples: Emulator, name: str) -> None:
    for seed in SEEDS:
        examples.seed(seed)
        message, want, got = run_example(examples, name, faulty=False)
        assert message == "" and torch.equal(got, want), seed


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_in_some_order(examples: Emulator, name: str) -> None:
    messages, wrong = [], 0
    for seed in SEEDS:
        examples.seed(seed)
        message, want, got = run_example(examples, name, faulty=True)
        messages.append(message)
        wrong += not torch.equal(got, want)
    expected = FAULTS[name]
    if expected is None:
        assert wrong > 0
    else:
        assert any(expected in message for message in messages), messages


def test_same_seed_gives_the_same_order(examples: Emulator) -> None:
    results = []
    for _ in range(2):
        examples.seed(5)
        results.append(run_example(examples, "reverse", faulty=True)[2])
    assert torch.equal(*(result.nan_to_num(-1.0) for result in results))


def test_emulation_replaces_every_primitive() -> None:
    def functions(header: Path) -> set[str]:
        return set(re.findall(r"\binline [\w ]+[ *](\w+)\(", header.read_text()))

    hardware = functions(SOURCES / "cuda" / "primitives.h")
    assert len(hardware) > 20
    assert hardware - functions(HERE / "primitives.h") <= {"shared_address"}
