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

`layer.py` chains a layer's operators. `linear`, `project` and `up_projection` each have two kernels: one of the GEMV
path and one of the GEMM path, which run for these batches:

    x           weights     GEMV      GEMM, `fragments.py`    GEMM, tiles in shared memory
    bfloat16    bfloat16    1         2 to 16                 17 and more
    bfloat16    int8                  1 to 16                 17 and more
    bfloat16    int4                  all
    float32     any         1 to 4                            5 and more

Sizes that do not fit `fragments.py` (rows of less than whole 16 bytes) take the paths of float32. `gemv.py`, `gemm.py`
and `fragments.py` hold what the kernels of a path share. Weights may be floats, int8 or int4 (`weights.py`). Every
module holds its reference in plain PyTorch (`*_reference`), its kernels (`megalodon_*`) and its launch, a torch
operator with the reference's signature.

Rules of these kernels:
- They are batch-invariant: rows of a batch never meet, and every sum has one order. Between the batches 1, 2 to 8, 9 to
  16 and 17 (int4: 17 and more), orders differ.
- Issue all loads that follow `grid_dependency_wait` before the first reduction: the reduction's barrier blocks
  reordering, and every further trip to memory shows in the step's time.
- Letters are those of the model: B rows of the batch, D features, H heads, C slots of the ring, Z, E = H dv, F hidden
  features, N modes of the EMA, G groups. A suffix _P is a size padded to a power of two, as Triton's tiles need.
"""
