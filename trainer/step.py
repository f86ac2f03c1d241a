"""From gradients to new weights: the norm over all ranks, clipping, the optimizers' step."""

import functools
import math

import torch
import torch.distributed as dist

from kernels.adamw import AdamW
from trainer.distributed import all_reduce_sum, world_size


class GradientStep:
    """Gradients become a step, in one of two ways.

    at the end: the norm of all gradients, --clip, then every optimizer's step. PyTorch's AdamW.
    in backward: as soon as a weight's gradient is complete, the weight is stepped and the gradient
    freed. This needs one optimizer per weight (adamw8) and no gradient clipping (the clip factor
    is known only after the last gradient). LLaVA's official runs do not clip. If the norm turns
    out to be not finite, training stops; the half-updated weights are discarded.

    is_last: set by the loop before each backward. True at the last micro-batch of a step that has
    a usable sample.

    Below, `p` is a parameter of the model and `local` what this rank's optimizer holds of it: with
    one rank the same object, with several a shard of it, or p itself if it is replicated."""

    def __init__(self, job):
        self.job, self.is_last, self.squares = job, False, []
        self.in_backward = not job.clip and all(type(o) is AdamW for o in job.optimizers)
        self.pairs = [(p, job.local_params[name]) for name, p in job.trained().items()]
        self.optimizer_of = {}
        for optimizer in job.optimizers:
            for local in optimizer.param_groups[0]["params"]:
                self.optimizer_of[id(local)] = optimizer
        if self.in_backward:
            for p, local in self.pairs:
                # a replicated weight of several ranks first needs the sum of all gradients
                if world_size() == 1 or local is not p:
                    hook = functools.partial(self.on_grad_ready, local)
                    p.register_post_accumulate_grad_hook(hook)

    def on_grad_ready(self, local, p):
        if self.is_last:
            self.collect(p, local)
            self.step_param(local)

    def collect(self, p, local):
        """Bring a gradient to where the optimizer looks for it, and note the square of its norm."""
        if local is not p:
            if p.grad is not None:
                local.grad, p.grad = p.grad.to_local(), None
        elif world_size() > 1:
            if p.grad is None:
                p.grad = torch.zeros_like(p)        # every rank must take part in the sum
            dist.all_reduce(p.grad)
        if local.grad is not None:
            square = torch.linalg.vector_norm(local.grad, dtype=torch.float32).square()
            if local is p:                          # every rank has it: the sum counts it once
                square = square / world_size()
            self.squares.append(square)

    def step_param(self, local):
        if local.grad is not None:
            self.optimizer_of[id(local)].step()
            local.grad = None

    def finish(self):
        """After the last backward: returns the norm of all gradients, and clips them.

        A step without a usable sample has norm 0, and its gradients, zeros, are dropped."""
        if not self.is_last:
            self.squares = []
            for p, local in self.pairs:
                p.grad = local.grad = None
            return 0.0
        self.is_last = False
        if not self.in_backward and world_size() == 1:
            weights = [p for p, _ in self.pairs]
            return float(torch.nn.utils.clip_grad_norm_(weights, self.job.clip or math.inf))
        for p, local in self.pairs:
            # what no hook has taken: replicated weights, and gradients of earlier micro-batches
            # that the last one, text alone, did not touch
            if p.grad is not None or world_size() > 1 and local is p:
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

    def step(self):
        """Every optimizer's step, if backward has not taken it. No gradient: no move."""
        if not self.in_backward:
            for optimizer in self.job.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
