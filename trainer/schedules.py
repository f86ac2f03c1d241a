"""Learning-rate schedules of the published training runs.

Each function below takes (row, steps), a recipe's row (train.Stage) and the number of steps of the
run, and returns a function step -> factor of the row's peak rate `lr`; steps count from 0.

    llava       LLaVA, ShareGPT4V: Hugging Face's cosine with warm-up
    lavis       BLIP-2: LAVIS, LinearWarmupCosineLRScheduler
    minigpt4    MiniGPT-4: its own copy of that class, called once a step
"""

import math


def cosine(step, steps, warmup):
    """Linear warm-up, then half a cosine down to 0. The first update is 0, as in the official runs.

    warmup: a share of the steps, rounded up; from 1 on a number of steps."""
    warm = warmup_steps(steps, warmup)
    if step < warm:
        return step / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def warmup_steps(steps, warmup):
    """`warmup` as a number of steps."""
    if warmup >= 1:
        return warmup
    return math.ceil(warmup * steps)


def llava(row, steps):
    def factor(step):
        return cosine(step, steps, row.warmup)
    return factor


def lavis(row, steps):
    """quirk: the rate changes once an epoch. Warm-up happens only in epoch 0; after it the rate is
    at its peak until epoch 1."""
    warm, epoch = warmup_steps(steps, row.warmup), math.ceil(steps / row.epochs)

    def factor(step):
        if step < warm and step < epoch:
            return rising(row, step, warm)
        return falling(row, step // epoch, row.epochs)
    return factor


def minigpt4(row, steps):
    """quirk: the cosine starts at step 0, so when warm-up ends the rate drops to the cosine's value
    at that step."""
    warm = warmup_steps(steps, row.warmup)

    def factor(step):
        if step < warm:
            return rising(row, step, warm)
        return falling(row, step, steps)
    return factor


def rising(row, done, whole):
    """The factor between warm_lr and lr on a straight line, when `done` of `whole` is over."""
    start = row.warm_lr / row.lr
    return start + (1 - start) * done / whole


def falling(row, done, whole):
    """The factor between lr and min_lr on half a cosine, when `done` of `whole` is over."""
    low = row.min_lr / row.lr
    return low + (1 - low) * (1 + math.cos(math.pi * done / whole)) / 2


SCHEDULES = {"llava": llava, "lavis": lavis, "minigpt4": minigpt4}


def lr_schedule(row, steps):
    """step -> factor of the peak learning rate, by the schedule that the row names."""
    return SCHEDULES[row.schedule](row, steps)
