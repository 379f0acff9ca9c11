"""`generate`: continue a prompt."""

from __future__ import annotations

import argparse
import json
import os
import sys

from ..bundles import bundle
from ..generation.arguments import utf8
from ..generation.session import load
from ..runtimes import default_runtime
from .options import sampling_options
from .threads import set_threads


def generate(args: argparse.Namespace) -> None:
    """Print the continuation as it comes, or one JSON object at the end."""
    set_threads(args, args.bundle)
    prompt = utf8(sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt))
    stops = [utf8(os.fsencode(stop), f"stop[{i}]") for i, stop in enumerate(args.stop)]
    runtime = args.runtime or default_runtime(bundle.read(args.bundle, "sizes"))
    session = load(args.bundle, runtime=runtime, device=args.device)
    sampling = sampling_options(args)
    pieces = session.generate(prompt, args.max_new_tokens, stops, **sampling)
    if args.json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces), "runtime": runtime, **sampling}))
        return
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
