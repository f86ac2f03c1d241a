"""TODO"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

# torchrun starts a process for each GPU, a rank. The micro-batches of a step are dealt to them, and
# so are the rows of every large matrix: a rank keeps and steps its share, and borrows a layer's
# others while it runs (FSDP2). Gradients are summed, never averaged: weights of tokens know of all.

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device):
    """Find the other ranks, if torchrun started this one. Returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)           # kernels start on the current one
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                            timeout=timedelta(hours=1))         # to save 13B takes its time
    return device


def all_reduce_sum(*numbers):
    """The sums of numbers over ranks."""
    if world_size() == 1:
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    all_ = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(all_)
    return all_.tolist()


def shard_model(model):
    """Leave each rank with its rows of every matrix whose rows can be dealt evenly, in whole blocks
    of adamw8's scales; all have the small rest, whose gradients `Update` sums."""
    if world_size() == 1:
        return
    whole = {p for p in model.parameters() if p.dim() != 2 or len(p) % world_size()
             or p.numel() // world_size() % 256}
    mesh = init_device_mesh(model.llm.embed.weight.device.type, (world_size(),))
    for part in (*model.llm.blocks, model):
        fully_shard(part, mesh=mesh, ignored_params=whole)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")
    model.always_run_vision = True


def local_shard(p):
    """What this rank has of a weight, in the same memory."""
    return torch.nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p


def gather_to_rank0(x, dealt):
    """A tensor of which every rank has its rows, for rank 0, on the CPU."""
    if not dealt or not x.dim():
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather([t.view(torch.uint8) for t in parts], x.contiguous().view(torch.uint8))
    return torch.cat([t.cpu() for t in parts]) if rank() == 0 else None


@contextmanager
def unsharded(model):
    """All weights whole on all ranks; every rank must come here."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()


class StopSignal:
    """Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.code = 0
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            signal.signal(number, lambda n, frame, code=code: self.ask(n, code))
        if world_size() > 1:                 # torchrun sends SIGTERM, too, when a rank has died
            told, tells = os.pipe()
            os.set_blocking(tells, False)
            signal.set_wakeup_fd(tells)
            threading.Thread(target=self.patience, args=(told,), daemon=True).start()

    @staticmethod
    def patience(told):
        """One that waits for a dead rank runs no Python: this thread ends it."""
        os.read(told, 1)
        time.sleep(25)
        print("error: asked to stop 25 s ago, and the other ranks do not answer: go on with "
              "--resume auto", file=sys.stderr, flush=True)
        os._exit(1)

    def ask(self, number, code):
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = code


def gathered(items):
    """The items of all ranks (what JSON can say), in the order of the ranks."""
    if world_size() == 1:
        return items
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    text = json.dumps(items).encode()
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=device)
    sizes[rank()] = len(text)
    dist.all_reduce(sizes)
    if int(sizes.max()) == len("[]"):           # as in nearly every step
        return []
    texts = torch.zeros(world_size(), int(sizes.max()), dtype=torch.uint8)
    texts[rank(), :len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = texts.to(device)
    dist.all_reduce(texts)
    rows = zip(texts.cpu(), sizes.tolist())
    return [item for row, size in rows for item in json.loads(bytes(row[:size].tolist()))]
