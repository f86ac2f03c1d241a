"""Exercise 11: what a token weighs when samples are packed.

Officially a step's loss is a mean of means: the samples are split into groups (one a GPU, so many
in a row), the loss of a group is the mean over all its tokens with loss, and the step's loss is
the mean over the groups. Samples packed into rows of another length would be grouped otherwise and
learn something else. So each token gets a weight, and the step's loss is the plain sum of
weight * loss, however the samples are cut into rows:

    3 + 1 tokens in the first group, 2 + 2 in the second:   1/8, 1/8, 1/8, 1/8
    3 + 1 and 2 + 0:                                        1/8, 1/8, 1/4, 1/4

A group without any token with loss weighs nothing: 0.

    python -m exercises 11
"""


def token_weights(learned, groups):
    """learned: tokens with loss of each sample, a list; groups: how many, they divide its length
    -> a list: the weight of one token of each sample."""
    raise NotImplementedError
