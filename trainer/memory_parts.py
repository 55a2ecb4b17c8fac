"""A memory plan as a value.

A plan has parts; each is there in some phases, and the largest sum over a phase is the peak:
`rollout` (and evaluation), `forward` (until the head has its gradient, activations of a micro-batch
being kept) and `backward` (its end, where the gradients of the embedding are whole). Fine-tuning
has the last two.
"""

from dataclasses import asdict, dataclass
from typing import Any

PHASES = ("rollout", "forward", "backward")
UPDATE = ("forward", "backward")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """Memory for one purpose, on one rank."""

    name: str
    bytes: int
    phases: tuple[str, ...]
    knob: str
    """What makes it smaller."""
    on_host: bool
    """In the memory of the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The parts of one rank's memory."""

    device: str
    ranks: int
    parts: tuple[MemoryPart, ...]
    phases: tuple[str, ...] = PHASES

    def in_phase(self, phase: str, *, on_host: bool) -> int:
        """Bytes of a phase, in host or device memory."""
        return sum(part.bytes for part in self.parts_of(phase, on_host=on_host))

    def parts_of(self, phase: str, *, on_host: bool) -> list[MemoryPart]:
        """The parts of a phase, largest first."""
        chosen = [part for part in self.parts if phase in part.phases and part.on_host == on_host]
        return sorted(chosen, key=lambda part: -part.bytes)

    def peak(self, *, on_host: bool) -> tuple[str, int]:
        """The phase that needs most, and its bytes."""
        sizes = {phase: self.in_phase(phase, on_host=on_host) for phase in self.phases}
        worst = max(sizes, key=lambda phase: sizes[phase])
        return worst, sizes[worst]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)
