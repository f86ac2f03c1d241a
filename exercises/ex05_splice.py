"""Exercise 5: put the vectors of a picture between those of the words.

In a row of ids a picture is one number, IMAGE (-200). The language model never sees it: in its
place stand the P vectors that the projector made of the picture. The row grows from T to
T - 1 + P, and so do its labels, or they would belong to other tokens from there on.

    ids      USER : IMAGE what ? A cat          labels   . . .     . . A cat
    row      USER : p1 p2 p3 what ? A cat       labels   . . . . . . . A cat

A row may hold several pictures, each with a length of its own, or none. What a picture says has
no loss: its labels are IGNORE (-100).

    python -m exercises 5
"""
from data import IGNORE, IMAGE  # noqa: F401


def splice(ids, text_embeds, image_embeds, labels):
    """ids (T), text_embeds (T, C), image_embeds [(P_i, C)] in order, labels (T)
    -> the row (T', C), its labels (T'). text_embeds has any values where an IMAGE stands."""
    raise NotImplementedError
