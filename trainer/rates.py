"""trainer/rates.py: with which rates a language model of one's own is trained in the toy world.

    python train.py --stage 2 --lora 16        after stage 1 with --llm FOLDER

The toy's rates are for a model of a million weights: with LoRA .015 a step. A published language
model is destroyed by that within ten steps. So rates follow the size of what trains: from LARGE
weights on they are those of the recipe as published; batch, steps, the length of the warm-up and
clipping stay the toy's. A projector that trains alone before a large language model:

    mlp, linear    keeps the toy's rate, but not Muon, whose steps have one length whatever the
                   gradient: before SmolLM2-135M the loss after 45 steps of 16 captions was 2.3 with
                   it and 1.4 without
    qformer        keeps the toy's rates, up to 2,000 times the published: in the toy's few steps it
                   learns most with them (docs/training.md has four tried). A note gives both

A flag wins over all, and a note says what is published and what was given.
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
    """{field: value} of the recipe's row; with --lora ten times the rate for the LLaMA, as
    officially."""
    row = args.published
    if args.lora:
        row = replace(row, lr=10 * row.lr, projector_lr=row.lr)
    return {name: getattr(row, name) for name in RATES}


def leave_muon(args, weights):
    """Train a projector before a language model of so many weights by AdamW alone."""
    row = args.row
    if row.muon and args.muon is None:
        args.row = replace(row, muon=0.)
        tell(f"note: the projector trains before {weights / 1e6:,.0f} M weights: by AdamW alone, "
             f"--muon 0, not the toy's {row.muon:g}")


def tell_toy_rates(args, weights):
    """A note that a Q-Former's projector trains at the toy's rates before so many weights."""
    published, row = published_rates(args), args.row
    kept = {name: getattr(row, name) for name, value in published.items()
            if getattr(args, name) is None and value != getattr(row, name)}
    if kept:
        there = ", ".join(f"{published[name]:g}" for name in kept)
        tell(f"note: the projector trains before {weights / 1e6:,.0f} M weights: {listed(kept)}, "
             f"the toy's (published: {there}); flags give others")


def publish_rates(args, why):
    """Set the published rates where no flag gives another, and tell the two apart in a note.

    why: what is too large for the toy's, the note's beginning."""
    published, toy = published_rates(args), args.row
    ours = {name: value for name, value in published.items() if getattr(args, name) is None}
    args.row = replace(toy, **ours)
    changed = {name: value for name, value in ours.items() if value != getattr(toy, name)}
    parts = []
    if changed:
        parts.append(f"{listed(changed)} as published, not the toy's")
    given = {name: getattr(args, name) for name in published if name not in ours}
    if given:
        there = ", ".join(f"{published[name]:g}" for name in given)
        parts.append(f"{listed(given)} as given (published: {there})")
    tell(f"note: {why}: {'; '.join(parts)}")


def listed(rates):
    """{field: value} as flags; the projector's rate in brackets behind the others' lr."""
    words = {name: f"--{name.replace('_', '-')} {value:g}" for name, value in rates.items()}
    if "lr" in words and words.pop("projector_lr", None):
        words["lr"] += f" (projector {rates['projector_lr']:g})"
    return ", ".join(words.values())


def fit_rates(args, set_trainable):
    """Set the published rates in args.row where the toy's are too high for what trains; before a
    large language model a projector's optimizer, or a note."""
    if args.base != "toy" or not args.stage or args.row.losses:
        return
    trained = trained_weights(args, set_trainable)
    behind = weights_in(meta_model(args, set_trainable).llm)
    if trained >= LARGE:
        publish_rates(args, f"{trained / 1e6:,.0f} M weights are trained")
    elif behind >= LARGE and args.row.projector_type == "qformer":
        tell_toy_rates(args, behind)
    elif behind >= LARGE:
        leave_muon(args, behind)
