"""The command line: its real entry point where that matters, its parser and exit statuses in this process."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import megalodon_export
from megalodon_export import cli
from megalodon_export.bundles import bundle
from megalodon_export.commands import options
from support.golden_data import load, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = {
    "aoti": ("--checkpoint", "--out", "--device", "--dtype", "--max-batch", "--max-length", "--portable"),
    "onnx": ("--checkpoint", "--out", "--dtype", "--max-batch", "--max-length", "--all-logits", "--add", "--json"),
    "convert": ("upstream", "megalodon-hf", "SRC", "DST"),
    "generate": ("--prompt", "--runtime", "--max-new-tokens", "--temperature", "--top-k", "--seed", "--stop", "--json"),
    "eval": ("--ppl", "--prompts", "--runtime", "--truncate-chunks", "--max-new-tokens", "--json"),
    "verify": ("bundle", "--json"),
    "inspect": ("bundle", "--json"),
    "bench": ("--runtime", "--batch", "--tokens", "--json"),
    "doctor": ("--json",),
}
Result = tuple[int, str, str]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def call(command: Start) -> Callable[..., Result]:
    """Runs the real entry point: exit status, stdout (line ends as they are) and stderr."""

    def run(*arguments: object, data: bytes = b"", **options: Any) -> Result:
        streams = {"stdin": subprocess.PIPE, "text": False, "encoding": None}
        process: Any = command(*arguments, **streams, **options)
        output, errors = process.communicate(data, timeout=300)
        return process.returncode, output.decode(), errors.decode()

    return run


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line in this process, which saves the seconds that importing torch takes."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            status = cli.run([str(a) for a in arguments])
        except SystemExit as ended:
            status = int(str(ended.code))
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def expected_text(folder: Path, prompt: str, count: int, runtime: str = "eager", **options: Any) -> str:
    return "".join(megalodon_export.load(folder, runtime=runtime, device="cpu").generate(prompt, count, **options))


# ---- help and usage --------------------------------------------------------------------------------------------------


def test_help_lists_every_command(call: Callable[..., Result]) -> None:
    status, output, errors = call("--help")
    assert (status, errors) == (0, "")
    assert all(re.search(rf"^ +{name} ", output, re.MULTILINE) for name in (*COMMANDS, "lm-eval"))
    assert "Start with `megalodon-export aoti`" in output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(here: Callable[..., Result], name: str) -> None:
    status, output, errors = here(name, "--help")
    assert (status, errors) == (0, "")
    assert output.startswith(f"usage: megalodon-export {name}")
    assert all(word in output for word in COMMANDS[name])


USAGE_ERRORS = {
    "no command": ((), "the following arguments are required: COMMAND"),
    "unknown command": (("explode",), "invalid choice: 'explode'"),
    "no bundle": (("inspect",), "required: bundle"),
    "no prompt": (("generate", "x"), "required: --prompt"),
    "unknown option": (("verify", "x", "--quickly"), "unrecognized arguments: --quickly"),
    "unknown dtype": (("aoti", "--dtype", "float16"), "invalid choice: 'float16'"),
    "unknown kind": (("convert", "gpt2", "a", "b"), "invalid choice: 'gpt2'"),
}


# Option -> a command that has it, values that are refused, and what is expected instead.
RANGES: dict[str, tuple[tuple[str, ...], tuple[object, ...], str]] = {
    "--threads": ((), (0, -1, 1025, "two", 1.5), "1..1024"),
    "--max-new-tokens": (("generate", "x", "--prompt", "y"), (0, -1, 2**63, "x", 3.0, ""), f"1..{2**63 - 1}"),
    "--temperature": (("generate", "x", "--prompt", "y"), (-1, "nan", "inf", "hot", "1e400"), "a finite number >= 0"),
    "--top-k": (("generate", "x", "--prompt", "y"), (-1, 2**63, "many", 1.0), f"0..{2**63 - 1}"),
    "--top-p": (("generate", "x", "--prompt", "y"), (0, -1, 1.5, "nan"), "a number above 0, 1 at most"),
    "--min-p": (("eval", "x"), (-0.1, 1.5, "nan"), "0..1"),
    "--seed": (("eval", "x"), (-1, 2**64, 1.5), f"0..{2**64 - 1}"),
    "--batch": (("eval", "x"), (0, -1, 2**16 + 1), "1..65536"),
    "--truncate-chunks": (("eval", "x"), (1, 2, -1, 1.5), "0, 3..1048576"),
    "--max-batch": (("onnx",), (0, -1, 2**16 + 1), "1..65536"),
    "--max-length": (("aoti",), (0, -1), "1..1048576"),
    "--group-size": (("aoti",), (0, -1), "1..1048576"),
    "--tokens": (("bench", "x"), (0, -1), "1..1048576"),
    "--prompt-tokens": (("bench", "x"), (0, -1), "1..1048576"),
    "--port": (("serve", "x"), (-1, 65536, 1.5), "0..65535"),
    "--streams": (("serve", "x"), (0, -1, 2**16 + 1), "1..65536"),
    "--queue": (("serve", "x"), (-1, 2**20 + 1), "0..1048576"),
    "--prefill-tokens": (("serve", "x"), (0, -1), "1..1048576"),
    "--max-tokens": (("serve", "x"), (0, -1, 2**31), f"1..{2**31 - 1}"),
    "--max-prompt-tokens": (("serve", "x"), (-1, 2**31), f"0..{2**31 - 1}"),
    "--max-body": (("serve", "x"), (0, -1), "1..1048576"),
    "--timeout": (("serve", "x"), (0, 10**7 + 1), "1..10000000"),
    "--drain-seconds": (("serve", "x"), (-1, 10**6 + 1), "0..1000000"),
    "--state-memory": (("serve", "x"), (-1, 2**30 + 1), f"0..{2**30}"),
    "--device-state-memory": (("serve", "x"), (-1, 2**30 + 1), f"0..{2**30}"),
    "--state-disk": (("serve", "x"), (-1, 2**40 + 1), f"0..{2**40}"),
    "--clients": (("bench-serve",), (0, 2**31 + 1), f"1..{2**31}"),
    "--requests": (("bench-serve",), (0, -1), f"1..{2**31}"),
    "--shared-tokens": (("bench-serve",), (-1, 2**31 + 1), f"0..{2**31}"),
    "--response-days": (("serve", "x"), (-1, "nan", 36501), "0..36500"),
}


@pytest.mark.parametrize("option", RANGES)
def test_numbers_out_of_range_exit_2(here: Callable[..., Result], option: str) -> None:
    command, values, expected = RANGES[option]
    for value in values:
        status, output, errors = here(*command, option, value)
        assert (status, output) == (2, "")
        assert errors.endswith(f"error: argument {option}: is {value}, expected {expected}\n")


def test_every_numeric_option_has_a_range() -> None:
    commands = next(a for a in options.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    every = {
        name: action.type
        for command in (options.parser(), *commands.values())
        for action in command._actions
        for name in action.option_strings
        if action.type is not None
    }
    numeric = {name for name, kind in every.items() if kind is not Path}
    assert numeric == RANGES.keys()
    assert not {int, float} & set(every.values())


@pytest.mark.parametrize("name", USAGE_ERRORS)
def test_usage_errors_exit_2(here: Callable[..., Result], name: str) -> None:
    arguments, message = USAGE_ERRORS[name]
    status, output, errors = here(*arguments)
    assert (status, output) == (2, "")
    assert message in errors
    assert errors.startswith("usage: megalodon-export")


# ---- failures --------------------------------------------------------------------------------------------------------


def test_failures_exit_1_with_one_line(call: Callable[..., Result], tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    status, output, errors = call("generate", missing, "--prompt", "x")
    assert (status, output) == (1, "")
    assert errors == f"megalodon-export: {missing}: a bundle folder expected, nothing found.\n"


FAILURES: dict[str, tuple[Callable[[Path, Path], tuple[object, ...]], str]] = {
    "no checkpoint": (lambda b, t: ("aoti", "--checkpoint", t), "is no checkpoint: it has no config.json"),
    "length": (
        lambda b, t: ("aoti", "--checkpoint", b, "--out", t / "new", "--device", "cpu", "--max-length", 33),
        "max_length is 33, expected a multiple of 32",
    ),
    "a foreign folder": (
        lambda b, t: ("aoti", "--checkpoint", b, "--out", t, "--device", "cpu"),
        "a bundle, an empty folder or nothing expected there",
    ),
    "no source": (lambda b, t: ("convert", "upstream", t / "none", t / "new"), "none"),
    "unknown runtime": (lambda b, t: ("generate", b, "--prompt", "x", "--runtime", "jax"), "no runtime 'jax'"),
    "an empty stop string": (lambda b, t: ("generate", b, "--prompt", "x", "--stop", ""), "an empty stop string"),
    "a stop string": (
        lambda b, t: ("generate", b, "--prompt", "x", "--stop", "a\udcff"),
        "stop[0] is not UTF-8 at byte 1",
    ),
    "not UTF-8": (lambda b, t: ("generate", b, "--prompt", "ab\udcff"), "the prompt is not UTF-8 at byte 2"),
    "another device": (lambda b, t: ("generate", b, "--prompt", "x", "--device", "cuda"), "are for cpu, not cuda"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_sentence(here: Callable[..., Result], tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    arguments, message = FAILURES[name]
    status, output, errors = here(*arguments(tiny_bundle, tmp_path))
    last = errors.splitlines()[-1]
    assert (status, output) == (1, "")
    assert last.startswith("megalodon-export: ")
    assert message in last
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_traceback_shows_where(here: Callable[..., Result], tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match="a bundle folder expected, nothing found"):
        here("--traceback", "inspect", tmp_path / "nothing")


def test_errors_without_words_are_named(
    here: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(bundle, "read", fail)
    assert here("inspect", tmp_path) == (1, "", "megalodon-export: NotImplementedError\n")


def test_a_reader_that_goes_away(command: Start, tiny_bundle: Path) -> None:
    process: Any = command(
        "generate", tiny_bundle, "--prompt", "x", "--max-new-tokens", 100_000, text=False, encoding=None
    )
    with process:
        process.stdout.read(20)
        process.stdout.close()
        assert process.wait(120) == 1
        assert b"Traceback" not in process.stderr.read()


def test_a_terminated_generation(command: Start, tiny_bundle: Path) -> None:
    process: Any = command(
        "generate", tiny_bundle, "--prompt", "x", "--max-new-tokens", 100_000, text=False, encoding=None
    )
    with process:
        process.stdout.read(20)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert errors.splitlines()[-1] == b"interrupted"


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "POSIX"])
def test_generate_streams_the_continuation(call: Callable[..., Result], tiny_bundle: Path, locale: str) -> None:
    """Alone, without the prompt, and in UTF-8 whatever the locale; `cpp/cli` prints the same."""
    prompt = "In the beginning – ě"
    environment = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    arguments = ("generate", tiny_bundle, "--prompt", prompt, "--max-new-tokens", 60)
    status, output, errors = call(*arguments, env=environment)
    assert (status, errors) == (0, "")
    assert output == expected_text(tiny_bundle, prompt, 60) + "\n"


def test_prompts_that_are_not_utf8(call: Callable[..., Result], tiny_bundle: Path) -> None:
    """From the shell and from stdin: one sentence, before anything is printed."""
    for arguments, data in ((("--prompt", b"ab\xff"), b""), (("--prompt", "-"), b"ab\xff")):
        status, output, errors = call("generate", tiny_bundle, *arguments, data=data)
        assert (status, output, errors) == (1, "", "megalodon-export: the prompt is not UTF-8 at byte 2\n")


@pytest.mark.parametrize("name", ["inspect", "generate"])
def test_output_that_cannot_be_written(name: str, command: Start, tiny_bundle: Path) -> None:
    with open("/dev/full", "w") as full:
        process = command(name, tiny_bundle, *(("--prompt", "x") if name == "generate" else ()), stdout=full)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.fullmatch(r"megalodon-export: .*No space left on device\n", errors)


def test_generate_json_from_stdin_with_sampling(call: Callable[..., Result], tiny_bundle: Path) -> None:
    options = (
        "--temperature",
        0.9,
        "--top-k",
        50,
        "--top-p",
        0.9,
        "--min-p",
        0.01,
        "--seed",
        11,
        "--max-new-tokens",
        40,
    )
    status, output, _ = call(
        "generate", tiny_bundle, "--prompt", "-", "--runtime", "eager", "--json", *options, data=b"Let there be\n"
    )
    sampling = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 11}
    text = expected_text(tiny_bundle, "Let there be\n", 40, **sampling)
    assert status == 0
    assert json.loads(output) == {"prompt": "Let there be\n", "text": text, "runtime": "eager", **sampling}


def test_generate_writes_the_same_in_both_runtimes(here: Callable[..., Result], tiny_bundle: Path) -> None:
    arguments = ("generate", tiny_bundle, "--prompt", "And God said", "--max-new-tokens", 80)
    outputs = [here(*arguments, "--runtime", name) for name in ("eager", "aoti")]
    assert [status for status, _, _ in outputs] == [0, 0]
    assert outputs[0][1] == outputs[1][1]


def test_generate_stops(here: Callable[..., Result], tiny_bundle: Path) -> None:
    text = expected_text(tiny_bundle, "x", 60)
    stop = text[8:10]
    arguments = ("generate", tiny_bundle, "--prompt", "x", "--max-new-tokens", 60, "--stop", "zzzz", "--stop", stop)
    assert here(*arguments)[1] == text[: text.index(stop)] + "\n"


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_verify(call: Callable[..., Result], here: Callable[..., Result], tiny_bundle: Path) -> None:
    status, output, errors = call("verify", tiny_bundle, "--json")
    assert status == 0
    assert json.loads(output) == json.loads((tiny_bundle / "parity.json").read_text())
    assert "aoti: a chunk and one: logits" in errors
    status, output, _ = here("verify", tiny_bundle)
    assert status == 0
    assert output.splitlines()[0].split() == ["runtime", "case", "logits", "cache", "bound"]


def test_inspect(here: Callable[..., Result], tiny_bundle: Path) -> None:
    status, output, _ = here("inspect", tiny_bundle, "--json")
    facts = json.loads(output)
    sizes = {path.relative_to(tiny_bundle).as_posix(): path.stat().st_size for path in tiny_bundle.rglob("*.*")}
    assert status == 0
    assert (facts["layers"], facts["model_dim"], facts["chunk_size"], facts["dtype"]) == (2, 32, 64, "float32")
    assert facts["files"] == {
        name: size for name, size in sizes.items() if name not in ("manifest.json", "parity.json")
    }
    cache = megalodon_export.load(tiny_bundle, runtime="eager").cache
    assert facts["state_bytes_per_stream"] == sum(t.nbytes for t in cache.tensors())
    bound = facts["tensors_bound_by_each_program"]
    assert set(bound) == {"prefill", "decode", "decode_one"}
    assert facts["distinct_tensors_bound"] < sum(bound.values())  # all programs bind the same tensors
    status, output, errors = here("inspect", tiny_bundle)
    assert (status, errors) == (0, "")
    assert re.search(r"^weights +.*once, in model\.safetensors", output, re.MULTILINE)
    assert all(name in output for name in facts["files"])


def test_bench(here: Callable[..., Result], tiny_bundle: Path) -> None:
    options = ("--batch", 1, "--batch", 3, "--tokens", 4, "--prompt-tokens", 70, "--json")
    status, output, errors = here("bench", tiny_bundle, *options)
    assert status == 0, errors
    results = json.loads(output)["results"]
    assert [(row["runtime"], row["batch"]) for row in results] == [
        *(("eager", 1), ("eager", 3), ("aoti", 1), ("aoti", 3)),
    ]
    assert all(row["decode_seconds"] > 0 and row["prefill_seconds"] > 0 for row in results)


@pytest.mark.parametrize(("kind", "name"), [("upstream", "model_base"), ("megalodon-hf", "hf_base")])
def test_convert(
    call: Callable[..., Result], here: Callable[..., Result], tmp_path: Path, kind: str, name: str
) -> None:
    source = write_checkpoint(name, tmp_path / "source")
    run = call if kind == "upstream" else here
    status, output, errors = run("convert", kind, source, tmp_path / "made")
    assert status == 0, errors
    config = load(name)[0]["config"]
    assert output.startswith(f"{tmp_path / 'made'}: ")
    assert re.search(rf"width {config['model_dim']}, chunks of {config['chunk_size']} tokens\n$", output)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    with torch.no_grad():
        assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()


def test_doctor_is_reached(here: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("megalodon_export.doctor.checks.main", lambda json: asked.append(json) or 1)
    assert here("doctor", "--json")[0] == 1
    assert asked == [True]
