"""Train the default checkpoint: a byte-level Megalodon on the King James Bible, from the text alone.

    python artifacts/recipe/train.py --text kjv.txt --out artifacts/default --minutes 7

The script writes progress to stderr, and the measured results to stdout as JSON. The folder always holds the best
checkpoint so far.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import corpus
import torch
from checkpoint import bits_per_byte, finish, save
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from megalodon_export.model import MegalodonConfig, MegalodonForCausalLM

COMMON = {
    **{"vocab_size": 257, "num_heads": 2, "swiglu": True, "share_emb": True, "cema_ndim": 8, "norm_num_groups": 8},
    **{"bos_token_id": corpus.END_OF_TEXT, "eos_token_id": corpus.END_OF_TEXT},
}
SIZES = {
    "model_dim": 192,
    "num_layers": 4,
    "z_dim": 96,
    "value_dim": 320,
    "ffn_hidden_dim": 384,
    "chunk_size": 128,
}
TINY = {"model_dim": 32, "num_layers": 2, "z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 32, "chunk_size": 16}
SMOKE_VERSES = 2000
WARMUP = 0.02  # share of the training in which the learning rate rises
FINAL_RATE = 0.02  # share of the peak learning rate that is left at the end of the cosine
AVERAGE_DECAY = 0.995  # for each step; the averaged weights are measured and saved
MAX_GRADIENT_NORM = 1.0

LossFunction = Callable[[Tensor], Tensor]


def main() -> int:
    """Parse the arguments, train, measure, write."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    disable_progress_bar()
    text = args.text.read_bytes()
    if args.smoke:
        text = b"".join(text.splitlines(keepends=True)[:SMOKE_VERSES])
    parts = corpus.split(text)
    trainer = Trainer(args, parts)
    trainer.run()
    results = {**trainer.results(), "xz_bits_per_byte": corpus.xz_bits_per_byte(text), "text_bytes": len(text)}
    results = finish(args.out, parts, results, trainer.device)
    print(json.dumps({key: value for key, value in results.items() if key != "sample"}, indent=2))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line; --smoke replaces the sizes by tiny ones."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="what `bible -f gen1:1-rev22:21` prints")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, artifacts/default")
    parser.add_argument("--minutes", type=float, default=7, help="everything ends within this time")
    parser.add_argument(
        "--steps",
        type=int,
        default=5000,
        help="most steps; the schedule follows the time or the steps, whichever ends first",
    )
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step")
    parser.add_argument("--length", type=int, default=2048, help="bytes in a sequence")
    parser.add_argument("--rate", type=float, default=8e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="run the training step eagerly")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model, to try the script")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.batch, args.length, args.every, args.no_compile = 30, 4, 128, 15, True
    return args


class Weights:
    """Float32 master weights of a model, and their running average. The model itself has the checkpoint's dtypes."""

    def __init__(self, model: MegalodonForCausalLM) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.model = list(model.parameters())
        self.masters = [nn.Parameter(parameter.detach().clone()) for parameter in self.model]
        self.average = [parameter.detach().clone() for parameter in self.model]
        to_stored_dtypes(model)

    def take_gradients(self) -> None:
        """Move the model's gradients to the masters, clipped."""
        for master, parameter in zip(self.masters, self.model, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, MAX_GRADIENT_NORM)

    @torch.no_grad()
    def publish(self, step: int) -> None:
        """Copy the masters into the model, and update the average."""
        torch._foreach_copy_(self.model, self.masters)
        share = 1 - min(AVERAGE_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.masters, share)


