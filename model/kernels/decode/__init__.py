"""One decode step on a GPU: each weight and each valid slot of the ring cache is read once.

    module               operator        computes
    embedding.py         embed_tokens    the token's embedding, cos and sin of its position
    ema.py               ema_step        TimestepNorm, CEMA, what RMSNorm needs             a layer
    projections.py       project         z, r, h1; v into the ring                          a layer
    attention.py         attend          attention over the ring, times r                   a layer
    linear.py            linear          h = wh2 gated + h1 + x; alpha fc2 hidden + x       a layer; the head
    up_projection.py     up_projection   LayerNorm, fc1 (fc3), silu                         a layer
    final_norm.py        final_norm      TimestepNorm; the position moves on
    argmax.py            argmax          the most probable token of each row

`layer.py` chains a layer's operators. `linear`, `project` and `up_projection` each have two kernels: one of the
GEMV path for up to MAX_GEMV_BATCH rows, one of the GEMM path above. `gemv.py` and `gemm.py` hold what the kernels of a
path share, and the two kernels of `linear`. Weights may be floats, int8 or int4
(`weights.py`). Every module holds its reference in plain PyTorch (`*_reference`), its kernels (`megalodon_*`) and its
launch, a torch operator with the reference's signature.

Rules of these kernels:
- They are batch-invariant: rows of a batch never meet, and every sum has one order.
- Issue all loads that follow `grid_dependency_wait` before the first reduction: the reduction's barrier blocks
  reordering, and every further trip to memory shows in the step's time.
- Letters are those of the model: B rows of the batch, D features, H heads, C slots of the ring, Z, E = H dv, F hidden
  features, N modes of the EMA, G groups. A suffix _P is a size padded to a power of two, as Triton's tiles need.
"""
