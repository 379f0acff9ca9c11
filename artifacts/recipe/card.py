"""The model card of the default checkpoint."""

from __future__ import annotations

from typing import Any

import corpus

PROMPT = "And it came to pass in those days"
TEMPERATURE = 0.75
SAMPLE_BYTES = 700


def card(config: dict[str, Any], results: dict[str, Any]) -> str:
    """The model card, from the model's config and the measured results."""
    return _model(config, results) + _training(results) + _quality(results)


def _model(config: dict[str, Any], r: dict[str, Any]) -> str:
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

With `trust_remote_code=True`, the first line may be left out. The chat template joins the texts of the messages by line
breaks: this is a base model, and continues the last one.

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

"""


def _training(r: dict[str, Any]) -> str:
    epochs = r["steps"] * r["batch"] * r["length"] / r["train_bytes"]
    return f"""## Data

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

"""


def _quality(r: dict[str, Any]) -> str:
    quoted = "\n".join(f"> {line}  " for line in r["sample"].splitlines())
    return f"""## Quality

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
