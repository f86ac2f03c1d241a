"""TODO"""

import functools
import math

import torch
import torch.distributed as dist

from kernels.adamw import AdamW
from trainer.distributed import all_reduce_sum, world_size


class GradientStep:
    """Gradients become a step, in one of two ways.

    at the end: the norm of all gradients, --clip, then every optimizer's step. This is AdamW's way.
    inside the last backward: as soon as a weight's gradient is whole it is stepped and the gradient
    freed. It wants an optimizer for each weight (adamw8) and no --clip, whose factor is known only
    when the last gradient is: none in the official runs of LLaVA, whose DeepSpeed files have no
    gradient_clipping. Norms are added up on the way; if their sum is not finite, the run stops with
    weights in memory that nobody will save."""

    def __init__(self, job):
        self.job, self.last, self.squares = job, False, []
        self.inside = not job.clip and all(type(o) is AdamW for o in job.optimizers)
        # of each weight: itself, and what this rank holds of it
        self.pairs = [(p, job.held[n]) for n, p in job.trained().items()]
        self.steps = {id(q): o for o in job.optimizers for q in o.param_groups[0]["params"]}
        for p, q in self.pairs if self.inside else ():
            if world_size() == 1 or q is not p:          # else all ranks' gradients are needed first
                p.register_post_accumulate_grad_hook(functools.partial(self.now, q))

    def now(self, q, p):
        if self.last:
            self.take(p, q)
            self.one(q)

    def take(self, p, q):
        """Bring a gradient to where the optimizer looks for it."""
        if q is not p and p.grad is not None:
            q.grad, p.grad = p.grad.to_local(), None
        elif q is p and world_size() > 1:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        if q.grad is not None:                      # what all ranks hold is counted once
            square = torch.linalg.vector_norm(q.grad, dtype=torch.float32).square()
            self.squares.append(square / world_size() if q is p else square)

    def one(self, q):
        if q.grad is not None:
            self.steps[id(q)].step()
            q.grad = None

    def norm(self):
        """After the last backward: the gradients' norm, and, inside, what it has not reached (of
        earlier micro-batches, where the last was text alone)."""
        if not self.inside and world_size() == 1:
            return float(torch.nn.utils.clip_grad_norm_([p for p, _ in self.pairs],
                                                        self.job.clip or math.inf))
        for p, q in self.pairs:
            if world_size() > 1 and q is p or p.grad is not None:
                self.take(p, q)
                if self.inside:
                    self.one(q)
        squares, self.last, self.squares = self.squares, False, []
        norm = math.sqrt(all_reduce_sum(float(sum(squares)))[0])
        if self.job.clip:
            for _, q in self.pairs:
                if q.grad is not None:
                    q.grad.mul_(min(1., self.job.clip / (norm + 1e-6)))
        return norm

    def drop(self):
        """Forget the gradients of a step that had no usable sample: they are zeros."""
        self.last, self.squares = False, []
        for p, q in self.pairs:
            p.grad = q.grad = None

    def step(self):
        for o in () if self.inside else self.job.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
