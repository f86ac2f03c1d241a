"""kernels/swiglu.py: the nonlinearities.

    SwiGLU      silu(gate) · up,  silu(x) = x σ(x)             [SwiGLU] 2002.05202
    QuickGELU   x σ(1.702 x)      OpenAI CLIP's: exact GELU loads without an error and is wrong
"""

import torch
import torch.nn.functional as F


def swiglu(gate_up):
    """(..., 2F), gate first -> (..., F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)
