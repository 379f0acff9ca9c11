"""The C++ library against the Python package: the same tokens, texts, snapshots and errors from the same bundles."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megalodon_export
from megalodon_export.generation.sampling import SamplingParams, sample, uniform
from support import native
from support.native import CPP, cli, sh

pytestmark = pytest.mark.usefixtures("one_thread")

INVALID = 1
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.3, "top_k": 20, "seed": 2},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2**64 - 1},
    {"temperature": 0.9, "min_p": 0.05, "seed": 4},
    {"temperature": 1.1, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 5},
]


@pytest.fixture(scope="session")
def installed(cpp_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as `cmake --install` leaves it."""
    prefix = tmp_path_factory.mktemp("prefix")
    sh("cmake", "--install", cpp_build, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="session")
def examples(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, built as a project of their own that finds the installed library."""
    source = Path(shutil.copytree(CPP / "examples", tmp_path_factory.mktemp("consumer") / "source"))
    sh("cmake", "-S", source, "-B", source.parent / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    sh("cmake", "--build", source.parent / "build")
    return source.parent / "build"


@pytest.fixture(scope="session")
def python(tiny_bundle: Path) -> megalodon_export.Session:
    return megalodon_export.load(tiny_bundle)


@pytest.fixture
def session(library: native.Library, tiny_bundle: Path) -> native.Session:
    return native.Session(native.Engine(library, tiny_bundle))


# ---- the library by itself -------------------------------------------------------------------------------------------


def test_googletest(cpp_build: Path, tiny_bundle: Path) -> None:
    printed = sh(cpp_build / "tests" / "megalodon_tests", env={"MEGALODON_TEST_BUNDLE": str(tiny_bundle)})
    assert "[  PASSED  ]" in printed
    assert "SKIPPED" not in printed


@pytest.mark.parametrize("target", ["http", "manifest", "request", "safetensors", "snapshot"])
def test_what_fuzzing_has_kept(cpp_build: Path, target: str) -> None:
    corpus = CPP / "fuzz" / "corpus" / target
    printed = sh(cpp_build / "tests" / f"replay_{target}", corpus)
    assert printed.split()[0] == str(len(list(corpus.iterdir())))


def test_only_the_interface_is_exported(cpp_build: Path) -> None:
    header = (CPP / "include" / "megalodon.h").read_text()
    declared = set(re.findall(r"^MEGALODON_API [^;]*?\b(megalodon_\w+)\(", header, re.MULTILINE))
    symbols = sh("nm", "-D", "--defined-only", "-P", cpp_build / "libmegalodon.so").splitlines()
    assert {line.split()[0] for line in symbols} == declared


# ---- a project of its own --------------------------------------------------------------------------------------------


def test_a_consumer_writes_the_same_512_tokens(examples: Path, default_bundle: Path) -> None:
    expected = megalodon_export.load(default_bundle).generate_ids(list(b"In the beginning"), 512, eos_token_id=-1)
    printed = sh(examples / "batch", default_bundle, 512, "In the beginning")
    assert [int(line) for line in printed.splitlines()] == list(expected)


def test_a_consumer_needs_no_python(examples: Path, installed: Path) -> None:
    for binary in (examples / "batch", installed / "bin" / "megalodon-cli"):
        linked = sh("ldd", binary)
        assert "libmegalodon.so" in linked
        assert "libtorch_cpu.so" in linked
        assert not re.search(r"libpython|libtorch_python", linked)
        assert "not found" not in linked


def test_the_header_s_example(examples: Path, default_bundle: Path) -> None:
    header = (CPP / "include" / "megalodon.h").read_text()
    example = (CPP / "examples" / "continue.c").read_text()
    indented = "".join(f"       {line}\n" if line else "\n" for line in example.splitlines())
    assert indented in header
    expected = "".join(megalodon_export.load(default_bundle).generate("In the beginning", 64))
    assert sh(examples / "continue_c", default_bundle, "In the beginning") == expected


def test_the_cpp_example(examples: Path, default_bundle: Path) -> None:
    python = megalodon_export.load(default_bundle)
    texts = []
    for seed in (1, 2, 3):
        python.reset()
        python.prefill(list(b"And God"))
        texts.append("".join(python.generate(" ", 64, stop=["\n"], temperature=0.7, seed=seed)) + "\n")
    assert sh(examples / "continue_cpp", default_bundle, "And God") == "".join(texts)


def test_rows_of_a_batch_are_streams_of_their_own(examples: Path, default_bundle: Path) -> None:
    prompts = ["In the beginning", "And", "The LORD is my shepherd; I shall not want."]
    rows = [list(map(int, line.split())) for line in sh(examples / "batch", default_bundle, 100, *prompts).splitlines()]
    for prompt, found in zip(prompts, zip(*rows, strict=True), strict=True):
        alone = sh(examples / "batch", default_bundle, 100, prompt)
        assert [int(line) for line in alone.splitlines()] == list(found)


def test_the_readme_s_program(installed: Path, default_bundle: Path, tmp_path: Path) -> None:
    (program,) = re.findall(r"```cpp\n(.*?)```", (CPP / "README.md").read_text(), re.DOTALL)
    (folder,) = (path.parent for path in installed.rglob("libmegalodon.so"))
    source = f"#include <iostream>\n#include <megalodon.hpp>\nint main() {{\n{program}}}\n"
    (tmp_path / "program.cpp").write_text(source.replace("artifacts/default-aoti-cpu", str(default_bundle)))
    linked = [f"-I{installed / 'include'}", f"-L{folder}", f"-Wl,-rpath,{folder}", "-lmegalodon"]
    sh("c++", "-std=c++17", tmp_path / "program.cpp", "-o", tmp_path / "program", *linked)
    python = megalodon_export.load(default_bundle)
    assert sh(tmp_path / "program") == "".join(python.generate("In the beginning", temperature=0.7))


def test_pkg_config(installed: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    (folder,) = (path.parent for path in installed.rglob("megalodon.pc"))
    flags = sh("pkg-config", "--cflags", "--libs", "megalodon", env={"PKG_CONFIG_PATH": str(folder)}).split()
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    sh("cc", *strict, CPP / "examples" / "continue.c", "-o", tmp_path / "program", *flags)
    assert "libmegalodon.so.1" in sh("readelf", "-d", tmp_path / "program")


# ---- the same as Python ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 200])
def test_logits_are_equal(session: native.Session, python: megalodon_export.Session, length: int) -> None:
    ids = [i * 37 % 251 for i in range(length)]
    python.reset()
    expected = python.prefill(ids).numpy()
    assert np.array_equal(session.prefill(ids, len(expected)), expected)


@pytest.mark.slow
def test_chunks_shorter_than_a_block(library: native.Library, short_chunk_bundle: Path) -> None:
    """Slow, because it needs an export of its own; the library does with it what it does with any."""
    python = megalodon_export.load(short_chunk_bundle)
    session = native.Session(native.Engine(library, short_chunk_bundle))
    prompt = [i * 37 % 251 for i in range(301)]
    expected = list(python.generate_ids(prompt, 40, eos_token_id=-1))
    assert session.generate_ids(prompt, 40, eos=-1) == expected


@pytest.mark.parametrize("sampling", [{}, *SAMPLINGS])
def test_equal_seeds_give_equal_tokens(
    session: native.Session, python: megalodon_export.Session, sampling: dict[str, Any]
) -> None:
    python.reset()
    expected = list(python.generate_ids(list(b"In the beginning"), 150, eos_token_id=-1, **sampling))
    assert session.generate_ids(list(b"In the beginning"), 150, eos=-1, **sampling) == expected
    more = list(python.generate_ids([], 30, eos_token_id=-1, **sampling))  # goes on, from draw 0
    assert session.generate_ids([], 30, eos=-1, **sampling) == more


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_samplers_are_equal(library: native.Library, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**64 - 1))
    size = data.draw(st.sampled_from([1, 2, 5, 257, 4096]))
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=data.draw(st.sampled_from([0.1, 1.0, 5.0, 50.0])), size=size).astype(np.float32)
    if data.draw(st.booleans()):
        logits = np.round(logits)  # ties
    if size > 1 and data.draw(st.booleans()):
        logits[1 + generator.integers(size - 1)] = -np.inf
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.0, 1e-3, 0.3, 0.7, 1.0, 3.0, 1e4])),
        top_k=data.draw(st.sampled_from([0, 1, 3, 40, 10**6])),
        top_p=data.draw(st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])),
        seed=seed,
    )
    index = data.draw(st.integers(0, 2**40))
    draws = torch.tensor([uniform(seed, index)], dtype=torch.float64)
    expected = int(sample(torch.from_numpy(logits)[None], params, draws))
    assert library.sample(logits, native.Sampling(**vars(params)), index) == expected


@pytest.mark.parametrize(
    ("prompt", "stop"),
    [("In the beginning", ()), ("And é€🦈", ("a", "é")), ("", ("\ufffd",)), ("x<|endoftext|>y", ("zz", "\n\n"))],
)
@pytest.mark.parametrize("seed", range(5))
def test_texts_are_equal(
    session: native.Session, python: megalodon_export.Session, prompt: str, stop: tuple[str, ...], seed: int
) -> None:
    python.reset()  # the weights are random: hardly any of the bytes are UTF-8
    expected = "".join(python.generate(prompt, 80, stop, temperature=1.0, seed=seed))
    assert "".join(session.generate(prompt, 80, stop, temperature=1.0, seed=seed)) == expected


# ---- the command line ------------------------------------------------------------------------------------------------


def test_cli_continues_a_text(cpp_build: Path, default_bundle: Path, tmp_path: Path) -> None:
    python = megalodon_export.load(default_bundle)
    how: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    expected = "".join(python.generate("And the king", 60, stop=["."], **how))
    options = ["--temperature", 0.8, "--top-p", 0.9, "--seed", 3, "--stop", ".", "-n", 60]
    done = cli(cpp_build, default_bundle, "-p", "And the king", *options, "--save", tmp_path / "end")
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    for phase in ("load", "prefill", "first token", "decode", "sampling"):
        assert re.search(rf"^{phase} +\d+\.\d+ s", done.stderr, re.MULTILINE)
    assert cli(cpp_build, default_bundle, *options, "-q", prompt="And the king").stdout == expected + "\n"
    more = cli(cpp_build, default_bundle, "--restore", tmp_path / "end", "-n", 20, "-q")
    assert (more.stdout, more.stderr) == ("".join(python.generate("", 20)) + "\n", "")


def test_cli_says_what_is_wrong(cpp_build: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    usage = cli(cpp_build)
    assert (usage.returncode, usage.stdout) == (2, "")
    os.truncate(copy / "model.safetensors", 100)
    damaged = cli(cpp_build, copy, "-p", "x")
    assert (damaged.returncode, damaged.stdout) == (1, "")
    assert "bytes expected, 100 found" in damaged.stderr
    absent = cli(cpp_build, copy / "absent", "-p", "x")
    assert absent.stderr == f"{copy / 'absent'}: a bundle folder expected, nothing found.\n"
