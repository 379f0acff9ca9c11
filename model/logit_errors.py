"""Why a row of logits cannot be sampled: one int64 code a row, written by every sampler and by decode programs.

    code    meaning
    0       the row can be sampled
    n > 0   n of its logits are NaN
    -1      POSITIVE_INFINITY: at least one logit is +inf
    -2      ALL_MASKED: every logit is -inf

NaN comes first: a row with NaN and +inf has a positive code. The C++ library has the same codes.
"""

POSITIVE_INFINITY = -1
ALL_MASKED = -2
