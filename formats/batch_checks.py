"""formats/batch_checks.py: do the pictures, the texts and the labels of a batch belong together?

projector.py asks these questions before it computes anything. Every answer "no" is a BadData that
says both numbers.
"""

from formats.errors import BadData


def check_image_count(in_text, given):
    """in_text: <image> tokens in the ids; given: pictures beside them."""
    if in_text != given:
        raise BadData(f"{in_text} <image> places in the text, but {given} pictures given; give one "
                      "picture for each place")


def check_tile_count(given, counts, sizes):
    """given: tiles; counts: tiles that pictures of these sizes [(width, height)] are cut into."""
    if given != sum(counts):
        raise BadData(f"{given} tiles given, but pictures of sizes {sizes} have {sum(counts)}; "
                      "give sizes=[(width, height)] of every picture")


def check_labels(has_loss):
    """has_loss (B, T) bool: the tokens with loss."""
    if not has_loss.any():
        raise BadData("a batch has nothing to train on: every label is masked; look at it with "
                      "--show-batch")
