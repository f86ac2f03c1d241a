"""The GPU's memory: how PyTorch hands it out, and whether the largest step fits, before step 1; and
the host's, where a run keeps a part of its numbers there.

Rows of a packed batch differ in length from step to step, so tensors of a new size come with every
step. PyTorch's allocator keeps freed blocks by size; a block that is a little too small is of no
use, and a run that is planned close to the card's limit ends hours later, though enough is free in
pieces. With expandable segments freed pages are put together to blocks of any size."""

import os
import re
from pathlib import Path

import torch

from formats.errors import TrainingFailed
from trainer.distributed import world_size
from trainer.forecast import host_forecast, memory_forecast
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
    check_host(model, args)
    size = missing_bytes(model, args)
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        free = torch.cuda.mem_get_info(device)[0]
        raise TrainingFailed(
            f"the largest step needs {size / 1e9:.1f} GB more of {torch.cuda.get_device_name()}, "
            f"{free / 1e9:.1f} GB are free: end what else runs there, or take a smaller --pack or "
            "--checkpoint attention (--plan says what fits)") from None


def check_host(model, args):
    """Is there room in the host's memory for what waits there? Pinned memory cannot be swapped out.
    Raises TrainingFailed."""
    sizes = host_forecast(model, args, sample_lengths(args)[1], args.pack, args.checkpoint,
                          world_size())
    # the processes of this machine: torchrun's, or this one
    need, free = sum(sizes.values()) * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), free_host_bytes()
    if need > free:
        raise TrainingFailed(
            f"{need / 1e9:.1f} GB of {', '.join(sizes)} are to wait in the host's memory, "
            f"{free / 1e9:.1f} GB of it are free: end what else runs there, or leave out one of "
            "--offload-optimizer, --offload-gradients, --offload (--plan says what fits)")


def free_host_bytes(meminfo=Path("/proc/meminfo")):
    """Bytes of memory that the system can hand out; infinity where it is not Linux and does not say
    so in a file."""
    if not meminfo.exists():
        return float("inf")
    return 1024 * int(re.search(r"^MemAvailable: +(\d+) kB$", meminfo.read_text(), re.M)[1])
