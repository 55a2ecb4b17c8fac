"""What runs inside the sandbox: loads a program, and calls it when asked to.

This file is both imported (for the encoding of values) and handed to the sandbox as a script, so
it uses the standard library only, and parts of it only when needed. In the sandbox it is one of:

- `stdin SOURCE`: the program as a script, on its own stdin and stdout;
- `function REQUEST RESULT`: one call of a function, the value written as strict JSON;
- `serve REQUEST CALLS RESULTS`: calls of a function as they come, values written with tags;
- `check REQUEST CALLS RESULTS VERDICT`: a test's own code, in a sandbox of its own, where
  `candidate` is a stand-in that sends its arguments to a `serve` in the program's sandbox.

The names in capitals are file descriptors. Nothing here decides a reward alone: expected values
are never in the sandbox of the program, which therefore can forge nothing but its own answers.
"""

from __future__ import annotations

import builtins
import math
import sys

# Importing typing would double the time that the interpreter takes to start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO

COMPILE_ERROR_EXIT = 86
"""Exit code of a Python program that does not compile."""
MAX_DEPTH = 100
"""Values nested deeper than this do not leave the sandbox."""
_MAX_DETAIL_CHARS = 300
_MAX_PLAIN_INT_BITS = 4096


class ProgramError(Exception):
    """An exception of the program under test that has no builtin counterpart."""


class _NoReply(BaseException):
    """The program did not answer a call; holds the status that follows.

    Not an Exception, so that no test code takes it for an error it expects.
    """


