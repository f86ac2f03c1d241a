"""TODO"""

import argparse
import math
from dataclasses import fields, replace

BASES = {"toy": ("toy/weights/clip", "toy/weights/llama"),
         "7b": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"),
         "13b": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-13b-v1.5")}
# of the recipes with a Q-Former: EVA's ViT-g, what the Q-Former starts as, and, for MiniGPT-4, ends
EVA, BERT, FLAN = ("Salesforce/blip2-itm-vit-g", "google-bert/bert-base-uncased",
                   "Salesforce/blip2-flan-t5-xxl")
SMALL = "openai/clip-vit-large-patch14"     # LLaVA's first tower: 224 pixels, 256 places


def parse(Stage, RECIPES, TOY, argv=None):
    """The command line: the recipe's row of this stage, each field overridable."""
    p = argparse.ArgumentParser(description="Run one stage of one recipe.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"error: {message}; see --help\n")
    p.add_argument("--stage", type=int, choices=(0, 1, 2), required=True)
    p.add_argument("--recipe", choices=RECIPES, default="llava-1.5")
    p.add_argument("--base", choices=BASES, default="toy", help="the parts to start from")
    p.add_argument("--vision", help="CLIP folder or hub id, instead of the base's")
    p.add_argument("--llm", help="LLaMA folder or hub id, instead of the base's")
    p.add_argument("--qformer", help="Q-Former's folder or hub id, instead of the base's")
    p.add_argument("--from", dest="start", help="model to start stage 2 from; 'none' skips stage 1")
    p.add_argument("--data", help="LLaVA JSON or JSONL; without it, the toy world")
    p.add_argument("--images", default=".", help="folder that the data's pictures are relative to")
    p.add_argument("--follow-links", action="store_true", help="links in --images may lead out of "
                   "it")
    p.add_argument("--projector", help="start the bridge from this file or folder, where it is new")
    p.add_argument("--official-quirks", action="store_true",
                   help="learn nothing from samples that the official code masks with a warning")
    p.add_argument("--max-length", type=int, default=0, metavar="N", help="cut samples after N "
                   "tokens, the picture counted (official: 2048; default: never)")
    p.add_argument("--on-bad-sample", choices=("error", "skip"), default="error",
                   help="error: refuse the data, naming its first bad rows; skip: go on without "
                   "them and list each in bad_samples.jsonl")
    p.add_argument("--most-bad", type=int, default=100, metavar="N",
                   help="with skip: more than so many samples end the run")
    p.add_argument("--output-dir", help="default: runs/<base>/<recipe>/stage<n>")
    p.add_argument("--resume", choices=("auto",), help="go on from the newest good checkpoint")
    p.add_argument("--overwrite", action="store_true", help="delete what the output folder holds")
    p.add_argument("--pack", type=int, metavar="N", help="samples in rows of N tokens, a row a "
                   "micro-batch; 0: padded batches (default 6144, toy 0)")
    p.add_argument("--accum", type=int, default=1, help="micro-batches a step, where not packed")
    p.add_argument("--loss", choices=("official", "token-mean"), default="official",
                   help="token-mean: --groups 1, all learned tokens of a step count the same")
    p.add_argument("--optimizer", choices=("adamw", "adamw8"), help="adamw8: bf16 weights and "
                   "gradients, exact fp32 masters, 8-bit moments (default, but for the toy)")
    p.add_argument("--stochastic", action="store_true", help="adamw8 without masters: weights are "
                   "rounded at random, a third less memory")
    p.add_argument("--checkpoint", choices=("none", "attention", "full"), help="what is computed "
                   "again in backward: norms and products; all but attention; all (default none)")
    p.add_argument("--offload", action="store_true", help="what --checkpoint keeps, on the host")
    p.add_argument("--lora", type=int, default=0, metavar="R", help="the LLaMA learns by additions "
                   "of rank R (official: 128), at ten times the rate; merged when saved")
    p.add_argument("--plan", action="store_true", help="print what the run needs in memory and "
                   "hours, and exit")
    p.add_argument("--memory", type=float, metavar="GB", help="--plan for a card of this size, not "
                   "the one at hand")
    p.add_argument("--gpus", type=int, default=1, help="--plan for so many")
    p.add_argument("--mfu", type=float, default=.6, help="--plan: share of an A100's 312 TFLOP/s "
                   "that the run is assumed to reach")
    p.add_argument("--workers", type=int, help="processes that read pictures ahead (default 4, "
                   "toy 0)")
    p.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    p.add_argument("--keep-last", type=int, default=2, help="checkpoints kept")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument("--part", choices=("both", "clip", "llama"), default="both", help="of stage 0")
    p.add_argument("--show-batch", type=int, default=0, metavar="N", help="print N samples, exit")
    p.add_argument("--debug", action="store_true", help="tracebacks")
    for f in fields(Stage):
        if f.name != "source":
            kind = str if f.type is tuple else f.type
            p.add_argument(f"--{f.name.replace('_', '-')}", type=kind,
                           help="field of the recipe's stage")
    a = p.parse_args(argv)
    row = RECIPES[a.recipe][max(a.stage, 1) - 1]
    if a.base == "toy":
        row = replace(row, **TOY[a.recipe][max(a.stage, 1) - 1])
        row = replace(row, steps=0) if a.data else row
    given = {f.name: getattr(a, f.name) for f in fields(Stage)
             if f.name != "source" and getattr(a, f.name) is not None}
    for name in {"train", "losses"} & set(given):
        given[name] = tuple(filter(None, given[name].split(",")))
    if a.base == "toy":                 # never had ranks
        row = replace(row, groups=1)
    if a.loss == "token-mean":
        given["groups"] = 1
    if a.lora:                          # official: 2e-4 beside 2e-5 for the bridge
        row = replace(row, lr=10 * row.lr, projector_lr=row.lr)
    a.row = replace(row, **given)
    a.free = [n for n in ("pack", "checkpoint") if getattr(a, n) is None and a.base != "toy"
              and (n, a.accum > 1) != ("pack", True)]
    toy = a.base == "toy"
    for name, value in (("pack", 0 if toy or a.row.losses or a.accum > 1 else 6144),
                        ("optimizer", "adamw" if toy or a.row.losses else "adamw8"),
                        ("checkpoint", None if toy else "none"), ("workers", 0 if toy else 4)):
        if getattr(a, name) is None:
            setattr(a, name, value)
    for name, low in (("accum", 1), ("save_every", 1), ("keep_last", 1), ("threads", 0),
                      ("show_batch", 0), ("seed", 0), ("pack", 0), ("workers", 0), ("lora", 0),
                      ("gpus", 1), ("most_bad", 0), ("max_length", 0)):
        if getattr(a, name) < low:
            p.error(f"--{name.replace('_', '-')} must be at least {low}")
    r = a.row
    if not (0 <= r.lr < 10 and r.batch >= 1 and 0 < r.epochs < 1e6 and 0 <= r.warmup < 10 ** 6
            and 0 <= r.steps < 10 ** 6 and 0 <= r.clip < math.inf and 0 <= r.decay < math.inf
            and all(0 <= x < 10 for x in (r.warm_lr, r.min_lr, r.projector_lr)) and a.seed < 2 ** 32
            and (r.lr or r.schedule == "llava")):
        p.error("lr, batch, epochs, steps, warmup, decay, clip, warm-lr, min-lr, bridge-lr or seed "
                "is out of range")
    kinds = ("qformer",) if a.recipe in ("blip2", "minigpt4") else ("linear", "mlp")
    if not r.train or r.projector_type not in kinds:
        p.error(f"--train takes names of parts with a comma, --projector-type {' or '.join(kinds)}")
    if r.schedule not in ("llava", "lavis", "minigpt4"):
        p.error(f"--schedule {r.schedule!r} must be llava, lavis or minigpt4")
    if set(r.losses) - {"itc", "itm", "itg"} or bool(r.losses) == bool(r.template):
        p.error("--losses takes itc, itm and itg with a comma, for stage 1 of blip2 and no other")
    told = ("captions", "dialogue", "conversation", "short", "web", "details", "descriptions",
            "imagined")
    if r.told not in told:
        p.error(f"--told {r.told!r} must be one of {', '.join(told)}")
    if a.show_batch and (a.stage == 0 or r.losses):
        p.error("--show-batch is for stages 1 and 2, and not for BLIP-2's first, which has no "
                "labels")
    # what is given and would be passed over is refused
    begins = a.start or ("none" if a.stage == 1 and a.recipe != "sharegpt4v" else "stage 1")
    if a.stage and begins != "none" and a.recipe != "blip2" and not a.plan:
        for name in ("vision", "llm", "qformer", "projector"):
            if getattr(a, name):
                p.error(f"--{name} is a part of a new model, and this one begins with {begins}: "
                        "leave it out, or give --from none")
    if a.projector and (r.losses or begins != "none"):
        p.error("--projector is for a new bridge: stage 1, or stage 2 with --from none")
    if r.losses and (a.start or a.max_length or a.on_bad_sample == "skip"):
        p.error("--from, --max-length and --on-bad-sample skip are for stages with a LLaMA")
    if a.stage == 0 and (given or a.seed or a.data or a.start or a.projector or a.vision or a.llm):
        p.error("--stage 0 makes toy/weights with steps, rates and seed of its own: it takes "
                "--part, --output-dir, --resume, --overwrite and --threads")
    if a.overwrite and a.resume:
        p.error("--overwrite begins anew, --resume auto goes on: give one of them")
    if r.aspect not in (("squash",) if r.projector_type == "qformer" else ("square", "pad")):
        p.error(f"--aspect {r.aspect!r}: must be squash before a Q-Former, else square or pad")
    if r.batch % a.accum:
        p.error(f"--batch {r.batch} does not divide into --accum {a.accum} micro-batches")
    if not r.losses and (r.groups < 1 or r.batch % r.groups):
        p.error(f"--batch {r.batch} does not divide into --groups {r.groups}, the official ranks; "
                "give another, or --loss token-mean")
    if r.order not in ("shuffled", "modality"):
        p.error(f"--order {r.order!r} must be shuffled or modality")
    if a.pack and (a.accum > 1 or r.losses):
        p.error("--pack makes micro-batches of its own, of texts that a LLaMA reads; give --pack 0")
    if a.lora and "llm" not in r.train:
        p.error("--lora is for a stage that trains the LLaMA: stage 2 of llava and llava-1.5")
    if a.plan and (a.stage == 0 or r.losses):
        p.error("--plan is for stages with a LLaMA")
    if not 0 < a.mfu <= 1 or not (a.memory is None or 0 < a.memory < 1e5):
        p.error("--mfu is a share above 0, at most 1; --memory a number of GB")
    if a.offload and a.checkpoint not in ("attention", "full"):
        p.error("--offload goes with --checkpoint attention or full")
    return a
