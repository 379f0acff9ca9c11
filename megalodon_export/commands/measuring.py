"""`eval` and `bench`: commands that measure a model's quality and its speed."""

from __future__ import annotations

import argparse
import json
import sys

from ..bundles import bundle
from ..measure.bench import bench as measure
from ..measure.bench import table
from ..measure.evaluation import Target, generations, perplexity
from .options import sampling_options
from .threads import set_threads


def evaluate(args: argparse.Namespace) -> int:
    """Score texts and continue prompts; a usage error where neither is asked for."""
    if not args.ppl and args.prompts is None:
        print("megalodon-export eval: nothing to do; give --ppl FILE, --prompts FILE or both", file=sys.stderr)
        return 2
    set_threads(args, args.folder)
    target = Target.open(args.folder, args.runtime, args.device, args.dtype)
    if args.ppl and not target.runtime.can_score:
        note = "prefill returns the last token's logits alone, so every token is scored by a decode step; a bundle "
        print(f"{args.folder}: {note}exported with --all-logits is scored faster", file=sys.stderr)
    for path in args.ppl:
        found = perplexity(target, path, args.batch, args.truncate_chunks)
        size = f"{found['tokens']:,} tokens in {found['documents']:,} documents, {target.name}"
        text = f"{path}: perplexity {found['perplexity']:.6g}, {found['nats_per_token']:.6f} nats a token ({size})"
        print(json.dumps(found) if args.json else text, flush=True)
    if args.prompts is not None:
        for made in generations(target, args.prompts, args.max_new_tokens, **sampling_options(args)):
            print(json.dumps(made, ensure_ascii=False) if args.json else "".join(made.values()) + "\n", flush=True)
    return 0


def bench(args: argparse.Namespace) -> None:
    """Time the runtimes of a bundle, eager mode first."""
    set_threads(args, args.bundle)
    programs = bundle.read(args.bundle, "sizes").programs.by_runtime()
    runtimes = args.runtime or ["eager", *(name for name in ("onnx", "aoti") if name in programs)]
    report = measure(args.bundle, runtimes, args.batch or [1, 8], args.prompt_tokens, args.tokens)
    print(json.dumps(report) if args.json else table(report))
