"""What the caller's thread and process have set does not reach a session: modes of torch, other threads, os.fork()."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megalodon_export
from megalodon_export import Session
from megalodon_export.generation.session import SessionError
from megalodon_export.runtimes import ForkedProcess

pytestmark = pytest.mark.usefixtures("one_thread")

RUNTIMES = ["eager", "aoti", "onnx"]
OPENING = [73, 110, 32]


@pytest.fixture(scope="module")
def folders(tiny_bundle: Path, tiny_onnx_bundle: Path) -> dict[str, Path]:
    return {"eager": tiny_bundle, "aoti": tiny_bundle, "onnx": tiny_onnx_bundle}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Session]:
    return {name: load(folders, name) for name in RUNTIMES}


def load(folders: dict[str, Path], name: str) -> Session:
    return megalodon_export.load(folders[name], runtime=name, device="cpu")


# ---- modes of torch --------------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "deterministic": deterministic,
}


def use(session: Session) -> list[Any]:
    """Every way to use a session, from a fresh stream to a fresh stream."""
    found: list[Any] = [list(session.generate_ids(OPENING, 8, eos_token_id=-1))]
    found.append(list(session.generate_ids([], 8, eos_token_id=-1, temperature=1.0, top_k=9, top_p=0.9, seed=3)))
    logits = [session.prefill([4, 5, 6]), session.decode(7)]
    state, fork = session.snapshot(), session.fork()
    found += ["".join(fork.generate("x", 4)), session.generate_batch(["a", "bcd"], 4, temperature=1.0)]
    session.restore(state)
    logits.append(session.decode(9))
    assert {tensor.dtype for tensor in logits} == {torch.float32}
    session.reset()
    return [*found, *(tensor.tolist() for tensor in logits)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RUNTIMES)
def test_modes_change_nothing(folders: dict[str, Path], loaded: dict[str, Session], name: str, mode: str) -> None:
    """A session loaded in the mode, and one from outside, give in it and after it what they give without."""
    outside = Session(loaded[name].runtime, loaded[name].tokenizer)
    expected = use(outside)
    generation = outside.generate_ids(OPENING, 8, eos_token_id=-1)
    written = [next(generation) for _ in range(3)]
    with MODES[mode]():
        written += [next(generation) for _ in range(3)]
        outside.reset()
        inside = load(folders, name)
        assert use(inside) == expected
        assert use(outside) == expected
        fork = inside.fork()
    assert written == expected[0][:6]
    for session in (inside, outside, fork, Session(inside.runtime, inside.tokenizer)):
        assert use(session) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RUNTIMES)
def test_modes_change_nothing_for_programs(loaded: dict[str, Session], name: str, mode: str) -> None:
    runtime = loaded[name].runtime
    ids, lengths = torch.tensor([OPENING, OPENING]), torch.tensor([3, 1])

    def run(programs: Any) -> list[Tensor]:
        return [programs.prefill(ids, lengths).clone(), programs.decode(ids[:, 0]).clone()]

    outside = runtime.bind(runtime.new_cache(2))
    expected = run(runtime.bind(runtime.new_cache(2)))
    with MODES[mode]():
        inside = runtime.bind(runtime.new_cache(2))
        found = run(inside)
    outside.cache.copy_(inside.cache)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(inside.decode(ids[:, 1]), outside.decode(ids[:, 1]))


# ---- threads ---------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Session], object]] = {
    "prefill": lambda session: session.prefill([1]),
    "decode": lambda session: session.decode(1),
    "generate": lambda session: list(session.generate("x", 2)),
    "generate_ids": lambda session: list(session.generate_ids([1], 2)),
    "generate_batch": lambda session: session.generate_batch(["x"], 2),
    "snapshot": lambda session: session.snapshot(),
    "restore": lambda session: session.restore(session.fork().snapshot()),
    "fork": lambda session: session.fork(),
    "reset": lambda session: session.reset(),
    "cache": lambda session: session.cache,
}


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_second_call_from_another_thread_is_refused(
    loaded: dict[str, Session], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    session = Session(loaded[name].runtime, loaded[name].tokenizer)
    expected = list(session.generate_ids(OPENING, 8, eos_token_id=-1))
    session.reset()
    running, go_on, run = threading.Event(), threading.Event(), session.programs.run_prefill

    def waiting(*arguments: Tensor) -> Tensor:
        running.set()
        assert go_on.wait(60)
        return run(*arguments)

    monkeypatch.setattr(session.programs, "run_prefill", waiting)
    written: list[int] = []
    thread = threading.Thread(target=lambda: written.extend(session.generate_ids(OPENING, 8, eos_token_id=-1)))
    thread.start()
    assert running.wait(60)
    for call in CALLS.values():
        with pytest.raises(
            SessionError, match=r"^the session is in use by another call; use a fork for that, or wait$"
        ):
            call(session)
    go_on.set()
    thread.join(60)
    assert written == expected
    for call in CALLS.values():  # which are all accepted now
        call(session)


def test_threads_with_a_session_each(loaded: dict[str, Session]) -> None:
    """Sessions of one runtime, by turns: a generator that waits for its reader keeps no other session waiting."""
    sessions = [Session(loaded["aoti"].runtime) for _ in range(3)]
    generations = [session.generate_ids([i + 1], 6, eos_token_id=-1) for i, session in enumerate(sessions)]
    written = [list(tokens) for tokens in zip(*(zip(*generations, strict=True)), strict=True)]
    for i, session in enumerate(sessions):
        session.reset()
        assert list(session.generate_ids([i + 1], 6, eos_token_id=-1)) == written[i]


# ---- os.fork() -------------------------------------------------------------------------------------------------------


def in_a_child(call: Callable[[], object]) -> str:
    """What `call` raises in a child of this process."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 on, in a process with threads
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            call()
            told = "nothing"
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return told


