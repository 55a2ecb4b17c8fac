"""A key-value cache that grows in steps."""

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer; grows by half its size, where DynamicLayer copies itself for
    every token."""

    stored: list[Tensor]
    """Keys and values with room for more positions than there are, `[B, heads, room, head_dim]`."""
    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends the new positions and returns the whole filled part, `[B, heads, T,
        head_dim]`."""
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.stored = [self._room(states, states.shape[-2]) for states in new]
            self._show(0)
        start = self.extend(key_states.shape[-2])
        for stored, states in zip(self.stored, new, strict=True):
            stored[:, :, start : start + states.shape[-2]] = states
        return self.keys, self.values

    def extend(self, positions: int) -> int:
        """Adds positions whose keys and values the caller writes; the first of them."""
        start = self.get_seq_length()
        end = start + positions
        if end > self.stored[0].shape[-2]:
            filled, self.stored = self.stored, [self._room(each, end) for each in self.stored]
            for stored, earlier in zip(self.stored, filled, strict=True):
                stored[:, :, :start] = earlier[:, :, :start]
        self._show(end)
        return start

    @staticmethod
    def _room(states: Tensor, positions: int) -> Tensor:
        rows, heads, _, width = states.shape
        return states.new_empty(rows, heads, positions + max(16, positions // 2), width)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, in place of itself."""
        self.stored = [stored.repeat_interleave(repeats, dim=0) for stored in self.stored]
        self._show(self.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows at `indices`."""
        self.stored = [stored.index_select(0, indices) for stored in self.stored]
        self._show(self.get_seq_length())

    def _show(self, end: int) -> None:
        self.keys, self.values = (stored[:, :, :end] for stored in self.stored)
