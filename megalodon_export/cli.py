"""The command line: results on stdout (`--json` for machines), progress on stderr, exit 0 / 1 (failed) / 2 (usage)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

_SMALL_WEIGHTS = 32 << 20
_EPILOG = "Start with `megalodon-export aoti`: it exports the model that ships with the package to artifacts/."


def run(arguments: list[str]) -> int:
    """Parse, dispatch, and turn failures into one sentence on stderr."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.command(args) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away; python would complain at exit
        return 1
    except Exception as error:
        if args.traceback:
            raise
        print(f"megalodon-export: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megalodon-export", description="Export and run Megalodon language models.", epilog=_EPILOG
    )
    parser.add_argument("--traceback", action="store_true", help="on failure, show where in the code")
    parser.add_argument("--threads", type=int, help="CPU threads (default: 1 for weights under 32 MB, else all cores)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_aoti(commands)
    _add_onnx(commands)
    _add_convert(commands)
    _add_generate(commands)
    _add_eval(commands)
    for name, function, about in (
        ("verify", _verify, "check a bundle's hashes, then its programs' numbers against the eager model"),
        ("inspect", _inspect, "show what is in a bundle"),
    ):
        command = _command(commands, name, function, about)
        command.add_argument("bundle", type=Path, help="a bundle's folder")
        command.add_argument("--json", action="store_true", help="print JSON")
    _add_bench(commands)
    doctor = _command(commands, "doctor", _doctor, "try the compiler, torch, CUDA and ONNX Runtime; say what to change")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _command(commands: Any, name: str, function: Any, about: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + "."
    )
    command.set_defaults(command=function)
    return command


def _add_aoti(commands: Any) -> None:
    about = "export a checkpoint with AOTInductor to a bundle: a folder with weights, compiled programs and proof"
    command = _command(commands, "aoti", _aoti, about)
    _add_export_options(command)
    command.add_argument("--out", type=Path, help="the bundle's folder (default: artifacts/NAME-aoti-DEVICE[-FORMAT])")
    command.add_argument("--device", help="cpu or cuda (default: this machine's best)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda")
    command.add_argument(
        "--weight-format",
        choices=("int8", "int4"),
        default="float",
        help="quantise linear layers, with torchao (default: weights in --dtype); int4 keeps the head in int8",
    )
    command.add_argument("--group-size", type=int, help="int4: features of a row that share a scale (default 32)")
    command.add_argument("--portable", action="store_true", help="cpu: for any x86-64 with AVX2, not just this one")


def _add_export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint", type=Path, help="a folder that from_pretrained loads (default: the one included)"
    )
    command.add_argument("--max-batch", type=int, default=64, help="largest batch the programs take (default 64)")
    command.add_argument("--max-length", type=int, help="most tokens in one prefill call (default: one chunk)")
    command.add_argument(
        "--all-logits", action="store_true", help="prefill returns the logits of every token, to score text"
    )
    command.add_argument("--add", type=Path, metavar="BUNDLE", help="add the programs to this bundle, of its weights")
    command.add_argument("--json", action="store_true", help="print the manifest's main facts as JSON")


def _add_onnx(commands: Any) -> None:
    about = "export a checkpoint as ONNX graphs, for ONNX Runtime on a CPU or on CUDA, to a bundle"
    command = _command(commands, "onnx", _onnx, about)
    _add_export_options(command)
    command.add_argument("--out", type=Path, help="the bundle's folder (default: artifacts/NAME-onnx)")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32")


def _add_convert(commands: Any) -> None:
    command = _command(
        commands, "convert", _convert, "convert another implementation's checkpoint to transformers' layout"
    )
    command.add_argument("kind", choices=("upstream", "megalodon-hf"), help="where the checkpoint comes from")
    command.add_argument("source", type=Path, metavar="SRC", help="its folder")
    command.add_argument("destination", type=Path, metavar="DST", help="the folder to make")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")