SENTENCE = (
    "ForkedProcess: this process was forked after the bundle was loaded, and compiled programs cannot run in a fork; "
    "load the bundle after the fork, in each process"
)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_forked_child_is_refused_with_a_sentence(
    folders: dict[str, Path], loaded: dict[str, Session], name: str
) -> None:
    session = Session(loaded[name].runtime, loaded[name].tokenizer)
    runtime, state = session.runtime, session.snapshot()
    generation = session.generate_ids(OPENING, 8, eos_token_id=-1)
    written = [next(generation)]
    ids = torch.tensor([[1]])
    uses = {
        **{call: lambda call=call: CALLS[call](session) for call in CALLS},
        "restore": lambda: session.restore(state),
        "a generation that goes on": lambda: next(generation),
        "a new session": lambda: Session(runtime),
        "programs": lambda: session.programs.prefill(ids, torch.tensor([1])),
        "a step": lambda: session.programs.decode(ids[0]),
        "loading": lambda: load(folders, name),
    }
    for what, call in uses.items():
        assert in_a_child(call) == SENTENCE, what
    assert issubclass(ForkedProcess, RuntimeError)
    written += generation  # the parent's session is as it was
    session.reset()
    assert list(session.generate_ids(OPENING, 8, eos_token_id=-1)) == written


PRE_FORK = """
import os, sys
import megalodon_export

def generate():
    session = megalodon_export.load(sys.argv[1], device="cpu")
    return "".join(session.generate("In the beginning", 3))

children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        os.write(1, f"{generate()!r}\\n".encode())  # one call, so that lines of two children do not mix
        os._exit(0)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
print(repr(generate()), flush=True)
"""


def test_a_pre_fork_server_loads_after_the_fork(folders: dict[str, Path]) -> None:
    """As docs/ say: a parent that has imported the package, and children that load the bundle, on several threads."""
    command = [sys.executable, "-c", PRE_FORK, str(folders["aoti"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    ran = subprocess.run(command, capture_output=True, timeout=300, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr.decode()
    lines = ran.stdout.splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