class Trainer:
    """Trains on the split text, and saves the best checkpoint."""

    def __init__(self, args: argparse.Namespace, parts: corpus.Corpus) -> None:
        self.args, self.started = args, time.monotonic()
        self.device = torch.device(args.device)
        config = MegalodonConfig(
            **COMMON, **(TINY if args.smoke else SIZES), dropout=args.dropout, hidden_dropout=args.dropout
        )
        self.model = MegalodonForCausalLM(config).to(self.device).train()
        self.weights = Weights(self.model)
        self.shadow = copy.deepcopy(self.model).eval()  # holds the averaged weights, to measure and save
        self.optimizers = make_optimizers(self.weights, args)
        self.train_ids = torch.tensor(corpus.token_ids(parts.train), device=self.device)
        self.validation_ids = torch.tensor(corpus.token_ids(parts.validation), device=self.device)
        self.best, self.best_step, self.step, self.measuring = math.inf, 0, 0, 0.0

    def run(self) -> None:
        """Train until the steps or the minutes are over, saving whenever the validation improves."""
        args = self.args
        loss_of = self.make_loss_function()
        positions = torch.Generator().manual_seed(args.seed)
        losses: list[Tensor] = []
        while self.progress() < 1:
            set_rate(self.optimizers, args.rate * schedule(self.progress()))
            loss = loss_of(self.batch(positions))
            loss.backward()
            self.weights.take_gradients()
            for optimizer in self.optimizers:
                optimizer.step()
            self.weights.publish(self.step)
            self.step += 1
            losses.append(loss.detach())
            if self.step % args.every == 0:
                self.validate(torch.stack(losses).mean().item() / math.log(2))
                losses = []
        if losses:
            self.validate(torch.stack(losses).mean().item() / math.log(2))

    def progress(self) -> float:
        """Share of the steps that is done, or of the time if the time ends first.

        Some time is left for the last measurements, which take about ten times as long as a validation.
        """
        elapsed = time.monotonic() - self.started
        available = self.args.minutes * 60 - 12 * self.measuring - 15
        return max(self.step / self.args.steps, elapsed / available if available > 0 else 1.0)

    def batch(self, positions: torch.Generator) -> Tensor:
        """Sequences from random places of the training stream: (batch, length)."""
        args = self.args
        starts = torch.randint(len(self.train_ids) - args.length, (args.batch, 1), generator=positions)
        return self.train_ids[(starts + torch.arange(args.length)).to(self.device)]

    def make_loss_function(self) -> LossFunction:
        """The training loss in nats a byte, compiled where that works."""

        def loss_of(ids: Tensor) -> Tensor:
            return self.model(ids, labels=ids).loss

        if self.args.no_compile:
            return loss_of
        compiled = torch.compile(loss_of)
        try:
            compiled(self.batch(torch.Generator().manual_seed(0))).backward()
        except Exception as error:  # training works without the compiler
            log(f"torch.compile failed; training continues without it: {type(error).__name__}: {str(error)[:300]}")
            compiled = loss_of
        self.model.zero_grad(set_to_none=True)
        log(f"{time.monotonic() - self.started:.0f} s: ready to train")
        return compiled

    @torch.no_grad()
    def validate(self, train: float) -> None:
        """Measure the averaged weights on the validation stream; save them if they are the best so far."""
        began = time.monotonic()
        torch._foreach_copy_(list(self.shadow.parameters()), self.weights.average)
        validation, _ = bits_per_byte(self.shadow, self.validation_ids)
        better = validation < self.best
        if better:
            self.best, self.best_step = validation, self.step
            save(self.shadow, self.args.out)
        self.measuring = time.monotonic() - began
        log(
            f"{began - self.started:.0f} s: step {self.step}, progress {self.progress():.1%}, train {train:.4f}, "
            f"validation {validation:.4f} bits per byte{', saved' if better else ''}"
        )

    def results(self) -> dict[str, object]:
        """The figures about the training that the model card shows."""
        args = self.args
        return {
            "validation_bits_per_byte": self.best,
            "best_step": self.best_step,
            "steps": self.step,
            "minutes": (time.monotonic() - self.started) / 60,
            "hardware": hardware(self.device),
            "torch": torch.__version__,
            **{key: getattr(args, key) for key in ("batch", "length", "rate", "weight_decay", "dropout", "seed")},
        }


def to_stored_dtypes(model: MegalodonForCausalLM) -> None:
    """Convert to the dtypes that `from_pretrained` loads: bfloat16, and float32 for the modules that stay in it."""
    keep = model._keep_in_fp32_modules_strict
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not any(module in name.split(".") for module in keep):
            tensor.data = tensor.data.bfloat16()


def make_optimizers(weights: Weights, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW without decay for the rest (embedding, EMA, norms, biases)."""
    matrices, others = [], []
    for name, master in zip(weights.names, weights.masters, strict=True):
        is_matrix = master.ndim == 2 and name.endswith(".weight") and "embed" not in name
        (matrices if is_matrix else others).append(master)
    muon = torch.optim.Muon(
        matrices, lr=args.rate, weight_decay=args.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def schedule(progress: float) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine."""
    if progress < WARMUP:
        return (progress + 1e-3) / (WARMUP + 1e-3)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def hardware(device: torch.device) -> str:
    """The device as the model card names it."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    cores = torch.get_num_threads()
    return f"{'one core' if cores == 1 else f'{cores} cores'} of an {platform.machine()} CPU"


def log(message: str) -> None:
    """A line of progress."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
