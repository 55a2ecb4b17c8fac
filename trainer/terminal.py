"""What a run shows on the terminal: one live progress line, results and framed samples above it.

On a terminal the progress line is rewritten in place; into a file or a pipe it is printed every
few steps. Model text is shown with its control characters made visible, so a completion cannot
move the cursor.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TextIO

MAX_COLUMNS = 110
_BAR_CELLS = 12
_PHASE_CHARS = 7
_SHOWN_LINES = 14

_GREEN, _RED, _DIM, _BOLD, _RESET = "\x1b[32m", "\x1b[31m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
_CLEAR_LINE = "\r\x1b[2K"

Metrics = Mapping[str, float | int | None]


class Terminal:
    """Writes permanent text to a stream, and one line that is rewritten where that is possible."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._has_colour = self.is_live and "NO_COLOR" not in os.environ
        self._encoding = stream.encoding or "utf-8"
        self.plain_glyphs = not _can_encode("━─│╭╰·", self._encoding)
        self._line = ""

    @property
    def columns(self) -> int:
        """Usable width; the last column stays free, where some terminals wrap early."""
        return min(shutil.get_terminal_size((100, 24)).columns - 1, MAX_COLUMNS)

    def print(self, text: str) -> None:
        """Permanent text above the live line."""
        line = self._line
        self._erase()
        self._write(text + "\n")
        if line:
            self.show_line(line)

    def show_line(self, text: str) -> None:
        """Replaces the live line; on a stream that is not a terminal, prints it."""
        if not self.is_live:
            self._write(text + "\n")
            return
        self._line = text
        self._write(_CLEAR_LINE + text)

    def close(self) -> None:
        """Leaves the last state of the live line behind, on a line of its own."""
        if self._line:
            self._write("\n")
            self._line = ""

    def colour(self, text: str, code: str) -> str:
        """The text in a colour, or as it is where there are none."""
        return f"{code}{text}{_RESET}" if self._has_colour else text

    def _erase(self) -> None:
        if self._line:
            self._write(_CLEAR_LINE)
            self._line = ""

    def _write(self, text: str) -> None:
        # A stream of a narrow encoding gets question marks instead of an exception in mid-run.
        self._stream.write(text.encode(self._encoding, "replace").decode(self._encoding))
        self._stream.flush()


def progress_text(
    terminal: Terminal,
    *,
    step: int,
    total_steps: int,
    metrics: Metrics,
    seconds_per_step: float | None,
    phase: str = "",
) -> str:
    """The progress line, cut to the terminal's width by leaving out its last fields."""
    done = min(step / total_steps, 1.0) if total_steps else 1.0
    steps_left = max(total_steps - step, 0)
    eta = seconds_per_step * steps_left if seconds_per_step is not None and steps_left else None
    accuracy = metrics.get("reward/accuracy", metrics.get("reward/code"))
    fields = [
        _field("acc", _percent(accuracy)),
        _field("reward", _number(metrics.get("reward/mean"), ".2f")),
        # That of reinforcement learning says nothing about progress.
        "" if "reward/mean" in metrics else _field("loss", _number(metrics.get("loss"), ".4f")),
        _field("len", _number(metrics.get("length/mean"), ".0f")),
        _field("reflect", _percent(metrics.get("reflection_rate"))),
        _field("", _number(seconds_per_step, ".2f", " s/step")),
        _field("", _tokens_per_second(metrics.get("tokens_per_second"))),
        _field("ETA", _duration(eta)),
    ]
    shown = [field for field in fields if field]
    # The estimate is what people look for, so it goes first when the line must be cut.
    if eta is not None:
        shown.insert(0, shown.pop())
    head = f"step {step:>{len(str(total_steps))}}/{total_steps}"
    if terminal.is_live:
        # Room for the phase is kept, so that the fields after it stay in their places.
        head = f"{head} {_bar(done, terminal.plain_glyphs)} {phase:<{_PHASE_CHARS}}"
    return _joined(head, shown, terminal.columns if terminal.is_live else None)


def eval_text(terminal: Terminal, step: int, metrics: Metrics, first: Metrics) -> str:
    """One line with the results on held-out problems, and how far they moved from the first."""
    separator = " | " if terminal.plain_glyphs else " · "
    parts = []
    for name in ("pass@1", "cons@k"):
        key = f"eval/{name}"
        value, start = metrics.get(key), first.get(key)
        if value is not None:
            moved = start is not None and metrics is not first
            change = f" ({100 * (value - start):+.1f})" if moved and start is not None else ""
            parts.append(f"{name} {100 * value:.1f} %{change}")
    length = metrics.get("eval/length/mean")
    if length is not None:
        parts.append(f"{length:.0f} tokens")
    return terminal.colour(f"step {step}: held-out {separator.join(parts)}", _BOLD)


def sample_text(
    terminal: Terminal,
    *,
    title: str,
    question: str,
    completion: str,
    correct: bool,
    verdict: str,
) -> str:
    """A framed completion with its question above and its verdict below."""
    top, side, bottom, rule = "+|+-" if terminal.plain_glyphs else "╭│╰─"
    width = max(terminal.columns - 2, 20)
    colour = _GREEN if correct else _RED
    edge = terminal.colour(side, colour)
    body = [terminal.colour(line, _DIM) for line in _shown_lines(question, width, 4)]
    body += _shown_lines(completion, width, _SHOWN_LINES)
    heading = f"{top}{rule} {_one_line(title)} "
    lines = [terminal.colour(heading + rule * max(width - len(heading), 2), colour)]
    lines += [f"{edge} {line}" for line in body]
    lines.append(terminal.colour(f"{bottom}{rule} {_one_line(verdict)}", colour))
    return "\n".join(lines)


def visible(text: str) -> str:
    """The text with control, format and surrogate characters as U+FFFD; line breaks are kept."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co")
        else (" " if char == "\t" else "\ufffd")
        for char in text
    )


def _one_line(text: str) -> str:
    return " ".join(visible(text).split())


def _shown_lines(text: str, width: int, limit: int) -> list[str]:
    lines: list[str] = []
    for paragraph in visible(text).strip().split("\n"):
        lines += textwrap.wrap(paragraph, width) or [""]
    if len(lines) <= limit:
        return lines
    head, tail = (limit - 1) // 2, limit - 1 - (limit - 1) // 2
    return [*lines[:head], f"[... {len(lines) - head - tail} lines ...]", *lines[-tail:]]


def _joined(head: str, fields: Sequence[str], columns: int | None) -> str:
    line = head
    for field in fields:
        longer = f"{line}  {field}"
        if columns is not None and len(longer) > columns:
            break
        line = longer
    return line if columns is None else line[:columns]


def _bar(share: float, plain: bool) -> str:
    full, empty = "#." if plain else "━─"
    cells = round(share * _BAR_CELLS)
    return full * cells + empty * (_BAR_CELLS - cells)


def _field(name: str, value: str | None) -> str:
    if value is None:
        return ""
    return f"{name} {value}" if name else value


def _number(value: float | int | None, spec: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{spec}}{unit}"


def _percent(value: float | int | None) -> str | None:
    return None if value is None else f"{100 * value:.0f}%"


def _tokens_per_second(value: float | int | None) -> str | None:
    if value is None:
        return None
    return f"{value / 1000:.1f}k tok/s" if value >= 1000 else f"{value:.0f} tok/s"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
