"""trainer/lora.py: train small matrices beside the frozen weights of a LLaMA.    [LoRA] 2106.09685

    add_lora(llm, rank)     before training: every linear layer of the blocks becomes a LoRALinear
    merge_lora(llm)         after it: plain linear layers again, which are saved like any other

trainer/qlora.py holds the frozen weights in int8 or int4.

Official runs of LLaVA: rank 128, alpha 2 r. Left out: dropout (0.05 there) of what A reads. With it
a step would not be a function of its inputs, and layers that are recomputed in backward would draw
other numbers.
"""

import torch
from torch import nn

from formats.names import fused_rows


class AddParts(torch.autograd.Function):
    """y += the parts B_i low_i side by side, in place.

    Each product adds to its own columns of y. Written out, the parts would be put side by side and
    added: 5 passes over y instead of 2, and its memory once more. Of the 7B, 42,496 numbers a token
    and layer: for 8,192 tokens in bf16 111 GB of traffic a forward instead of 45 (computed)."""

    @staticmethod
    def forward(ctx, y, low, b, sizes):
        """y (N, sum C_i), low (N, parts * r), b (sum C_i, r), sizes: C_i."""
        ctx.save_for_backward(low, b)
        ctx.sizes = sizes
        ctx.mark_dirty(y)
        parts = low.chunk(len(sizes), -1)
        for columns, part, rows in zip(y.split(sizes, -1), parts, b.split(sizes)):
            columns.addmm_(part, rows.t())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        low, b = ctx.saved_tensors
        dlow, db = torch.empty_like(low), torch.empty_like(b)
        count = len(ctx.sizes)
        for columns, part, rows, dpart, drows in zip(
                dy.split(ctx.sizes, -1), low.chunk(count, -1), b.split(ctx.sizes),
                dlow.chunk(count, -1), db.split(ctx.sizes)):
            dpart.copy_(columns @ rows)
            torch.mm(columns.t(), part, out=drows)
        return dy, dlow, db, None


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained addition to each of its parts i (q, k and v are three):

        y_i = W_i x + (alpha / r) B_i A_i x        A_i (r, C), B_i (C_i, r), B_i = 0 at first

    The official runs have one LoRA for each part. Here the A_i are rows of one matrix, so that one
    product computes all A_i x, and each B_i reads its own r results."""

    def __init__(self, linear, sizes, rank):
        """sizes: C_i, the rows of each part."""
        super().__init__()
        self.weight, self.sizes, self.scale = linear.weight, sizes, 2.0     # scale: alpha / r
        C = linear.in_features
        # the range in which PyTorch draws a linear layer's weights, as in the official runs
        self.a = nn.Parameter(self.weight.new_empty(len(sizes) * rank, C).uniform_(-1, 1) / C ** .5)
        self.b = nn.Parameter(self.weight.new_zeros(sum(sizes), rank))

    def frozen(self, x):
        """W x, (..., sum C_i)."""
        return nn.functional.linear(x, self.weight)

    def frozen_weight(self):
        """W, (sum C_i, C)."""
        return self.weight

    def forward(self, x):
        low = self.scale * nn.functional.linear(x, self.a)                  # (..., parts * r)
        y = self.frozen(x)
        flat = AddParts.apply(y.view(-1, y.shape[-1]), low.view(-1, low.shape[-1]),
                              self.b.to(y.dtype), self.sizes)               # under autocast bf16
        return flat.view(y.shape)

    @torch.no_grad()
    def merged(self):
        """One linear layer that computes the same: W_i + scale B_i A_i, summed in fp32."""
        added = []
        for b, a in zip(self.b.float().split(self.sizes), self.a.float().chunk(len(self.sizes))):
            added.append(b @ a)
        total = self.frozen_weight().float() + self.scale * torch.cat(added)
        rows, columns = total.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(total.to(self.a.dtype))
        return linear


def add_lora(llm, rank, seed=0, kind=LoRALinear):
    """Freeze the LLaMA and put a LoRALinear in the place of every linear layer of its blocks.

    kind: what is made of (linear, sizes, rank)."""
    llm.requires_grad_(False)
    rows = fused_rows(llm.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in llm.blocks:
            for name in ("qkv", "out", "gate_up", "down"):
                linear = getattr(block, name)
                sizes = rows.get(f"blocks.{{}}.{name}.weight", [linear.out_features])
                setattr(block, name, kind(linear, sizes, rank))


def merge_lora(llm):
    """Add what `add_lora` trained to the weights; returns llm."""
    for block in llm.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, LoRALinear):
                setattr(block, name, layer.merged())
    return llm
