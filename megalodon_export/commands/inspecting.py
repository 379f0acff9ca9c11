"""`inspect` and `verify`: commands that look at a bundle."""

from __future__ import annotations

import argparse
import json
import time

from ..bundles import inspection
from ..bundles import verify as verification
from ..export.steps import progress
from .threads import set_threads


def inspect(args: argparse.Namespace) -> None:
    """Print what is in a bundle."""
    facts = inspection.inspect(args.bundle)
    print(json.dumps(facts) if args.json else inspection.table(facts))


def verify(args: argparse.Namespace) -> None:
    """Compare a bundle's programs with the eager model, and print the largest differences."""
    set_threads(args, args.bundle)
    parity = verification.verify(args.bundle, report=progress(time.monotonic()))
    if args.json:
        print(json.dumps(parity))
        return
    print(f"{'runtime':<8} {'case':<28} {'logits':>8} {'cache':>8} {'bound':>8}")
    for row in parity["results"]:
        print(f"{row['runtime']:<8} {row['case']:<28} {row['logits']:8.1e} {row['cache']:8.1e} {row['bound']:8.0e}")
