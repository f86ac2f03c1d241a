"""Exercise 7: one step of decoding with a KV cache.

A new token attends to all tokens before it and to itself. Their keys and values do not change, so
they are kept in a buffer that was taken once, and a step computes those of the new token only:

    k_cache  [k0 k1 k2 .. .. ..]   length = 3: three rows are written, the rest is memory
    k        [k3]                  goes into row 3; then q3 attends to rows 0 to 3

What stands behind the written rows is left over from something else: it must not be seen.

    python -m exercises 7
"""


def cache_step(q, k, v, k_cache, v_cache, length):
    """q, k, v (B, 1, H, D) of the new token; k_cache, v_cache (B, capacity, H, D), of which
    `length` rows are written. Writes k and v into the caches, and returns the attention's output
    (B, 1, H, D): softmax(q k / sqrt(D)) v, each head by itself."""
    raise NotImplementedError
