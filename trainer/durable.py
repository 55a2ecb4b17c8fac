"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole: readers see the old content or the new, never a part."""
    # The process id keeps two writers of one run directory from sharing a half-written file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    # Else a loss of power may leave the new name with nothing in it.
    flush_to_disk(temporary)
    os.replace(temporary, path)


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
