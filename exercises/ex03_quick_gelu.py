"""Exercise 3: QuickGELU, and why it matters.

Between the two matrices of an MLP stands a function of single numbers. OpenAI's CLIP was trained
with QuickGELU, x times the sigmoid of 1.702 x. It is close to GELU, x times the probability that
a normal number is below x: the two differ by at most 0.02.

A CLIP that is run with GELU loads without an error and returns features of the right shape. They
are not the features that it was trained to give: each block adds its own small difference. When
your function is right, the check says how far the toy's tower moves with the wrong one.

    python -m exercises 3
"""


def quick_gelu(x):
    """x, any shape -> the same shape."""
    raise NotImplementedError
