"""`serve`: answer OpenAI's clients over HTTP. `bench-serve`: send load to such a server."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from ..bundles.checkpoints import default_checkpoint, default_device
from ..serving.load import Load, measure, table
from .threads import set_threads


def serve(args: argparse.Namespace) -> None:
    """Serve a bundle until a signal ends it; the default model's is exported if it is missing."""
    try:
        from ..serving.server import ServerOptions, ServiceLimits
        from ..serving.server import serve as run
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serving needs the package {error.name}; install it: pip install 'megalodon-export[serve]'"
        ) from error
    folder = args.bundle or _default_bundle(args.device)
    set_threads(args, folder)
    limits = ServiceLimits(
        body_bytes=args.max_body << 20,
        new_tokens=args.max_tokens,
        prompt_tokens=args.max_prompt_tokens,
        seconds=float(args.timeout),
    )
    run(
        ServerOptions(
            folder,
            runtime=args.runtime,
            device=args.device,
            host=args.host,
            port=args.port,
            name=args.name,
            streams=args.streams,
            queue=args.queue,
            prefill_tokens=args.prefill_tokens,
            state_memory=args.state_memory,
            device_state_memory=args.device_state_memory,
            state_dir=args.state_dir,
            state_disk=args.state_disk,
            response_days=args.response_days,
            key_file=args.api_key_file,
            origins=tuple(args.cors_origin),
            chat_template=args.chat_template,
            drain_seconds=args.drain_seconds,
            log_json=args.log_json,
            limits=limits,
        )
    )


def bench_serve(args: argparse.Namespace) -> None:
    """Measure a running server."""
    key = None
    if args.api_key_file is not None:
        key = args.api_key_file.read_text(encoding="utf-8").splitlines()[0].strip()
    counts = (args.clients, args.requests, args.prompt_tokens, args.shared_tokens, args.max_tokens)
    report = measure(Load(args.url, *counts, seed=args.seed, key=key))
    print(json.dumps(report) if args.json else table(report))


def _default_bundle(device: str | None) -> Path:
    """The default model's bundle in artifacts, exported if it is not there."""
    from ..export.aoti import export_aoti
    from ..export.steps import progress

    chosen = device or default_device()
    folder = Path("artifacts") / f"default-aoti-{chosen.replace(':', '')}"
    if not folder.exists():
        print(f"{folder} is missing; the default model is exported first", file=sys.stderr)
        export_aoti(default_checkpoint(), folder, chosen, report=progress(time.monotonic()))
    return folder
