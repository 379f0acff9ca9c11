"""Write text with a bundle's ONNX graphs, by onnxruntime and numpy alone: python examples/onnx_numpy.py BUNDLE [PROMPT]

The model's tokens must be bytes, as the default model's are. Other models need their tokenizer.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

folder, prompt = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "In the beginning"
manifest = json.loads((folder / "manifest.json").read_text())
entry = manifest["programs"]["onnx"]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # errors only: without IOBinding, ONNX Runtime warns at each step that caches are copied
sessions = {name: onnxruntime.InferenceSession(folder / g["file"], options) for name, g in entry["graphs"].items()}
past = [one["name"] for one in entry["graphs"]["decode"]["inputs"][1:]]
cache = [np.full([1, *t["row_shape"]], t["initial_value"], t["dtype"]) for t in manifest["cache"]]


def run(program: str, **inputs: np.ndarray) -> np.ndarray:
    """Logits (B, V); the cache is replaced by the new one."""
    logits, *cache[:] = sessions[program].run(None, inputs | dict(zip(past, cache, strict=True)))
    return logits


tokens, length = np.frombuffer(prompt.encode(), np.uint8), entry["limits"]["max_length"]
for start in range(0, len(tokens), length):  # every call has the same length; the last one is padded
    piece = tokens[start : start + length].astype(np.int64)
    logits = run("prefill", input_ids=np.pad(piece, (0, length - len(piece)))[None], lengths=np.array([len(piece)]))
sys.stdout.write(prompt)
for _ in range(200):
    token = logits[0].argmax()
    if token > 255:  # the end of the text
        break
    sys.stdout.flush()
    sys.stdout.buffer.write(bytes([token]))
    logits = run("decode", input_ids=token[None])
