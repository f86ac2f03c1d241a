"""The command line of train.py: one table of flags, their defaults, and what does not go together.

It is parsed before torch is imported, so that --help answers at once. What needs torch to be
judged is judged in trainer/machine.py and, for folders of models, in trainer/build.py."""

import argparse
import math
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path

from trainer.compare import curve_for
from trainer.schedules import SCHEDULES

# base -> (vision tower, LLaMA): folders beside this program, or ids on the hub
BASES = {"toy": ("toy/weights/clip", "toy/weights/llama"),
         "small": ("openai/clip-vit-base-patch16", "HuggingFaceTB/SmolLM2-360M-Instruct"),
         "7b": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"),
         "13b": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-13b-v1.5")}
LLAVA_TOWER = "openai/clip-vit-large-patch14"       # LLaVA's first: 224 pixels, 256 patches
# of the recipes with a Q-Former: EVA's ViT-g, what the Q-Former starts as, and, for MiniGPT-4, ends
EVA, BERT, FLAN = ("Salesforce/blip2-itm-vit-g", "google-bert/bert-base-uncased",
                   "Salesforce/blip2-flan-t5-xxl")

# the language models of BLIP-2 as published: a plan needs no network
KNOWN_KINDS = {"facebook/opt-2.7b": "opt", "facebook/opt-6.7b": "opt",
               "google/flan-t5-xl": "t5", "google/flan-t5-xxl": "t5"}

GOLDEN = str(Path(__file__).parents[1] / "tests/golden_losses.json")
CAPTION_STYLES = ("captions", "dialogue", "conversation", "short", "web", "mixed", "details",
                  "descriptions", "imagined")
LOSSES = {"itc", "itm", "itg"}                      # of a Q-Former


def flag(name, help=None, **more):
    """A row of the table: what argparse's add_argument takes."""
    return name, {"help": help, **more}


def count(name, help, default, **more):
    """A row of the table for a whole number."""
    return flag(name, help, type=int, default=default, **more)


# group of --help -> its flags; --recipe and --base take their choices in `parser`
FLAGS = {
    "start here": (
        flag("--stage", "1: the projector; 2: instructions; 0: the toy's parts", type=int,
             choices=(0, 1, 2)),
        flag("--recipe", "whose training is repeated", default="llava-1.5"),
        flag("--task", "what stage 2 of llava learns: conversations (default), or ScienceQA",
             choices=("scienceqa",)),
        flag("--base", "the parts to start from", default="toy"),
        flag("--data", "LLaVA JSON or JSONL; without it, the toy world"),
        flag("--images", "folder that the data's pictures are relative to", default="."),
        flag("--output-dir", "default: runs/<base>/<recipe>/stage<n>"),
        flag("--resume", "go on from the newest good checkpoint", choices=("auto",)),
        flag("--overwrite", "delete what the output folder holds", action="store_true"),
        count("--show-batch", "print N samples, exit", 0, metavar="N"),
        flag("--plan", "print what the run needs in memory and hours, and exit",
             action="store_true"),
        flag("--compare", "say at the end whether the loss is normal (the toy's stages)",
             action="store_true")),
    "the run": (
        count("--save-every", "steps between checkpoints", 100),
        count("--sample-every", "steps between descriptions of four held-out scenes of the toy "
              "world, which take time; 0: none (default: five times in a run)", None, metavar="N"),
        count("--keep-last", "checkpoints kept", 2),
        count("--seed", "of the order of samples and of new weights", 0),
        count("--threads", "CPU threads; 0: all cores", 0),
        flag("--eval-data", "a file like --data, its pictures in --images, that is not learned "
             "from: its loss goes to metrics.jsonl"),
        count("--eval-every", "steps between two looks at --eval-data (default 100)", None,
              metavar="N"),
        flag("--keep-best", "end with the weights of the lowest loss on --eval-data",
             action="store_true"),
        flag("--device", "cpu, cuda, or auto", default="auto"),
        flag("--dtype", "what the forward computes in; auto: bf16 where it is faster",
             choices=("auto", "fp32", "bf16"), default="auto"),
        flag("--part", "of stage 0; both: CLIP and LLaMA", default="both",
             choices=("both", "clip", "llama", "qformer")),
        flag("--compare-golden", "are the first losses of all toy stages those of this file?",
             nargs="?", const=GOLDEN, metavar="FILE"),
        flag("--write-golden", "measure that file anew", nargs="?", const=GOLDEN, metavar="FILE"),
        flag("--debug", "tracebacks", action="store_true")),
    "the parts": (
        flag("--vision", "CLIP folder or hub id, instead of the base's"),
        flag("--llm", "LLaMA folder or hub id, instead of the base's; for blip2 an OPT or a "
             "FlanT5, too"),
        flag("--qformer", "Q-Former's folder or hub id, instead of the base's; for stage 1 of "
             "blip2 the BERT that it begins as"),
        flag("--projector", "start a new projector from this file or folder"),
        flag("--from", "model to start stage 2 from; 'none' skips stage 1", dest="start")),
    "your data": (
        flag("--follow-links", "links in --images may lead out of it", action="store_true"),
        flag("--official-quirks", "learn nothing from samples that the official code masks with a "
             "warning", action="store_true"),
        count("--max-length", "cut samples after N tokens, the picture counted (official: 2048; "
              "default: never)", 0, metavar="N"),
        flag("--on-bad-sample", "error: refuse the data, naming its first bad rows; skip: go on "
             "without them and list each in bad_samples.jsonl", choices=("error", "skip"),
             default="error"),
        count("--most-bad", "with skip: more than so many samples end the run", 100, metavar="N"),
        count("--workers", "processes that read pictures ahead (default 4, toy 0)", None)),
    "memory and speed": (
        count("--pack", "samples in rows of N tokens, a row a micro-batch; 0: padded batches "
              "(default 6144, toy 0)", None, metavar="N"),
        count("--accum", "micro-batches a step, where not packed", 1),
        flag("--loss", "token-mean: --loss-groups 1, all tokens with loss of a step count the same",
             choices=("official", "token-mean"), default="official"),
        flag("--optimizer", "adamw8: bf16 weights and gradients, exact fp32 masters, 8-bit moments "
             "(default, but for the toy)", choices=("adamw", "adamw8")),
        flag("--stochastic", "adamw8 without masters: weights are rounded at random, a third less "
             "memory", action="store_true"),
        flag("--checkpoint", "what backward recomputes: norms and products; all but attention; "
             "all (default none)", choices=("none", "attention", "full")),
        flag("--offload", "keep what --checkpoint keeps in the host's memory", action="store_true"),
        flag("--offload-optimizer", "keep what adamw8 remembers of each weight (moments, masters) "
             "in the host's memory; the same bits", action="store_true"),
        flag("--offload-gradients", "add up the gradients of a step's micro-batches in the host's "
             "memory; adamw8 with --clip 0; the same bits", action="store_true"),
        count("--lora", "train additions of rank R to the LLaMA (official: 128), at ten times the "
              "rate; merged when saved", 0, metavar="R"),
        flag("--keep-adapter", "with --lora: write the additions unmerged, too, in PEFT's layout: "
             "adapter/", action="store_true"),
        flag("--quantize", "with --lora: hold the LLaMA's frozen weights in int8 or int4 (QLoRA); "
             "written out when saved", choices=("int8", "int4"))),
    "the plan": (
        flag("--memory", "--plan for a card of this size, not the one at hand", type=float,
             metavar="GB"),
        count("--gpus", "--plan for so many", 1),
        flag("--mfu", "--plan: share of an A100's 312 TFLOP/s that the run is assumed to reach",
             type=float, default=.6),
        flag("--pcie", "--plan: GB/s between host and GPU that offloading is assumed to reach",
             type=float, default=25., metavar="GB/s")),
}
LOWEST = {"accum": 1, "save_every": 1, "keep_last": 1, "threads": 0, "show_batch": 0, "seed": 0,
          "pack": 0, "workers": 0, "lora": 0, "gpus": 1, "most_bad": 0, "max_length": 0,
          "eval_every": 0, "sample_every": 0}


def parser(Stage, RECIPES):
    """The table as an ArgumentParser; a wrong command line is one line and exit code 2."""
    p = argparse.ArgumentParser(description="Run one stage of one recipe.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"error: {message}; see --help\n")
    choices = {"--recipe": RECIPES, "--base": BASES}
    for title, rows in FLAGS.items():
        group = p.add_argument_group(title)
        for name, options in rows:
            if name in choices:
                options = {**options, "choices": choices[name]}
            group.add_argument(name, **options)
    group = p.add_argument_group("fields of the recipe")
    for field in row_fields(Stage):
        kind = str if field.type is tuple else field.type
        group.add_argument(f"--{field.name.replace('_', '-')}", type=kind,
                           help="field of the recipe's stage")
    return p


def row_fields(Stage):
    """The fields of a recipe's row that are flags."""
    return [field for field in fields(Stage) if field.name != "source"]


def parse(Stage, RECIPES, changes, argv=None):
    """The command line: the recipe's row of this stage as args.row, each field overridable.

    changes: {base: {recipe: what differs from the rows of RECIPES, a dict a stage}}."""
    p = parser(Stage, RECIPES)
    args, given = p.parse_args(argv), {}
    if args.compare_golden or args.write_golden:
        check_alone(p, args)
        return args
    if args.stage is None:
        p.error("the following arguments are required: --stage")
    for field in row_fields(Stage):
        value = getattr(args, field.name)
        if value is not None:
            if field.type is tuple:
                value = tuple(filter(None, value.split(",")))
            given[field.name] = value
    args.row = recipe_row(args, RECIPES, changes, given)
    set_defaults(args)
    for name, lowest in LOWEST.items():
        if getattr(args, name) is not None and getattr(args, name) < lowest:
            p.error(f"--{name.replace('_', '-')} must be at least {lowest}")
    faults = chain(faults_of_row(args, args.row), faults_of_start(args, args.row, given),
                   faults_of_compare(args), faults_of_batch(args, args.row),
                   faults_of_held_out(args, args.row),
                   faults_of_memory(args, args.row))
    for is_wrong, message in faults:
        if is_wrong:
            p.error(message)
    return args


def check_alone(p, args):
    """The golden losses are of all stages, and no flag changes them."""
    given = [name for name, value in vars(args).items() if value != p.get_default(name)]
    if len(set(given) - {"debug"}) > 1:
        p.error("--compare-golden and --write-golden run every toy stage as it is: give one of "
                "them, and no other flag")


def recipe_row(args, RECIPES, changes, given):
    """The recipe's row (args.published), with the base's changes and then the flags."""
    place = max(args.stage, 1) - 1
    if args.task and (args.recipe, args.stage) == ("llava", 2):     # else: faults_of_start
        place = 2
    args.published = row = RECIPES[args.recipe][place]
    if args.recipe in changes.get(args.base, {}):
        row = replace(row, **changes[args.base][args.recipe][place])
    if args.base == "toy":
        if args.data:
            row = replace(row, steps=0)         # the file says how many
        row = replace(row, loss_groups=1)       # the toy was never trained on several GPUs
    if args.loss == "token-mean":
        given["loss_groups"] = 1
    if args.lora:                               # official: 2e-4 beside 2e-5 for the projector
        row = replace(row, lr=10 * row.lr, projector_lr=row.lr)
    if args.lora or args.optimizer == "adamw8":
        row = replace(row, muon=0.0)            # the toy's Muon is for whole matrices beside AdamW
    return replace(row, **given)


def set_defaults(args):
    """What depends on other flags. args.free: what fit_to_card may choose on a GPU."""
    toy, padded = args.base == "toy", args.accum > 1
    args.free = []
    if not toy:
        if args.pack is None and not padded:
            args.free.append("pack")
        if args.checkpoint is None:
            args.free.append("checkpoint")
    defaults = {"pack": 6144, "optimizer": "adamw8", "checkpoint": "none", "workers": 4}
    if toy or padded or args.row.losses:
        defaults["pack"] = 0
    if toy or args.row.losses:
        defaults["optimizer"] = "adamw"
    if toy:
        defaults["checkpoint"], defaults["workers"] = None, 0
    defaults["eval_every"] = 100 if args.eval_data else 0
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


# Each function yields rows (is it wrong?, what is said). What is given and would be passed over is
# refused, too.

def faults_of_row(args, row):
    in_range = (0 <= row.lr < 10 and row.batch >= 1 and 0 < row.epochs < 1e6
                and 0 <= row.warmup < 10 ** 6 and 0 <= row.steps < 10 ** 6
                and 0 <= row.muon < 10 and 0 <= row.clip < math.inf and 0 <= row.decay < math.inf
                and 0 <= row.warm_lr < 10 and 0 <= row.min_lr < 10 and 0 <= row.projector_lr < 10
                and args.seed < 2 ** 32
                and (row.lr or row.schedule == "llava"))    # the others divide by lr
    yield not in_range, ("lr, muon, batch, epochs, steps, warmup, decay, clip, warm-lr, min-lr, "
                         "projector-lr or seed is out of range")
    types = ("linear", "mlp")
    if args.recipe in ("blip2", "minigpt4"):
        types = ("qformer",)
    yield not row.train or row.projector_type not in types, (
        f"--train takes names of parts with a comma, --projector-type {' or '.join(types)}")
    yield row.schedule not in SCHEDULES, (
        f"--schedule {row.schedule!r} must be llava, lavis or minigpt4")
    yield set(row.losses) - LOSSES or bool(row.losses) == bool(row.template), (
        "--losses takes itc, itm and itg with a comma, for stage 1 of blip2 and no other")
    yield row.caption_style not in CAPTION_STYLES, (
        f"--caption-style {row.caption_style!r} must be one of {', '.join(CAPTION_STYLES)}")
    no_scenes = args.base != "toy" or args.data or row.losses or args.stage == 0
    yield args.sample_every and no_scenes, (
        "--sample-every describes scenes of the toy world, beside training on them: leave it out")
    yield args.show_batch and (args.stage == 0 or row.losses), (
        "--show-batch is for stages 1 and 2, and not for BLIP-2's first, which has no labels")


def faults_of_start(args, row, given):
    start = args.start or "stage 1"
    if not args.start and args.stage == 1 and args.recipe != "sharegpt4v":
        start = "none"
    # without --from nothing is loaded to look at: the parts are as good
    looks = (args.plan or args.show_batch) and not args.start
    if args.stage and start != "none" and args.recipe != "blip2" and not looks:
        for name in ("vision", "llm", "qformer", "projector"):
            yield getattr(args, name), (
                f"--{name} is a part of a new model, and this one begins with {start}: leave it "
                "out, or give --from none")
    yield args.qformer and row.projector_type != "qformer", (
        "--qformer is for the recipes that have one, blip2 and minigpt4")
    yield args.qformer and row.losses and args.base == "toy", (
        "--qformer: stage 1 of blip2 begins as a BERT, and the toy's at random: leave it out; or "
        "give it to stage 2")
    yield args.qformer and args.recipe == "blip2" and args.start, (
        "--qformer and --from both say where stage 2 of blip2 starts: give one of them")
    yield args.projector and (row.losses or start != "none"), (
        "--projector is for a new projector: stage 1, or stage 2 with --from none")
    yield row.losses and (args.start or args.max_length or args.on_bad_sample == "skip"), (
        "--from, --max-length and --on-bad-sample skip are for stages with a LLaMA")
    yield args.task and ((args.recipe, args.stage) != ("llava", 2) or not args.data), (
        "--task scienceqa is for --stage 2 of --recipe llava with --data FILE, which python -m "
        "instruct scienceqa writes")
    own = (given, args.seed, args.data, args.start, args.projector, args.vision, args.llm)
    yield args.stage == 0 and any(own), (
        "--stage 0 makes toy/weights with steps, rates and seed of its own: it takes --part, "
        "--output-dir, --resume, --overwrite and --threads")
    yield args.overwrite and args.resume, (
        "--overwrite begins anew, --resume auto goes on: give one of them")


def faults_of_compare(args):
    is_toy = args.base == "toy" and args.stage and not args.data
    yield args.compare and not is_toy, (
        "--compare knows the toy's stages 1 and 2 alone: leave --base and --data out")
    yield args.compare and is_toy and curve_for(args) is None, (
        f"--compare: there is no curve of stage {args.stage} of {args.recipe}; python -m "
        f"evaluate.curves --only {args.recipe} makes it")


def faults_of_batch(args, row):
    aspects = ("square", "pad")
    if row.projector_type == "qformer":
        aspects = ("squash",)
    yield row.image_aspect not in aspects, (
        f"--image-aspect {row.image_aspect!r}: must be squash before a Q-Former, else square or "
        "pad")
    yield row.batch % args.accum, (
        f"--batch {row.batch} does not divide into --accum {args.accum} micro-batches")
    yield not row.losses and (row.loss_groups < 1 or row.batch % row.loss_groups), (
        f"--batch {row.batch} does not divide into --loss-groups {row.loss_groups}, the official "
        "ranks; give another, or --loss token-mean")
    yield row.order not in ("shuffled", "modality"), (
        f"--order {row.order!r} must be shuffled or modality")
    yield args.pack and (args.accum > 1 or row.losses), (
        "--pack makes micro-batches of its own, of texts that a LLaMA reads; give --pack 0")
    yield row.muon and args.optimizer != "adamw", (
        "--muon takes the place of AdamW for some weights: give --optimizer adamw, or --muon 0")
    yield args.lora and "llm" not in row.train, (
        "--lora is for a stage that trains the LLaMA: stage 2 of llava and llava-1.5")
    yield args.plan and (args.stage == 0 or row.losses), "--plan is for stages with a LLaMA"
    yield not 0 < args.mfu <= 1 or args.memory is not None and not 0 < args.memory < 1e5, (
        "--mfu is a share above 0, at most 1; --memory a number of GB")
    yield args.offload and args.checkpoint not in ("attention", "full"), (
        "--offload goes with --checkpoint attention or full")


def faults_of_held_out(args, row):
    yield args.eval_data and (args.stage == 0 or row.losses), (
        "--eval-data is for stages with a LLaMA")
    yield args.eval_data and not args.eval_every, "--eval-every must be at least 1"
    yield (args.eval_every or args.keep_best) and not args.eval_data, (
        "--eval-every and --keep-best are about --eval-data FILE: give it, too")


def faults_of_memory(args, row):
    """Of the flags that save a GPU's memory."""
    to_host = args.offload_optimizer or args.offload_gradients
    yield to_host and (args.stage == 0 or row.losses), (
        "--offload-optimizer and --offload-gradients are for stages with a LLaMA")
    yield args.offload_optimizer and args.optimizer != "adamw8", (
        "--offload-optimizer moves what adamw8 remembers: give --optimizer adamw8, too")
    yield args.offload_gradients and (args.optimizer != "adamw8" or row.clip), (
        "--offload-gradients needs a step inside backward: give --optimizer adamw8 and --clip 0")
    yield args.quantize and not args.lora, (
        "--quantize is for weights that stay frozen, beside --lora: give --lora R, too")
    yield args.keep_adapter and not args.lora, (
        "--keep-adapter keeps what --lora trains: give --lora R, too")
    yield args.keep_adapter and args.quantize, (
        "--keep-adapter: beside --quantize the additions make up for what the codes lose, and no "
        "folder holds the coded weights that they belong to: leave one out")
    yield args.keep_adapter and row.projector_type == "qformer", (
        "--keep-adapter is for LLaVA's recipes: of a model with a Q-Former no adapter is loaded "
        "again: leave it out")
    yield args.keep_adapter and (args.start == "none" or args.stage == 1 and not args.start
                                 and args.recipe != "sharegpt4v"), (
        "--keep-adapter: an adapter belongs to the model that the run starts from: give --from "
        "FOLDER, or start from stage 1")
    yield not 0 < args.pcie < 1e5, "--pcie is a number of GB/s above 0"
