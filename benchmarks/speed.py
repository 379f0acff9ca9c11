"""Measure the speed of a preset with random weights, per runtime: load, prefill, first token, decode and generation.

    python benchmarks/speed.py --preset 200M --runtime eager aoti onnx --batch 1 8 64 --prompt-tokens 128 2048 \\
        --device cuda --dtype bfloat16 --out results/ [--context-tokens 2048 32768 262144 1048576] [--peer PATH]

The script writes DIR/speed.json after every runtime. At the end it writes DIR/speed.md and, with matplotlib, plots.
Every time stands beside the roofline of the same run. A decode step cannot be faster than its bytes over the rate of a
copy. A prefill cannot be faster than its operations over the rate of a matrix product.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import report
import torch
from engines import Subject, make_bundle, open_engine, programs_of
from kernel_times import kernel_times
from peer import open_peer, time_peer
from processes import graph_against_none, memory_of_a_process, resident_memory

from megalodon_export.bundles import bundle
from megalodon_export.bundles.checkpoints import default_device
from megalodon_export.bundles.manifest import DTYPES
from megalodon_export.measure.bench import WARM_UP, PeakRates, median_seconds, time_decode, time_prefill
from megalodon_export.measure.roofline import decode_bytes, prefill_flops, visible_tokens
from megalodon_export.model import PRESETS, MegalodonConfig, preset
from megalodon_export.runtimes import Runtime

IN_MEMORY = ("eager", "compile", "kernels")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="200M", choices=tuple(PRESETS))
    parser.add_argument("--layers", type=int, help="number of layers (default: the preset's)")
    parser.add_argument(
        "--weight-format",
        choices=("float", "int8", "int4"),
        default="float",
        help="the numbers that linear layers hold",
    )
    parser.add_argument("--bundle", type=Path, help="measure this bundle; if it is missing, make it from the preset")
    parser.add_argument("--runtime", nargs="+", default=["eager", "aoti"], help="eager, compile, kernels, aoti, onnx")
    parser.add_argument("--from-config", action="store_true", help="aoti: compile from the config, without a bundle")
    parser.add_argument("--programs", type=Path, help="with --from-config: the folder of the programs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--context-tokens", type=int, nargs="*", default=[], help="contexts to stream, batch 1")
    parser.add_argument("--steps", type=int, default=100, help="decode steps timed")
    parser.add_argument("--repeats", type=int, default=5, help="prefills timed")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--peer", type=Path, help="a checkout of megalodon-hf, timed on the same sizes")
    parser.add_argument("--peer-batch", type=int, nargs="+", help="batches of the peer (default: the same)")
    parser.add_argument("--process-memory", action="store_true", help="also measure what a new process needs")
    parser.add_argument(
        "--graph-steps", type=int, default=0, help="CUDA: compare that many greedy steps with and without a graph"
    )
    parser.add_argument(
        "--profile", action="store_true", help="CUDA: also list the times of the kernels of a prefill and of a step"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for speed.json, speed.md and plots")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.programs and not args.from_config:
        parser.error("--programs needs --from-config; a bundle holds its own programs")
    if args.process_memory and (args.from_config or not set(args.runtime) - set(IN_MEMORY)):
        parser.error("--process-memory measures a bundle: ask for --runtime aoti without --from-config")
    return args


def main() -> None:
    """Measure every runtime that the command line names, and write the report."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        subject, found = prepare(args, Path(scratch))
        peak = PeakRates.measure(torch.device(subject.device), DTYPES[subject.dtype])
        found |= {"copy_gigabytes_per_second": peak.copy / 1e9, "matmul_teraflops": peak.matmul / 1e12}
        for name in args.runtime:
            print(f"{name}", file=sys.stderr, flush=True)
            if name == "aoti" and args.from_config:
                _, found["compile_seconds"] = programs_of(subject)
            measure(name, subject, args, peak, found)
            write_json(args.out, found)
        if args.peer:
            print("peer", file=sys.stderr, flush=True)
            model = open_peer(args.peer, subject)
            timed = time_peer(model, subject, args.peer_batch or args.batch, args.prompt_tokens, args.steps, peak)
            found["results"] += guarded(timed, {"runtime": "megalodon-hf"}, subject.device)
        if args.process_memory and subject.folder:
            found["process_memory"] = memory_of_a_process(subject.folder, subject.device)
    write_json(args.out, found)
    report.write(found, args.out)
    print(report.markdown(found))


