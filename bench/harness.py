"""What every benchmark needs: peak memory of a call, the copy that bounds it, and a table.

Times are medians of rounds whose inputs are restored outside the clock. Nothing passes or fails on
speed; what is compared was measured side by side in one run.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def cpu_model() -> str:
    """The processor's name, as the kernel prints it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """Where a result was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model()
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def let_threads_rest() -> None:
    """OpenMP threads spin for some milliseconds after PyTorch's last parallel region, on the cores
    that the next measurement is about."""
    time.sleep(0.02)


def copy_seconds(logits: Tensor, rounds: int = 15) -> float:
    """Median time of a plain copy of the logits between two resident buffers."""
    target = torch.empty_like(logits)
    times = []
    for _ in range(rounds):
        let_threads_rest()
        start = time.perf_counter()
        target.copy_(logits)
        if logits.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, found none")


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Most memory that a call holds beyond what was held before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Linux forgets the process's peak resident size on this write (man 5 proc, clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured case."""

    case: str
    """What was computed: op, dtype and shape; cases of one name are compared."""
    implementation: str
    seconds: float
    p20: float
    p80: float
    copy_seconds: float
    bytes_moved: int
    """One read of the logits and one write of the gradient."""
    error: float
    """Relative to float64, of the gradient."""
    peak_bytes: int

    @classmethod
    def from_benchmark(cls, benchmark: Any) -> "Row":
        """Reads what a case left in pytest-benchmark's record."""
        times = sorted(benchmark.stats.data)
        info = benchmark.extra_info
        return cls(
            case=info["case"],
            implementation=info["implementation"],
            seconds=statistics.median(times),
            p20=times[len(times) // 5],
            p80=times[len(times) * 4 // 5],
            copy_seconds=info["copy_seconds"],
            bytes_moved=info["bytes_moved"],
            error=info["error"],
            peak_bytes=info["peak_bytes"],
        )


def table(rows: list[Row]) -> str:
    """Markdown, one line a case; speed-ups are against eager and torch.compile of the same case."""
    seconds = {(row.case, row.implementation): row.seconds for row in rows}
    lines = [
        "| case | implementation | ms (p20-p80) | x eager | x compile | copies | GB/s "
        "| of copy | error | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def speedup(row: Row, baseline: str) -> str:
        base = seconds.get((row.case, baseline))
        return "" if base is None else f"{base / row.seconds:.1f}"

    for row in rows:
        cells = [
            row.case,
            row.implementation,
            f"{row.seconds * 1e3:.1f} ({row.p20 * 1e3:.1f}-{row.p80 * 1e3:.1f})",
            speedup(row, "eager"),
            speedup(row, "compile"),
            f"{row.seconds / row.copy_seconds:.2f}",
            f"{row.bytes_moved / row.seconds / 1e9:.1f}",
            f"{row.copy_seconds / row.seconds:.0%}",
            f"{row.error:.1e}",
            f"{row.peak_bytes / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
