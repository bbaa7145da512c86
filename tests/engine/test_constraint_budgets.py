"""What a constraint may cost: compiling in a process that may be killed, masks within counts."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from quatom.engine.sampling import StructuredOutput
from quatom.engine.structured import compiler as compiler_module
from quatom.engine.structured.compiler import ConstraintCompiler
from quatom.engine.structured.masks import build_mask
from quatom.errors import QueueFullError, RequestError
from tests.engine.doubles import EOS, VOCAB, byte_tokenizer

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def compiler():
    made = ConstraintCompiler(byte_tokenizer(), VOCAB, (EOS,))
    yield made
    made.close()


def spec(kind, value):
    return StructuredOutput(kind, value if isinstance(value, str) else json.dumps(value))


def chain(length, link):
    names = [f"d{i}" for i in range(length)]
    defs = {name: link(f"#/$defs/d{i + 1}") for i, name in enumerate(names)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {"type": "null"}}}


def nested_arrays(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
TOO_LONG = {"type": "integer", "multipleOf": 999_983}  # 25 s on the machine it was written on

WORST = {
    "nested repetitions": ("regex", "([a-z]{1,50} ?){1,500}"),
    "deeper repetitions": ("regex", "(((a{1,50}b?){1,50}c?){1,50}d?){1,50}"),
    "many states": ("regex", "(.*a.{25}b.*|.*c.{25}d.*)"),
    "a long way back": ("regex", "[ab ]*a[a-z ]{2000}"),
    "a big count": ("regex", ".{1,100000}"),
    "many choices": ("choice", [f"w{i * 7919 % 100003}x" for i in range(6000)]),
    "1,200 nullable properties": (
        "json_schema",
        {"type": "object", "properties": {f"p{i}": NULLABLE for i in range(1200)}},
    ),
    "1,200 required ones": (
        "json_schema",
        {
            "type": "object",
            "properties": {f"p{i}": NULLABLE for i in range(1200)},
            "required": [f"p{i}" for i in range(1200)],
        },
    ),
    "many objects": ("json_schema", {"enum": [{"a": i} for i in range(4000)]}),
    "a long literal": ("json_schema", {"const": "hello world " * 8000}),
    "deep nesting": ("json_schema", nested_arrays(110)),
    "deeper than the parser": ("json_schema", '{"items": ' * 2000 + "{}" + "}" * 2000),
    "a chain of references": ("json_schema", chain(1500, lambda r: {"items": {"$ref": r}})),
    "a chain in place": ("json_schema", chain(1500, lambda r: {"allOf": [{"$ref": r}]})),
    "references to the 4th": ("json_schema", chain(8, lambda r: {"allOf": [{"$ref": r}] * 4})),
    "alternatives to the 9th": (
        "json_schema",
        {"allOf": [{"anyOf": [{"minimum": 3 * i + j} for j in range(3)]} for i in range(9)]},
    ),
    "patterns all at once": (
        "json_schema",
        {"type": "string", "allOf": [{"pattern": f"{c}.*{c}"} for c in "abcdefghij"]},
    ),
    "a chain of rules": (
        "grammar",
        "start: r0\n" + "".join(f'r{i}: r{i + 1} "b"\n' for i in range(5000)) + 'r5000: "a"',
    ),
    "an ambiguous grammar": ("grammar", 'start: s\ns: s s s | s s | "a" | " "'),
    "many lexemes": (
        "grammar",
        "start: ("
        + " | ".join(f"T{i}" for i in range(300))
        + ")*\n"
        + "\n".join(f"T{i}: /[a-z]*{i}/" for i in range(300)),
    ),
}
HARD_LIMIT = 0.5
"""Seconds of CPU time of one mask, on a machine five times slower than that of the limits."""


@pytest.mark.parametrize("name", WORST)
def test_the_worst_is_refused_or_cheap(compiler, name):
    wanted = spec(*WORST[name])
    try:
        matcher = compiler.compile(wanted).matcher()
    except RequestError as error:
        reason = str(error)
    else:
        reason = cost_of_masks(matcher)
    assert re.search(REASONS, reason), reason


REASONS = "^cheap$|at most|too costly|make it|make its|nested|cannot be enforced|any further"


def cost_of_masks(matcher):
    """Draw 60 tokens; what ended the text early, or "cheap"."""
    for step in range(60):
        started = time.thread_time()
        mask = build_mask([matcher])
        assert time.thread_time() - started < HARD_LIMIT
        if matcher.error:
            return matcher.error
        allowed = [i for i in range(VOCAB) if mask.words[0, i // 32] >> (i % 32) & 1]
        started = time.thread_time()
        accepted = matcher.accept(allowed[step * 7919 % len(allowed)])
        assert time.thread_time() - started < HARD_LIMIT
        if not accepted or matcher.terminated:
            break
    return matcher.error or "cheap"


def test_the_budget_is_named(compiler):
    with pytest.raises(RequestError, match=r"all of the 2 s of CPU time .* make it smaller"):
        compiler.compile(spec("json_schema", TOO_LONG))


def test_a_library_that_crashes_takes_nothing_with_it(compiler):
    with pytest.raises(RequestError, match="nested too deeply"):
        compiler.compile(spec(*WORST["a chain of rules"]))
    assert compiler.compile(spec("regex", "a+"))


def test_cancelling_ends_a_compilation_at_once(compiler):
    compilation = compiler.submit(spec("json_schema", TOO_LONG | {"title": "cancelled"}))
    while not compilation.future.running():
        time.sleep(0.005)
    time.sleep(0.2)
    compilation.cancel()
    with pytest.raises(RequestError, match="cancelled"):
        compilation.future.result(timeout=10)
    assert compiler.compile(spec("regex", "after+"))


def test_a_queue_of_constraints_has_an_end(monkeypatch, compiler):
    monkeypatch.setattr(compiler_module, "MAX_WAITING", 2)
    running = []

    def submit_many():
        for i in range(compiler_module.COMPILERS + 3):
            running.append(compiler.submit(spec("json_schema", TOO_LONG | {"title": str(i)})))

    with pytest.raises(QueueFullError, match="2 constraints wait"):
        submit_many()
    for compilation in reversed(running):  # those that wait first, so that none starts
        compilation.cancel()
    for compilation in running:
        assert compilation.future.cancelled() or compilation.future.exception(timeout=20)
    assert compiler.compile(spec("regex", "free+"))


def test_a_constraint_is_compiled_once(compiler):
    wanted = spec("regex", "once+")
    first = compiler.compile(wanted)
    assert compiler.compile(spec("regex", "once+")) is first
    for i in range(compiler_module.MAX_KEPT):
        compiler.compile(spec("regex", f"other{i}"))
    assert compiler.compile(wanted) is not first


def test_the_process_is_started_again(compiler):
    compiler.compile(spec("regex", "before"))
    for trials in compiler._trials:
        if trials._process is not None:
            os.kill(trials._process.pid, signal.SIGKILL)
            trials._process.wait()
    assert compiler.compile(spec("regex", "behind"))


def test_closing_ends_the_processes():
    made = ConstraintCompiler(byte_tokenizer(), VOCAB, (EOS,))
    made.compile(spec("regex", "a"))
    processes = [t._process for t in made._trials if t._process is not None]
    made.close()
    assert processes
    assert all(process.poll() is not None for process in processes)


def test_what_a_tokenizer_must_have():
    with pytest.raises(RequestError, match="this model has none"):
        ConstraintCompiler(None, VOCAB, (EOS,))
    with pytest.raises(RequestError, match="end-of-sequence"):
        ConstraintCompiler(byte_tokenizer(), VOCAB, ())
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        ConstraintCompiler(object(), VOCAB, (EOS,))
    with pytest.raises(RequestError, match=r"cannot use this model's tokenizer: .*200 vs 260"):
        ConstraintCompiler(byte_tokenizer(), 200, (100,))


def test_a_trial_starts_without_torch():
    command = "import sys, quatom.engine.structured.trial; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
