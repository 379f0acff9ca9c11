"""The C++ library from Python, through its C interface: for tests that compare the two."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.readme import ROOT

CPP = ROOT / "cpp"
# A header of each package that the build needs, and the Debian package that has it.
HEADERS = {
    **{"nlohmann/json.hpp": "nlohmann-json3-dev", "gtest/gtest.h": "libgtest-dev", "CLI/CLI.hpp": "libcli11-dev"},
    **{"openssl/evp.h": "libssl-dev", "pcre2.h": "libpcre2-dev"},
}

TokenCallback = ctypes.CFUNCTYPE(c_int, c_void_p, c_int64)
TextCallback = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)


class Sampling(ctypes.Structure):
    """megalodon_sampling"""

    _fields_ = (
        *(("temperature", c_double), ("top_k", c_int64), ("top_p", c_double), ("min_p", c_double)),
        ("seed", c_uint64),
    )

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0):
        super().__init__(temperature, top_k, top_p, min_p, seed)


class Options(ctypes.Structure):
    """megalodon_generate_options"""

    _fields_ = (
        *(("struct_size", c_size_t), ("sampling", Sampling), ("max_new_tokens", c_int64), ("eos_token_id", c_int64)),
        *(("stop", POINTER(c_char_p)), ("stop_count", c_size_t)),
    )


class EngineOptions(ctypes.Structure):
    """megalodon_engine_options"""

    _fields_ = (("struct_size", c_size_t), ("check_hashes", c_int32), ("concurrency", c_int32))


class NativeError(Exception):
    """A status that is not MEGALODON_OK, with what the library said."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Library:
    """libmegalodon; every function returns a status, which becomes an exception."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.megalodon_last_error.restype = c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """megalodon_NAME(arguments); NativeError unless it succeeds."""
        status = getattr(self._library, f"megalodon_{name}")(*arguments)
        if status:
            raise NativeError(status, self._library.megalodon_last_error().decode())

    def free(self, kind: str, handle: c_void_p) -> None:
        """megalodon_KIND_free(handle)."""
        function = getattr(self._library, f"megalodon_{kind}_free")
        function.restype = None
        function(handle)

    def sample(self, logits: np.ndarray, sampling: Sampling, index: int) -> int:
        """One token from float32 logits (V)."""
        token = c_int64()
        values = np.ascontiguousarray(logits, dtype=np.float32)
        pointer = values.ctypes.data_as(POINTER(c_float))
        self.call("sample", pointer, c_size_t(len(values)), byref(sampling), c_uint64(index), byref(token))
        return token.value


class Engine:
    """megalodon_engine"""

    def __init__(self, library: Library, folder: Path, check_hashes: bool = True) -> None:
        self.abi, self.handle = library, c_void_p()
        options = EngineOptions(ctypes.sizeof(EngineOptions), check_hashes, 0)
        library.call("engine_open", str(folder).encode(), byref(options), byref(self.handle))

    def __del__(self) -> None:
        self.abi.free("engine", self.handle)


class Session:
    """megalodon_session"""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.abi, self.handle = engine, engine.abi, c_void_p()
        self.abi.call("session_create", engine.handle, byref(self.handle))

    def __del__(self) -> None:
        self.abi.free("session", self.handle)

    def prefill(self, token_ids: Sequence[int], logits_size: int) -> np.ndarray:
        """Logits (V) after the last token."""
        logits = np.empty(logits_size, dtype=np.float32)
        pointer = logits.ctypes.data_as(POINTER(c_float))
        self.abi.call("session_prefill", self.handle, _ids(token_ids), c_size_t(len(token_ids)), pointer)
        return logits

    def generate_ids(self, prompt: Sequence[int], count: int, eos: int = -2, **sampling: Any) -> list[int]:
        """Token ids that follow a prompt; eos -1 is none, -2 the model's."""
        written: list[int] = []
        callback = TokenCallback(lambda _, token: written.append(token) or 0)
        options = _options(count, eos, (), sampling)
        self.abi.call(
            "session_generate",
            *(self.handle, _ids(prompt), c_size_t(len(prompt)), byref(options), callback, None, None),
        )
        return written

    def generate(self, prompt: str | bytes, count: int, stop: Sequence[str | bytes] = (), **sampling: Any) -> list[str]:
        """Pieces of the text that follows a prompt."""
        pieces: list[str] = []

        def give(_: object, piece: int, size: int) -> int:
            pieces.append(ctypes.string_at(piece, size).decode())
            return 0

        options = _options(count, -2, stop, sampling)
        callback = TextCallback(give)
        self.abi.call("session_generate_text", self.handle, _bytes(prompt), byref(options), callback, None, None)
        return pieces

    @property
    def position(self) -> int:
        """The number of tokens fed."""
        position = c_int64()
        self.abi.call("session_position", self.handle, byref(position))
        return position.value

    def save(self, path: Path) -> None:
        """Write a snapshot."""
        snapshot = c_void_p()
        self.abi.call("session_snapshot", self.handle, byref(snapshot))
        self.abi.call("snapshot_save", snapshot, str(path).encode())
        self.abi.free("snapshot", snapshot)

    def restore(self, path: Path) -> None:
        """Go back to a snapshot."""
        snapshot = c_void_p()
        self.abi.call("snapshot_load", str(path).encode(), byref(snapshot))
        try:
            self.abi.call("session_restore", self.handle, snapshot)
        finally:
            self.abi.free("snapshot", snapshot)


