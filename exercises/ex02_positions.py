"""Exercise 2: put the class token in front of the patches, and add the positions.

Attention does not know where a vector stands: it gives the same result for the patches in any
order. So each place of the row has a learned vector of its own, which is added. In front of the
patches stands one more learned vector, the class token. It belongs to no patch; CLIP reads the
whole picture there. LLaVA does not: it reads the patches behind it.

    patches (B, P, C),  cls (C),  position (1 + P, C)  ->  (B, 1 + P, C)

Row 0 of `position` belongs to the class token, row 1 to the first patch.

    python -m exercises 2
"""


def add_positions(patches, cls, position):
    """patches (B, P, C), cls (C), position (1 + P, C) -> (B, 1 + P, C)."""
    raise NotImplementedError
