"""kernels/gather.py: the batch of all ranks, for losses that compare within the batch.

Each of the world_size ranks has B samples; all have N = B * world_size, in the order of the ranks.
Without torch.distributed a process is all ranks. Nothing here carries a gradient: gradients are
summed over the ranks by the training loop.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from formats.errors import BadData


def all_gather(x):
    """x (B, ...) of every rank, the same B on each -> (N, ...) without gradient, mine included."""
    x = x.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_texts(ids, mask, pad):
    """My ids and mask (B, T) -> all ranks' ids and mask (N, T'), padded with `pad` and False to the
    longest, and the index of my first row in them."""
    longest = int(all_gather(torch.tensor([ids.shape[1]], device=ids.device)).max())
    padding = (0, longest - ids.shape[1])
    all_ids, all_mask = all_gather(F.pad(ids, padding, value=pad)), all_gather(F.pad(mask, padding))
    first = dist.get_rank() * len(ids) if len(all_ids) > len(ids) else 0
    return all_ids, all_mask, first


def require_negatives(same):
    """same (B, N) bool, of each rank: pairs that are no negatives of each other. Raises BadData, on
    every rank alike, if nothing is a negative of anything."""
    if bool(all_gather(same.all().view(1)).all()):
        raise BadData(f"a batch of {same.shape[1]} pairs with the same text or image has no "
                      "negatives: shuffle the data, or take a larger batch")
