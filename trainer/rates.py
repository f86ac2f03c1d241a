"""trainer/rates.py: with which rates a language model of one's own is trained in the toy world.

    python train.py --stage 2 --lora 16        after stage 1 with --llm FOLDER

The toy's rates are for a model of a million weights: with LoRA .015 a step. A published language
model is destroyed by that within ten steps. So rates follow the size of what trains: from LARGE
weights on they are those of the recipe as published; batch, steps, warm-up and clipping stay the
toy's. In stage 1 of LLaVA the projector alone trains, before a large language model too, and keeps
the toy's rate, but not Muon, whose steps have one length whatever the gradient: before SmolLM2-135M
the loss after 45 steps of 16 captions was 2.3 with it and 1.4 without. A flag wins over all.
"""

from dataclasses import replace

from trainer.forecast import meta_model
from trainer.qlora import weights_in
from trainer.start import tell

LARGE = 20_000_000      # weights. The toy's has 1.2 million, the smallest published ones 100
RATES = ("lr", "muon", "projector_lr", "decay", "warm_lr", "min_lr")


def trained_weights(args, set_trainable):
    """How many weights the run changes, by the sizes in config.json: LoRA all of a LLaMA's."""
    model = meta_model(args, set_trainable)
    if args.lora:
        return weights_in(model.llm)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def published_rates(args):
    """{field: value} of the recipe's row, without those that a flag gives; with --lora ten times
    the rate for the LLaMA, as officially."""
    row = args.published
    if args.lora:
        row = replace(row, lr=10 * row.lr, projector_lr=row.lr)
    return {name: getattr(row, name) for name in RATES if getattr(args, name) is None}


def leave_muon(args, set_trainable):
    """Train a projector before a large language model by AdamW alone."""
    row = args.row
    if not row.muon or args.muon is not None or row.projector_type == "qformer":
        return
    weights = weights_in(meta_model(args, set_trainable).llm)
    if weights >= LARGE:
        args.row = replace(row, muon=0.)
        tell(f"note: the projector trains before {weights / 1e6:,.0f} M weights: by AdamW alone, "
             f"--muon 0, not the toy's {row.muon:g}")


def fit_rates(args, set_trainable):
    """Set the published rates in args.row where the toy's are too high for what trains."""
    if args.base != "toy" or not args.stage or args.row.losses:
        return
    weights = trained_weights(args, set_trainable)
    if weights < LARGE:
        leave_muon(args, set_trainable)
        return
    args.row = replace(args.row, **published_rates(args))
    projector = f" (projector {args.row.projector_lr:g})" if args.row.projector_lr else ""
    tell(f"note: {weights / 1e6:,.0f} M weights are trained: --lr {args.row.lr:g}{projector} as "
         "published, not the toy's")
