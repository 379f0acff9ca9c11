"""A weight times up to 32 rows on the tensor cores, without shared memory: weights go from memory into the registers
that multiply them.

A tensor core takes a tile of 16 output features and 16 columns in which each of a warp's 32 threads holds certain
numbers: thread 4 g + c those of features g and g + 8, and of four columns. Which columns does not matter, as long as
the weight and x agree. So each thread takes 16 consecutive bytes of a weight's row, with one load, and the same columns
of x. int8 and int4 become bfloat16 in registers, two numbers with each instruction. The warps of a Triton program share
the columns, and their sums meet once, at the end.

A program asks for its first weights before it waits for the kernel in front of it.

Names in this module: a "word" is 32 bits; a "part" is what a warp's threads take of a row with one load each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import TRITON_VERSION, grid_dependency_wait
from .weights import eight_nibbles, four_bytes, load_output_features, stored_columns, two_floats

# Consecutive columns of one thread in a fragment, as the compiler arranges them. With another number, operands are
# shuffled between threads: slower, equally right.
_FLOAT_RUN = tl.constexpr(4 if TRITON_VERSION < (3, 7) else 2)
_INTEGER_RUN = tl.constexpr(4)
_PARTS = {0: 4, 8: 2, 4: 2}  # of a weight's row that a warp takes in one step


def fragments_fit(weight: Tensor, columns: int, group: int) -> bool:
    """Whether rows of a stored weight are whole words, and int4's groups whole parts."""
    whole_rows = weight.shape[1] * weight.element_size() % 16 == 0 and columns % 16 == 0
    return whole_rows and (group == 0 or (group % 16 == 0 and columns // 2 % group == 0))


def fragment_sizes(bits: int, group: int, features: int, columns: int, rows: int) -> dict[str, int | bool]:
    """Tile sizes of `fragment_product` for ROWS rows of the batch; measured on an H200 for 1,024 to 11,264 columns.

    SPLIT_K warps share the columns. K_TILE columns go through a warp at once (bytes for int4), STAGES such tiles are
    asked for ahead. Wide weights have programs enough; others need more warps and longer loads for each of theirs.
    """
    wide, long, short = features >= 8192, columns > 4096, columns <= 2560
    feature_tile, warps, parts, stages = 16, 8 if long else 4, _PARTS[bits], 2
    if bits == 0 and rows == 8:
        stages = 2 if short else 1
    elif bits == 0:
        feature_tile, warps, parts = (32, 4, 2) if wide and not long else (16, 4, 4)
    elif rows == 8:
        feature_tile = 32 if features >= 4096 and not long else 16
    elif rows == 16:
        warps, parts, stages = 4, 4 if long else 2, 2 if short else 1
        feature_tile = 32 if features >= 4096 and not long and (short or bits == 4) else 16
    else:
        warps, stages = 4, 1
    part = part_columns(bits, group)
    while parts > 1 and stored_columns(columns, {"BITS": bits}) % (warps * parts * part):
        parts //= 2
    sizes = {"FEATURES": feature_tile, "ROWS": rows, "K_TILE": parts * part, "SPLIT_K": warps, "STAGES": stages}
    return {**sizes, "FRAGMENTS": True, "IEEE": False, "num_warps": warps}


def part_columns(bits: int, group: int) -> int:
    """Columns of one part: those that four threads take. The kernels below derive the same from BITS and GROUP.

    For int4 they are bytes, and lie inside a group.
    """
    if bits == 4:
        return 32 if group % 32 == 0 else 16
    return 64 if bits == 8 else 32


# A tile's numbers lie in one long dimension, whose fastest bits are the thread of a warp, then come warps, parts of a
# row and further rows. The compiler gives consecutive indices to consecutive threads, so this is what each one holds.
@triton.jit
def _part(n, WARPS: tl.constexpr, PARTS: tl.constexpr):
    """The part of a row that index n stands for: each warp's parts are neighbours."""
    return (n // 32 % WARPS) * PARTS + n // (32 * WARPS) % PARTS


@triton.jit
def weight_words(WORDS: tl.constexpr, FEATURES: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr):
    """(feature, word) of a weight's tile, each (FEATURES / 8 * PARTS * WARPS * 32, 1 or WORDS), WORDS a thread."""
    n = tl.arange(0, FEATURES // 8 * PARTS * WARPS * 32)[:, None]
    feature = n // (32 * WARPS * PARTS) * 8 + n // 4 % 8
    return feature, (_part(n, WARPS, PARTS) * 4 + n % 4) * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def row_words(COLUMNS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr):
    """(row, word) of a tile of x in bfloat16, COLUMNS a thread: loads of up to four words."""
    WORDS: tl.constexpr = 4 if COLUMNS >= 8 else COLUMNS // 2
    LOADS: tl.constexpr = COLUMNS // 2 // WORDS
    n = tl.arange(0, ROWS // 8 * LOADS * PARTS * WARPS * 32)[:, None]
    row = n // (32 * WARPS * PARTS * LOADS) * 8 + n // 4 % 8
    load = n // (32 * WARPS * PARTS) % LOADS
    return row, ((_part(n, WARPS, PARTS) * 4 + n % 4) * LOADS + load) * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def weight_fragment(
    weight,
    COLUMNS: tl.constexpr, FEATURES: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """A tile in bfloat16 as the first operand of a product: a matrix for each warp, or with GROUPED for each part."""
    weight = tl.reshape(weight, (FEATURES // 8, PARTS, WARPS, 8, 4, COLUMNS // RUN, RUN))
    if GROUPED:
        weight = tl.reshape(tl.permute(weight, (1, 2, 0, 3, 5, 4, 6)), (PARTS * WARPS, FEATURES, 4 * COLUMNS))
    else:
        weight = tl.reshape(tl.permute(weight, (2, 0, 3, 1, 5, 4, 6)), (WARPS, FEATURES, PARTS * 4 * COLUMNS))
    return weight


@triton.jit
def row_fragment(
    words,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """Words of x as the second operand of a product."""
    LOADED: tl.constexpr = 8 if COLUMNS >= 8 else COLUMNS
    x = tl.reshape(two_floats(words), (ROWS // 8, COLUMNS // LOADED, PARTS, WARPS, 8, 4, LOADED // RUN, RUN))
    if GROUPED:
        x = tl.reshape(tl.permute(x, (2, 3, 1, 6, 5, 7, 0, 4)), (PARTS * WARPS, 4 * COLUMNS, ROWS))
    else:
        x = tl.reshape(tl.permute(x, (3, 2, 1, 6, 5, 7, 0, 4)), (WARPS, PARTS * 4 * COLUMNS, ROWS))
    return x


@triton.jit
def scale_fragment(
    scale, FEATURES: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """int4's scales of a tile, where the sums of each part's product are."""
    scale = tl.reshape(scale, (FEATURES // 8, WARPS, 8, 4, PARTS))[:, :, :, :, :, None, None]
    scale = tl.broadcast_to(scale, (FEATURES // 8, WARPS, 8, 4, PARTS, ROWS // 8, 2))
    return tl.reshape(tl.permute(scale, (4, 1, 0, 2, 5, 3, 6)), (PARTS * WARPS, FEATURES, ROWS))


@triton.jit
def _load_step(
    at, ok, word, step,
    ROW: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, MASKED: tl.constexpr, CERTAIN: tl.constexpr,
):  # fmt: skip
    """Words of a step, from where `at` points to in it. Zeros beyond the last step, unless it is CERTAIN to exist.

    With MASKED, also where `ok` is false or a row has ended.
    """
    if MASKED:
        loaded = tl.load(at, mask=ok & (word + step * STEP < ROW), other=0)
    elif CERTAIN:
        loaded = tl.load(at)
    else:
        loaded = tl.load(at, mask=step < STEPS, other=0)
    return loaded


@triton.jit
def _weight_places(
    weight_ptr, first_feature,
    OUT: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr, FEATURES: tl.constexpr, WARPS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Pointers to a tile's words in the first step, whether their features exist, and their places in a row."""
    feature, word = weight_words(WORDS, FEATURES, WARPS, PARTS)
    words = weight_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + first_feature.to(tl.int64) * ROW
    return words + feature * ROW + word, first_feature + feature < OUT, word


@triton.jit
def _row_places(
    x_ptr, first_row, B,
    K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The same of x."""
    row, word = row_words(COLUMNS, ROWS, WARPS, PARTS)
    words = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return words + (first_row + row) * (K // 2) + word, first_row + row < B, word


@triton.jit
def _load_rows(at, ok, word, step, ROW: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr):
    """Words of x in a step; with RAGGED, zeros where a row has ended."""
    if RAGGED:
        ok = ok & (word + step * STEP < ROW)
    return tl.load(at, mask=ok, other=0)


@triton.jit
def _multiply(
    weight, x, sums,
    BITS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, WARPS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One step: `sums` and the product of its words of the weight and of x."""
    RUN: tl.constexpr = _INTEGER_RUN if BITS == 8 else _FLOAT_RUN
    numbers = four_bytes(weight) if BITS == 8 else two_floats(weight)
    numbers = weight_fragment(numbers, COLUMNS, FEATURES, WARPS, PARTS, RUN, False)
    return tl.dot(numbers, row_fragment(x, COLUMNS, ROWS, WARPS, PARTS, RUN, False), sums)


@triton.jit
def fragment_product(
    x_ptr, weight_ptr, scale_ptr,
    first_feature, first_row, B,
    OUT: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """FEATURES output features of a weight times ROWS rows of x (B, K) bfloat16: (FEATURES, ROWS) float32.

    The weight is in bfloat16 or int8. Words of the next step, with STAGES = 2 of the one after it as well, are on
    their way while a step is multiplied.
    """
    COLUMNS: tl.constexpr = 16 if BITS == 8 else 8  # of a thread, in one part
    PARTS: tl.constexpr = K_TILE // (4 * COLUMNS)
    ROW: tl.constexpr = K // 4 if BITS == 8 else K // 2  # words
    STEP: tl.constexpr = SPLIT_K * PARTS * 16
    STEPS: tl.constexpr = (ROW + STEP - 1) // STEP
    X_STEP: tl.constexpr = SPLIT_K * PARTS * 2 * COLUMNS
    RAGGED: tl.constexpr = ROW % STEP != 0
    MASKED: tl.constexpr = RAGGED or OUT % FEATURES != 0
    weight_at, ok, word = _weight_places(weight_ptr, first_feature, OUT, ROW, 4, FEATURES, SPLIT_K, PARTS)
    weight = _load_step(weight_at, ok, word, 0, ROW, STEP, STEPS, MASKED, True)
    second = weight
    if STAGES == 2:
        second = _load_step(weight_at + STEP, ok, word, 1, ROW, STEP, STEPS, MASKED, False)
    x_at, x_ok, x_word = _row_places(x_ptr, first_row, B, K, COLUMNS, ROWS, SPLIT_K, PARTS)
    grid_dependency_wait(PDL)
    x = _load_rows(x_at, x_ok, x_word, 0, K // 2, X_STEP, RAGGED)
    sums = tl.zeros((SPLIT_K, FEATURES, ROWS), tl.float32)
    for step in range(1, STEPS):
        weight_at += STEP
        x_at += X_STEP
        next_x = _load_rows(x_at, x_ok, x_word, step, K // 2, X_STEP, RAGGED)
        if STAGES == 2:
            after = _load_step(weight_at + STEP, ok, word, step + 1, ROW, STEP, STEPS, MASKED, False)
        else:
            second = _load_step(weight_at, ok, word, step, ROW, STEP, STEPS, MASKED, True)
        sums = _multiply(weight, x, sums, BITS, COLUMNS, ROWS, FEATURES, SPLIT_K, PARTS)
        weight, x = second, next_x
        if STAGES == 2:
            second = after
    y = tl.sum(_multiply(weight, x, sums, BITS, COLUMNS, ROWS, FEATURES, SPLIT_K, PARTS), 0)
    if BITS == 8:
        y *= load_output_features(scale_ptr, first_feature + tl.arange(0, FEATURES), OUT)[:, None]
    return y


@triton.jit
def _multiply_groups(
    weight, low_x, high_x, low_scale, high_scale, sums,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One step of int4: `sums` and the products of its parts, each times the scale of its group."""
    low, high = eight_nibbles(weight)
    low = weight_fragment(low, COLUMNS, FEATURES, WARPS, PARTS, _INTEGER_RUN, True)
    high = weight_fragment(high, COLUMNS, FEATURES, WARPS, PARTS, _INTEGER_RUN, True)
    low_x = row_fragment(low_x, COLUMNS, ROWS, WARPS, PARTS, _INTEGER_RUN, True)
    high_x = row_fragment(high_x, COLUMNS, ROWS, WARPS, PARTS, _INTEGER_RUN, True)
    sums += tl.dot(low, low_x) * scale_fragment(low_scale, FEATURES, ROWS, WARPS, PARTS)
    return sums + tl.dot(high, high_x) * scale_fragment(high_scale, FEATURES, ROWS, WARPS, PARTS)


@triton.jit
def _load_scales(
    scale_ptr, first_feature, step,
    OUT: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, FEATURES: tl.constexpr,
    WARPS: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """int4's scales of a step, of the low and of the high half of K: (FEATURES / 8 * WARPS * 32, PARTS) each."""
    n = tl.arange(0, FEATURES // 8 * WARPS * 32)[:, None]
    feature = n // (32 * WARPS) * 8 + n // 4 % 8
    column = (step * WARPS * PARTS + n // 32 % WARPS * PARTS + tl.arange(0, PARTS)[None, :]) * PART
    at = scale_ptr + first_feature.to(tl.int64) * (2 * HALF // GROUP) + feature * (2 * HALF // GROUP) + column // GROUP
    if MASKED:
        ok = (first_feature + feature < OUT) & (column < HALF)
        low, high = tl.load(at, mask=ok, other=0), tl.load(at + HALF // GROUP, mask=ok, other=0)
    else:
        low, high = tl.load(at), tl.load(at + HALF // GROUP)
    return low, high


@triton.jit
def grouped_fragment_product(
    x_ptr, weight_ptr, scale_ptr,
    first_feature, first_row, B,
    OUT: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`fragment_product` of int4: a byte meets a column of each half of x, and a part lies in one group of each."""
    COLUMNS: tl.constexpr = 8 if GROUP % 32 == 0 else 4  # of a thread, in one part of one half
    PARTS: tl.constexpr = K_TILE // (4 * COLUMNS)
    HALF: tl.constexpr = K // 2
    ROW: tl.constexpr = K // 8  # words
    STEP: tl.constexpr = SPLIT_K * PARTS * COLUMNS
    STEPS: tl.constexpr = (ROW + STEP - 1) // STEP
    X_STEP: tl.constexpr = 2 * STEP
    RAGGED: tl.constexpr = ROW % STEP != 0
    MASKED: tl.constexpr = RAGGED or OUT % FEATURES != 0
    weight_at, ok, word = _weight_places(weight_ptr, first_feature, OUT, ROW, COLUMNS // 4, FEATURES, SPLIT_K, PARTS)
    weight = _load_step(weight_at, ok, word, 0, ROW, STEP, STEPS, MASKED, True)
    second = weight
    if STAGES == 2:
        second = _load_step(weight_at + STEP, ok, word, 1, ROW, STEP, STEPS, MASKED, False)
    low_scale, high_scale = _load_scales(
        scale_ptr, first_feature, 0, OUT, HALF, GROUP, 4 * COLUMNS, FEATURES, SPLIT_K, PARTS, MASKED
    )
    x_at, x_ok, x_word = _row_places(x_ptr, first_row, B, K, COLUMNS, ROWS, SPLIT_K, PARTS)
    grid_dependency_wait(PDL)
    x = _load_rows(x_at, x_ok, x_word, 0, HALF // 2, X_STEP, RAGGED)
    high_x = _load_rows(x_at + HALF // 2, x_ok, x_word, 0, HALF // 2, X_STEP, RAGGED)
    sums = tl.zeros((SPLIT_K * PARTS, FEATURES, ROWS), tl.float32)
    for step in range(1, STEPS):
        weight_at += STEP
        x_at += X_STEP
        next_x = _load_rows(x_at, x_ok, x_word, step, HALF // 2, X_STEP, RAGGED)
        next_high_x = _load_rows(x_at + HALF // 2, x_ok, x_word, step, HALF // 2, X_STEP, RAGGED)
        if STAGES == 2:
            after = _load_step(weight_at + STEP, ok, word, step + 1, ROW, STEP, STEPS, MASKED, False)
        else:
            second = _load_step(weight_at, ok, word, step, ROW, STEP, STEPS, MASKED, True)
        next_low, next_high = _load_scales(
            scale_ptr, first_feature, step, OUT, HALF, GROUP, 4 * COLUMNS, FEATURES, SPLIT_K, PARTS, MASKED
        )
        sums = _multiply_groups(weight, x, high_x, low_scale, high_scale, sums, COLUMNS, ROWS, FEATURES, SPLIT_K, PARTS)
        weight, x, high_x, low_scale, high_scale = second, next_x, next_high_x, next_low, next_high
        if STAGES == 2:
            second = after
    sums = _multiply_groups(weight, x, high_x, low_scale, high_scale, sums, COLUMNS, ROWS, FEATURES, SPLIT_K, PARTS)
    return tl.sum(sums, 0)
