"""Exercise 10: draw wrong pictures and wrong texts that are hard to tell from the right ones.

Image-text matching learns "no" from pairs that do not belong together. Any other text would do,
but most are easy. So they are drawn by their similarity, the softmax of a row of scores, in which
every right column has weight 0 (two pictures may have the same caption: both columns are right).

To draw from weights w with a number u in 0 .. 1: the first column at which the sum of weights so
far is above u times the sum of all. A row in which all columns are right has no wrong one: -1.

    python -m exercises 10
"""
import torch


def hard_negatives(to_text, to_image, same, seed=0):
    """to_text (B, B): my image (row) to all texts; to_image (B, B): my text (row) to all images;
    same (B, B) bool: right columns -> (2, B) columns: first the wrong image of each text, drawn
    from to_image with u[0], then the wrong text of each image, drawn from to_text with u[1]."""
    u = torch.rand(len(same), 2, generator=torch.Generator().manual_seed(seed)).T       # (2, B)
    raise NotImplementedError
