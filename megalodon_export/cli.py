"""The command line: results on stdout (`--json` for machines), progress on stderr, exit 0 / 1 (failed) / 2 (usage)."""

from __future__ import annotations

import sys
from importlib import import_module

from .bundles.strict_json import shown_lines
from .commands.options import parser

# The function of each command. Its module is imported when the command is given: importing torch takes seconds.
_COMMANDS = {
    "aoti": "exporting:aoti",
    "onnx": "exporting:onnx",
    "convert": "exporting:convert",
    "generate": "generating:generate",
    "serve": "serving:serve",
    "eval": "measuring:evaluate",
    "lm-eval": "harness:lm_eval",
    "bench": "measuring:bench",
    "bench-serve": "serving:bench_serve",
    "verify": "inspecting:verify",
    "inspect": "inspecting:inspect",
    "doctor": "checking:doctor",
}


def run(arguments: list[str]) -> int:
    """Parse the arguments, run the command, and turn a failure into one sentence on stderr; the exit status."""
    args = parser().parse_args(arguments)
    try:
        module, function = _COMMANDS[args.command].split(":")
        command = getattr(import_module(f".commands.{module}", __package__), function)
        return int(command(args) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away; python would complain at exit
        return 1
    except Exception as error:
        if args.traceback:
            raise
        advice = "; set TMPDIR to a folder that can be written" if _is_about_temporary_folders(error) else ""
        print(f"megalodon-export: {shown_lines(str(error)) or type(error).__name__}{advice}", file=sys.stderr)
        return 1


def _is_about_temporary_folders(error: Exception) -> bool:
    """Whether Python found no temporary folder, for this package or for another one while it was imported."""
    return isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error)
