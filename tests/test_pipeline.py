"""The R1 pipeline with its commands in this process: stages and files, repeats, edits, refusals."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline_runs import command_line, stages_here
from pytest import CaptureFixture

from trainer.pipeline_options import merged_flags
from trainer.pipeline_presets import PIPELINES
from trainer.stage_record import StageRecord, checksum
from trainer.stages import pipeline_stages
from trainer.testing import write_bigram_model, write_sums
from trainer.train import main

RL = "--steps 2 --num-prompts 4 --group-size 4 --max-new-tokens 12 --eval-samples 1 --backend cpp"
FLAGS = (
    f"rl: {RL}",
    "samples: --max-new-tokens 12 --count 40 --samples 8",
    "evaluate: --samples 2",
    "sft: --batch-size 8 --max-tokens 64",
)
ORDER = [
    *("evaluate-base", "r1-zero", "evaluate-r1-zero"),
    *("cold-start-samples", "cold-start-filter", "cold-start-rewrite", "cold-start-sft"),
    *("evaluate-dev1", "reasoning-rl", "evaluate-dev2"),
    *("rejection-samples", "rejection-filter", "rejection-sft", "evaluate-dev3"),
    *("general-rl", "evaluate-r1", "distill", "evaluate-distilled", "results"),
]
Outcome = tuple[int, str, str]
Main = Callable[..., Outcome]


def rewrite(question: str, completion: str) -> str | None:
    """A rule for the tests: one more word in the thought."""
    return completion.replace("<think>", "<think> so") if "<think>" in completion else None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_bigram_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    general = {"question": "Say so.", "completion": "<think> so </think> <answer> 1 </answer>"}
    (folder / "general.jsonl").write_text(json.dumps(general) + "\n")
    return folder


def flags(inputs: Path, run_dir: Path, *more: object, **changed: object) -> list[str]:
    options = {
        "small_model": inputs / "model",
        "rewrite": f"{__name__}:rewrite",
        "general_data": inputs / "general.jsonl",
    }
    return command_line(inputs, run_dir, options | changed, more, FLAGS)


@pytest.fixture
def commands() -> Iterator[list[str]]:
    with stages_here() as ran:
        yield ran


@pytest.fixture
def run(capsys: CaptureFixture[str], commands: list[str]) -> Main:
    """Runs the command line: exit code, standard output, standard error."""

    def call(arguments: list[str]) -> Outcome:
        commands.clear()
        capsys.readouterr()
        return main(arguments), *capsys.readouterr()

    return call


def error_of(outcome: Outcome) -> str:
    code, _, err = outcome
    assert code == 2
    return err.strip().splitlines()[-1]


def stage_folder(run_dir: Path, name: str) -> Path:
    (folder,) = [
        each for each in (run_dir / "stages").iterdir() if each.name.split("-", 1)[1] == name
    ]
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a pipeline that is complete."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with stages_here():
        assert main(flags(inputs, run_dir)) == 0
    return run_dir


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


def test_stages_come_in_the_order_of_the_paper_and_each_leaves_its_files(whole: Path) -> None:
    folders = sorted((whole / "stages").iterdir())
    assert [folder.name for folder in folders] == [
        f"{number:02d}-{name}" for number, name in enumerate(ORDER, start=1)
    ]
    for folder in folders:
        record = StageRecord.read(folder / "done.json")
        assert record is not None
        for name, digest in record.outputs.items():
            assert checksum(folder / name) == digest
        for name in record.inputs:
            assert (whole / name).exists(), name


def test_models_of_the_fine_tunings_start_from_the_base(whole: Path, inputs: Path) -> None:
    for name, start in (
        ("cold-start-sft", inputs / "model"),
        ("reasoning-rl", stage_folder(whole, "cold-start-sft") / "model"),
        ("rejection-sft", inputs / "model"),
        ("general-rl", stage_folder(whole, "rejection-sft") / "model"),
    ):
        config = json.loads((stage_folder(whole, name) / "config.json").read_text())
        assert config["model"] == str(start)


def test_rows_to_learn_from_are_right_and_rewritten_and_general_data_is_added(whole: Path) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (stage_folder(whole, name) / "rows.jsonl").open()]

    kept, rewritten = rows("cold-start-filter"), rows("cold-start-rewrite")
    assert all(row["correct"] for row in kept)
    assert [row["original"] for row in rewritten] == [row["completion"] for row in kept]
    assert all(row["completion"].startswith("<think> so") for row in rewritten)
    assert rows("rejection-filter")[-1]["question"] == "Say so."
    counts = json.loads((stage_folder(whole, "rejection-filter") / "counts.json").read_text())
    samples = (stage_folder(whole, "rejection-samples") / "samples.jsonl").read_text()
    assert counts["read"] == samples.count("\n") == 40 * 8
    dropped = sum(counts.values()) - counts["read"] - counts["kept"] - counts["general"]
    assert dropped + counts["kept"] == counts["read"]


def test_table_states_the_share_of_right_samples_of_every_model(whole: Path) -> None:
    results = json.loads((stage_folder(whole, "results") / "results.json").read_text())
    labels = ["base", "r1-zero", "dev1", "dev2", "dev3", "r1", "distilled"]
    assert list(results) == labels
    for label in labels:
        lines = (stage_folder(whole, f"evaluate-{label}") / "samples.jsonl").open()
        right = [json.loads(line)["correct"] for line in lines]
        assert results[label]["accuracy"]["value"] == pytest.approx(sum(right) / len(right))
    table = (stage_folder(whole, "results") / "results.md").read_text()
    assert "| R1-Dev3" in table and "language consistency" in table


def test_stages_that_are_done_are_not_made_again(
    inputs: Path, whole: Path, run: Main, commands: list[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if "/0" in str(path)}
    code, out, _ = run(flags(inputs, whole))
    assert code == 0 and commands == []
    assert out.count(": done") == len(ORDER)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_edited_samples_are_noticed_and_redone_when_asked(
    inputs: Path, copy: Path, run: Main, commands: list[str]
) -> None:
    edited = stage_folder(copy, "cold-start-rewrite") / "rows.jsonl"
    edited.write_text("".join(edited.read_text().splitlines(keepends=True)[:-1]))
    error = error_of(run(flags(inputs, copy)))
    assert re.search(
        r"07-cold-start-sft was made from another stages/06-cold-start-rewrite/rows.jsonl than is "
        r"there now: --from cold-start-sft makes it and the stages after it again",
        error,
    )
    assert commands == []
    code, _, _ = run(flags(inputs, copy, "--from=cold-start-sft", "--until=evaluate-dev1"))
    assert code == 0 and commands == ["cold-start-sft", "evaluate-dev1"]
    assert (copy / "replaced" / "07-cold-start-sft.1" / "model").is_dir()
    record = StageRecord.read(stage_folder(copy, "cold-start-sft") / "done.json")
    assert record is not None and checksum(edited) in record.inputs.values()
    # A second time there is nothing to redo.
    assert run(flags(inputs, copy, "--from=cold-start-sft", "--until=evaluate-dev1"))[0] == 0
    assert commands == []


def test_table_is_shown_by_a_start_that_ends_with_it(inputs: Path, whole: Path, run: Main) -> None:
    assert "R1-Dev3" in run(flags(inputs, whole))[1]
    assert "R1-Dev3" in run(flags(inputs, whole, "--only=results"))[1]
    for part in ("--only=evaluate-base", "--until=evaluate-base"):
        code, out, _ = run(flags(inputs, whole, part))
        assert code == 0 and "R1-Dev3" not in out


def test_other_options_of_a_stage_are_noticed(inputs: Path, copy: Path, run: Main) -> None:
    arguments = [*flags(inputs, copy), "evaluate-r1: --temperature 0.5"]
    assert "evaluate-r1 was made from other options than are given now" in error_of(run(arguments))


def test_one_stage_alone_starts_from_a_file_of_the_user(
    inputs: Path, whole: Path, tmp_path: Path, run: Main, commands: list[str]
) -> None:
    rows = shutil.copy(stage_folder(whole, "cold-start-filter") / "rows.jsonl", tmp_path)
    given = f"--given=cold-start-rewrite={rows}"
    code, _, _ = run(flags(inputs, tmp_path / "run", given, "--only=cold-start-sft"))
    assert code == 0 and commands == ["cold-start-sft"]
    (folder,) = (tmp_path / "run" / "stages").iterdir()
    assert folder.name == "07-cold-start-sft"
    assert json.loads((folder / "config.json").read_text())["data"]["dataset"] == str(rows)


def test_stage_between_from_and_until_alone_is_made(
    inputs: Path, copy: Path, run: Main, commands: list[str]
) -> None:
    for name in ("evaluate-dev2", "rejection-samples", "rejection-filter"):
        shutil.rmtree(stage_folder(copy, name))
    arguments = flags(inputs, copy, "--from=rejection-samples", "--until=rejection-filter")
    assert run(arguments)[0] == 0
    assert commands == ["rejection-samples"]


def test_a_model_rewrites_through_requests(
    inputs: Path, whole: Path, tmp_path: Path, run: Main, commands: list[str]
) -> None:
    config = replace(PIPELINES["r1-tiny"][1], rewrite="owner/model", run_dir=tmp_path)
    stages = {stage.name: stage for stage in pipeline_stages(config)}
    requests = stages["cold-start-requests"]
    rows = stage_folder(whole, "cold-start-filter") / "rows.jsonl"
    assert requests.step is not None
    requests = replace(requests, step=replace(requests.step, rows=rows))  # type: ignore[type-var]
    assert requests.step is not None
    counts = requests.step.run(tmp_path)
    asked = [json.loads(line) for line in (tmp_path / "requests.jsonl").open()]
    originals = [json.loads(line) for line in rows.open()]
    assert counts == {"requests": len(originals)} and len(asked) == len(originals)
    for request, row in zip(asked, originals, strict=True):
        assert row["question"] in request["question"] and row["completion"] in request["question"]
        assert request["answer"] == row["answer"]
    answers = [
        {"problem_id": request["problem_id"], "question": "?", "correct": place != 1}
        | {"completion": f"<think> so </think> <answer> {request['answer']} </answer>"}
        for place, request in enumerate(asked)
    ]
    answers[2]["completion"] = "<think> so </think> <answer> 99 </answer>"
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    reader = stages["cold-start-rewrite"].step
    changed = {"rows": rows, "rewrites": tmp_path / "answers.jsonl", "template": "tiny"}
    counts = replace(reader, **changed).run(tmp_path)  # type: ignore[type-var, union-attr]
    expected = {"not rewritten": 1, "another answer": 1, "kept": len(originals) - 2}
    assert counts == {"read": len(originals), **expected}


def test_few_requests_are_enough_for_a_rewriting_alone(
    inputs: Path, tmp_path: Path, run: Main
) -> None:
    request = {"problem_id": "0", "question": "1 + 1", "answer": "2"}
    (tmp_path / "requests.jsonl").write_text(json.dumps(request) + "\n")
    more = (
        "--only=cold-start-rewriting",
        f"--given=cold-start-requests={tmp_path / 'requests.jsonl'}",
        "--dry-run=1xcpu",
    )
    code, out, err = run(flags(inputs, tmp_path / "run", *more, rewrite=inputs / "model"))
    assert code == 0, err
    assert "stage cold-start-rewriting\n  trainer/sample.py" in out


@pytest.mark.parametrize(
    ("more", "changed", "message"),
    [
        ((), {"general_data": "none.jsonl"}, "stage rejection-filter: .*none.jsonl: no such file"),
        ((), {"dataset": "none.jsonl"}, "stage evaluate-base: none.jsonl: no such file"),
        ((), {"model": "/nowhere"}, "stage evaluate-base: --model: expected an existing folder"),
        ((), {"small_model": "/nowhere"}, "stage distill: --model: expected an existing folder"),
        ((), {"template": "r9"}, "--template: expected one of r1,"),
        ((), {"rewrite": "trainer.none:rule"}, "--rewrite: trainer.none:rule cannot be imported"),
        ((), {"rewrite": "trainer.seeds:rule"}, "--rewrite: expected a function in"),
        (("--only=r2",), {}, "--only: expected one of evaluate-base, r1-zero, .*, got 'r2'"),
        (("--given=r2=x",), {}, "--given: expected one of evaluate-base"),
        (("--given=r1-zero=/nowhere",), {}, "--given: r1-zero=/nowhere: no such file"),
        (("--given=r1-zero",), {}, "--given: expected stage=PATH"),
        (("--only=r1-zero", "--until=results"), {}, "--only: expected neither"),
        (("--from=results", "--until=r1-zero"), {}, "--until: r1-zero comes before --from results"),
        (("--from=distill",), {}, "stage distill: .*rows.jsonl: no such file; stage .*-filter mak"),
        (("--onyl=r1-zero",), {}, "--onyl: no such flag; did you mean --only"),
    ],
)
def test_mistake_is_one_sentence_before_anything_is_computed(
    inputs: Path,
    tmp_path: Path,
    run: Main,
    commands: list[str],
    more: tuple[str, ...],
    changed: dict[str, object],
    message: str,
) -> None:
    error = error_of(run(flags(inputs, tmp_path / "run", *more, **changed)))
    assert re.search(message, error), error
    assert commands == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reasoning-rl: --stepps 3", "stage reasoning-rl: --stepps: no such flag; did you mean"),
        ("distill: --epochs none", "stage distill: .*expected a whole number"),
        ("r2: --steps 3", "--flags: expected one of evaluate-base, .* rl, sft, samples, evaluate"),
        ("rl: --steps '3", '--flags: "--steps \'3" cannot be read'),
        ("steps 3", "--flags: expected 'stage: --flag value"),
        ("rejection-filter: --count 3", "--flags: expected one of .*, got 'rejection-filter'"),
    ],
)
def test_mistake_in_the_flags_of_a_late_stage_is_found_first(
    inputs: Path, tmp_path: Path, run: Main, commands: list[str], text: str, message: str
) -> None:
    error = error_of(run([*flags(inputs, tmp_path / "run"), text]))
    assert re.search(message, error), error
    assert commands == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "1"}', "line 1: expected a non-empty text in column 'completion'"),
        ("[]", "line 1: expected an object"),
        ("", "expected at least one line, got none"),
        ("{", "line 1: not valid JSON"),
    ],
)
def test_file_with_other_columns_is_refused_at_the_start(
    inputs: Path, tmp_path: Path, run: Main, commands: list[str], line: str, message: str
) -> None:
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    given = f"--given=rejection-filter={tmp_path / 'mine.jsonl'}"
    error = error_of(run(flags(inputs, tmp_path / "run", given)))
    assert error.startswith("error: stage rejection-sft: ") and message in error, error
    assert commands == []


def test_filters_that_leave_nothing_stop_before_the_fine_tuning(
    inputs: Path, whole: Path, tmp_path: Path, run: Main, commands: list[str]
) -> None:
    samples = stage_folder(whole, "cold-start-samples") / "samples.jsonl"
    changed = {"correct": False, "finish_reason": "stop"}
    lines = [json.loads(line) | changed for line in samples.open()]
    wrong = tmp_path / "samples.jsonl"
    wrong.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = f"--given=cold-start-samples={wrong}"
    span = ("--from=cold-start-filter", "--until=cold-start-sft")
    error = error_of(run(flags(inputs, tmp_path / "run", given, *span)))
    assert "stage cold-start-filter: expected rows to learn from" in error
    assert f"got none (read {len(lines)}, wrong {len(lines)}" in error
    assert commands == []


def test_later_flags_replace_earlier_ones() -> None:
    words = ["--steps", "3", "--levels", "1", "2", "--steps=5", "--levels", "4"]
    assert merged_flags(words) == ["--steps", "5", "--levels", "4"]


def test_large_file_edited_in_the_middle_has_another_checksum(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"a" * (80 << 20))
    before = checksum(file)
    with file.open("r+b") as content:
        content.seek(40 << 20)
        content.write(b"b")
    assert checksum(file) != before


def test_record_of_another_version_is_named(inputs: Path, copy: Path, run: Main) -> None:
    (stage_folder(copy, "r1-zero") / "done.json").write_text('{"other": 1}')
    assert "not a record of this version" in error_of(run(flags(inputs, copy)))