def plain_value(value: Any, depth: int = 0) -> Any:
    """`value` as JSON holds it: exact builtin types, tuples as lists, dictionaries by string key.

    Raises:
        TypeError: it holds something else, an instance of a subclass included.
        ValueError: it is nested too deep, or holds a float that is not finite.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        if not math.isfinite(value):
            raise ValueError(f"expected finite numbers, got {value}")
        return value
    if depth >= MAX_DEPTH:
        raise ValueError(f"expected at most {MAX_DEPTH} levels, got more")
    if kind in (list, tuple):
        return [plain_value(item, depth + 1) for item in value]
    if kind is dict and all(type(key) is str for key in value):
        return {key: plain_value(item, depth + 1) for key, item in value.items()}
    raise TypeError(f"expected a JSON value, got {kind.__name__}")


def encode_value(value: Any, depth: int = 0) -> Any:
    """`value` as JSON that `decode_value` turns back into an equal value of the same builtin type.

    Raises:
        TypeError: it holds something other than builtin scalars and containers.
        ValueError: it is nested too deep.
    """
    from collections import Counter, OrderedDict, defaultdict, deque

    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if value.bit_length() <= _MAX_PLAIN_INT_BITS else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is complex:
        return {"complex": [encode_value(value.real), encode_value(value.imag)]}
    if kind in (bytes, bytearray):
        return {"bytes": value.hex()}
    if depth >= MAX_DEPTH:
        raise ValueError(f"expected at most {MAX_DEPTH} levels, got more")
    if kind in (dict, defaultdict, OrderedDict, Counter):
        pairs = [[encode_value(k, depth + 1), encode_value(v, depth + 1)] for k, v in value.items()]
        return {"dict": pairs}
    if kind in (list, tuple, set, frozenset, deque, range):
        items = [encode_value(item, depth + 1) for item in value]
        return items if kind is list else {kind.__name__: items}
    raise TypeError(f"expected builtin values, got {kind.__name__}")


def decode_value(encoded: Any) -> Any:
    """The value that `encode_value` encoded; builtin types only, whatever the text holds.

    Raises:
        ValueError, TypeError: it was not written by `encode_value`.
    """
    if isinstance(encoded, list):
        return [decode_value(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if len(encoded) != 1:
        raise ValueError(f"expected one tag, got {len(encoded)}")
    ((tag, body),) = encoded.items()
    if tag == "int":
        return int(body, 16)
    if tag == "float":
        return float(body)
    if tag == "bytes":
        return bytes.fromhex(body)
    items = [decode_value(item) for item in body]
    if tag == "dict":
        return dict(items)
    if tag == "complex":
        return complex(*items)
    if tag in ("tuple", "range"):
        return tuple(items)
    if tag == "deque":
        return items
    if tag in ("set", "frozenset"):
        return set(items) if tag == "set" else frozenset(items)
    raise ValueError(f"expected a known tag, got {tag!r}")


def _load(source: bytes, name: str, setup: str = "") -> dict[str, Any]:
    """Runs the program as a module called `name` and returns its namespace."""
    code = compile(source, "program.py", "exec", dont_inherit=True)
    module = type(sys)(name)
    sys.modules[name] = module
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), module.__dict__)
    exec(code, module.__dict__)
    return module.__dict__


def _find(namespace: dict[str, Any], entry_point: str) -> Callable[..., Any]:
    """The function `name`, or the method of a fresh instance for `Class.method`."""
    first, *rest = entry_point.split(".")
    found = namespace[first]
    if rest and isinstance(found, type):
        found = found()
    for attribute in rest:
        found = getattr(found, attribute)
    return found


def _describe(error: BaseException) -> str:
    try:
        message = str(error)[:_MAX_DETAIL_CHARS]
    except BaseException as own:  # the program's own __str__
        message = f"(no message: {type(own).__name__})"
    return f"{type(error).__name__}: {message}"


def _failure(error: BaseException, stage: str) -> dict[str, str]:
    if stage == "load" and isinstance(error, SyntaxError):
        stage = "compile"
    return {"failed": stage, "type": type(error).__name__, "detail": _describe(error)}


def _run_stdin(source_file: BinaryIO) -> None:
    source = source_file.read()
    try:
        compile(source, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        print(_describe(error), file=sys.stderr)
        sys.exit(COMPILE_ERROR_EXIT)
    _load(source, "__main__")


def _load_entry(request: dict[str, Any]) -> Callable[..., Any]:
    source = request["source"].encode("utf-8", "surrogatepass")
    namespace = _load(source, "program", request.get("setup", ""))
    return _find(namespace, request["entry_point"])


def _run_function(request_file: BinaryIO, result_file: BinaryIO) -> None:
    import json

    request = json.load(request_file)
    stage = "load"
    # Whatever a program raises, SystemExit included, is its result and must not end the driver.
    try:
        function = _load_entry(request)
        stage = "call"
        value = function(*request["arguments"])
        stage = "value"
        line = json.dumps({"value": plain_value(value)})
    except BaseException as error:
        line = json.dumps(_failure(error, stage))
    _send(result_file, line)


def _serve(request_file: BinaryIO, calls: BinaryIO, results: BinaryIO) -> None:
    import json

    request = json.load(request_file)
    try:
        function = _load_entry(request)
    except BaseException as error:
        _send(results, json.dumps(_failure(error, "load")))
        return
    _send(results, json.dumps({"loaded": True}))
    for line in calls:
        arguments, keywords = decode_value(json.loads(line))
        stage = "call"
        try:
            value = function(*arguments, **keywords)
            stage = "value"
            reply = json.dumps({"value": encode_value(value)})
        except BaseException as error:
            reply = json.dumps(_failure(error, stage))
        _send(results, reply)


def _run_check(
    request_file: BinaryIO, calls: BinaryIO, results: BinaryIO, verdict_file: BinaryIO
) -> None:
    import json

    request = json.load(request_file)
    raised: list[BaseException] = []

    def receive() -> dict[str, Any]:
        most = request["max_reply_bytes"]
        line = results.readline(most)
        if not line.endswith(b"\n"):
            raise _NoReply("gone" if len(line) < most else "output_limit")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            raise _NoReply("crash") from None
        if not isinstance(reply, dict):
            raise _NoReply("crash")
        return reply

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        try:
            _send(calls, json.dumps(encode_value((arguments, keywords))))
        except BrokenPipeError:
            raise _NoReply("gone") from None
        reply = receive()
        if "value" in reply:
            return decode_value(reply["value"])
        if reply.get("failed") == "value":
            raise TypeError(str(reply.get("detail")))
        error = _same_exception(str(reply.get("type")), str(reply.get("detail")))
        raised.append(error)
        raise error

    verdict = {"status": "wrong", "detail": ""}
    if "random" in request["code"]:
        import random

        random.seed(0)
    try:
        loaded = receive()
        if "loaded" not in loaded:
            status = "compile_error" if loaded.get("failed") == "compile" else "crash"
            detail = str(loaded.get("detail"))[:_MAX_DETAIL_CHARS]
            verdict = {"status": status, "detail": detail}
        else:
            namespace: dict[str, Any] = {"__name__": "check"}
            exec(compile(request["setup"], "setup.py", "exec", dont_inherit=True), namespace)
            namespace[request["entry_point"]] = candidate
            exec(compile(request["code"], "check.py", "exec", dont_inherit=True), namespace)
            if "check" in namespace:
                namespace["check"](candidate)
            verdict = {"status": "passed", "detail": ""}
    except _NoReply as none:
        verdict = {"status": str(none), "detail": "no reply to a call that can be read"}
    # The test decides by raising: AssertionError, or what a wrong type of value leads to.
    except BaseException as error:
        status = "crash" if any(error is own for own in raised) else "wrong"
        verdict = {"status": status, "detail": _describe(error)}
    _send(verdict_file, json.dumps(verdict))


def _same_exception(type_name: str, detail: str) -> BaseException:
    kind = getattr(builtins, type_name, None)
    message = detail.partition(": ")[2]
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and the like want more arguments
            pass
    return ProgramError(detail)


def _send(file: BinaryIO, line: str) -> None:
    file.write(line.encode() + b"\n")
    file.flush()


_MODES: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "stdin": (_run_stdin, ("rb",)),
    "function": (_run_function, ("rb", "wb")),
    "serve": (_serve, ("rb", "rb", "wb")),
    "check": (_run_check, ("rb", "wb", "rb", "wb")),
}


def main(mode: str, *descriptors: str) -> None:
    """Runs one mode of the module's list on the given file descriptors."""
    # Programs use these two, and only the site module, which is left out, would define them.
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    # The current folder, where the program can write.
    del sys.path[0]
    run, file_modes = _MODES[mode]
    files = [open(int(fd), how) for fd, how in zip(descriptors, file_modes, strict=True)]
    run(*files)


if __name__ == "__main__":
    main(*sys.argv[1:])
