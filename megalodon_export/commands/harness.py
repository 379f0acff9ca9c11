"""`lm-eval`: the command of EleutherAI's lm-evaluation-harness, which then knows the model "megalodon"."""

from __future__ import annotations

import argparse
import sys

import torch

from ..measure import lm_eval_adapter  # noqa: F401 - registers the model

_MODEL = ["--model", "megalodon"]


def lm_eval(args: argparse.Namespace) -> None:
    """Hand the arguments on; where they name no model, it is "megalodon"."""
    from lm_eval.__main__ import cli_evaluate

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    before, sys.argv = sys.argv, ["lm-eval", *with_model(args.arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def with_model(arguments: list[str]) -> list[str]:
    """The harness's arguments with `--model megalodon` where a run names neither a model nor a file that may.

    ["--tasks", "lambada_openai"] -> ["run", "--model", "megalodon", "--tasks", "lambada_openai"]
    """
    options = [word for word in arguments if word.startswith("-")]
    if not options or arguments[0] not in ("run", *options):  # `ls tasks`, `validate`
        return arguments
    names = {word.split("=")[0] if word.startswith("--") else word[:2] for word in options}
    if names & {"--model", "-M", "--config", "-C", "--help", "-h"}:
        return arguments
    return ["run", *_MODEL, *(arguments[1:] if arguments[0] == "run" else arguments)]
