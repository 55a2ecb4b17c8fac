"""Tokenized sequences in files that all ranks map into memory: whatever their number, no process
holds them."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from trainer.packing import TokenSequence

BLOCK_BYTES = 1 << 20


class TokenStore:
    """Sequences of prompt and completion, in order.

    Args:
        path: of the two files, without their suffixes, as given to `write`.
    """

    def __init__(self, path: Path) -> None:
        self.files = _files(path)
        self._tokens = np.memmap(self.files[0], dtype=np.int32, mode="r")
        self._bounds_S3 = np.load(self.files[1], mmap_mode="r")

    @classmethod
    def write(cls, path: Path, sequences: Iterable[tuple[list[int], list[int]]]) -> int:
        """Stores prompts and completions under a path without suffix, in place of what was there;
        returns their number, of which there has to be one for the store to be opened."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens_path, bounds_path = _files(path)
        # Another process may still have the old files mapped.
        new_tokens, new_bounds = (file.with_name(f".{file.name}") for file in _files(path))
        bounds, start = [], 0
        with new_tokens.open("wb") as file:
            for prompt_ids, token_ids in sequences:
                np.array([*prompt_ids, *token_ids], dtype=np.int32).tofile(file)
                middle = start + len(prompt_ids)
                bounds.append((start, middle, middle + len(token_ids)))
                start = middle + len(token_ids)
        with new_bounds.open("wb") as file:
            np.save(file, np.array(bounds, dtype=np.int64).reshape(-1, 3))
        os.replace(new_tokens, tokens_path)
        os.replace(new_bounds, bounds_path)
        return len(bounds)

    def __len__(self) -> int:
        return len(self._bounds_S3)

    def __getitem__(self, index: int) -> TokenSequence:
        start, middle, end = self._bounds_S3[index].tolist()
        return TokenSequence(
            prompt_ids=self._tokens[start:middle].tolist(),
            token_ids=self._tokens[middle:end].astype(np.int64),
        )

    def __iter__(self) -> Iterator[TokenSequence]:
        return map(self.__getitem__, range(len(self)))

    def prompt_keys(self) -> list[bytes]:
        """For each sequence a hash of its prompt's tokens."""
        return [
            hashlib.sha256(self._tokens[start:middle].tobytes()).digest()
            for start, middle, _ in self._bounds_S3.tolist()
        ]

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int((self._bounds_S3[:, 2] - self._bounds_S3[:, 0]).max())

    def fingerprint(self) -> str:
        """The same for the same tokens."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as content:
                while block := content.read(BLOCK_BYTES):
                    digest.update(block)
        return digest.hexdigest()


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".tokens"), path.with_suffix(".bounds.npy")
