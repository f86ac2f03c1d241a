"""trainer/qlora.py: LoRA beside frozen weights in int8 or int4.                [QLoRA] 2305.14314

    y_i = Ŵ_i x + (alpha / r) B_i A_i x         Ŵ: what the codes of kernels/quantize.py stand for

Frozen weights are only read, so they may be coded: of the 7B's blocks 4.0 GB in int4, where bf16
takes 13. A and B keep their dtype, and so do the embedding, the output head and the vision tower.
Every forward and every backward writes a layer's Ŵ out for its product and forgets it.

What is saved. A and B were trained beside Ŵ, and they make up for some of what the codes lose. So
they are merged into Ŵ, written out: the saved model is the one that was trained, in the dtype of
the run. Merged into the weights from before, A and B would meet other weights than those they were
trained beside; what that costs in the toy world stands in docs/training.md.

The paper's code is NF4, 64 weights a scale. Ours are 16 equal steps between the smallest and the
largest of 32 weights, kept in fp16 and not coded again: 0.625 bytes a weight for its 0.52.
"""

import functools

import torch

from kernels.quantize import encode, frozen_linear, GROUP, written_in
from trainer.lora import add_lora, LoRALinear, merge_lora


class QLoRALinear(LoRALinear):
    """A LoRALinear whose frozen weights are codes and scales."""

    def __init__(self, linear, sizes, rank, bits):
        super().__init__(linear, sizes, rank)
        codes, scales = empty_codes(self.weight, bits)
        if not self.weight.is_meta:
            codes, scales = encode(self.weight.detach(), bits)
        self.coded_weights = self.weight.numel()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.weight = None

    def frozen(self, x):
        return frozen_linear(x, self.codes, self.scales)

    def frozen_weight(self):
        return written_in(self.codes, self.scales, self.a.shape[1], torch.float32)

    @torch.no_grad()
    def merged(self):
        """As LoRALinear's, in the host's memory: all layers written out may not fit a GPU that
        holds them in codes."""
        return super().merged().cpu()


def empty_codes(weight, bits):
    """Codes and scales of a weight (N, C) on the meta device, for a forecast."""
    N, C = weight.shape
    groups = -(-C // GROUP)
    with torch.device("meta"):
        if bits == 8:
            return torch.empty(N, C, dtype=torch.int8), torch.empty(N)
        return (torch.empty(N, groups * GROUP // 2, dtype=torch.uint8),
                torch.empty(2, groups, N, dtype=torch.float16))


def add_additions(llm, args):
    """What --lora and --quantize ask for; nothing without --lora."""
    if not args.lora:
        return
    kind = LoRALinear
    if args.quantize:
        kind = functools.partial(QLoRALinear, bits=int(args.quantize.removeprefix("int")))
    add_lora(llm, args.lora, args.seed, kind)


def merge_additions(llm):
    """Plain linear layers again, in place of what `add_additions` made."""
    if coded_weights(llm):
        print("the additions are merged into the coded weights, written out: what is saved is the "
              "model that was trained")
    merge_lora(llm)


def coded_weights(module):
    """How many weights stand in codes inside a module; a parameter is none of them."""
    return sum(layer.coded_weights for layer in module.modules() if isinstance(layer, QLoRALinear))


def weights_in(module):
    """How many weights a module has, in codes or not."""
    return sum(p.numel() for p in module.parameters()) + coded_weights(module)


def code_bytes(module):
    """Bytes of all codes and scales."""
    return sum(layer.codes.nbytes + layer.scales.nbytes for layer in module.modules()
               if isinstance(layer, QLoRALinear))


def written_out_bytes(module, size):
    """Bytes of the largest layer while it is written out, in numbers of `size` bytes."""
    layers = [layer for layer in module.modules() if isinstance(layer, QLoRALinear)]
    return max((size * layer.coded_weights for layer in layers), default=0)
