"""The GPU's memory: how PyTorch hands it out, and whether the largest step fits, before step 1.

Rows of a packed batch differ in length from step to step, so tensors of a new size come with every
step. PyTorch's allocator keeps freed blocks by size; a block that is a little too small is of no
use, and a run that is planned close to the card's limit ends hours later, though enough is free in
pieces. With expandable segments freed pages are put together to blocks of any size."""

import os

import torch

from formats.errors import TrainingFailed
from trainer.distributed import world_size
from trainer.forecast import memory_forecast
from trainer.lengths import sample_lengths


def setting():
    """What the allocator was told, for run.json; "" where it has its own defaults."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")


def device_of(model):
    return next(model.parameters()).device


def missing_bytes(model, args):
    """Bytes that the largest step will need beyond what is allocated: gradients, moments,
    activations, as --plan forecasts them."""
    need = memory_forecast(model, args, sample_lengths(args)[1], args.pack, args.checkpoint,
                           world_size())
    return max(0, int(sum(need.values())) - torch.cuda.memory_allocated())


def reserve(model, args):
    """Allocate once what the largest step needs, and give it back to the allocator: what does not
    fit fails here, not in the middle of an epoch. Nothing happens on a CPU.

    Raises TrainingFailed."""
    device = device_of(model)
    if device.type != "cuda":
        return
    size = missing_bytes(model, args)
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        free = torch.cuda.mem_get_info(device)[0]
        raise TrainingFailed(
            f"the largest step needs {size / 1e9:.1f} GB more of {torch.cuda.get_device_name()}, "
            f"{free / 1e9:.1f} GB are free: end what else runs there, or take a smaller --pack or "
            "--checkpoint attention (--plan says what fits)") from None
