"""Exercise 9: image-text contrast, with the best of the queries.

BLIP-2 has Q vectors of a picture and one of its text, all of length 1. A text fits a picture as
well as it fits the best of the picture's queries: the largest of Q cosines. That makes a (B, B)
matrix of scores, divided by a temperature: row i is picture i with all texts.

In each row the right text is to be found, in each column the right picture: two cross-entropies
over the batch; the loss is their mean. The target is smoothed: the right one has 1 - 0.1 and all
B share 0.1.

    python -m exercises 9
"""


def itc_loss(image, text, temp):
    """image (B, Q, E), text (B, E), unit vectors; temp a number -> a scalar."""
    raise NotImplementedError