def _add_generate(commands: Any) -> None:
    command = _command(commands, "generate", _generate, "continue a prompt, streaming the text as it comes")
    command.add_argument("bundle", type=Path, help="a bundle's folder")
    command.add_argument("--prompt", required=True, help="the text to continue; - reads it from stdin")
    command.add_argument("--runtime", help="aoti, onnx or eager (default: what the bundle has, aoti first)")
    command.add_argument("--device", help="default: where the programs were compiled for")
    command.add_argument("--max-new-tokens", type=int, default=256, help="default 256")
    _add_sampling_options(command)
    command.add_argument(
        "--stop", action="append", default=[], help="end before this string; may be given more than once"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object at the end instead of streaming")


def _add_sampling_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most probable token")
    command.add_argument("--top-k", type=int, default=0, help="sample among the K most probable (0: off)")
    command.add_argument("--top-p", type=float, default=1.0, help="sample among the most probable that make up P")
    command.add_argument("--min-p", type=float, default=0.0, help="drop tokens below P times the most probable")
    command.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts")


def _add_eval(commands: Any) -> None:
    command = _command(commands, "eval", _eval, "measure perplexity over texts, and continue prompts, from JSON lines")
    command.add_argument("folder", type=Path, help="a bundle's folder, or a checkpoint's")
    command.add_argument(
        "--ppl", type=Path, action="append", default=[], metavar="FILE", help="score the field text of every line"
    )
    command.add_argument("--prompts", type=Path, metavar="FILE", help="continue the field text of every line")
    command.add_argument("--runtime", help="aoti, onnx or eager (default: what a bundle has; eager for a checkpoint)")
    command.add_argument("--device", help="default: where the programs were compiled for; a checkpoint: the best one")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of a checkpoint (default: float32 on cpu, bfloat16 on cuda)"
    )
    command.add_argument("--batch", type=int, default=1, help="documents to score side by side (default 1)")
    command.add_argument(
        "--truncate-chunks",
        type=int,
        default=0,
        metavar="N",
        help="from N chunks on, keep the norms' statistics of the last N - 2 alone (default 0: off; the original: 8)",
    )
    command.add_argument("--max-new-tokens", type=int, default=512, help="of a continuation; default 512")
    _add_sampling_options(command)
    command.add_argument("--json", action="store_true", help="print one JSON object a line")


def _add_bench(commands: Any) -> None:
    command = _command(commands, "bench", _bench, "time a bundle: load, prefill, first token, decode, each apart")
    command.add_argument("bundle", type=Path, help="a bundle's folder")
    command.add_argument(
        "--runtime", action="append", help="eager, aoti, onnx; may be repeated (default: all there are)"
    )
    command.add_argument(
        "--batch", type=int, action="append", help="batch size; may be given more than once (default 1, 8)"
    )
    command.add_argument("--tokens", type=int, default=64, help="decode steps to time (default 64)")
    command.add_argument("--prompt-tokens", type=int, default=512, help="prefill length (default 512)")
    command.add_argument("--json", action="store_true", help="print JSON")


def _set_threads(args: argparse.Namespace, folder: Path) -> None:
    """A small model is slower on many threads: they wait for each other longer than they work."""
    import torch

    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    elif weights < _SMALL_WEIGHTS:
        torch.set_num_threads(1)


def _aoti(args: argparse.Namespace) -> None:
    from .bundles.checkpoints import default_checkpoint
    from .export.aoti import default_device, export_aoti, progress
    from .export.onnx import add_aoti

    device, report = args.device or default_device(), progress(time.monotonic())
    if args.add:
        _refuse_with_add(args, "checkpoint", "out", "dtype", "all_logits", "weight_format", "group_size")
        _set_threads(args, args.add)
        manifest = add_aoti(args.add, device, args.max_batch, args.max_length, args.portable, report)
        return _print_exported(args, args.add, manifest)
    checkpoint = args.checkpoint or default_checkpoint()
    _set_threads(args, checkpoint)
    name = "default" if args.checkpoint is None else checkpoint.resolve().name
    suffix = "" if args.weight_format == "float" else f"-{args.weight_format}"
    destination = args.out or Path("artifacts") / f"{name}-aoti-{device.replace(':', '')}{suffix}"
    manifest = export_aoti(
        *(checkpoint, destination, device, args.dtype, args.max_batch, args.max_length, args.all_logits, args.portable),
        report=report,
        weight_format=args.weight_format,
        group_size=args.group_size,
    )
    _print_exported(args, destination, manifest)


def _onnx(args: argparse.Namespace) -> None:
    from .bundles.checkpoints import default_checkpoint
    from .export.aoti import progress
    from .export.onnx import add_onnx, export_onnx

    report = progress(time.monotonic())
    if args.add:
        _refuse_with_add(args, "checkpoint", "out", "dtype", "all_logits")
        _set_threads(args, args.add)
        return _print_exported(args, args.add, add_onnx(args.add, args.max_batch, args.max_length, report))
    checkpoint = args.checkpoint or default_checkpoint()
    _set_threads(args, checkpoint)
    name = "default" if args.checkpoint is None else checkpoint.resolve().name
    destination = args.out or Path("artifacts") / f"{name}-onnx"
    options = args.dtype, args.max_batch, args.max_length, args.all_logits
    _print_exported(args, destination, export_onnx(checkpoint, destination, *options, report))


