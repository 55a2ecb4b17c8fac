"""The process that compares answers: killable, limited in memory and CPU time, free of torch.

`python -m trainer.math_answers.worker MEMORY_BYTES CPU_SECONDS` loads its libraries once and forks
a child that answers requests, one JSON line each way. The kernel kills the child when a request
takes more CPU time than allowed (also inside one long big-integer operation, where Python sees no
signal); this process then reports the death in place of the answer and forks the next child, warm.
The child ends when its input does, so nothing outlives the grader's process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import BinaryIO

from trainer.math_answers.comparison import compare, warm_up
from trainer.stop_signal import die_with_parent


def main() -> None:
    memory_bytes, cpu_seconds = int(sys.argv[1]), float(sys.argv[2])
    requests, replies = _claim_pipes()
    warm_up()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(replies, {"ready": True})
    while True:
        child = os.fork()
        if child == 0:
            _answer_requests(requests, replies, memory_bytes, cpu_seconds)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        _send(replies, {"status": "timeout" if out_of_time else "crash"})


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    # Whatever a library prints goes to stderr and cannot be taken for a reply.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sys.stdin.buffer, replies


def _answer_requests(
    requests: BinaryIO, replies: BinaryIO, memory_bytes: int, cpu_seconds: float
) -> None:
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        correct, status = compare(request["golds"], request["answer"], request["mode"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(replies, {"id": request["id"], "correct": correct, "status": status})


def _send(replies: BinaryIO, reply: dict[str, object]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()
