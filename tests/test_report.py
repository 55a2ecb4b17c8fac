"""The report of a run: complete, self-contained, small, and safe against the text it shows."""

import dataclasses
import html.parser
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import report
from trainer.report import write_page, write_report
from trainer.report_charts import (
    MAIN_CHARTS,
    MAX_POINTS,
    OTHER_CHARTS,
    chart_svg,
    curve_points,
    smoothed,
    value_range,
)
from trainer.rewards import Reward
from trainer.run_log import RunLog, Sample
from trainer.tasks import Problem

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028<!--\x00\ud800&\"'"


class PageReader(html.parser.HTMLParser):
    """Collects the elements of a page, and the text of its scripts and of its table."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.cells: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)
        if self._open in ("th", "td", "span", "b", "i", "h1"):
            self.cells.append(data)


def make_sample(number: int, completion: str = "5", *, correct: bool = True) -> Sample:
    return Sample.of(
        Problem(problem_id=f"p{number}", question=f"{number} + 1 ?", answer=str(number + 1)),
        Reward(total=float(correct), parts={}, extracted="5", correct=correct, status="ok"),
        prompt="",
        completion=completion,
        length=7,
        finish_reason="stop",
    )


def make_run(run_dir: Path, *, steps: int = 3, completion: str = "5", problems: int = 2) -> Path:
    with RunLog(run_dir, total_steps=steps, stream=io.StringIO()) as log:
        for step in range(steps + 1):
            samples = [make_sample(n, completion) for n in range(problems)]
            metrics = {
                "reward/mean": step / 10,
                "length/mean": 10.0 + step,
                "kl": math.nan if step == 1 else 0.1,
                "eval/pass@1": 0.25 + step / 10,
                "seconds/rollout": 30.0,
            }
            log.log_step(step, metrics, eval_samples=samples)
    return run_dir


def read_page(path: Path) -> PageReader:
    reader = PageReader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def page_data(path: Path) -> dict:
    return json.loads(read_page(path).scripts[0])


def test_report_holds_curves_headlines_configuration_and_samples(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 3, "loss": {"kl": "k3", "weight": 0.1}}')
    path = write_report(make_run(tmp_path))
    assert path == tmp_path / "report.html"
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    cells = read_page(path).cells
    assert {"25.0 → 55.0 %", "+30.0 points", "10.0 → 13.0", "1.30 times", "2 min 00 s"} <= set(
        cells
    )
    assert cells[cells.index("loss.weight") + 1] == "0.1"
    data = page_data(path)
    assert [problem["problem_id"] for problem in data["browser"]["problems"]] == ["p0", "p1"]
    assert [e["step"] for e in data["browser"]["problems"][0]["steps"]] == [0, 1, 2, 3]
    (kl,) = (c for chart in data["charts"] for c in chart["curves"] if c["label"] == "kl")
    assert kl["points"] == [[0, 0.1], [2, 0.1], [3, 0.1]]


def test_report_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))
    for tag, attributes in read_page(path).tags:
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name) in (None, "data:,")
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|url\(|@import", text)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run_dir = tmp_path / "run<img src=x>"
    make_run(run_dir, completion=HOSTILE)
    (run_dir / "config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    path = write_report(run_dir)
    reader = read_page(path)
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in reader.tags)
    assert len(reader.scripts) == 2
    # Browsers end a script at more spellings than this parser does, so no markup may be in it.
    assert not set("<>&") & set(reader.scripts[0])
    sample = json.loads(reader.scripts[0])["browser"]["problems"][0]["steps"][0]["samples"][0]
    assert sample["completion"] == HOSTILE
    # The page's own script must put text in place as text.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", reader.scripts[1])


def test_report_can_be_written_before_the_first_step(tmp_path: Path) -> None:
    RunLog(tmp_path, total_steps=3, stream=io.StringIO()).close()
    data = page_data(write_report(tmp_path))
    assert data["charts"] == [] and data["browser"]["problems"] == []


def test_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    make_run(tmp_path)
    first = write_report(tmp_path).read_text()
    assert write_report(tmp_path).read_text() == first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_page_alone_is_the_page_of_the_report(tmp_path: Path) -> None:
    page = write_page(make_run(tmp_path)).read_text()
    assert not (tmp_path / "curves.png").exists()
    assert write_report(tmp_path).read_text() == page


def test_report_of_a_long_run_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_READ_BYTES", 300_000)
    path = write_report(make_run(tmp_path, steps=25, completion="wait " * 4000, problems=20))
    problems = page_data(path)["browser"]["problems"]
    assert len(problems) == report.MAX_PROBLEMS
    steps = [entry["step"] for entry in problems[0]["steps"]]
    assert len(steps) == report.MAX_STEPS and (steps[0], steps[-1]) == (0, 25)
    assert path.stat().st_size < 500_000


def test_long_completion_keeps_its_start_and_its_end(tmp_path: Path) -> None:
    text = "start " + "x" * 10_000 + " <answer>5</answer>"
    path = write_report(make_run(tmp_path, completion=text))
    shown = page_data(path)["browser"]["problems"][0]["steps"][0]["samples"][0]["completion"]
    assert shown.startswith("start x") and shown.endswith("<answer>5</answer>")
    assert len(shown) < report.MAX_COMPLETION_CHARS + 100


def test_training_samples_stand_in_where_nothing_was_held_out(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=3, stream=io.StringIO()) as log:
        for step, numbers in enumerate([(1, 2), (2, 3), (3, 2)], start=1):
            log.log_step(step, {}, samples=[make_sample(n) for n in numbers])
    browser = page_data(write_report(tmp_path))["browser"]
    assert [(p["problem_id"], len(p["steps"])) for p in browser["problems"]] == [
        ("p2", 3),
        ("p3", 2),
        ("p1", 1),
    ]


def test_samples_of_a_step_are_capped(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, stream=io.StringIO()) as log:
        log.log_step(1, {}, eval_samples=[make_sample(1) for _ in range(50)])
    (problem,) = page_data(write_report(tmp_path))["browser"]["problems"]
    assert len(problem["steps"][0]["samples"]) == report.MAX_SAMPLES


def test_thinned_curve_keeps_its_mean_and_its_last_step() -> None:
    records = [{"step": n, "x": float(n % 7)} for n in range(20 * MAX_POINTS)]
    points = curve_points(records, "x")
    assert len(points) == MAX_POINTS
    assert points[-1][0] == records[-1]["step"]
    mean = sum(record["x"] for record in records) / len(records)
    assert sum(value for _, value in points) / MAX_POINTS == pytest.approx(mean)


def test_smoothing_keeps_a_line_in_place() -> None:
    line = [(float(n), 3.0 * n) for n in range(200)]
    middle = smoothed(line)[20:-20]
    assert [value for _, value in middle] == pytest.approx([value for _, value in line[20:-20]])


@pytest.mark.parametrize(
    "values", [[], [0.0], [5.0], [-3.0], [1e-7, 3e-7], [1e9, 2e9], [-1.0, 1.0], [0.2, 0.2]]
)
def test_value_range_holds_all_values(values: list[float]) -> None:
    for chart in (*MAIN_CHARTS, *OTHER_CHARTS):
        if chart.unit == "number":
            low, high = value_range(chart, values)
            assert low < high
            assert all(low <= value <= high for value in values)


@pytest.mark.parametrize("count", [1, 2, 31, 400])
def test_curve_is_drawn_inside_its_chart(count: int) -> None:
    chart = dataclasses.replace(OTHER_CHARTS[0], starts_at_zero=False)
    key = chart.curves[0].key
    points = [(float(n), math.sin(n)) for n in range(count)]
    svg = chart_svg(chart, {key: points}, last_step=count - 1)
    spots = re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'points="([^"]*)"', svg)))
    spots += re.findall(r'cx="(-?[\d.]+)" cy="(-?[\d.]+)"', svg)
    assert len(spots) >= count
    assert all(44 <= float(x) <= 392 and 10 <= float(y) <= 194 for x, y in spots)


def test_report_runs_as_a_program(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    program = [sys.executable, report.__file__]
    done = subprocess.run([*program, str(tmp_path / "run")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'run' / 'report.html'}\n")
    missing = subprocess.run([*program, str(tmp_path)], capture_output=True, text=True)
    assert missing.returncode == 2
    assert missing.stderr.startswith("run_dir: expected a run directory with metrics.jsonl, got ")
    assert missing.stderr.count("\n") == 1
