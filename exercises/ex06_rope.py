"""Exercise 6: rotary positions.

LLaMA adds no position vectors. It turns each query and key by an angle that grows with its
position, so that their product depends on the distance between the two alone.

The D channels of a head are D / 2 pairs; pair m is (x[m], x[m + D / 2]), the two halves of the
head. At position t it turns by t * base ** (-2 * m / D):

    y[m]         = x[m] * cos - x[m + D / 2] * sin
    y[m + D / 2] = x[m + D / 2] * cos + x[m] * sin

The paper's own code pairs neighbours, (0, 1), (2, 3) ... With weights made for the halves, that
gives nonsense and no error.

    python -m exercises 6
"""


def rope(x, position_ids, base):
    """x (B, T, H, D), position_ids (B, T) -> (B, T, H, D)."""
    raise NotImplementedError
