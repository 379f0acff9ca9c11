"""A prefill on a GPU: new tokens of every row, from any position, through a layer.

    module         operator         computes
    norms.py       timestep_norm    TimestepNorm of every token, from its running statistics
    ema.py         ema_scan         CEMA as a scan over segments of tokens, then RMSNorm
    attention.py   attend_chunks    attention inside chunks, times silu(r); new keys and values into the ring
    layer.py                        a layer of these; its matrix products are torch's, the GPU's own library

Every module holds its reference in plain PyTorch (`*_reference`), its kernels (`megalodon_*`) and its launch, a torch
operator with the reference's signature. A row of the batch has its own length: what lies at or beyond it changes no
state, and gives zeros where a result is read again. Letters are those of the model; a suffix _P is a size padded to a
power of two, as Triton's tiles need.
"""

WIDE_DIM = 2048  # features from which on longer segments, and more groups in a program, still fill a GPU
