"""`generate`: continue a prompt."""

from __future__ import annotations

import argparse
import json
import sys

from ..bundles import bundle
from ..generation.session import load
from ..runtimes import default_runtime
from .options import sampling_options
from .threads import set_threads


def generate(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation as it comes, or one JSON object at the end."""
    set_threads(args, args.bundle)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    runtime = args.runtime or default_runtime(bundle.read(args.bundle, "sizes"))
    session = load(args.bundle, runtime=runtime, device=args.device)
    sampling = sampling_options(args)
    pieces = session.generate(prompt, args.max_new_tokens, args.stop, **sampling)
    if args.json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces), "runtime": runtime, **sampling}))
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
