"""kernels/cached.py: the attention of a decoder's layer, with or without a KV cache.

    no cache                        attention           a whole row: training
    a cache, several tokens         attention           the prompt
    a cache, one token, no_grad     decode              a kernel of its own for one query
    its length on the GPU           decode              inside a CUDA graph

The cache is a llama.KVCache: .update stores keys and values and returns all so far, .length is
their number or, inside a CUDA graph, .end (B,) on the device.
"""

import torch

from kernels.attention import attention, causal, sliding_window
from kernels.checkpoint import keep_output
from kernels.decode import decode

# checkpoint.py must know attention: it may keep its output instead of running it again
attention = keep_output(attention)


def mask_rule(window, S):
    """(rule, n) of causal attention over S keys of which a query sees the last `window`."""
    if window is None or S <= window:
        return causal, 0                        # inside the window the mask is causal
    return sliding_window, window


def self_attention(q, k, v, window=None, cache=None, layer=0, attention_mask=None, doc_spans=None):
    """q (B, T, H, D), k and v (B, T, G, D) of the new tokens -> (B, T, H, D), causal.

    window: keys that a query sees, its own included; None: all before it. With a cache its own
    mask counts, else attention_mask (B, T) bool. doc_spans: kernels.attention.document_spans."""
    start = 0
    if cache is not None:
        start = cache.length                    # before this call's tokens
        k, v = cache.update(layer, k, v)        # (B, S, G, D)
        attention_mask = cache.attention_mask
        if attention_mask is not None:
            attention_mask = attention_mask[:, :k.shape[1]]
    allow, n = mask_rule(window, k.shape[1])
    if cache is not None and cache.end is not None:
        return decode(q, k, v, attention_mask, cache.end, allow=allow, n=n)
    if cache is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
        return decode(q, k, v, attention_mask, allow=allow, n=n)
    return attention(q, k, v, allow, n, start, attention_mask, doc_spans)
