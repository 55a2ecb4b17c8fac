"""Options of the benchmarks, the fixture that runs a case, and the report at the end.

Where no GPU is present Triton runs in its interpreter; it has to be told before its import.
"""

import os
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from harness import CHECKED_NAMES, DEVICE, Case, Compete, Factory, Rounds, Unavailable, machine  # noqa: E402
from report import Record, Row, comparison, load, markdown, save  # noqa: E402

RECORD = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="time every vocabulary, not only the shapes that the README speaks of",
    )
    parser.addoption(
        "--errors-only", action="store_true", help="plain PyTorch and our backends, checked only"
    )
    parser.addoption("--record", type=Path, metavar="STEM", help="write STEM.json and STEM.md")
    parser.addoption("--compare", type=Path, metavar="OLD.json", help="print what changed since")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: timed with --full only")
    config.stash[RECORD] = Record(machine=machine())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks benchmarks of a GPU `gpu`, and leaves out those that ask for --full."""
    here = Path(__file__).parent
    for item in items:
        if DEVICE == "cuda" and here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    if config.getoption("--full"):
        return
    full = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=full)
    items[:] = [item for item in items if item not in full]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.update(config.stash[RECORD].machine)


class Contest:
    """Runs cases and records them."""

    def __init__(self, benchmark: Any, config: pytest.Config) -> None:
        self.benchmark, self.record = benchmark, config.stash[RECORD]
        self.errors_only = config.getoption("--errors-only")
        benchmark._mode = "rounds beside plain PyTorch"

    def __call__(self, case: Case, factories: dict[str, Factory]) -> None:
        is_timed = case.is_timed and not self.errors_only
        if not is_timed:
            factories = {name: factories[name] for name in CHECKED_NAMES if name in factories}
        rounds = Rounds(case)
        for name, factory in factories.items():
            try:
                rounds.enter(name, factory(), timed=is_timed and name != "reference")
            except Unavailable as reason:
                self.leave_out(str(case), f"{name}: {reason}")
        if is_timed:
            rounds.time()
        self.record.rows += [Row.of(case, name, result) for name, result in rounds.results.items()]
        for name, result in rounds.results.items():
            if result.seconds:
                add_to_pytest_benchmark(self.benchmark, case, name, result.seconds)

    def leave_out(self, case: str, reason: str) -> None:
        self.record.missing.setdefault(reason, []).append(case)


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Compete:
    """Runs a case, each implementation made by its factory, and records it."""
    return Contest(benchmark, request.config)


def add_to_pytest_benchmark(benchmark: Any, case: Case, name: str, seconds: list[float]) -> None:
    """Hands rounds to pytest-benchmark, whose options then work on them.

    Its own loop runs one function a test; ours runs plain PyTorch between the rounds.
    """
    one = copy(benchmark)
    one.group = str(case)
    one.name = one.fullname = f"{case} {name}"
    stats = one._make_stats(iterations=1)
    for value in seconds:
        stats.update(value)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    record = config.stash[RECORD]
    if not record.rows:
        return
    stem, old = config.getoption("--record"), config.getoption("--compare")
    if stem:
        save(record, stem)
    terminalreporter.write_line("\n" + markdown(record))
    if old:
        terminalreporter.write_line("\n" + comparison(load(old), record))
