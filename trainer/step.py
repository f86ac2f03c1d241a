"""From gradients to new weights: the norm over all ranks, clipping, the optimizers' step."""

import functools
import math

import torch
import torch.distributed as dist

from kernels.adamw import AdamW
from kernels.host_state import host_memory, HostSums
from trainer.distributed import all_reduce_sum, world_size


class GradientStep:
    """Gradients become a step, in one of two ways.

    at the end: the norm of all gradients, --clip, then every optimizer's step. PyTorch's AdamW.
    in backward: as soon as a weight's gradient is complete, the weight is stepped and the gradient
    freed. This needs one optimizer per weight (adamw8) and no gradient clipping (the clip factor
    is known only after the last gradient). LLaVA's official runs do not clip. If the norm turns
    out to be not finite, training stops; the half-updated weights are discarded.

    What --offload-optimizer and --offload-gradients keep in the host's memory is fetched when a
    gradient is there, and used when the next one is: kernels/host_state.py.

    is_last: set by `begin` before each backward. True at the last micro-batch of a step that has
    a usable sample.

    Below, `p` is a parameter of the model and `local` what this rank's optimizer holds of it: with
    one rank the same object, with several a shard of it, or p itself if it is replicated."""

    def __init__(self, job):
        self.job, self.is_last, self.squares = job, False, []
        eight_bit = all(type(o) is AdamW for o in job.optimizers)
        self.in_backward = eight_bit and not job.clip
        self.pairs = [(p, job.local_params[name]) for name, p in job.trained().items()]
        self.optimizer_of = {}
        for optimizer in job.optimizers:
            for local in optimizer.param_groups[0]["params"]:
                self.optimizer_of[id(local)] = optimizer
        device = self.pairs[0][1].device
        self.sums = HostSums(device) if job.offload_gradients else None
        self.offloads = eight_bit and job.optimizers[0].offload
        self.memory = host_memory(device) if self.sums or self.offloads else None
        self.waiting = None                 # its gradient is there; what it needs is on its way
        if self.in_backward:
            for p, local in self.pairs:
                # a replicated weight of several ranks first needs the sum of all gradients
                if world_size() == 1 or local is not p:
                    hook = functools.partial(self.on_grad_ready, local)
                    p.register_post_accumulate_grad_hook(hook)

    def begin(self, is_last):
        """Before each backward. is_last: it completes the gradients of the step."""
        self.handle_waiting()
        self.is_last = is_last

    def on_grad_ready(self, local, p):
        if not self.is_last and not self.sums:
            return                          # it stays, and the next micro-batch adds to it
        bring_to_shard(p, local)
        if not self.memory:
            return self.handle(local)
        self.fetch(local)
        self.handle_waiting()
        self.waiting = local

    def fetch(self, local):
        """Begin to copy from the host what `handle` will need."""
        if self.sums:
            self.sums.fetch(local)
        if self.offloads and self.is_last:
            self.optimizer_of[id(local)].fetch_ahead()

    def handle_waiting(self):
        if self.waiting is not None:
            local, self.waiting = self.waiting, None
            self.handle(local)

    def handle(self, local):
        """A gradient is complete, of the step or of a micro-batch: step the weight, or send the
        gradient to the host."""
        if self.sums:
            self.sums.add(local)
        if not self.is_last:
            return self.sums.keep(local)
        self.note_norm(local.grad)
        self.step_param(local)
        if self.sums and not self.offloads:
            self.memory.send({}, {})        # or Python would fetch sums far ahead of the GPU

    def note_norm(self, grad, copies=1):
        """Note the square of a gradient's norm; copies: ranks that have the same gradient."""
        if grad is not None:
            square = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
            self.squares.append(square / copies)        # the sum over the ranks counts it once

    def collect(self, p, local):
        """Bring a gradient to where the optimizer looks for it, and note the square of its norm."""
        bring_to_shard(p, local)
        copies = 1
        if local is p and world_size() > 1:
            if p.grad is None:
                p.grad = torch.zeros_like(p)        # every rank must take part in the sum
            dist.all_reduce(p.grad)
            copies = world_size()
        self.note_norm(local.grad, copies)

    def step_param(self, local):
        if local.grad is not None:
            self.optimizer_of[id(local)].step()
            local.grad = None

    def finish(self):
        """After the last backward: returns the norm of all gradients, and clips them.

        A step without a usable sample has norm 0, and its gradients, zeros, are dropped."""
        self.handle_waiting()
        if not self.is_last:
            self.drop()
            return 0.0
        self.is_last = False
        if not self.in_backward and world_size() == 1:
            weights = [p for p, _ in self.pairs]
            return float(torch.nn.utils.clip_grad_norm_(weights, self.job.clip or math.inf))
        for p, local in self.pairs:
            # what no hook has taken: replicated weights, and gradients of earlier micro-batches
            # that the last one, text alone, did not touch
            if self.sums:
                self.sums.add(local)
            if p.grad is not None or local.grad is not None or world_size() > 1 and local is p:
                self.collect(p, local)
                if self.in_backward:
                    self.step_param(local)
        squares, self.squares = self.squares, []
        (total,) = all_reduce_sum(float(sum(squares)))
        norm = math.sqrt(total)
        if self.job.clip:
            for _, local in self.pairs:
                if local.grad is not None:
                    local.grad.mul_(min(1., self.job.clip / (norm + 1e-6)))
        return norm

    def drop(self):
        """Forget all gradients."""
        self.squares = []
        for p, local in self.pairs:
            p.grad = local.grad = None
        if self.sums:
            self.sums.clear()

    def step(self):
        """Every optimizer's step, if backward has not taken it. No gradient: no move."""
        if not self.in_backward:
            following = [*self.job.optimizers[1:], None]
            for optimizer, after in zip(self.job.optimizers, following):
                if self.offloads and after:
                    after.fetch_ahead()                 # on its way while this one steps
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if self.memory:
            self.memory.wait()                          # a checkpoint reads the states


def bring_to_shard(p, local):
    """A gradient that FSDP2 left at the parameter goes to this rank's shard of it."""
    if local is not p and p.grad is not None:
        local.grad, p.grad = p.grad.to_local(), None
