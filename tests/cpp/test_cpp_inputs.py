"""What the C++ library and its command line refuse: each input by kind, in one sentence that names it."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_float, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import megalodon_export
from megalodon_export.generation.sampling import SamplingParams
from megalodon_export.runtimes.ambient import ForkedProcess, check_process
from support import native
from support.native import NativeError, Sampling, array, cli

pytestmark = pytest.mark.usefixtures("one_thread")

INVALID, UNAVAILABLE = 1, 3
HUGE = 2**64 - 1
FORKED = (
    "this process was forked after the bundle was loaded, and compiled programs cannot run in a fork; "
    "load the bundle after the fork, in each process"
)


@pytest.fixture
def session(engine: native.Engine) -> native.Session:
    """A stream of three tokens."""
    session = native.Session(engine)
    session.prefill([1, 2, 3], 257)
    return session


def refused(call: Callable[[], Any]) -> str:
    """What the library says about a call with invalid arguments."""
    with pytest.raises(NativeError) as caught:
        call()
    assert caught.value.status == INVALID
    return str(caught.value)


# ---- token ids -------------------------------------------------------------------------------------------------------

DOORS: dict[str, Callable[[native.Session, int], Any]] = {
    "prefill": lambda session, bad: session.prefill([5, bad, -7], 257),
    "decode": lambda session, bad: session.abi.call("session_decode", session.handle, c_int64(bad), None),
    "generate": lambda session, bad: session.generate_ids([5, bad], 4),
    "decode_batch": lambda session, bad: session.abi.call(
        "decode_batch", array(c_void_p, [session.handle]), array(c_int64, [bad]), c_size_t(1), None
    ),
    "prefill_batch": lambda session, bad: session.abi.call(
        "prefill_batch",
        *(array(c_void_p, [session.handle]), array(POINTER(c_int64), [array(c_int64, [5, bad])])),
        *(array(c_size_t, [2]), c_size_t(1), None),
    ),
}


@pytest.mark.parametrize("bad", [-1, 257, 1_000_000, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("door", DOORS)
def test_a_token_id_is_named(session: native.Session, door: str, bad: int) -> None:
    assert (
        refused(lambda: DOORS[door](session, bad))
        == f"token id {bad} is outside 0..256; is this the model's tokenizer?"
    )
    assert session.position == 3


def test_a_token_id_of_one_stream_leaves_the_others(engine: native.Engine) -> None:
    sessions = [native.Session(engine) for _ in range(2)]
    next_tokens, said = native.step(sessions, [1, 257], Sampling())
    assert (next_tokens, said) == ([-1, -1], "token id 257 of row 1 is outside 0..256; is this the model's tokenizer?")
    assert [session.position for session in sessions] == [0, 0]
    assert -1 not in native.step(sessions, [1, 256], Sampling())[0]


# ---- addresses, counts and structs -----------------------------------------------------------------------------------


def _call(name: str, *arguments: Any) -> Callable[[native.Session], Any]:
    """A call whose first argument is the session."""
    return lambda session: session.abi.call(name, session.handle, *arguments)


def _batch(handles: list[Any], count: int) -> Callable[[native.Session], Any]:
    def call(session: native.Session) -> None:
        given = array(c_void_p, [session.handle, *handles])
        session.abi.call("decode_batch", given, array(c_int64, [1] * 2), c_size_t(count), None)

    return call


def _prefill_batch(token_ids: Any, length: int) -> Callable[[native.Session], Any]:
    return lambda session: session.abi.call(
        "prefill_batch",
        *(array(c_void_p, [session.handle]), array(POINTER(c_int64), [token_ids])),
        *(array(c_size_t, [length]), c_size_t(1), None),
    )


def _sample(size: int) -> Callable[[native.Session], Any]:
    return lambda session: session.abi.call(
        "sample", array(c_float, [1.0]), c_size_t(size), None, c_uint64(0), byref(c_int64())
    )


def _generate(struct: Any, prompt: Any = b"x", result: Any = None) -> Callable[[native.Session], Any]:
    callback = native.TextCallback(lambda *_: 0)
    return _call("session_generate_text", prompt, byref(struct), callback, None, result)


def _options(**fields: Any) -> native.Options:
    options = native.Options(ctypes.sizeof(native.Options), Sampling(), 4, -2, None, 0)
    for name, value in fields.items():
        setattr(options, name, value)
    return options


def _open(**fields: int) -> Callable[[native.Session], Any]:
    options = native.EngineOptions(**{"struct_size": 16, "check_hashes": 1, "concurrency": 0, **fields})
    return lambda session: session.abi.call("engine_open", b"/nowhere", byref(options), byref(c_void_p()))


ARGUMENTS: dict[str, tuple[Callable[[native.Session], Any], str]] = {
    "no ids": (_call("session_prefill", None, c_size_t(0), None), "there are no tokens to feed; give at least one"),
    "ids of NULL": (_call("session_prefill", None, c_size_t(1), None), "token_ids is NULL, expected an address"),
    "more ids than memory": (
        _call("session_prefill", array(c_int64, [1]), c_size_t(HUGE), None),
        f"count is {HUGE}, expected at most {2**60 - 1}",
    ),
    "a session of NULL": (
        lambda session: session.abi.call("session_reset", None),
        "session is NULL, expected an address",
    ),
    "no sessions": (_batch([], 0), "there are no sessions to feed; give at least one"),
    "a batch of half a null": (_batch([None], 2), "sessions[1] is NULL, expected an address"),
    "more sessions than memory": (_batch([], HUGE), f"a batch of {HUGE} is outside 1..8, which this bundle was"),
    "a prompt of NULL": (_prefill_batch(None, 1), "token_ids[0] is NULL, expected an address"),
    "a prompt larger than memory": (
        _prefill_batch(array(c_int64, [1]), HUGE),
        f"lengths[0] is {HUGE}, expected at most {2**60 - 1}",
    ),
    "no logits": (_sample(0), "logits_size is 0, expected the engine's"),
    "more logits than memory": (_sample(2**62), f"logits_size is {2**62}, expected the engine's"),
    "a text of NULL": (_generate(_options(), None), "prompt is NULL, expected an address"),
    "a stop string of NULL": (
        _generate(_options(stop=array(c_char_p, [b"a", None]), stop_count=2)),
        "stop[1] is NULL, expected an address",
    ),
    "stop strings of NULL": (_generate(_options(stop_count=1)), "stop is NULL, expected an address"),
    "more stop strings than memory": (
        _generate(_options(stop=array(c_char_p, [b"a"]), stop_count=HUGE)),
        f"stop_count is {HUGE}, expected at most {2**60 - 1}",
    ),
    "a snapshot larger than memory": (
        lambda session: session.abi.call("snapshot_from_bytes", b"x", c_size_t(HUGE), byref(c_void_p())),
        f"size is {HUGE}, expected at most {2**63 - 1}",
    ),
    **{
        f"options of {size} bytes": (
            _generate(_options(struct_size=size)),
            f"struct_size is {size}, expected {ctypes.sizeof(native.Options)} or more; initialise options with their",
        )
        for size in (0, 8, ctypes.sizeof(native.Options) - 1, 5000, HUGE)
    },
    "a result of 8 bytes": (
        _generate(_options(), b"x", byref(c_size_t(8))),
        "struct_size is 8, expected 56 or more; set it to the size of the struct",
    ),
    "engine options of 12 bytes": (_open(struct_size=12), "struct_size is 12, expected 16 or more; initialise options"),
    **{
        f"concurrency {value}": (
            _open(concurrency=value),
            f"concurrency is {value}, expected 1..1024, or 0 for one call per processor",
        )
        for value in (-1, 1025, 2**31 - 1)
    },
    **{
        f"{value} new tokens": (
            _generate(_options(max_new_tokens=value)),
            f"max_new_tokens is {value}, expected at least 1",
        )
        for value in (0, -1, -(2**63))
    },
    **{
        f"end at {value}": (
            _generate(_options(eos_token_id=value)),
            f"eos_token_id is {value}, expected 0..256, or -1 for none",
        )
        for value in (-3, 257, 2**63 - 1)
    },
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_is_named(session: native.Session, name: str) -> None:
    call, message = ARGUMENTS[name]
    assert refused(lambda: call(session)).startswith(message)
    assert session.position == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (np.nan, np.inf, -np.inf, -1e-9)),
        *(("top_k", value) for value in (-1, -(2**63))),
        *(("top_p", value) for value in (np.nan, 0.0, -0.5, 1.5, np.inf)),
        *(("min_p", value) for value in (np.nan, -0.1, 1.1)),
    ],
)
def test_sampling_is_refused_in_the_words_of_python(session: native.Session, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field) as python:
        SamplingParams(**{field: float(value) if field != "top_k" else int(value)})
    assert refused(lambda: session.generate_ids([1], 4, **{field: value})) == str(python.value)
    assert refused(lambda: session.abi.sample(np.ones(3), Sampling(**{field: value}), 0)) == str(python.value)
    assert session.position == 3


# What each side is asked; both refuse it in the same words.
SAME: dict[str, tuple[Callable[[native.Session], Any], Callable[[megalodon_export.Session], Any]]] = {
    "a token id": (lambda one: one.prefill([1, 300], 257), lambda one: one.prefill([1, 300])),
    "no token ids": (lambda one: one.prefill([], 257), lambda one: one.prefill([])),
    "no new tokens": (lambda one: one.generate_ids([1], 0), lambda one: list(one.generate_ids([1], 0))),
    "an end": (
        lambda one: one.generate_ids([1], 4, eos=257),
        lambda one: list(one.generate_ids([1], 4, eos_token_id=257)),
    ),
    "a prompt": (lambda one: one.generate(b"\xc3\xa9\xff", 4), lambda one: list(one.generate("é\udcff", 4))),
    "a stop string": (
        lambda one: one.generate("x", 4, ["a", b"b\xff"]),
        lambda one: list(one.generate("x", 4, stop=["a", "b\udcff"])),
    ),
    "an empty stop string": (lambda one: one.generate("x", 4, [""]), lambda one: list(one.generate("x", 4, stop=[""]))),
}


@pytest.mark.parametrize("name", SAME)
def test_python_uses_the_same_words(session: native.Session, tiny_bundle: Path, name: str) -> None:
    ours, python = SAME[name]
    with pytest.raises(ValueError, match=" ") as caught:
        python(megalodon_export.load(tiny_bundle))
    assert refused(lambda: ours(session)) == str(caught.value)


# ---- a forked child --------------------------------------------------------------------------------------------------


def _in_child(call: Callable[[], Any]) -> Any:
    """What a call returns in a forked child, as JSON; the child is killed after a minute."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(call()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ended = select.select([reading], [], [], 60)[0]
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert ended, "the child hangs"
    return json.loads(said)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_what_to_do(engine: native.Engine, session: native.Session, tiny_bundle: Path) -> None:
    expected = native.Session(engine).generate_ids([1, 2, 3, 4], 20)  # the engine's threads have run
    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: session.prefill([1] * 100, 257),
        "generate": lambda: session.generate_ids([1], 4),
        "text": lambda: session.generate("x", 4),
        "step": lambda: session.abi.call(
            *("decode_batch", array(c_void_p, [session.handle]), array(c_int64, [1]), c_size_t(1), None)
        ),
        "position": lambda: session.position,
        "reset": lambda: session.abi.call("session_reset", session.handle),
        "open": lambda: native.Engine(engine.abi, tiny_bundle),
        "create": lambda: native.Session(engine),
        "fork": lambda: session.abi.call("session_fork", session.handle, byref(c_void_p())),
        "encode": lambda: session.abi.call(
            *("engine_encode", engine.handle, b"x", c_size_t(1), None, c_size_t(0), byref(c_size_t()))
        ),
    }

    with pytest.raises(ForkedProcess) as python:
        check_process(os.getpid() + 1)
    assert str(python.value) == FORKED

    def child() -> dict[str, Any]:
        told = {}
        for name, call in calls.items():
            try:
                told[name] = call()
            except NativeError as error:
                told[name] = [error.status, str(error)]
        session.abi.free("session", session.handle)
        return told

    assert _in_child(child) == {name: [UNAVAILABLE, FORKED] for name in calls}
    assert session.generate_ids([4], 20) == expected


