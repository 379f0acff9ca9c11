"""Write text with a bundle's ONNX graphs, by onnxruntime and numpy alone: python examples/onnx_numpy.py BUNDLE [PROMPT]

For a model whose tokens are bytes, as the default one's are; another needs its tokenizer.json.
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
options.log_severity_level = (
    3  # else it says at every step that keys and values are copied, as they are without IOBinding
)
sessions = {name: onnxruntime.InferenceSession(folder / g["file"], options) for name, g in entry["graphs"].items()}
past = [one["name"] for one in entry["graphs"]["decode"]["inputs"][1:]]
cache = [np.full([1, *t["row_shape"]], t["initial_value"], t["dtype"]) for t in manifest["cache"]]


def run(program: str, **inputs: np.ndarray) -> np.ndarray:
    """Logits; the cache goes on."""
    logits, *cache[:] = sessions[program].run(None, inputs | dict(zip(past, cache, strict=True)))
    return logits


tokens, length = np.frombuffer(prompt.encode(), np.uint8), entry["limits"]["max_length"]
for start in range(0, len(tokens), length):  # calls of one length, the last of them padded
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
