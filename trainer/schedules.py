"""TODO"""

import math


def cosine(step, steps, warmup):
    """Linear warm-up over ceil(warmup · steps), or `warmup` from 1 on, then half a cosine to 0. The
    first update is 0, as in the official runs."""
    warm = warmup if warmup >= 1 else math.ceil(warmup * steps)
    if step < warm:
        return step / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def lr_schedule(row, steps):
    """step -> multiple of the peak learning rate, of a recipe's row.

    llava       `cosine`
    lavis       quirk: the rate stands still within an epoch, and only the first one warms up:
                after 5,000 steps at the latest it stays at the peak until epoch 1
    minigpt4    quirk: the cosine counts the steps of the warm-up too, so that after it the rate
                falls at once to where the cosine has got to meanwhile"""
    if row.schedule == "llava":
        return lambda step: cosine(step, steps, row.warmup)
    warm = row.warmup if row.warmup >= 1 else math.ceil(row.warmup * steps)
    low, start = row.min_lr / row.lr, row.warm_lr / row.lr
    epoch = math.ceil(steps / row.epochs) if row.schedule == "lavis" else 1
    ends = row.epochs if row.schedule == "lavis" else steps

    def factor(step):
        if step < warm and (row.schedule == "minigpt4" or step < epoch):
            return start + (1 - start) * step / warm
        return low + (1 - low) * (1 + math.cos(math.pi * (step // epoch) / ends)) / 2
    return factor