# ---- text ------------------------------------------------------------------------------------------------------------


def _encode(engine: native.Engine, text: bytes) -> None:
    engine.abi.call("engine_encode", engine.handle, text, c_size_t(len(text)), None, c_size_t(0), byref(c_size_t()))


@given(text=st.lists(st.sampled_from([0x61, 0xC3, 0xA9, 0xE0, 0x9F, 0xED, 0xF0, 0x90, 0xF4, 0x80, 0xBF, 0xFF])))
@example(text=list(b"ab\xe2\x82"))
@settings(max_examples=300, deadline=None)
def test_utf8_is_what_python_takes_for_it(engine: native.Engine, text: list[int]) -> None:
    wrong: int | None = None
    try:
        bytes(text).decode()
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong is None:
        _encode(engine, bytes(text))
    else:
        assert refused(lambda: _encode(engine, bytes(text))) == f"the text is not UTF-8 at byte {wrong}"


@pytest.mark.parametrize(("text", "at"), [(b"\xff", 0), (b"ab\xc3\x28", 2), (b"ok \xed\xa0\x80", 3), (b"\xe2\x82", 0)])
def test_texts_that_are_not_utf8_are_refused(session: native.Session, text: bytes, at: int) -> None:
    assert refused(lambda: session.generate(text, 4)) == f"the prompt is not UTF-8 at byte {at}"
    assert refused(lambda: session.generate("x", 4, ["a", text])) == f"stop[1] is not UTF-8 at byte {at}"
    assert session.position == 3


