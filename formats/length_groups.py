"""The official trainer's way to give several ranks equal work: samples of like length together.

Source: haotian-liu/LLaVA c121f04, llava/train/llava_trainer.py, get_length_grouped_indices and
split_to_even_chunks. data.modality_order calls it for pictures and for text alone."""
import math

import torch


def length_grouped_indices(lengths, batch: int, world_size: int, rng) -> list[int]:
    """A random order of samples: in steps of world_size * batch of them, rank by rank, each rank
    has samples whose lengths add up to about the same.

    lengths: of each sample; rng: the torch.Generator that shuffles."""
    shuffled, order = torch.randperm(len(lengths), generator=rng).tolist(), []
    for first in range(0, len(shuffled), batch * world_size):
        step = shuffled[first:first + batch * world_size]
        step.sort(key=lengths.__getitem__, reverse=True)            # longest first
        per_rank, sums = [[] for _ in range(world_size)], [0] * world_size
        for number, i in enumerate(step):
            rank = number % world_size              # quirk: a short step goes around in turn
            if len(step) % world_size == 0:         # the next goes to the rank with the least
                rank = sums.index(min(sums))
            per_rank[rank].append(i)
            sums[rank] += lengths[i]
            if len(per_rank[rank]) == len(step) // world_size:      # this rank is full
                sums[rank] = math.inf
        for samples in per_rank:
            order += samples
    return order
