"""Exercise 12: attention over tiles of keys, as flash attention does it.

The softmax of a row needs its maximum and its sum before the first weight is known. Flash
attention has only a tile of keys at a time. Of the tiles so far it keeps three things, and when a
later tile has a larger score, it corrects them by alpha = exp(m - m'):

    m    (T, 1)  the largest score            starts at -inf    m' = max(m, max of the tile's s)
    l    (T, 1)  the sum of exp(s - m)        starts at 0       l' = alpha l + sum exp(s - m')
    acc  (T, D)  the sum of exp(s - m) v      starts at 0       acc' = alpha acc + exp(s - m') v

The check calls `fold` once for each tile, from these starts on, so no call sees two tiles. At the
end out = acc / l, and lse = m + log l, the natural logarithm (the kernel's is to base 2). Backward
needs lse, one number a row: from it, q and k each weight is computed again, exp(s - lse).

    python -m exercises 12
"""


def fold(q, k, v, m, l, acc):
    """q (T, D); k, v (S, D), one tile; m, l (T, 1), acc (T, D) of the tiles before -> m, l, acc.
    s = q k / sqrt(D), no mask. Scores may be large: exp of one alone would overflow."""
    raise NotImplementedError


def finish(m, l, acc):
    """m, l (T, 1), acc (T, D) after the last tile -> out (T, D), lse (T, 1)."""
    raise NotImplementedError
