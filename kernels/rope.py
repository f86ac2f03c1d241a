"""kernels/rope.py: positions as rotations, so that q · k depends on the distance alone.

Channel pair m of D/2 turns by position · θₘ, θₘ = base^(-2m/D):         [RoPE] 2104.09864

    y₁ = x₁ cos - x₂ sin
    y₂ = x₂ cos + x₁ sin

Which channels are a pair is a convention. For D = 8:
    half-split (Hugging Face, here)    (0,4) (1,5) (2,6) (3,7)
    interleaved (the paper, Meta)      (0,1) (2,3) (4,5) (6,7)
The same model under the other convention is garbage, without an error: the rows of q and k differ
by a fixed permutation.

A model is stretched to a longer context by turning more slowly:
    linear   all pairs by 1/factor (Vicuna-16k)
    llama3   pairs that turn fewer than `low` times in the old context by 1/factor, those that turn
             more than `high` times not at all, in between a blend (Llama-3.1, [Llama3] 2407.21783)
"""

import math

import torch


def rope_table(positions, dim, base, scaling=None):
    """cos and sin (..., dim/2) in fp32 for positions (...).

    scaling: None, ("linear", factor) or ("llama3", factor, low, high, old context)."""
    # 1 / base^x and base^(-x) differ in the last bit; this is how the official tables are made
    theta = 1 / base ** (torch.arange(0, dim, 2, device=positions.device).float() / dim)
    if scaling and scaling[0] == "linear":
        theta = theta / scaling[1]
    elif scaling:
        _, factor, low, high, context = scaling
        turns = context * theta / (2 * math.pi)             # of each pair, in the old context
        fast = ((turns - low) / (high - low)).clamp(0, 1)   # 0: stretched, 1: left as it was
        theta = (1 - fast) * theta / factor + fast * theta
    angle = positions[..., None].float() * theta
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """x (B, T, H, D) turned by cos, sin (B or 1, T, D/2); returns x's dtype."""
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
