"""The layer on a GPU: Triton kernels behind torch operators, which torch.export traces and AOTInductor compiles.

The plain form in `model/` stays the reference, the form for training, and the one for every other device.
"""

from __future__ import annotations

KERNEL_PREFIX = "megalodon_"  # of every kernel here: by it a captured graph tells those that wait from others
