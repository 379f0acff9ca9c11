"""The checkpoint as a folder: writing it, measuring it as it was written, and its model card."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import corpus
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from megalodon_export.exporters.programs import Limits
from megalodon_export.generation.text import byte_tokenizer
from megalodon_export.measure.evaluation import score
from megalodon_export.model import MegalodonForCausalLM
from megalodon_export.runtimes.eager import ModelRuntime

MAX_BYTES = 4_000_000
PIECE = 4096  # tokens a prefill call, when a long stream is measured
PROMPT = "And it came to pass in those days"
TEMPERATURE = 0.75
SAMPLE_BYTES = 700


def bits_per_byte(model: MegalodonForCausalLM, stream: Tensor) -> tuple[float, int]:
    """Bits per byte of ids (L), after the first one, as one stream whose state is carried to the end; and its bytes.

    Predicting the END_OF_TEXT between the texts costs bits too, but is not counted as a byte.
    """
    nats = score(ModelRuntime(model, Limits(max_length=PIECE)), [stream]).nats
    count = int((stream != corpus.END_OF_TEXT).sum())
    return nats / math.log(2) / count, count


@torch.no_grad()
def sample(model: MegalodonForCausalLM, seed: int = 0) -> str:
    """PROMPT continued by SAMPLE_BYTES bytes, drawn at TEMPERATURE on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(PROMPT.encode())
    prompt = torch.tensor([ids], device=model.device)
    cache = model.new_cache(1)
    logits = model.prefill(prompt, torch.full_like(prompt[:, 0], len(ids)), cache)
    for _ in range(SAMPLE_BYTES):
        probabilities = torch.softmax(logits[0].cpu() / TEMPERATURE, -1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        logits = model.decode(torch.tensor(ids[-1:], device=model.device), cache)
    return bytes(i for i in ids if i < corpus.END_OF_TEXT).decode(errors="replace")


def save(model: MegalodonForCausalLM, folder: Path) -> None:
    """Write weights, configs and tokenizer; each file replaces an older one at once."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    end = corpus.END_OF_TEXT
    GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, do_sample=True, temperature=TEMPERATURE
    ).save_pretrained(staging)
    name = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer((name,)), bos_token=name, eos_token=name, pad_token=name,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(staging)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for file in staging.iterdir():
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    staging.rmdir()


def finish(folder: Path, parts: corpus.Corpus, results: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Reload the folder as a user would, measure it on the held-out text, write the card, check the size."""
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream = torch.tensor(corpus.token_ids(parts.held_out), device=device)
    if tokenizer.encode(PROMPT) != list(PROMPT.encode()):
        raise RuntimeError(f"the tokenizer in {folder} does not map bytes to themselves")
    measured, count = bits_per_byte(model, stream)
    results = {
        **results,
        "held_out_bits_per_byte": measured,
        "held_out_bytes": count,
        "train_bytes": sum(map(len, parts.train)),
        "validation_bytes": sum(map(len, parts.validation)),
        "repeated_share": corpus.repeated_share(parts),
        "parameters": model.num_parameters(),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "sample": sample(model),
    }
    (folder / "README.md").write_text(card(model.config.to_dict(), results), encoding="utf-8")
    results["folder_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    if results["folder_bytes"] > MAX_BYTES:
        raise RuntimeError(f"{folder} has {results['folder_bytes']:,} bytes, expected at most {MAX_BYTES:,}")
    return results


def card(config: dict[str, Any], r: dict[str, Any]) -> str:
    """The model card, from the config and what was measured."""
    epochs = r["steps"] * r["batch"] * r["length"] / r["train_bytes"]
    quoted = "\n".join(f"> {line}  " for line in r["sample"].splitlines())
    return f"""---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [megalodon, byte-level]
---

# Megalodon, byte level, King James Bible

A small Megalodon language model that reads and writes bytes, to try exports, runtimes and tests on. It is small enough
to be committed. It is trained, so the text that it writes shows whether a runtime is right.

    import megalodon_export  # registers the model with transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("artifacts/default")
    tokenizer = AutoTokenizer.from_pretrained("artifacts/default")

## Model

| | |
|---|---|
| parameters | {r["parameters"]:,} ({" and ".join(r["dtypes"])}; the complex EMA's are float32) |
| `model.safetensors` | {r["weights_bytes"]:,} bytes |
| layers, width, heads | {config["num_layers"]}, {config["model_dim"]}, {config["num_heads"]} |
| query/key, value, feed-forward width | {config["z_dim"]}, {config["value_dim"]}, {config["ffn_hidden_dim"]} (SwiGLU) |
| EMA modes, norm groups | {config["cema_ndim"]}, {config["norm_num_groups"]} |
| attention chunk | {config["chunk_size"]} bytes; the EMA and the norms' statistics carry what lies further back |
| vocabulary | {config["vocab_size"]}: the 256 bytes, and `<|endoftext|>` before, between and after books |

## Data

The text is the King James Version in the Debian package `bible-kjv`, as `bible -f gen1:1-rev22:21` prints it:
{r["text_bytes"]:,} bytes, one verse a line, each after its reference (`Ge1:1`). The package states that the
copyright of the text is expired. The text is in the public domain (in the United Kingdom, Crown
letters patent govern its printing).

The last 5% of each book's verses are held out, and the 1% before them choose the checkpoint:
{r["train_bytes"]:,} bytes of training,
{r["validation_bytes"]:,} of validation, {r["held_out_bytes"]:,} held out. {r["repeated_share"]:.1%} of the held-out
bytes lie in passages of {corpus.REPEAT} bytes or more that the training part has too: the Bible repeats itself.

## Training

{r["steps"]:,} steps of {r["batch"]} sequences of {r["length"]:,} bytes from random places, {epochs:.1f} times the
text, in {r["minutes"]:.1f} minutes on {r["hardware"]}, with torch {r["torch"]}.

The optimisers are Muon for the layers' matrices and AdamW for the rest. The learning rate has its peak at
{r["rate"]:g} and falls as a cosine. Weight decay is {r["weight_decay"]:g}, dropout {r["dropout"]:g}, the seed
{r["seed"]}. The weights are trained in bfloat16 over float32 masters. The file holds the running average of
the masters. The recipe is `artifacts/recipe/`.

## Quality

| bits per byte | |
|---|---|
| held out | **{r["held_out_bits_per_byte"]:.3f}** |
| validation (step {r["best_step"]:,}, the best) | {r["validation_bits_per_byte"]:.3f} |
| `xz -9e`, the whole text | {r["xz_bits_per_byte"]:.3f} |

The figures were measured on these files, as `from_pretrained` loads them. All held-out bytes are one stream, book after
book, with the state carried from the first byte to the last.

A sample: "{PROMPT}", continued by {SAMPLE_BYTES} bytes drawn at temperature {TEMPERATURE}:

{quoted}

## Limits

It knows one book, in early modern English, and nothing else: no facts, no instructions, no other language. It invents
verses and references: nothing that it writes is a quotation. It says what that book says, in the book's terms.

## Licence

The weights are under the project's licence, Apache-2.0; the text is in the public domain.
"""
