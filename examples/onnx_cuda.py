"""Write text with a bundle's ONNX graphs with kernels on an NVIDIA GPU: python examples/onnx_cuda.py BUNDLE [PROMPT]

It needs onnxruntime-gpu and numpy, and no torch: `megalodon-export onnx --kernels` has put the kernels into the bundle.
The model's tokens must be bytes, as the default model's are. Other models need their tokenizer.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

DEVICE, PROVIDER = "cuda", "CUDAExecutionProvider"
TYPES = {"float32": (1, np.float32), "int64": (7, np.int64), "bfloat16": (16, np.uint16)}  # of ONNX, of numpy

folder, prompt = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "In the beginning"
manifest = json.loads((folder / "manifest.json").read_text())
entry = manifest["programs"]["onnx"]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(folder / "onnx_kernels.so"))
onnxruntime.preload_dlls()  # CUDA's libraries, from NVIDIA's packages for pip


def open_graph(name: str) -> onnxruntime.InferenceSession:
    """A graph with kernels."""
    return onnxruntime.InferenceSession(folder / f"{name}_kernels.onnx", options, [PROVIDER])


def new_cache() -> list[onnxruntime.OrtValue]:
    """The state of one stream at position 0, on the GPU."""
    rows = [np.full([1, *t["row_shape"]], t["initial_value"], TYPES[t["dtype"]][1]) for t in manifest["cache"]]
    return [onnxruntime.OrtValue.ortvalue_from_numpy(row, DEVICE, 0) for row in rows]


past = [one["name"] for one in entry["graphs"]["decode"]["inputs"][1:]]
present = [one["name"] for one in entry["graphs"]["decode"]["outputs"][1:]]
prefill, decode = open_graph("prefill"), open_graph("decode")
next_tokens = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((2, 1), np.int64), DEVICE, 0)


def bind(session: onnxruntime.InferenceSession, old: list, new: list) -> onnxruntime.IOBinding:
    """A graph bound to the cache: `old` before a run, `new` after it."""
    binding = session.io_binding()
    for names, values, add in ((past, old, binding.bind_input), (present, new, binding.bind_output)):
        for name, value, t in zip(names, values, manifest["cache"], strict=True):
            add(name, DEVICE, 0, TYPES[t["dtype"]][0], [1, *t["row_shape"]], value.data_ptr())
    return binding


cache, other = new_cache(), new_cache()
rings = {i for i, t in enumerate(manifest["cache"]) if "C" in t["dims"]}  # keys and values: updated in place
tokens, length = np.frombuffer(prompt.encode(), np.uint8), entry["limits"]["max_length"]
for start in range(0, len(tokens), length):  # every call has the same length; the last one is padded
    piece = tokens[start : start + length].astype(np.int64)
    other = [cache[i] if i in rings else value for i, value in enumerate(other)]
    binding = bind(prefill, cache, other)
    binding.bind_cpu_input("input_ids", np.pad(piece, (0, length - len(piece)))[None])
    binding.bind_cpu_input("lengths", np.array([len(piece)]))
    binding.bind_output("logits", "cpu")
    prefill.run_with_iobinding(binding)
    cache, other = other, cache
    token = int(binding.get_outputs()[-1].numpy()[0].argmax())
next_tokens.update_inplace(np.array([[token], [0]]))
binding = bind(decode, cache, cache)  # a step reads its token where the step before has written it
binding.bind_input("input_ids", DEVICE, 0, np.int64, [1], next_tokens.data_ptr())
binding.bind_output("next_tokens", DEVICE, 0, np.int64, [2, 1], next_tokens.data_ptr())
binding.bind_output("logits", DEVICE)
sys.stdout.write(prompt)
for _ in range(200):
    if token > 255:  # the end of the text
        break
    sys.stdout.flush()
    sys.stdout.buffer.write(bytes([token]))
    decode.run_with_iobinding(binding)
    token = int(next_tokens.numpy()[0, 0])
