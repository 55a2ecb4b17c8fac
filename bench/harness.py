"""What every benchmark shares: a case, its checks, its rounds and its peak memory.

A case is one op on one dtype and shape, computed by several implementations. Each is first checked
against float64. Then each is timed in a block of its own, in which plain PyTorch, the
implementation and the ceilings take turns, on inputs restored outside the clock. A ratio is the
median over the rounds of a block, so its two sides were measured within a fraction of a second of
each other: on a shared machine whose speed drifts by a third within a minute, a rotation of all
implementations compares what ran seconds apart. Before every turn malloc gives free memory back to
the system, so that none starts with pages that another has left (plain PyTorch was 15 % faster
behind TRL and torch.compile than behind itself). Nothing passes or fails on speed.
"""

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor

import kernels
from kernels.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARIES = (32000, 49152, 129920, 151936, 262144)
DTYPES = (torch.float32, torch.bfloat16)
PLAIN = "eager"
UPCAST = f"{PLAIN}, .float()"
BACKENDS = ("reference", "cpp", "triton", "cuda")
# Who is checked where nothing is timed.
CHECKED_NAMES = (PLAIN, UPCAST, *BACKENDS)

# Cases of this many tokens are checked and not timed; few enough for Triton's interpreter.
CHECKED_TOKENS = 8
CHECKED_SHAPES = [(CHECKED_TOKENS, width) for width in VOCABULARIES]
MOST_ROUNDS, FEWEST_ROUNDS = 15, 3
# A block that has taken longer stops at the fewest.
SECONDS_A_BLOCK = 3.0

Implementation = Callable[..., tuple[Tensor, ...]]
Factory = Callable[[], Implementation]


class Unavailable(Exception):
    """An implementation cannot run here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op on one dtype and shape."""

    op: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Tokens first."""
    inputs: dict[str, Tensor]
    """Positional arguments of every implementation, by name; with `upstream`, leaves."""
    outputs: tuple[str, ...]
    """Names of what an implementation returns."""
    upstream: tuple[Tensor, ...] = ()
    """Gradients by the outputs; none: forward only."""
    plain: Implementation
    """Plain PyTorch; on float64 inputs it is the truth."""
    work: float
    """Bytes or FLOP that no implementation can avoid."""
    unit: str
    """"GB/s" or "TFLOP/s"."""
    ceilings: dict[str, Callable[[], object]]
    """Bare copies or products, timed beside every implementation."""
    ceiling_work: float

    def __str__(self) -> str:
        return f"{self.op}, {str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def is_timed(self) -> bool:
        """Whether the case is large enough for its time to mean something."""
        return self.shape[0] > CHECKED_TOKENS


class Compete(Protocol):
    """The fixture `contest`."""

    def __call__(self, case: Case, factories: dict[str, Factory]) -> None:
        """Checks, times and records each implementation, made by its factory."""

    def leave_out(self, case: str, reason: str) -> None:
        """Records that a case was not run, and why."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What was measured of one implementation."""

    errors: dict[str, float] = field(default_factory=dict)
    """Relative to float64, of each output and gradient."""
    seconds: list[float] = field(default_factory=list)
    """One a round; of plain PyTorch and the ceilings, the rounds of all blocks."""
    times_plain: list[float] = field(default_factory=list)
    """How many times faster than plain PyTorch, one a round."""
    over_ceiling: list[float] = field(default_factory=list)
    """How many times slower than the fastest ceiling, one a round."""
    peak_bytes: int | None = None
    """Most memory held beyond the inputs, results included."""


def shape_params(
    checked: list[tuple[int, ...]], timed: list[tuple[int, ...]], full: list[tuple[int, ...]]
) -> list[object]:
    """Parameters of `pytest.mark.parametrize`; those of `full` run with --full only."""
    return [
        *(pytest.param(shape, id="x".join(map(str, shape))) for shape in checked + timed),
        *(
            pytest.param(shape, id="x".join(map(str, shape)), marks=pytest.mark.full)
            for shape in full
        ),
    ]


def copy_ceiling(logits: Tensor) -> Callable[[], object]:
    """A plain copy of the logits between two resident buffers."""
    target = torch.empty_like(logits)
    return lambda: target.copy_(logits)


def require_package(name: str) -> None:
    """Raises `Unavailable` unless the package is installed."""
    if find_spec(name) is None:
        raise Unavailable(f"{name} is not installed")


def our_backends(
    make: Callable[..., Implementation], num_tokens: int, *, inplace: bool
) -> dict[str, Factory]:
    """Our backends by name: `make(backend=..., inplace=...)`, where the backend can take part.

    Args:
        make: makes an implementation.
        num_tokens: size of the case.
        inplace: whether there is an in-place version of the op.
    """

    def available(backend: str, inplace: bool) -> Implementation:
        reason = kernels.available_backends()[backend]
        if reason != "available":
            raise Unavailable(reason)
        if backend == "cpp" and DEVICE == "cuda":
            raise Unavailable("runs on the CPU")
        if backend == "triton" and DEVICE == "cpu" and num_tokens > CHECKED_TOKENS:
            raise Unavailable("no GPU: its interpreter checks small cases and times none")
        return make(backend=backend, inplace=inplace)

    factories: dict[str, Factory] = {}
    for backend in BACKENDS:
        factories[backend] = partial(available, backend, False)
        if inplace and backend != "reference":
            factories[f"{backend}, in place"] = partial(available, backend, True)
    return factories


