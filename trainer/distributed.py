"""Several GPUs: ranks, shards, sums over ranks; and the signals that stop a run.

torchrun starts a process for each GPU: a rank. Each rank gets some micro-batches of the step and a
row shard of every large matrix; FSDP2 gathers a layer's full weights while that layer runs.
Gradients are summed, not averaged, because each token's loss weight already divides by the global
count (trainer/loader.py). With one process every function here does nothing, or the plain thing."""

import json
import multiprocessing
import os
import re
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

from formats.errors import TrainingFailed, UsageError

QUANTIZATION_BLOCK = 256                # weights that share a scale in kernels/adamw.py


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


# --------------------------------------------------------------------------- beginning and ending

def init_distributed(device):
    """Find the other ranks, if torchrun started this one. Returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)           # kernels start on the current one
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    # an hour: rank 0 saves 13B while the others wait
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    return device


@contextmanager
def all_ranks(args, device):
    """Yields this rank's device. At the end no rank leaves before the others are done; if one has
    died, its absence is one line; so it is if that happens while they still look for each other."""
    try:
        device = init_distributed(device)
        if world_size() > 1 and args.row.losses:
            raise UsageError("torchrun is for stages with a LLaMA; start this one with python")
        yield device
        all_reduce_sum(0)                           # wait here until rank 0 has written everything
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or re.search("peer|gloo|NCCL", str(error))
        if not lost or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        why = str(error).strip().splitlines()[0][:100]
        raise TrainingFailed(f"another rank is gone ({why}): see what it said, and go on with "
                             "--resume auto") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def leave(code):
    """End this process with an exit code; one of several ranks without Python's own end.

    There a thread of gloo that is late to free its last tensor aborts the process (exit code -6,
    "terminate called without an active exception"), although everything has been written; torchrun
    then calls the whole run failed. Seen once, on a busy machine."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        for worker in multiprocessing.active_children():        # of the loader
            worker.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class StopSignal:
    """Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once.

    code: 0, or the exit code that was asked for: 130 (Ctrl-C) or 143 (SIGTERM)."""
    CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

    def __init__(self):
        self.code = 0
        for number in self.CODES:
            signal.signal(number, self.receive)
        if world_size() > 1:                 # torchrun sends SIGTERM, too, when a rank has died
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer)     # Python writes a byte here when a signal arrives
            threading.Thread(target=self.watchdog, args=(reader,), daemon=True).start()

    def receive(self, number, frame):
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = self.CODES[number]

    @staticmethod
    def watchdog(reader):
        """A process that waits for a dead rank runs no Python: this thread ends it after 25 s."""
        os.read(reader, 1)
        time.sleep(25)
        print("error: asked to stop 25 s ago, and the other ranks do not answer: go on with "
              "--resume auto", file=sys.stderr, flush=True)
        os._exit(1)


# ------------------------------------------------------------------------------------ the weights

def shard_model(model, whole=False):
    """Shard every matrix by rows, if the rows divide by the number of ranks and a shard is whole
    quantization blocks. All other parameters are replicated; `GradientStep` sums their gradients.
    whole: what trains is replicated, too. Muon needs whole matrices.

    Returns {name: what this rank's optimizer steps}, of the parameters that train."""
    if world_size() > 1:
        replicated = {p for p in model.parameters()
                      if not divides(p) or whole and p.requires_grad}
        mesh = init_device_mesh(model.llm.embed.weight.device.type, (world_size(),))
        for part in (*model.llm.blocks, model):
            fully_shard(part, mesh=mesh, ignored_params=replicated)
            part.set_gradient_divide_factor(1.0)            # summed, not averaged
            part.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "loss")
        model.always_run_vision = True      # all ranks must issue the same collectives
    return {name: local_shard(p) for name, p in model.named_parameters() if p.requires_grad}


def divides(p):
    """Can this parameter be sharded by rows?"""
    if p.dim() != 2 or len(p) % world_size():
        return False
    return p.numel() // world_size() % QUANTIZATION_BLOCK == 0


def local_shard(p):
    """This rank's rows of a parameter, in the same memory; a replicated one is returned itself."""
    return torch.nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p


def gather_to_rank0(x, sharded):
    """All rows of a sharded tensor on rank 0's CPU; None on other ranks. Others as they are."""
    if not sharded or not x.dim():
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    # as bytes, because not every backend knows every dtype
    dist.all_gather([part.view(torch.uint8) for part in parts], x.contiguous().view(torch.uint8))
    return torch.cat([part.cpu() for part in parts]) if rank() == 0 else None


@contextmanager
def unsharded(model):
    """Inside, all weights are whole on all ranks; every rank must come here."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()


# ------------------------------------------------------------------------------ sums over the ranks

def collective_device():
    """Where the tensors of a collective must lie."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def all_reduce_sum(*numbers):
    """The sums of numbers over ranks, in the order given."""
    if world_size() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=collective_device())
    dist.all_reduce(sums)
    return sums.tolist()


def gathered(items):
    """The items of all ranks (anything that JSON can hold), in the order of the ranks."""
    if world_size() == 1:
        return items
    device, text = collective_device(), json.dumps(items).encode()
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=device)
    sizes[rank()] = len(text)
    dist.all_reduce(sizes)
    if int(sizes.max()) == len("[]"):           # nothing anywhere, as in nearly every step
        return []
    texts = torch.zeros(world_size(), int(sizes.max()), dtype=torch.uint8)
    texts[rank(), :len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = texts.to(device)
    dist.all_reduce(texts)                      # each row has one writer: a sum is a gather
    found = []
    for row, size in zip(texts.cpu(), sizes.tolist()):
        found += json.loads(bytes(row[:size].tolist()))
    return found
