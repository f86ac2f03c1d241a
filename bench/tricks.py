"""bench.tricks: what each way to save memory saves, and what it costs, each switched on alone.

The toy's stage 2 on one core, through the loop's own parts: its micro-batches, its loss, its step.
Each row is a row before it and one change. Nothing is estimated:

    tokens/s    of the computation alone, batches made beforehand; seconds of this thread. All rows
                take turns, and the median of 9 steps counts: whatever else runs on the machine
                slows all of them
    held MB     weights, and what the optimizer keeps of them, between two steps
    peak MB     the most bytes of tensors that lived at once in a step, those included; what an
                operation takes inside itself is not seen
    host MB     what of it lies in the host's memory: not in the two columns before
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from trainer.run_folder import autocast_dtype
from trainer.step import GradientStep

FP32 = "--optimizer", "adamw", "--muon", "0", "--dtype", "fp32"
BF16 = "--optimizer", "adamw8"
FOUR = *BF16, "--clip", "0", "--accum", "4"
# what is measured -> flags; a name that begins with + is a change of the last one without
TRICKS = {
    "fp32, AdamW, padded batches": FP32,
    "+ packing": (*FP32, "--pack", "1024"),
    "+ checkpoint none": (*FP32, "--checkpoint", "none"),
    "+ checkpoint attention": (*FP32, "--checkpoint", "attention"),
    "+ checkpoint full": (*FP32, "--checkpoint", "full"),
    "+ LoRA 16": (*FP32, "--lora", "16"),
    "+ LoRA 16 beside int4": (*FP32, "--lora", "16", "--quantize", "int4"),
    "bf16 weights, adamw8": BF16,
    "+ stochastic": (*BF16, "--stochastic"),
    "+ a step inside backward": (*BF16, "--clip", "0"),
    "+ offload-optimizer": (*BF16, "--offload-optimizer"),
    "the same inside backward, 4 micro-batches": FOUR,
    "+ offload-optimizer, inside": (*FOUR, "--offload-optimizer"),
    "+ offload-gradients": (*FOUR, "--offload-gradients"),
    "+ both": (*FOUR, "--offload-optimizer", "--offload-gradients"),
}
WARM, TIMED = 2, 9                      # steps


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of new tensors that live at once. `known`: storages, by address,
    that were there before or lie on the host."""

    def __init__(self, known):
        super().__init__()
        self.known, self.alive, self.most = known, {}, 0
        self.bound = 0                  # bytes alive, and of some that have gone

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.note(x.untyped_storage())
        return result

    def note(self, storage):
        place = storage.data_ptr()
        old = self.alive.get(place)
        if place in self.known or old is not None and not old[0].expired():
            return
        self.bound += storage.nbytes() - (old[1] if old else 0)
        self.alive[place] = StorageWeakRef(storage), storage.nbytes()
        if self.bound > self.most:      # only then is it worth looking who has gone
            self.alive = {at: pair for at, pair in self.alive.items() if not pair[0].expired()}
            self.bound = sum(size for _, size in self.alive.values())
            self.most = max(self.most, self.bound)


def storages(tensors):
    """{address: bytes}, each memory once."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


class Loop:
    """The steps of one row."""

    def __init__(self, argv, folder):
        self.args = train.parse_args(["--stage", "2", "--from", "none", "--steps", "100",
                                      "--batch", "12", "--threads", "1", *argv])
        torch.manual_seed(0)
        self.job = train.vlm_job(self.args, Path(folder), "cpu")
        self.gradients = GradientStep(self.job)
        self.dtype = autocast_dtype(self.args, torch.device("cpu"))
        self.steps = [list(self.job.batches(i)) for i in range(WARM + TIMED + 1)]
        self.speeds = []

    def timed(self, number):
        """Step `number`; notes its tokens a second once it is warm."""
        micro_batches = self.steps[number]
        tokens = sum(self.job.count_flops(micro)[0] for micro in micro_batches)
        start = time.thread_time()
        self.step(micro_batches)
        if number >= WARM:
            self.speeds.append(tokens / (time.thread_time() - start))

    def step(self, micro_batches):
        weight = next(iter(self.job.trained().values()))
        fast = self.dtype not in (torch.float32, weight.dtype)
        for i, micro in enumerate(micro_batches):
            with torch.autocast("cpu", self.dtype, enabled=fast):
                loss = sum(self.job.loss(micro).values())
            self.gradients.begin(i == len(micro_batches) - 1)
            loss.backward()
        self.gradients.finish()
        self.gradients.step()

    def states(self):
        """Tensors that the optimizers keep."""
        found = []
        for optimizer in self.job.optimizers:
            for entries in optimizer.state.values():
                found += [x for x in entries.values() if torch.is_tensor(x)]
        return found

    def bytes_between_steps(self):
        """{address: bytes} on the device and on the host."""
        model = self.job.model
        here, there = storages([*model.parameters(), *model.buffers()]), {}
        (there if self.args.offload_optimizer else here).update(storages(self.states()))
        if self.gradients.sums:
            there.update(storages(self.gradients.sums.room.values()))
        return here, there

    def row(self):
        """The figures, of the timed steps and of one more that is watched."""
        here, there = self.bytes_between_steps()
        with LiveBytes({**here, **there}) as live:
            self.step(self.steps[-1])
        held = sum(here.values())
        return {"tokens/s": round(statistics.median(self.speeds)), "held MB": megabytes(held),
                "peak MB": megabytes(held + live.most), "host MB": megabytes(sum(there.values())),
                "micro-batches": len(self.steps[-1]), "ok": True}


def megabytes(size):
    return round(size / 1e6, 1)


def cpu_tricks():
    """A row for each of TRICKS."""
    with tempfile.TemporaryDirectory() as folder:
        loops = {what: Loop(argv, folder) for what, argv in TRICKS.items()}
        for number in range(WARM + TIMED):
            for loop in loops.values():
                loop.timed(number)
        for what, loop in loops.items():
            yield {"what": what, **loop.row()}