def machine() -> dict[str, str]:
    """Where and with what a result was measured."""
    facts = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_model(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f} at the start",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
    }
    for package in ("torch", "triton", "trl", "liger-kernel"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "none"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    facts["commit"] = (
        subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    )
    return facts


def cpu_model() -> str:
    """The processor's name, as the kernel prints it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronize() -> None:
    """Waits until the GPU, if any, has done everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def step(implementation: Implementation, leaves: list[Tensor], upstream: list[Tensor]) -> object:
    """What is timed: forward, and backward from `upstream` if there is any."""
    outputs = implementation(*leaves)
    if upstream:
        torch.autograd.backward(outputs, upstream)
    return outputs


def run(case: Case, implementation: Implementation, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of one implementation, by name."""
    outputs = implementation(*leaves)
    results = dict(zip(case.outputs, outputs, strict=True))
    if case.upstream:
        torch.autograd.backward(outputs, upstream_of(case, outputs))
        for name, leaf in zip(case.inputs, leaves, strict=True):
            assert leaf.grad is not None
            results[f"grad {name}"] = leaf.grad
    return {name: result.detach() for name, result in results.items()}


def upstream_of(case: Case, outputs: Iterable[Tensor]) -> list[Tensor]:
    """The gradients by the outputs in the dtypes of the outputs."""
    if not case.upstream:
        return []
    return [grad.to(out.dtype) for out, grad in zip(outputs, case.upstream, strict=True)]


def truth(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients in float64."""
    leaves = [
        tensor.double().requires_grad_(bool(case.upstream)) for tensor in case.inputs.values()
    ]
    return run(case, case.plain, leaves)


def _status_bytes(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field_name}, found none")


def trim_heap() -> None:
    """Gives memory that nobody uses back to the system, which else would be used again unseen."""
    ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Most memory that the process, or the GPU, holds beyond what it held at the start."""

    def __init__(self) -> None:
        gc.collect()
        trim_heap()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        # Linux forgets the peak resident size on this write (man 5 proc, clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status_bytes("VmRSS")

    def extra_bytes(self) -> int:
        """The peak until now."""
        if DEVICE == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return max(0, _status_bytes("VmHWM") - self.before)


class Rounds:
    """The implementations of a case, checked and then timed."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.buffers = [torch.empty_like(tensor) for tensor in case.inputs.values()]
        self.results: dict[str, Result] = {}
        self._turns: dict[str, Callable[[], float]] = {}
        self._truth = truth(case)

    def _fresh_leaves(self) -> list[Tensor]:
        for buffer, tensor in zip(self.buffers, self.case.inputs.values(), strict=True):
            buffer.copy_(tensor)
        wants_grad = bool(self.case.upstream)
        return [buffer.detach().requires_grad_(wants_grad) for buffer in self.buffers]

    def enter(self, name: str, implementation: Implementation, *, timed: bool) -> None:
        """Checks an implementation, and lets it be timed if it is `timed`."""
        results = run(self.case, implementation, self._fresh_leaves())
        errors = {key: relative_error(results[key], want) for key, want in self._truth.items()}
        self.results[name] = Result(errors=errors)
        upstream = upstream_of(self.case, (results[output] for output in self.case.outputs))

        def turn() -> float:
            leaves = self._fresh_leaves()
            return seconds_of(lambda: step(implementation, leaves, upstream))

        if timed:
            self._turns[name] = turn

    def time(self) -> None:
        """A block of rounds for each implementation beside plain PyTorch."""
        self._truth.clear()
        ceilings: dict[str, Callable[[], float]] = {}
        for name, ceiling in self.case.ceilings.items():
            self.results[name] = Result()
            ceiling()
            ceilings[name] = partial(seconds_of, ceiling)
        plain = {PLAIN: self._turns.pop(PLAIN)} if PLAIN in self._turns else {}
        for name, turn in self._turns.items():
            self._time_block(plain | {name: turn} | ceilings)

    def _time_block(self, turns: dict[str, Callable[[], float]]) -> None:
        """Rounds in which `turns` follow each other."""
        block: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(MOST_ROUNDS):
            if number >= FEWEST_ROUNDS and sum(map(sum, block.values())) > SECONDS_A_BLOCK:
                break
            for name, turn in turns.items():
                block[name].append(self._timed(name, turn))
        fastest = min((block[name] for name in self.case.ceilings), key=statistics.median)
        for name, seconds in block.items():
            result = self.results[name]
            result.seconds += seconds
            result.over_ceiling += [own / bare for own, bare in zip(seconds, fastest, strict=True)]
            if PLAIN in block:
                plain = zip(block[PLAIN], seconds, strict=True)
                result.times_plain += [base / own for base, own in plain]

    def _timed(self, name: str, turn: Callable[[], float]) -> float:
        """Seconds of a turn; the first one of an implementation measures its memory too."""
        result = self.results[name]
        if result.peak_bytes is not None:
            trim_heap()
            return turn()
        memory = PeakMemory()
        seconds = turn()
        result.peak_bytes = memory.extra_bytes()
        return seconds


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start
