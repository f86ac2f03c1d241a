"""trainer/rates.py: with which rates a language model of one's own is trained in the toy world.

    python train.py --stage 1 --llm FOLDER

The toy's rates are for its own language model of a million weights: with LoRA .015 a step, and
Muon. A real language model is destroyed by them within ten steps. So rates follow the size of what
is trained: in front of a language model of LARGE weights and more, the rates and the schedule are
those of the recipe as published; batch, steps and clipping stay the toy's. A flag wins over both.
"""

from dataclasses import replace

import torch

import llms
from trainer.forecast import part_configs
from trainer.start import tell

LARGE = 20_000_000      # weights. The toy's has 1.2 million, the smallest published ones 100
RATES = ("lr", "muon", "projector_lr", "warmup", "decay", "warm_lr", "min_lr")


def llm_weights(args):
    """How many weights the run's language model has, by its config.json."""
    with torch.device("meta"):
        llm = llms.new(part_configs(args)[1])
    return sum(p.numel() for p in llm.parameters())


def published_rates(args):
    """{field: value} of the recipe's row, without those that a flag gives; with --lora ten times
    the rate for the LLaMA, as officially."""
    row = args.published
    if args.lora:
        row = replace(row, lr=10 * row.lr, projector_lr=row.lr)
    return {name: getattr(row, name) for name in RATES if getattr(args, name) is None}


def fit_rates(args):
    """Set the published rates in args.row where the toy's are too high for the language model."""
    if args.base != "toy" or not args.stage or args.row.losses:
        return
    weights = llm_weights(args)
    if weights < LARGE:
        return
    args.row = replace(args.row, **published_rates(args))
    projector = f" (projector {args.row.projector_lr:g})" if args.row.projector_lr else ""
    tell(f"note: a language model of {weights / 1e6:,.0f} M weights: --lr {args.row.lr:g}"
         f"{projector} as published, not the toy's")
