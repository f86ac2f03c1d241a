"""kernels/norm.py: keep every row at one length, or every token drifts.

    RMSNorm     y = x / √(mean(x²) + ε) · w                        [RMSNorm] 1910.07467
    LayerNorm   y = (x - mean x) / √(var x + ε) · w + b            [LayerNorm] 1607.06450
"""

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps):
    """x (..., C), weight (C,) -> (..., C) in x's dtype; the mean of squares is taken in fp32."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)           # quirk: LLaMA rounds to x's dtype before the weight


def layer_norm(x, weight, bias, eps):
    """x (..., C), weight and bias (C,) -> (..., C)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
