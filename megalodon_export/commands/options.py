"""The options of every command. This module imports the standard library alone, so that `--help` is quick."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EPILOG = "Start with `megalodon-export aoti`: it exports the model that ships with the package to artifacts/."
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


def integer(least: int, most: int = 2**63 - 1, *others: int) -> Callable[[str], int]:
    """The type of an option that is a whole number in least..most, or one of `others`."""
    expected = ", ".join([*map(str, others), f"{least}..{most}"])

    def parse(text: str) -> int:
        found: int | None
        try:
            found = int(text)
        except ValueError:
            found = None
        if found is None or not (least <= found <= most or found in others):
            raise argparse.ArgumentTypeError(f"is {text}, expected {expected}")
        return found

    return parse


def number(least: float, most: float, expected: str) -> Callable[[str], float]:
    """The type of an option that is a number in least..most; NaN is in no range."""

    def parse(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not least <= found <= most:
            raise argparse.ArgumentTypeError(f"is {text}, expected {expected}")
        return found

    return parse


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` of what it returns is the command's name."""
    whole = argparse.ArgumentParser(
        prog="megalodon-export", description="Export and run Megalodon language models.", epilog=_EPILOG
    )
    whole.add_argument("--traceback", action="store_true", help="on failure, show where in the code it happened")
    whole.add_argument(
        "--threads", type=integer(1, 1024), help="CPU threads (default: 1 for weights under 32 MB, else all cores)"
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (
        _aoti,
        _onnx,
        _convert,
        _generate,
        _serve,
        _eval,
        _lm_eval,
        _verify,
        _inspect,
        _bench,
        _bench_serve,
        _doctor,
    ):
        add(commands)
    return whole


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `--temperature` and the options beside it, by the names of `SamplingParams`."""
    return {name: getattr(args, name) for name in _SAMPLING}


def _command(commands: Any, name: str, about: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + "."
    )
    return command


def _aoti(commands: Any) -> None:
    about = "export a checkpoint with AOTInductor to a bundle: a folder with weights, compiled programs and proof"
    command = _command(commands, "aoti", about)
    _add_export_options(command)
    command.add_argument("--out", type=Path, help="the bundle's folder (default: artifacts/NAME-aoti-DEVICE[-FORMAT])")
    command.add_argument("--device", help="cpu or cuda (default: this machine's best)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda")
    command.add_argument(
        "--weight-format",
        choices=("int8", "int4"),
        default="float",
        help="quantise linear layers with torchao (default: leave them in --dtype); int4 keeps the head in int8",
    )
    command.add_argument(
        "--group-size", type=integer(1, 2**20), help="int4: features of a row that share a scale (default 32)"
    )
    command.add_argument(
        "--portable", action="store_true", help="cpu: programs for any x86-64 CPU with AVX2, not for this one alone"
    )


def _onnx(commands: Any) -> None:
    about = "export a checkpoint as ONNX graphs, for ONNX Runtime on a CPU or on CUDA, to a bundle"
    command = _command(commands, "onnx", about)
    _add_export_options(command)
    command.add_argument("--out", type=Path, help="the bundle's folder (default: artifacts/NAME-onnx)")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32")
    command.add_argument(
        "--kernels",
        nargs="?",
        const="all",
        metavar="ARCHITECTURES",
        help="write graphs with GPU kernels for ONNX Runtime on CUDA as well, which needs no GPU: for these "
        "architectures, such as sm_90,sm_100 (default: all that are known)",
    )


def _add_export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint", type=Path, help="a folder that from_pretrained loads (default: the one included)"
    )
    command.add_argument(
        "--max-batch", type=integer(1, 2**16), default=64, help="largest batch the programs take (default 64)"
    )
    command.add_argument(
        "--max-length", type=integer(1, 2**20), help="most tokens in one prefill call (default: one chunk)"
    )
    command.add_argument(
        "--all-logits", action="store_true", help="prefill returns the logits of every token, to score text"
    )
    command.add_argument(
        "--ema-prefill",
        choices=("blocked", "fft"),
        help="how prefill evaluates the EMA (default: as the checkpoint's config says). blocked is the fastest. fft "
        "compiles faster on a CPU, and runs within 8%% of blocked at batch 1. Kernels for a GPU use neither",
    )
    command.add_argument(
        "--add", type=Path, metavar="BUNDLE", help="add the programs to this bundle, and use the weights that it has"
    )
    command.add_argument("--json", action="store_true", help="print the manifest's main facts as JSON")


def _convert(commands: Any) -> None:
    command = _command(commands, "convert", "convert another implementation's checkpoint to transformers' layout")
    command.add_argument("kind", choices=("upstream", "megalodon-hf"), help="where the checkpoint comes from")
    command.add_argument("source", type=Path, metavar="SRC", help="its folder")
    command.add_argument("destination", type=Path, metavar="DST", help="the folder to make")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")


def _generate(commands: Any) -> None:
    command = _command(commands, "generate", "continue a prompt, streaming the text as it comes")
    _add_bundle(command)
    command.add_argument("--prompt", required=True, help="the text to continue; - reads it from stdin")
    command.add_argument("--runtime", help="aoti, onnx or eager (default: what the bundle has, aoti first)")
    command.add_argument("--device", help="default: the device that the programs were compiled for")
    command.add_argument("--max-new-tokens", type=integer(1), default=256, help="default 256")
    _add_sampling_options(command)
    command.add_argument(
        "--stop", action="append", default=[], help="end before this string; may be given more than once"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object at the end instead of streaming")


def _serve(commands: Any) -> None:
    command = _command(commands, "serve", "answer OpenAI's clients over HTTP; needs the extra `serve`")
    command.add_argument(
        "bundle", type=Path, nargs="?", help="a bundle's folder (default: the default model's in artifacts, exported)"
    )
    command.add_argument("--runtime", help="aoti, onnx or eager (default: what the bundle has, aoti first)")
    command.add_argument("--device", help="default: the device that the programs were compiled for")
    command.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    command.add_argument("--port", type=integer(0, 65535), default=8000, help="0 takes a free one (default 8000)")
    command.add_argument("--name", help="the model's name in the API (default: the bundle's folder)")
    command.add_argument("--chat-template", type=Path, metavar="FILE", help="default: the tokenizer's")
    command.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that are accepted, one a line")
    command.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="a web page's origin that may send requests"
    )
    command.add_argument("--log-json", action="store_true", help="write the log as JSON lines")
    _add_serving_sizes(command)


def _add_serving_sizes(command: argparse.ArgumentParser) -> None:
    """The limits of `serve`, and how much it keeps."""
    whole: dict[str, tuple[int, int, int | None, str]] = {
        "--streams": (1, 2**16, 32, "streams that run at the same time"),
        "--queue": (0, 2**20, 256, "requests that wait; more are answered with 429"),
        "--prefill-tokens": (1, 2**20, 256, "tokens of prompts that are fed between two steps"),
        "--max-tokens": (1, 2**31 - 1, 4096, "most tokens that a request may ask for"),
        "--max-prompt-tokens": (0, 2**31 - 1, 0, "most tokens of a prompt; 0 for any number"),
        "--max-body": (1, 2**20, 16, "MiB of a request"),
        "--timeout": (1, 10**7, 3600, "seconds for a whole request"),
        "--drain-seconds": (0, 10**6, 30, "seconds that running requests have to end after SIGTERM"),
        "--state-memory": (0, 2**30, None, "MiB of host memory for states (default: a quarter of what is free)"),
        "--device-state-memory": (0, 2**30, None, "MiB of GPU memory for states (default: an eighth)"),
        "--state-disk": (0, 2**40, 8192, "MiB in --state-dir for stored responses, and as many for prefixes"),
    }
    for option, (least, most, default, about) in whole.items():
        shown = "" if default is None else f" (default {default})"
        command.add_argument(option, type=integer(least, most), default=default, help=about + shown)
    command.add_argument(
        "--state-dir", type=Path, metavar="DIR", help="keep responses here over restarts (default: in memory)"
    )
    command.add_argument(
        "--response-days", type=number(0, 36500, "0..36500"), default=30.0, help="until a stored response expires"
    )


def _eval(commands: Any) -> None:
    command = _command(commands, "eval", "measure perplexity over texts, and continue prompts, from JSON lines")
    command.add_argument("folder", type=Path, help="a bundle's folder, or a checkpoint's")
    command.add_argument(
        "--ppl", type=Path, action="append", default=[], metavar="FILE", help="score the field text of every line"
    )
    command.add_argument("--prompts", type=Path, metavar="FILE", help="continue the field text of every line")
    command.add_argument("--runtime", help="aoti, onnx or eager (default: what a bundle has; eager for a checkpoint)")
    command.add_argument(
        "--device", help="default: the device that the programs were compiled for; for a checkpoint, the best one"
    )
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="for a checkpoint (default: float32 on cpu, bfloat16 on cuda)"
    )
    command.add_argument(
        "--batch", type=integer(1, 2**16), default=1, help="documents to score side by side (default 1)"
    )
    command.add_argument(
        "--truncate-chunks",
        type=integer(3, 2**20, 0),
        default=0,
        metavar="N",
        help="from N chunks on, keep the norms' statistics of the last N - 2 alone (default 0: off; the original: 8)",
    )
    command.add_argument("--max-new-tokens", type=integer(1), default=512, help="for --prompts; default 512")
    _add_sampling_options(command)
    command.add_argument("--json", action="store_true", help="print one JSON object a line")


def _lm_eval(commands: Any) -> None:
    about = "run lm-evaluation-harness, which then knows the model megalodon; all arguments are its own"
    # No argument begins with NUL, so that none is taken for an option of this command, not even --help.
    command = commands.add_parser("lm-eval", help=about, add_help=False, prefix_chars="\0")
    command.add_argument("arguments", nargs=argparse.REMAINDER)


def _add_sampling_options(command: argparse.ArgumentParser) -> None:
    largest, smallest = sys.float_info.max, sys.float_info.min
    kinds: dict[str, tuple[Callable[[str], float], float, str]] = {
        "--temperature": (number(0, largest, "a finite number >= 0"), 0.0, "0: always the most probable token"),
        "--top-k": (integer(0), 0, "sample among the K most probable (0: off)"),
        "--top-p": (number(smallest, 1, "a number above 0, 1 at most"), 1.0, "sample among the most probable, up to P"),
        "--min-p": (number(0, 1, "0..1"), 0.0, "drop tokens below P times the most probable"),
        "--seed": (integer(0, 2**64 - 1), 0, "equal seeds give equal texts"),
    }
    for option, (kind, default, about) in kinds.items():
        command.add_argument(option, type=kind, default=default, help=f"{about} (default {default})")


def _verify(commands: Any) -> None:
    about = "check a bundle's hashes, then its programs' numbers against the eager model"
    command = _command(commands, "verify", about)
    _add_bundle(command)
    command.add_argument("--json", action="store_true", help="print JSON")


def _inspect(commands: Any) -> None:
    command = _command(commands, "inspect", "show what is in a bundle")
    _add_bundle(command)
    command.add_argument("--json", action="store_true", help="print JSON")


def _bench(commands: Any) -> None:
    command = _command(commands, "bench", "time a bundle: load, prefill, first token, decode, each apart")
    _add_bundle(command)
    command.add_argument(
        "--runtime", action="append", help="eager, aoti, onnx; may be repeated (default: all there are)"
    )
    command.add_argument(
        "--batch",
        type=integer(1, 2**16),
        action="append",
        help="batch size; may be given more than once (default 1, 8)",
    )
    command.add_argument("--tokens", type=integer(1, 2**20), default=64, help="decode steps to time (default 64)")
    command.add_argument("--prompt-tokens", type=integer(1, 2**20), default=512, help="prefill length (default 512)")
    command.add_argument("--json", action="store_true", help="print JSON")


def _bench_serve(commands: Any) -> None:
    about = "send load to a running server; print time to first token, inter-token latency, throughput and hits"
    command = _command(commands, "bench-serve", about)
    command.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="default http://127.0.0.1:8000")
    whole: dict[str, tuple[int, int, str]] = {
        "--clients": (1, 8, "requests at the same time"),
        "--requests": (1, 64, "of all clients together"),
        "--prompt-tokens": (1, 128, "of each prompt, drawn at random"),
        "--shared-tokens": (0, 0, "of them the same in all prompts, at their beginning"),
        "--max-tokens": (1, 64, "that each request generates"),
        "--seed": (0, 0, "of the prompts"),
    }
    for option, (least, default, what) in whole.items():
        command.add_argument(option, type=integer(least, 2**31), default=default, help=f"{what} (default {default})")
    command.add_argument("--api-key-file", type=Path, metavar="FILE", help="its first line is sent as the key")
    command.add_argument("--json", action="store_true", help="print JSON")


def _doctor(commands: Any) -> None:
    command = _command(commands, "doctor", "try the compiler, torch, CUDA and ONNX Runtime; say what to change")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_bundle(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=Path, help="a bundle's folder")
