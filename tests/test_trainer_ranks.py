"""Refusals on several ranks: the main rank says why, however late it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The main rank is late: before it reads the flags, or between its failure and what it says of it.
SCRIPT = """
import os, sys, time
from trainer import train, training_run
late, *arguments = sys.argv[1:]
if os.environ["RANK"] == "0":
    if late == "early":
        time.sleep(2)
    stop_world = training_run.stop_world
    training_run.stop_world = lambda: (stop_world(), time.sleep(2))
sys.exit(train.main(arguments))
"""


@pytest.mark.parametrize(
    ("late", "flag", "sentence"),
    [
        ("early", "--steps=many", "error: --steps: expected"),
        ("afterwards", "--model=nowhere", "error: --model: expected an existing folder"),
    ],
)
def test_refusal_is_said_once_though_another_rank_fails_first(
    late: str, flag: str, sentence: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), late, flag, f"--run-dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: --") == 1 and sentence in done.stderr, done.stderr


END = """
import atexit, time
from concurrent.futures import ThreadPoolExecutor
from trainer.training_run import end_process

class Kept:
    def __del__(self):
        print("torn down")

kept = Kept()
atexit.register(print, "registered")
ThreadPoolExecutor().submit(lambda: (time.sleep(0.5), print("saved")))
end_process(3)
"""


def test_a_process_ends_after_what_it_still_has_to_do_and_tears_nothing_down() -> None:
    done = subprocess.run(
        [sys.executable, "-c", END],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "saved\nregistered\n", "")
