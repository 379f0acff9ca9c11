"""How long a researcher waits for torch.compile: this model, beside a Llama and a Mamba2 of about its size.

    python benchmarks/compile_time.py --device cpu --layers 4 12 --task forward train --out FILE

Each case runs in a process of its own, with Inductor's caches on disk off:

    first    seconds of the first call, 2 x 512 tokens, which compiles
    cpu      seconds of processor time in it, which other work on the machine does not lengthen as much
    second   seconds of the first call of another length, 2 x 384
    third    the same for a batch of another size, 3 x 640 tokens
    steady   milliseconds of a call of 2 x 512, the median of those that follow
    eager    the same without torch.compile

`compile()` is `model.compile()`, and `torch.compile` compiles `model.forward`: ours layer by layer as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("megalodon compile()", "megalodon torch.compile", "llama", "mamba2")
TASKS = ("forward", "train", "generate")
CALLS = {"first": (2, 512), "second": (2, 384), "third": (3, 640)}
WIDTH, VOCABULARY, CHUNK = 256, 1000, 256
NEW_TOKENS = 32


def make(name: str, layers: int) -> Any:
    """A model of width 256 with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

    from megalodon_export.model import MegalodonConfig, MegalodonForCausalLM

    if name == "llama":
        sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes))
    if name == "mamba2":
        sizes = {"hidden_size": WIDTH, "num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1}
        return Mamba2ForCausalLM(Mamba2Config(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes))
    sizes = {"model_dim": WIDTH, "num_heads": 1, "z_dim": 64, "value_dim": 2 * WIDTH, "ffn_hidden_dim": 2 * WIDTH}
    config = MegalodonConfig(vocab_size=VOCABULARY, num_layers=layers, chunk_size=CHUNK, norm_num_groups=32, **sizes)
    return MegalodonForCausalLM(config)


def call_of(task: str, model: Any, device: str) -> Callable[[int, int], None]:
    """One call of a task on (batch, length) tokens, to its end."""
    import torch

    def tokens(batch: int, length: int) -> torch.Tensor:
        return torch.randint(VOCABULARY - 1, (batch, length), device=device)

    @torch.no_grad()
    def forward(batch: int, length: int) -> None:
        model(tokens(batch, length), use_cache=False)

    def train(batch: int, length: int) -> None:
        ids = tokens(batch, length)
        model(ids, labels=ids, use_cache=False).loss.backward()

    def generate(batch: int, length: int) -> None:
        ids = tokens(batch, length)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)

    run = {"forward": forward, "train": train, "generate": generate}[task]

    def synchronized(batch: int, length: int) -> None:
        run(batch, length)
        if device == "cuda":
            torch.cuda.synchronize()

    return synchronized


def measure(name: str, layers: int, task: str, device: str) -> dict[str, Any]:
    """One case, in this process."""
    import torch

    torch.manual_seed(0)
    model = make(name, layers).to(device)
    model.train(task == "train")
    call = call_of(task, model, device)
    eager = seconds_of(call, *CALLS["first"], count=5)
    if name == MODELS[0]:
        model.compile()
    else:  # generate() calls the model itself
        model.forward = torch.compile(model.forward)
    row: dict[str, Any] = {"model": name, "layers": layers, "task": task, "device": device}
    before = sum(os.times()[:4])
    for column, sizes in CALLS.items():
        row[column] = seconds_of(call, *sizes, count=1)
        row.setdefault("cpu", sum(os.times()[:4]) - before)
    row["steady"] = seconds_of(call, *CALLS["first"], count=5)
    row["eager"] = eager
    row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    row["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return row


def seconds_of(call: Callable[[int, int], None], batch: int, length: int, count: int) -> float:
    """The median time of `count` calls."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call(batch, length)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def in_a_process(case: tuple[str, int, str, str], timeout: float) -> dict[str, Any]:
    """`measure` in a process of its own; the row says so if it fails or takes too long."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    row: dict[str, Any] = dict(zip(("model", "layers", "task", "device"), case, strict=True))
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"not done in {timeout:.0f} s"}
    if done.returncode:
        return {**row, "failed": done.stderr.strip().splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    start = f"{row['task']:9} {row['layers']:3} layers  {row['model']:24}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    times = "".join(f"{column} {row[column]:7.2f} s  " for column in (*CALLS, "cpu"))
    calls = "".join(f"{column} {row[column] * 1e3:7.1f} ms  " for column in ("steady", "eager"))
    return f"{start} {times}{calls}{row['graphs']} graphs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--task", nargs="+", default=["forward", "train"], choices=TASKS)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one case may take")
    parser.add_argument("--out", type=Path, help="writes all rows and the versions here, as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*json.loads(arguments.case))))
        return
    import torch
    import transformers

    rows = []
    for task in arguments.task:
        for layers in arguments.layers:
            for model in arguments.model:
                rows.append(in_a_process((model, layers, task, arguments.device), arguments.timeout))
                print(line(rows[-1]), flush=True)
    if arguments.out:
        machine = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} threads"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": machine}
        arguments.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
