"""Write the checkpoint's folder, load it again, measure it, and write its model card."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import corpus
import torch
from card import PROMPT, SAMPLE_BYTES, TEMPERATURE, card
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from megalodon_export.exporters.programs import Limits
from megalodon_export.generation.text import byte_tokenizer
from megalodon_export.measure.evaluation import score
from megalodon_export.model import MegalodonForCausalLM
from megalodon_export.runtimes.eager import ModelRuntime

MAX_BYTES = 4_000_000
PIECE = 4096  # tokens in a call of prefill when a long stream is measured
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def bits_per_byte(model: MegalodonForCausalLM, stream: Tensor) -> tuple[float, int]:
    """Bits per byte of a stream of token ids (L), and the number of its bytes.

    Every token but the first is predicted, with the state carried from the first to the last. The END_OF_TEXT tokens
    between the texts cost bits, but do not count as bytes.
    """
    nats = score(ModelRuntime(model, Limits(max_length=PIECE)), [stream]).nats
    count = int((stream != corpus.END_OF_TEXT).sum())
    return nats / math.log(2) / count, count


@torch.no_grad()
def sample(model: MegalodonForCausalLM, seed: int = 0) -> str:
    """PROMPT, continued by SAMPLE_BYTES bytes that are drawn at TEMPERATURE on the CPU."""
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
    """Write weights, configs and tokenizer. Each file replaces an older one in one step."""
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
        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    ).save_pretrained(staging)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for file in staging.iterdir():
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    staging.rmdir()


def finish(folder: Path, parts: corpus.Corpus, results: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Load the folder like a user, measure it on the held-out text, write the model card, check the folder's size."""
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
