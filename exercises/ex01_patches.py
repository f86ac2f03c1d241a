"""Exercise 1: cut a picture into patches, and make one vector of each.

A vision transformer does not slide over the picture. It cuts it into squares of p x p pixels, and
one matrix turns the 3 * p * p numbers of a square into C numbers. From here on the picture is a
row of P = (S // p) ** 2 vectors, as a text is a row of token vectors.

    pixels (B, 3, S, S)  ->  patches (B, P, 3 * p * p)  ->  vectors (B, P, C)

Patches come in reading order: the first row from left to right, then the second. Inside a patch
the numbers are in the order of `weight`: colour, row, column. Pixels at the right and at the
bottom that do not fill a patch are not used.

    python -m exercises 1
"""


def embed_patches(pixels, weight):
    """pixels (B, 3, S, S), weight (C, 3, p, p) -> (B, P, C). There is no bias."""
    raise NotImplementedError