@pytest.mark.parametrize(
    ("arguments", "prompt", "said"),
    [
        (("-p", "ab\udcff"), "", "the prompt is not UTF-8 at byte 2"),
        ((), "ab\udce2\udc82", "the prompt is not UTF-8 at byte 2"),
        (("-p", "x", "--stop", "\udcff"), "", "stop[0] is not UTF-8 at byte 0"),
        ((), "ab\0cd", "the prompt has a zero byte, at byte 2; leave it out, or pass token ids"),
    ],
)
def test_the_command_line_refuses_texts(
    cpp_build: Path, tiny_bundle: Path, arguments: tuple[str, ...], prompt: str, said: str
) -> None:
    done = cli(cpp_build, tiny_bundle, *arguments, prompt=prompt)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said + "\n")


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        *(("--max-new-tokens", value, f"1..{2**63 - 1}") for value in ("0", "2.5", str(2**63))),
        *(("--temperature", value, "a finite number >= 0") for value in ("-1", "nan", "warm")),
        *(("--top-k", value, f"0..{2**63 - 1}") for value in ("-1", str(2**64 - 1))),
        *(("--top-p", value, "a number above 0, 1 at most") for value in ("0", "nan")),
        *(("--min-p", value, "0..1") for value in ("-0.1", "1.1")),
        *(("--seed", value, f"0..{2**64 - 1}") for value in ("-1", str(2**64))),
        *(("--ids", value, f"0..{2**63 - 1}") for value in ("-1", str(2**64 - 1))),
    ],
)
def test_an_option_names_its_range(cpp_build: Path, option: str, value: str, expected: str) -> None:
    done = cli(cpp_build, "/nowhere", option, value)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{option} is {value}, expected {expected}\n")


@pytest.mark.parametrize("arguments", [("-p", "x"), ("--ids", "1", "2"), ("--help",)])
def test_a_full_disk_is_a_failure(cpp_build: Path, tiny_bundle: Path, tmp_path: Path, arguments: tuple[str]) -> None:
    with open("/dev/full", "w") as full:
        done = cli(cpp_build, tiny_bundle, *arguments, "-n", 20, "--save", tmp_path / "state", stdout=full)
    assert (done.returncode, done.stderr) == (1, "standard output cannot be written: No space left on device\n")
    assert not (tmp_path / "state").exists()
