"""kernels/spans.py: where the Q-Former's masks are True, so that kernels/attention.py skips tiles.

The rules are in qformer.py: itc, itg (itm sees everything, as `full`). The first n positions are
queries, the others text. For a block of positions lo .. hi-1 each function returns first, last,
inner, outer as kernels/attention.py explains them: nothing outside first .. last-1 is seen by any
of the block, everything in inner .. outer-1 by all of it. Plain arithmetic and `if`: the kernel
compiles these functions too.
"""


def itc_span(lo, hi, n, end):
    first, last = n if lo >= n else 0, n if hi <= n else end
    return first, last, first, (last if (lo >= n) | (hi <= n) else 0)


def itg_keys(lo, hi, n, end):
    return 0, (hi if hi > n else n), 0, (lo + 1 if lo >= n else n)


def itg_queries(lo, hi, n, end):
    return (0 if lo < n else lo), end, (0 if hi <= n else hi - 1), end