def array(kind: Any, values: Sequence[Any]) -> Any:
    """Values as a C array."""
    return (kind * len(values))(*values)


def _ids(token_ids: Sequence[int]) -> Any:
    return array(c_int64, token_ids)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _options(count: int, eos: int, stop: Sequence[str | bytes], sampling: dict[str, Any]) -> Options:
    strings = array(c_char_p, [_bytes(one) for one in stop])
    return Options(ctypes.sizeof(Options), Sampling(**sampling), count, eos, strings, len(stop))


def step(sessions: Sequence[Session], token_ids: Sequence[int], sampling: Sampling) -> tuple[list[int], str]:
    """Feed a token to each session: its next token, or -1; and what the library said if the call failed."""
    count = len(sessions)
    next_tokens, said = array(c_int64, [0] * count), ""
    handles = array(c_void_p, [session.handle for session in sessions])
    samplings, indices = array(Sampling, [sampling] * count), array(c_uint64, [0] * count)
    try:
        sessions[0].abi.call("step_batch", handles, _ids(token_ids), c_size_t(count), samplings, indices, next_tokens)
    except NativeError as error:
        said = str(error)
    return list(next_tokens), said


# ---- building it -----------------------------------------------------------------------------------------------------


def missing() -> str | None:
    """What the build needs and this machine lacks."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or shutil.which("cmake") is None:
        return "a C++ compiler and cmake"
    for header, package in HEADERS.items():
        command = [compiler, "-std=c++20", "-DPCRE2_CODE_UNIT_WIDTH=8", "-E", "-x", "c++", "-"]
        if subprocess.run(command, input=f"#include <{header}>", text=True, capture_output=True).returncode:
            return package
    return None


def sh(*command: object, **options: Any) -> str:
    """Run a command on one thread; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment, **options)
    assert done.returncode == 0, f"{command} failed: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def cli(build: Path, *arguments: object, prompt: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """`megalodon-cli ARGUMENTS`. In the arguments and the prompt, "\\udcff" stands for a byte 0xff."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(build / "megalodon-cli"), *map(str, arguments)]
    given = {"input": prompt.encode(errors="surrogateescape"), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(command, env=environment, timeout=60, check=False, **given | options)
    # Decoded here: subprocess would make line feeds of the carriage returns that a model may write.
    out, err = (None if one is None else one.decode(errors="surrogateescape") for one in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(command, done.returncode, out, err)


def build_commands(folder: Path) -> list[list[object]]:
    """What builds the library, its tests, its command line and the service with this Python's torch."""
    configure: list[object] = [
        *("cmake", "-S", CPP, "-B", folder, "-DMEGALODON_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release"),
        "-DMEGALODON_BUILD_SERVICE=ON",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
    ]
    return [configure, ["cmake", "--build", folder, "-j2"]]