def prepare(args: argparse.Namespace, scratch: Path) -> tuple[Subject, dict[str, Any]]:
    """The model to measure and the head of the report. Exports the model if a runtime needs a bundle."""
    folder: Path | None = args.bundle
    overrides: dict[str, Any] = {"weight_format": args.weight_format}
    if args.layers:
        overrides["num_layers"] = args.layers
    config, max_batch = preset(args.preset, **overrides), max(64, *args.batch)
    programs = (args.programs or scratch / "programs") if args.from_config else None
    subject = Subject(config, args.device, args.dtype, max_batch, programs)
    in_memory = (*IN_MEMORY, "aoti") if args.from_config else IN_MEMORY
    found: dict[str, Any] = {
        **report.head(args.device),
        "model": str(args.bundle) if args.bundle else args.preset,
        "weight_format": args.weight_format,
    }
    wanted = [name for name in args.runtime if name not in in_memory]
    if folder is None and wanted:
        folder = scratch / "bundle"
    if folder is not None and not bundle.is_bundle(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        make_bundle(subject, folder, wanted)
        found["export_seconds"] = time.monotonic() - started
    if folder is not None:
        manifest = bundle.read(folder, check="sizes")
        config = MegalodonConfig(**vars(manifest.config))
        subject = replace(subject, config=config, dtype=manifest.dtype, folder=folder)
        found["file_bytes"] = {name: entry.size for name, entry in manifest.files.items()}
    found |= {"dtype": subject.dtype, "config": subject.config.to_diff_dict(), "results": [], "contexts": []}
    return subject, found


def measure(name: str, subject: Subject, args: argparse.Namespace, peak: PeakRates, found: dict[str, Any]) -> None:
    """Append all rows of one runtime to the report. Its memory is free again afterwards."""
    device = torch.device(subject.device)
    started = time.perf_counter()
    runtime = open_engine(name, subject)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    # Without a bundle the time is not a load time: random weights are drawn, and programs may be compiled.
    head = {"runtime": name, ("load_seconds" if subject.folder else "made_seconds"): seconds}
    repeats = (args.repeats, WARM_UP if device.type == "cuda" else 1)
    for batch in args.batch:
        row = {**head, "batch": batch}
        for tokens in args.prompt_tokens:
            prefill = one_row(time_prefill, runtime, batch, tokens, peak, *repeats)
            found["results"] += guarded(prefill, {**row, "prompt_tokens": tokens}, subject.device)
        decode = one_row(time_decode, runtime, batch, args.steps, peak)
        found["results"] += guarded(decode, row, subject.device)
    if args.context_tokens:
        streamed = stream(runtime, sorted(args.context_tokens), args.steps, peak)
        found["contexts"] += guarded(streamed, {"runtime": name}, subject.device)
    if args.graph_steps and name == "aoti" and device.type == "cuda":
        found.setdefault("cuda_graph", {})[name] = graph_against_none(runtime, args.graph_steps)
    if args.profile and device.type == "cuda":
        kernels = found.setdefault("kernels", [])
        kernels += [{"runtime": name, **row} for row in kernel_times(runtime, args.batch[0], args.prompt_tokens[-1])]


def one_row(measurement: Callable[..., dict[str, Any]], *arguments: Any) -> Iterator[dict[str, Any]]:
    """The row of one measurement, which starts when `guarded` asks for the row."""
    yield measurement(*arguments)


def guarded(rows: Iterator[dict[str, Any]], head: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """The rows, each with its peak memory. Running out of memory or of limits ends them with a row that says so."""
    done: list[dict[str, Any]] = []
    while True:
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            row = next(rows)
        except StopIteration:
            return done
        except (torch.OutOfMemoryError, ValueError) as error:  # programs raise ValueError outside their limits
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            return [*done, {**head, "error": reason}]
        on_gpu = device.startswith("cuda")
        memory = torch.cuda.max_memory_allocated(device) if on_gpu else resident_memory()["resident"]
        done.append({**head, **row, "memory_bytes": memory})
        print(json.dumps(done[-1]), file=sys.stderr, flush=True)


def stream(runtime: Runtime, contexts: Sequence[int], steps: int, peak: PeakRates) -> Iterator[dict[str, Any]]:
    """Feed one stream with random tokens, up to each context, in calls of the prefill program's greatest length.

    A row holds a context's rate since the context before it, and the time of a decode step there, in a copy of the
    stream. The last row feeds as many tokens as the last context took, but into a fresh stream for each call. It shows
    whether the context costs time: a device that has worked for seconds is slower than one that starts.
    """
    config, device = runtime.config, runtime.device
    programs, branch = (runtime.bind(runtime.new_cache(1)) for _ in range(2))
    cache = programs.cache

    def feed(tokens: int) -> None:
        programs.feed(torch.randint(config.vocab_size, (1, tokens), device=device), torch.tensor([tokens]))

    segment = runtime.limits.max_length
    for _ in range(WARM_UP):
        feed(segment)
    token_ids = torch.randint(config.vocab_size, (1,), device=device)
    cache.reset()
    fed = 0
    for context in contexts:
        start = int(cache.position[0])  # waits for the device
        started = time.perf_counter()
        for position in range(start, context, segment):
            feed(min(segment, context - position))
        fed = int(cache.position[0]) - start
        row: dict[str, Any] = {"context_tokens": context}
        if fed:
            seconds = time.perf_counter() - started
            operations = prefill_flops(config, 1, fed, start, runtime.all_logits)
            row |= rates(fed, seconds, operations, peak)
        branch.cache.copy_(cache)
        seconds = median_seconds(lambda: branch.step(token_ids), device, steps)
        visible = visible_tokens(config, start + fed + WARM_UP, steps) / steps
        moved = decode_bytes(config, runtime.dtype, 1, visible).total
        yield row | {
            "decode_seconds": seconds,
            "decode_tokens_per_second": 1 / seconds,
            "decode_share": moved / peak.copy / seconds,
        }
    pieces = max(fed // segment, 1)
    started = time.perf_counter()
    for _ in range(pieces):
        cache.position.zero_()  # makes the stream fresh: no slot of the ring is visible
        feed(segment)
    int(cache.position[0])
    operations = pieces * prefill_flops(config, 1, segment, all_logits=runtime.all_logits)
    yield {"fresh_streams": pieces, "context_tokens": segment} | rates(
        pieces * segment, time.perf_counter() - started, operations, peak
    )


def rates(tokens: int, seconds: float, operations: int, peak: PeakRates) -> dict[str, Any]:
    """The rates of a streamed prefill."""
    return {
        "streamed_tokens": tokens,
        "prefill_tokens_per_second": tokens / seconds,
        "prefill_share": operations / peak.matmul / seconds,
    }


def write_json(out: Path, found: dict[str, Any]) -> None:
    """Replace speed.json in one step, so that a run cut short leaves a whole file."""
    staged = out / ".speed.json"
    staged.write_text(json.dumps(found, indent=1) + "\n")
    staged.replace(out / "speed.json")


if __name__ == "__main__":
    main()
