"""Memory that was freed: one thread gets what another gave back, and the system gets the rest."""

import ctypes
import subprocess
import sys

import pytest

MEGABYTES = 200
# Pieces below the size that is mapped alone, freed by a thread and then wanted by the main one.
SCRIPT = f"""
import sys, threading
from trainer import host_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def fill():
    return [bytearray(100_000) for _ in range({MEGABYTES} * 10)]

def fill_and_free():
    pieces = fill()
    # Keeps the end of the heap, so that the rest is free within it.
    kept.append(bytearray(100_000))

kept = []
if sys.argv[1] == "one":
    host_memory.use_one_heap()
before = resident()
thread = threading.Thread(target=fill_and_free)
thread.start()
thread.join()
if sys.argv[2] == "return":
    host_memory.return_free_memory()
    print(resident() - before)
else:
    pieces = fill()
    print(resident() - before)
"""
pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc"
)


def growth(heaps: str, then: str) -> float:
    """Megabytes that the process has more in the end."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, heaps, then], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


def test_one_heap_gives_a_thread_what_another_freed() -> None:
    assert growth("one", "fill") < 1.3 * MEGABYTES
    assert growth("many", "fill") > 1.7 * MEGABYTES


def test_free_memory_goes_back_to_the_system() -> None:
    assert growth("one", "return") < 0.1 * MEGABYTES
