"""Adds the machine to pytest-benchmark's record and prints one table of all cases at the end."""

from pathlib import Path
from typing import Any

import pytest
from harness import Row, machine, table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="also write the table of results to this file")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(machine())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [Row.from_benchmark(bench) for bench in session.benchmarks] if session else []
    if not rows:
        return
    text = ", ".join(f"{name} {value}" for name, value in machine().items()) + "\n\n" + table(rows)
    terminalreporter.write_line("")
    terminalreporter.write_line(text)
    if config.getoption("--table"):
        config.getoption("--table").write_text(text + "\n")
