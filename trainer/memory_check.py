"""What the memory plan is held against: the memory there is, the peak there was, and the allocation
that failed.

`RunMemory` prints the plan before a run loads its weights, refuses one that cannot fit, turns an
allocation that fails into one sentence, and writes the measured peak beside the plan, in
`memory_plan.json` of the run directory.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.config import RunConfig, UsageError
from trainer.durable import write_atomically
from trainer.fsdp import World, gather_in_order
from trainer.memory_parts import MemoryPart, MemoryPlan
from trainer.run_log import RunLog

PLAN_FILE = "memory_plan.json"
# What the run calls its phases, and which one of the plan that is.
PLANNED_PHASE = {"update": "forward"}
PHASE_NAMES = {
    "rollout": "the rollout",
    "forward": "the update",
    "backward": "the update's end",
}
# Control groups of the second and of the first kind.
CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


class OutOfMemoryError(UsageError):
    """An allocation failed on this rank, which says so itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMemory:
    """The plan of a run, None where none was wanted, and what is measured against it."""

    plan: MemoryPlan | None
    world: World
    folder: Path
    start_bytes: int
    """Host memory of this process when the plan was made."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Turns an allocation that fails within its block into one sentence.

        Raises:
            OutOfMemoryError: one failed.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(self._advice(name)) from error

    def log_peak(self, log: RunLog) -> None:
        """Prints the largest peak of all ranks beside the plan, and adds it to the plan's file.

        Collectives: one all-gather of pickled objects.
        """
        if self.plan is None:
            return
        peaks = gather_in_order(self.world, [peak_bytes(self.world.device, self.start_bytes)])
        on_host = self.plan.device == "cpu"
        planned, measured = self.plan.peak(on_host=on_host)[1], max(peaks)
        log.message(f"memory of a rank at its peak: {gib(measured)}, {gib(planned)} planned")
        if self.world.is_main:
            _write_plan(self.folder, self.plan, {"planned": planned, "measured": peaks})

    def _advice(self, name: str) -> str:
        where = f"out of memory in the {name} phase of rank {self.world.rank}"
        go_on = "then give the same command again, which goes on from the last checkpoint"
        if self.plan is None:
            return f"{where}; use less, {go_on}"
        phase, on_host = PLANNED_PHASE.get(name, "rollout"), self.plan.device == "cpu"
        largest = self.plan.parts_of(phase, on_host=on_host)[0]
        temporary = [
            part
            for part in self.plan.parts_of(phase, on_host=on_host)
            if len(part.phases) < len(largest.phases)
        ]
        part = temporary[0] if temporary else largest
        return (
            f"{where}, where {gib(self.plan.in_phase(phase, on_host=on_host))} were planned, the "
            f"most that can be changed for {part.name} ({gib(part.bytes)}); give {part.knob}, "
            f"{go_on}"
        )


def check_memory(
    config: RunConfig,
    world: World,
    log: RunLog,
    make_plan: Callable[[int | None], MemoryPlan],
) -> RunMemory:
    """Plans the memory of the run, prints the plan and compares it with the memory there is.

    Args:
        config: of the run.
        world: its ranks.
        log: gets the plan.
        make_plan: the plan, by the memory of a GPU; None on a CPU.

    Raises:
        UsageError: it cannot fit, unless `--memory-check` allows that.
    """
    start_bytes, folder = host_bytes_used(), config.run_folder
    if config.memory_check == "off":
        return RunMemory(plan=None, world=world, folder=folder, start_bytes=start_bytes)
    on_gpu = world.device.type == "cuda"
    free, total = torch.cuda.mem_get_info(world.device) if on_gpu else (None, None)
    plan = make_plan(total)
    log.message(plan_table(plan))
    if world.is_main:
        _write_plan(folder, plan)
    problems = gather_in_order(world, _problems(plan, free))
    if problems and config.memory_check == "refuse":
        raise UsageError(f"{problems[0]} (--memory-check warn tries all the same)")
    if problems:
        log.message(f"warning: {problems[0]}")
    return RunMemory(plan=plan, world=world, folder=folder, start_bytes=start_bytes)


def _problems(plan: MemoryPlan, device_free: int | None) -> list[str]:
    # Ranks of this machine share its memory.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    compared = ((False, 1, device_free), (True, here, host_bytes_free()))
    found = [
        what_cannot_fit(plan, on_host=on_host, ranks=ranks, room=room)
        for on_host, ranks, room in compared
    ]
    return [problem for problem in found if problem is not None]


def what_cannot_fit(plan: MemoryPlan, *, on_host: bool, ranks: int, room: int | None) -> str | None:
    """A sentence if so many ranks need more than the room they share, which None leaves open."""
    phase, needed = plan.peak(on_host=on_host)
    if room is None or needed * ranks <= room:
        return None
    largest = plan.parts_of(phase, on_host=on_host)[0]
    each = f"{gib(needed)} on each of {ranks} ranks" if ranks > 1 else gib(needed)
    return (
        f"memory: expected at most the {gib(room)} that are free, got a plan of {each} in "
        f"{PHASE_NAMES[phase]}, the largest part {gib(largest.bytes)} for {largest.name}; give "
        f"{largest.knob}"
    )


def plan_table(plan: MemoryPlan) -> str:
    """The plan as lines of text, the largest part first."""
    lines = [f"memory of each of {plan.ranks} ranks" if plan.ranks > 1 else "memory"]
    for part in sorted(plan.parts, key=lambda part: -part.bytes):
        if part.bytes:
            lines.append(f"  {part.name:<26}{gib(part.bytes):>10}  {_when(part, plan)}")
    for on_host in (False, True):
        phase, needed = plan.peak(on_host=on_host)
        if needed:
            where = " of the host" if on_host and plan.device != "cpu" else ""
            lines.append(f"  {'peak' + where:<26}{gib(needed):>10}  in {PHASE_NAMES[phase]}")
    return "\n".join(lines)


def _when(part: MemoryPart, plan: MemoryPlan) -> str:
    """When a part is there, where that is not always; and where, if not on the device."""
    is_always_there = set(plan.phases) <= set(part.phases)
    when = "" if is_always_there else ", ".join(PHASE_NAMES[each] for each in part.phases)
    where = "host" if part.on_host and plan.device != "cpu" else ""
    return "; ".join(filter(None, (when, where)))


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or, which torch has no class for, on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


def host_bytes_used() -> int:
    """Memory of this process; 0 where /proc does not say."""
    return _status("VmRSS")


def peak_bytes(device: torch.device, start_bytes: int) -> int:
    """The most that this process had allocated on a GPU, or on the host above its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(0, _status("VmHWM") - start_bytes)


def host_bytes_free() -> int | None:
    """What the machine and the control group still have; None where /proc does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    free = [] if found is None else [int(found[1]) * 1024]
    for folder, limit, usage, inactive in CGROUPS:
        if not (folder / limit).exists() or (text := (folder / limit).read_text().strip()) == "max":
            continue
        # Files that were read are dropped when their memory is needed.
        files = re.search(rf"^{inactive} (\d+)", (folder / "memory.stat").read_text(), re.M)
        used = int((folder / usage).read_text()) - (int(files[1]) if files else 0)
        free.append(int(text) - used)
    return min(free, default=None)


def _status(name: str) -> int:
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def _write_plan(
    folder: Path, plan: MemoryPlan, peak: dict[str, int | list[int]] | None = None
) -> None:
    text = json.dumps(plan.to_dict() | {"peak_bytes": peak}, indent=2)
    write_atomically(folder / PLAN_FILE, text + "\n")
