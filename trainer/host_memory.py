"""What the C library does with host memory that was freed: on a CPU all tensors are in its heap.

glibc gives each thread a heap of its own, and what one thread frees no other gets. The forward pass
runs in one thread and autograd in another, so a step would need the memory of both.
"""

import ctypes
from typing import Any

# Of <malloc.h>.
M_ARENA_MAX = -8


def use_one_heap() -> None:
    """Makes all threads of this process that are yet to come share its heap; without glibc it does
    nothing."""
    if (library := _glibc()) is not None:
        library.mallopt(M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Gives what is free within the heap back to the system; without glibc it does nothing."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
