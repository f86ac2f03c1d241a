"""kernels/cross_entropy.py: the output head and the loss, over supervised rows only.

In instruction tuning perhaps one token in five is trained. Logits for the other four are the
largest tensor of the whole model and nobody reads them, so they are never made:

    rows = labels != IGNORE;   loss = mean( logsumexp(x Wᵀ) - (x Wᵀ)[label] )   over rows
"""

import torch.nn.functional as F


def linear_cross_entropy(x, head, labels, weights=None):
    """Loss of the rows x (N, C) with head (V, C) against labels (N,); a scalar in fp32.

    weights (N,): the sum of weight · loss instead of the mean."""
    logits = F.linear(x, head).float()
    if weights is None:
        return F.cross_entropy(logits, labels)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
