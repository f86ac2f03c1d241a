"""kernels/biased.py: attention with a learned number added to every score, for T5.    [T5] 2.1

    softmax(q kᵀ + bias) v        bias (1, H, T, S), one number for head h, query i and key j

T5 knows positions by it: the number depends on the distance j - i alone. Near distances have a
number each, far ones share one (a bucket), on a logarithmic scale up to `furthest`:

    32 buckets, one way:    distance back   0 1 2 ... 15 | 16-18 19-20 ... 113 and more
                            bucket          0 1 2 ... 15 |   16    17  ...     31
    both ways: 16 buckets for the keys before the query, 16 for those behind it

Scores are not divided by sqrt(D): T5 was trained without it.

Why there is no kernel here. kernels/attention.py takes a mask as a rule of positions, which the
kernel compiles: a yes or no, without data. A bias is data, H numbers a bucket, and would add a
lookup to the kernel's inner loop and a sum over all scores to its backward. What it would save is
the matrix of scores in memory, which is small: BLIP-2 shows a T5 32 image vectors and a few words.
So this is the specification, and PyTorch's own operation runs it on every device. T5's
cross-attention has no bias and goes through kernels/attention.py.
"""

import math

import torch
import torch.nn.functional as F

from kernels.checkpoint import keep_output


def bucket(distance, buckets, furthest, both_ways):
    """Which bucket a distance (key - query; int64, any shape) falls into. Not both ways: all keys
    behind the query count as distance 0, and are hidden."""
    first = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        first = buckets * (distance > 0)
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    near = buckets // 2                             # below it a bucket a distance
    # log(0) is -inf, and is not taken
    share = torch.log(distance.float() / near) / math.log(furthest / near)
    far = near + (share * (buckets - near)).clamp(min=0).long()
    return first + torch.where(distance < near, distance, far.clamp(max=buckets - 1))


def distance_bias(table, T, S, furthest, both_ways):
    """The bias (1, H, T, S) of the last T of S positions to all S. table (buckets, H). Not both
    ways: keys behind the query are hidden."""
    query = torch.arange(S - T, S, device=table.device)[:, None]
    distance = torch.arange(S, device=table.device)[None, :] - query        # (T, S)
    bias = table[bucket(distance, len(table), furthest, both_ways)]         # (T, S, H)
    if not both_ways:
        bias = bias.masked_fill((distance > 0)[:, :, None], torch.finfo(bias.dtype).min)
    return bias.permute(2, 0, 1)[None]


def hide_padding(bias, attention_mask):
    """The bias (1, H, T, S) with keys hidden where attention_mask (B, S) is False; None: nowhere.
    -> (B, H, T, S)"""
    if attention_mask is None:
        return bias
    return bias.masked_fill(~attention_mask[:, None, None, :], torch.finfo(bias.dtype).min)


def biased_attention(q, k, v, bias):
    """q (B, T, H, D), k and v (B, S, H, D), bias (B or 1, H, T, S) -> (B, T, H, D)."""
    # what is kept for backward knows q, k and v: a bias that trains needs the plain function
    return plain_attention(q, k, v, bias) if bias.requires_grad else kept_attention(q, k, v, bias)


def plain_attention(q, k, v, bias):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))                        # (B, H, length, D)
    bias = bias.to(q.dtype)                         # autocast makes q smaller, and not the bias
    return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0).transpose(1, 2)


kept_attention = keep_output(plain_attention)       # kernels/checkpoint.py must know it
