"""TODO"""

import torch
from torch import nn

from formats.names import fused_rows


class LoRALinear(nn.Module):
    """A frozen linear layer, and for each of its parts i (q, k and v are three) a trained addition:

        y_i = W_i x + (α / r) B_i A_i x        A_i (r, C), B_i (C_i, r), B_i = 0 at first

    One layer a part is what the official runs have, and what [LoRA] 2106.09685 says: here the A_i
    lie in rows on top of each other, one product for all, and each B_i reads its own r of the
    results. Official: α = 2 r. Left out: dropout of what A reads, 0.05 there: with it a step is no
    function of its inputs, and what runs again in backward draws other numbers."""

    def __init__(self, linear, sizes, rank):
        super().__init__()
        self.weight, self.sizes, self.scale = linear.weight, sizes, 2.0
        C = linear.in_features
        # as large as the first values of a linear layer of PyTorch, which the official ones are too
        self.a = nn.Parameter(self.weight.new_empty(len(sizes) * rank, C).uniform_(-1, 1) / C ** .5)
        self.b = nn.Parameter(self.weight.new_zeros(sum(sizes), rank))

    def forward(self, x):
        low = (self.scale * nn.functional.linear(x, self.a)).chunk(len(self.sizes), -1)
        more = [nn.functional.linear(l, b) for l, b in zip(low, self.b.split(self.sizes))]
        return nn.functional.linear(x, self.weight) + torch.cat(more, -1)

    @torch.no_grad()
    def merged(self):
        """The one linear layer that does the same."""
        pairs = zip(self.b.float().split(self.sizes), self.a.float().chunk(len(self.sizes)))
        one = nn.Linear(*self.weight.shape[::-1], bias=False, device="meta")
        wide = self.weight.float() + self.scale * torch.cat([b @ a for b, a in pairs])
        one.weight = nn.Parameter(wide.to(self.weight.dtype))
        return one


def add_lora(llm, rank, seed=0):
    """LoRA in every linear layer of the blocks; of this model only that trains from now on."""
    llm.requires_grad_(False)
    rows = fused_rows(llm.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in llm.blocks:
            for name in ("qkv", "out", "gate_up", "down"):
                linear = getattr(block, name)
                sizes = rows.get(f"blocks.{{}}.{name}.weight", [linear.out_features])
                setattr(block, name, LoRALinear(linear, sizes, rank))


def merge_lora(llm):
    """What `add_lora` put there becomes part of the weights; returns llm."""
    for block in llm.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, LoRALinear):
                setattr(block, name, layer.merged())
    return llm