def _refuse_with_add(args: argparse.Namespace, *names: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False, "float")]
    if given:
        raise ValueError(f"--add takes the bundle's own weights and dtype; leave out {', '.join(given)}")


def _print_exported(args: argparse.Namespace, folder: Path, manifest: Any) -> None:
    total = sum(entry.size for entry in manifest.files.values())
    targets = {name: entry.target for name, entry in manifest.programs.by_runtime().items()}
    if args.json:
        facts = {"bundle": str(folder), "bytes": total, "dtype": manifest.dtype}
        print(json.dumps({**facts, **{name: msgspec.to_builtins(target) for name, target in targets.items()}}))
        return
    devices = ", ".join(target.device for target in targets.values())
    print(f"{folder}: {total:,} bytes, {manifest.dtype}, {devices}; programs equal to the eager model")
    print(f'next: megalodon-export generate {folder} --prompt "In the beginning"')


def _convert(args: argparse.Namespace) -> None:
    from .bundles.checkpoints import DTYPES
    from .model.conversion.convert import convert_megalodon_hf, convert_upstream

    convert = convert_upstream if args.kind == "upstream" else convert_megalodon_hf
    config = convert(args.source, args.destination, DTYPES[args.dtype] if args.dtype else None)
    sizes = f"{config.num_layers} layers, width {config.model_dim}, chunks of {config.chunk_size} tokens"
    print(f"{args.destination}: {sizes}")


def _generate(args: argparse.Namespace) -> None:
    from .bundles.bundle import read
    from .generation.session import load
    from .runtimes import default_runtime

    _set_threads(args, args.bundle)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    runtime = args.runtime or default_runtime(read(args.bundle, "sizes"))
    session = load(args.bundle, runtime=runtime, device=args.device)
    sampling = _sampling(args)
    pieces = session.generate(prompt, args.max_new_tokens, args.stop, **sampling)
    if args.json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces), "runtime": runtime, **sampling}))
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}


def _eval(args: argparse.Namespace) -> int:
    from .measure.evaluation import Target, generations, perplexity

    if not args.ppl and args.prompts is None:
        print("megalodon-export eval: nothing to do; give --ppl FILE, --prompts FILE or both", file=sys.stderr)
        return 2
    _set_threads(args, args.folder)
    target = Target.open(args.folder, args.runtime, args.device, args.dtype)
    if args.ppl and not target.runtime.all_logits:
        note = "prefill returns the last token's logits alone, so every token is scored by a decode step; a bundle "
        print(f"{args.folder}: {note}exported with --all-logits is scored faster", file=sys.stderr)
    for path in args.ppl:
        found = perplexity(target, path, args.batch, args.truncate_chunks)
        size = f"{found['tokens']:,} tokens in {found['documents']:,} documents, {target.name}"
        text = f"{path}: perplexity {found['perplexity']:.6g}, {found['nats_per_token']:.6f} nats a token ({size})"
        print(json.dumps(found) if args.json else text, flush=True)
    if args.prompts is not None:
        for made in generations(target, args.prompts, args.max_new_tokens, **_sampling(args)):
            print(json.dumps(made, ensure_ascii=False) if args.json else "".join(made.values()) + "\n", flush=True)
    return 0


def _runtimes(folder: Path) -> list[str]:
    """All that can run a bundle, eager first."""
    from .bundles.bundle import read

    programs = read(folder, "sizes").programs.by_runtime()
    return ["eager", *(name for name in ("onnx", "aoti") if name in programs)]


def _verify(args: argparse.Namespace) -> None:
    from .bundles.verify import verify
    from .export.aoti import progress

    _set_threads(args, args.bundle)
    parity = verify(args.bundle, report=progress(time.monotonic()))
    if args.json:
        print(json.dumps(parity))
        return
    print(f"{'runtime':<8} {'case':<28} {'logits':>8} {'cache':>8} {'bound':>8}")
    for row in parity["results"]:
        print(f"{row['runtime']:<8} {row['case']:<28} {row['logits']:8.1e} {row['cache']:8.1e} {row['bound']:8.0e}")


def _inspect(args: argparse.Namespace) -> None:
    from .bundles.inspection import inspect, table

    facts = inspect(args.bundle)
    print(json.dumps(facts) if args.json else table(facts))


def _bench(args: argparse.Namespace) -> None:
    from .measure.bench import bench, table

    _set_threads(args, args.bundle)
    report = bench(
        args.bundle, args.runtime or _runtimes(args.bundle), args.batch or [1, 8], args.prompt_tokens, args.tokens
    )
    print(json.dumps(report) if args.json else table(report))


def _doctor(args: argparse.Namespace) -> int:
    from .doctor.checks import main

    return main(args.json)
