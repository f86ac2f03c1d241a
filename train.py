"""train.py: run one stage of one recipe.

    python train.py --stage 1                     align the bridge: pictures and captions
    python train.py --stage 2                     instruction tuning: pictures and conversations
    python train.py --stage 1 --show-batch 2      what is learned, in colour, and exit
    python train.py --stage 2 --plan --base 7b    what it needs in memory and hours, and exit
    python train.py --stage 0                     make the toy parts in weights/toy from nothing

    recipe      stage   starts from                     trains              learns to
                0       nothing                         CLIP; LLaMA, apart  see; read and answer
    llava,      1       CLIP + LLaMA + new bridge       bridge              turn patches into words
    llava-1.5   2       stage 1                         bridge + LLaMA      answer about pictures
    blip2       1       ViT + new Q-Former, no LLaMA    Q-Former            match pictures and texts
                2       stage 1 + LLaMA                 Q-Former, linear    turn queries into words
    minigpt4    1       blip2's Q-Former + LLaMA        linear              caption
                2       stage 1                         linear              describe at length
    sharegpt4v  1       llava-1.5's stage 1             half the ViT, rest  describe at length
                2       stage 1                         bridge + LLaMA      answer about pictures

A recipe is two rows of one table, below: what the paper and the released script say. Every field
is a flag too. `--base toy` (shipped) runs on two CPU cores; its sizes have their own small table.

One step is five movements, always in this order: schedule, data, accumulate, step, log.
Every batch is a function of (seed, stage, step) alone, so a run that is killed and resumed ends
with the same bits as one that was not, on the same machine with the same number of threads.
The toy's weights are fp32, and the forward runs in bf16 where the processor multiplies that faster;
at 7B weights are bf16, and the optimizer holds the rest of an fp32 master.
"""

import argparse
import math
import os
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Stage:
    """One row of a paper's table of hyper-parameters."""
    source: str                     # where the numbers come from
    bridge: str                     # linear | mlp | qformer
    train: tuple                    # parts that learn, by the names that the model has for them
    template: str                   # how the text is laid out, data.TEMPLATES; "": no LLaMA
    aspect: str                     # how pictures are made square, data.preprocess
    lr: float
    batch: int                      # samples a step
    epochs: float = 1
    steps: int = 0                  # 0: from epochs and the data
    warmup: float = .03             # of the steps; a whole number is a number of steps
    decay: float = 0.0
    clip: float = 0.0               # 0: not clipped, as the official runs were
    schedule: str = "llava"         # llava | lavis | minigpt4: see `factor_of`
    warm_lr: float = 0.0            # where the warm-up begins
    min_lr: float = 0.0             # where the cosine ends
    bridge_lr: float = 0.0          # the bridge's; 0: lr, as everything's
    losses: tuple = ()              # of the Q-Former alone: itc, itm, itg; (): the next token's
    groups: int = 8                 # the official ranks: the loss is a mean of their means
    order: str = "shuffled"         # of --data's samples; or modality: data.modality_order
    told: str = ""                  # what the toy world says of its pictures, `toy_sample`


RECIPES = {
    # [LLaVA] 2304.08485, scripts/pretrain.sh, finetune.sh. Paper: stage 2 with batch 32, 3 epochs;
    # a later script says 128. Not run by us at 7B.
    "llava": (
        Stage("LLaVA, April 2023", "linear", ("bridge",), "plain", "square", 2e-3, 128,
              told="captions"),
        Stage("LLaVA, April 2023", "linear", ("bridge", "llm"), "v1", "square", 2e-5, 32, 3,
              told="dialogue")),
    # [LLaVA15] 2310.03744, scripts/v1_5/pretrain.sh, finetune.sh. Not run by us at 7B.
    # quirk: stage 1 crops pictures to a square, stage 2 and inference pad them.
    "llava-1.5": (
        Stage("LLaVA-1.5, October 2023", "mlp", ("bridge",), "plain", "square", 1e-3, 256,
              told="captions"),
        Stage("LLaVA-1.5, October 2023", "mlp", ("bridge", "llm"), "v1", "pad", 2e-5, 128,
              order="modality", told="dialogue")),
    # [BLIP2] 2301.12597, LAVIS blip2_pretrain_stage{1,2}.yaml. Paper: stage 1 250k steps of 1,680
    # pictures, stage 2 80k of 1,920 (OPT), warm-up 2k, least rate 5e-5 in stage 2, beta2 .98; here
    # is the script. Its stage 2 speaks through OPT or FlanT5, which are not LLaMAs: this one is our
    # composition, InstructBLIP-Vicuna its nearest official relative. Not run by us at full size.
    "blip2": (
        Stage("BLIP-2, January 2023", "qformer", ("ln_vision", "qformer", "to_shared",
              "text_to_shared", "match", "head", "temp"), "", "squash", 1e-4, 1600, 10, warmup=5000,
              decay=.05, schedule="lavis", warm_lr=1e-6, min_lr=1e-5,
              losses=("itc", "itm", "itg"), told="short"),
        Stage("BLIP-2's stage 2 with a LLaMA: our composition", "qformer", ("bridge",), "blip2",
              "squash", 1e-4, 1024, 10, warmup=2000, decay=.05, schedule="lavis", warm_lr=1e-6,
              min_lr=1e-5, groups=16, told="captions")),
    # [MiniGPT4] 2304.10592, minigpt4_stage{1,2}_*.yaml. Paper: 400 steps in stage 2. Both stages
    # train one linear layer. It was made with Vicuna v0, of which only differences to LLaMA are
    # public: give yours by --llm. Not run by us at full size.
    "minigpt4": (
        Stage("MiniGPT-4, April 2023", "qformer", ("bridge.proj",), "minigpt4_caption", "squash",
              1e-4, 256, 4, 20000, 5000, .05, schedule="minigpt4", warm_lr=1e-6, min_lr=8e-5,
              groups=4, told="web"),
        Stage("MiniGPT-4, April 2023", "qformer", ("bridge.proj",), "minigpt4", "squash",
              3e-5, 12, 5, 1000, 200, .05, schedule="minigpt4", warm_lr=1e-6, min_lr=1e-5,
              groups=1, told="details")),
    # [ShareGPT4V] 2311.12793, its pretrain.sh and finetune.sh. Stage 1 goes on from LLaVA-1.5's
    # stage 1. The tuned tower is saved inside the model; officially in a folder apart.
    # quirk: block 23 is unlocked, but LLaVA reads the block before it, so that nothing moves it.
    "sharegpt4v": (
        Stage("ShareGPT4V, November 2023", "mlp", ("vision.blocks.12+", "bridge", "llm"), "plain",
              "square", 2e-5, 256, groups=16, told="descriptions"),
        Stage("ShareGPT4V, November 2023", "mlp", ("bridge", "llm"), "v1", "pad", 2e-5, 128,
              groups=16, order="modality", told="dialogue")),
}
# What two CPU cores need instead: a model 5,000 times smaller wants larger steps and fewer.
LLAVA_TOY = (dict(lr=1.2e-2, batch=16, steps=340, clip=1.0),
             dict(lr=1.5e-3, batch=12, steps=520, clip=1.0))
TOY = {"llava": LLAVA_TOY, "llava-1.5": LLAVA_TOY,
       "blip2": (dict(lr=1e-3, batch=32, steps=400, warmup=.1, clip=1.0, warm_lr=0., min_lr=1e-4),
                 dict(lr=2e-3, batch=16, steps=400, warmup=.05, clip=1.0, warm_lr=0., min_lr=2e-4)),
       "minigpt4": (dict(lr=1e-2, batch=16, steps=300, warmup=.05, clip=1.0, warm_lr=0.,
                         min_lr=8e-3),
                    dict(lr=3e-3, batch=12, steps=100, warmup=.05, clip=1.0, warm_lr=0.,
                         min_lr=1e-3)),
       "sharegpt4v": (dict(lr=1e-3, batch=12, steps=300, clip=1.0,
                           train=("vision.blocks.2+", "bridge", "llm")), LLAVA_TOY[1])}
TOY_QFORMER = dict(width=128, depth=4, heads=4, mlp=256, queries=16)
BASES = {"toy": ("weights/toy/clip", "weights/toy/llama"),
         "7b": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"),
         "13b": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-13b-v1.5")}
# of the recipes with a Q-Former: EVA's ViT-g, what the Q-Former starts as, and, for MiniGPT-4, ends
EVA, BERT, FLAN = ("Salesforce/blip2-itm-vit-g", "google-bert/bert-base-uncased",
                   "Salesforce/blip2-flan-t5-xxl")
SMALL = "openai/clip-vit-large-patch14"     # LLaVA's first tower: 224 pixels, 256 places


def arguments(argv=None):
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
        row = replace(row, lr=10 * row.lr, bridge_lr=row.lr)
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
            and all(0 <= x < 10 for x in (r.warm_lr, r.min_lr, r.bridge_lr)) and a.seed < 2 ** 32
            and (r.lr or r.schedule == "llava")):
        p.error("lr, batch, epochs, steps, warmup, decay, clip, warm-lr, min-lr, bridge-lr or seed "
                "is out of range")
    kinds = ("qformer",) if a.recipe in ("blip2", "minigpt4") else ("linear", "mlp")
    if not r.train or r.bridge not in kinds:
        p.error(f"--train takes names of parts with a comma, --bridge {' or '.join(kinds)}")
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
        p.error("--stage 0 makes weights/toy with steps, rates and seed of its own: it takes "
                "--part, --output-dir, --resume, --overwrite and --threads")
    if a.overwrite and a.resume:
        p.error("--overwrite begins anew, --resume auto goes on: give one of them")
    if r.aspect not in (("squash",) if r.bridge == "qformer" else ("square", "pad")):
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


if __name__ == "__main__":
    ARGS = arguments()              # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # spinning threads starve each other

import fcntl
import functools
import hashlib
import json
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter, deque
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import world
from clip import CLIP, LayerNorm, ViT, contrastive_loss, late_scores, read_tokenizer
from clip import Config as TowerConfig
from generate import ask, generate
from kernels import linear_cross_entropy
from kernels.adamw import AdamW
from llama import Config as LlamaConfig
from llama import Llama, start_copying
from projector import VLM, Queries, settings
from qformer import Config as QFormerConfig
from qformer import QFormer, Retriever, Words
from trainer.loader import BAD, LISTS, NOTHING, Journal, Rows

HERE = Path(__file__).parent


@dataclass
class Job:
    """What the loop needs to know of a stage."""
    model: torch.nn.Module
    optimizers: list
    steps: int
    batches: object                 # step -> list of micro-batches
    loss: object                    # micro-batch -> scalar, or several by name, to be summed
    factor: object                  # step -> multiple of the peak learning rate
    finish: object                  # folder -> writes the finished model into it
    clip: float = 0.0
    watch: object = None            # () -> list of dicts for samples.jsonl
    dtype: torch.dtype = torch.float32
    batch: int = 0                  # samples a step, for the log
    work: object = None             # micro-batch -> (tokens, FLOPs)
    samples: object = None          # Samples, where the micro-batches are from one
    held: dict | None = None        # name -> what optimizers hold, where that is a rank's share

    def __post_init__(self):
        self.held = self.held or self.trained()
        for o in self.optimizers:
            for g in o.param_groups:
                g["peak"] = g["lr"]

    def trained(self):
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------- many ranks
# torchrun starts a process for each GPU, a rank. The micro-batches of a step are dealt to them, and
# so are the rows of every large matrix: a rank keeps and steps its share, and borrows a layer's
# others while it runs (FSDP2). Gradients are summed, never averaged: weights of tokens know of all.

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device):
    """Find the other ranks, if torchrun started this one. Returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)           # kernels start on the current one
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                            timeout=timedelta(hours=1))         # to save 13B takes its time
    return device


def summed(*numbers):
    """The sums of numbers over ranks."""
    if ranks() == 1:
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    all_ = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(all_)
    return all_.tolist()


def gathered(items):
    """The items of all ranks (what JSON can say), in the order of the ranks."""
    if ranks() == 1:
        return items
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    text = json.dumps(items).encode()
    sizes = torch.zeros(ranks(), dtype=torch.int64, device=device)
    sizes[rank()] = len(text)
    dist.all_reduce(sizes)
    if int(sizes.max()) == len("[]"):           # as in nearly every step
        return []
    texts = torch.zeros(ranks(), int(sizes.max()), dtype=torch.uint8)
    texts[rank(), :len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = texts.to(device)
    dist.all_reduce(texts)
    rows = zip(texts.cpu(), sizes.tolist())
    return [item for row, size in rows for item in json.loads(bytes(row[:size].tolist()))]


def deal(model):
    """Leave each rank with its rows of every matrix whose rows can be dealt evenly, in whole blocks
    of adamw8's scales; all have the small rest, whose gradients `Update` sums."""
    if ranks() == 1:
        return
    whole = {p for p in model.parameters() if p.dim() != 2 or len(p) % ranks()
             or p.numel() // ranks() % 256}
    mesh = init_device_mesh(model.llm.embed.weight.device.type, (ranks(),))
    for part in (*model.llm.blocks, model):
        fully_shard(part, mesh=mesh, ignored_params=whole)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")
    model.always_look = True


def share(p):
    """What this rank has of a weight, in the same memory."""
    return torch.nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p


def put_together(x, dealt):
    """A tensor of which every rank has its rows, for rank 0, on the CPU."""
    if not dealt or not x.dim():
        return x
    parts = [torch.empty_like(x) for _ in range(ranks())]
    dist.all_gather([t.view(torch.uint8) for t in parts], x.contiguous().view(torch.uint8))
    return torch.cat([t.cpu() for t in parts]) if rank() == 0 else None


@contextmanager
def together(model):
    """All weights whole on all ranks; every rank must come here."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()


# ------------------------------------------------------------------------------- checkpoints
# Write aside, fsync, rename, then prune: whatever moment the power fails at, either the old
# checkpoint is whole or the new one is. A rename is the only step that others can see.

def sync(path):
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(aside, final):
    """fsync everything in the folder `aside` and give it its name in one step."""
    for path in sorted(aside.rglob("*")):
        sync(path)
    sync(aside)
    os.rename(aside, final)
    sync(final.parent)


def put(path, text):
    """Write a small file whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    sync(aside)
    os.replace(aside, path)


def digest(path):
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def save(job, out, step, keep):
    """out/step-N: weights that train, optimizer state, and trainer.json with their checksums."""
    final, aside = out / f"step-{step:06d}", out / f"step-{step:06d}.tmp"
    trained = job.trained()
    names = {id(q): (n, q is not trained[n]) for n, q in job.held.items()}
    weights = {n: put_together(q.data, q is not trained[n]) for n, q in job.held.items()}
    state = {f"{names[id(q)][0]}|{key}": put_together(value, names[id(q)][1])
             for o in job.optimizers for q, entry in o.state.items()
             for key, value in entry.items()}
    if rank():
        return
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_file({n: p.contiguous() for n, p in weights.items()},
                  aside / "trained.safetensors")
        save_file({n: v.contiguous() for n, v in state.items()}, aside / "optimizer.safetensors")
        files = {p.name: digest(p) for p in sorted(aside.iterdir())}
        (aside / "trainer.json").write_text(json.dumps({"step": step, "sha256": files}) + "\n")
        if final.exists():                          # `restore` passed it over: it is damaged
            shutil.rmtree(final)
        publish(aside, final)
    except (OSError, data.SafetensorError) as error:       # a full disk arrives as either
        shutil.rmtree(aside, ignore_errors=True)
        raise data.TrainingFailed(f"{aside}: {error}; the checkpoint before is whole: free space "
                                  "and go on with --resume auto") from None
    # a later one is damaged, or this run would have begun there: it is none of those to keep
    for old in sorted(f for f in out.glob("step-??????") if f.name <= final.name)[:-keep]:
        shutil.rmtree(old)


def restore(job, out):
    """Load the newest good checkpoint; returns its step, 0 if there is none."""
    for folder in sorted(out.glob("step-??????"), reverse=True):
        try:
            trainer = json.loads((folder / "trainer.json").read_text())
            if folder.name != f"step-{trainer['step']:06d}":
                raise ValueError(f"trainer.json says step {trainer['step']}")
            if any(digest(folder / n) != d for n, d in trainer["sha256"].items()):
                raise ValueError("a checksum differs")
            weights = data.Weights([folder / "trained.safetensors"])
            state = data.Weights([folder / "optimizer.safetensors"])
        except (OSError, ValueError, KeyError, TypeError, data.Failure) as error:
            print(f"{folder} passed over: {error}", file=sys.stderr)
            continue
        trained = job.trained()
        shapes = {n: tuple(p.shape) for n, p in trained.items()}
        if {n: weights.shape(n) for n in weights} != shapes:
            raise data.BadModel(f"{folder}: holds other weights than this run trains; resume with "
                                "the flags it was started with")
        mine = lambda name, x: x if job.held[name] is trained[name] or not x.dim() else (
            x.chunk(ranks())[rank()])
        with torch.no_grad():
            for name, q in job.held.items():
                q.copy_(mine(name, weights[name]))
        names = {n: (o, q) for o in job.optimizers for g in o.param_groups for q in g["params"]
                 for n, held in job.held.items() if held is q}
        for key in state:
            name, entry = key.split("|")
            optimizer, q = names[name]
            device = "cpu" if type(optimizer) is AdamW and entry == "step" else q.device
            optimizer.state[q][entry] = mine(name, state[key]).to(device, copy=True)
        return trainer["step"]
    return 0


# ------------------------------------------------------------------------------------ the loop

class Stop:
    """Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.code = 0
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            signal.signal(number, lambda n, frame, code=code: self.ask(n, code))
        if ranks() > 1:                 # torchrun sends SIGTERM, too, when a rank has died
            told, tells = os.pipe()
            os.set_blocking(tells, False)
            signal.set_wakeup_fd(tells)
            threading.Thread(target=self.patience, args=(told,), daemon=True).start()

    @staticmethod
    def patience(told):
        """One that waits for a dead rank runs no Python: this thread ends it."""
        os.read(told, 1)
        time.sleep(25)
        print("error: asked to stop 25 s ago, and the other ranks do not answer: go on with "
              "--resume auto", file=sys.stderr, flush=True)
        os._exit(1)

    def ask(self, number, code):
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = code


def rewind(path, step):
    """Drop the lines of a .jsonl that a resumed run will write again, and one cut short."""
    if path.exists():
        lines = [x for x in path.read_text().splitlines(True) if x.endswith("}\n")]
        put(path, "".join(x for x in lines if json.loads(x)["step"] <= step))


class Update:
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
            if ranks() == 1 or q is not p:          # else all ranks' gradients are needed first
                p.register_post_accumulate_grad_hook(functools.partial(self.now, q))

    def now(self, q, p):
        if self.last:
            self.take(p, q)
            self.one(q)

    def take(self, p, q):
        """Bring a gradient to where the optimizer looks for it."""
        if q is not p and p.grad is not None:
            q.grad, p.grad = p.grad.to_local(), None
        elif q is p and ranks() > 1:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        if q.grad is not None:                      # what all ranks hold is counted once
            square = torch.linalg.vector_norm(q.grad, dtype=torch.float32).square()
            self.squares.append(square / ranks() if q is p else square)

    def one(self, q):
        if q.grad is not None:
            self.steps[id(q)].step()
            q.grad = None

    def norm(self):
        """After the last backward: the gradients' norm, and, inside, what it has not reached (of
        earlier micro-batches, where the last was text alone)."""
        if not self.inside and ranks() == 1:
            return float(torch.nn.utils.clip_grad_norm_([p for p, _ in self.pairs],
                                                        self.job.clip or math.inf))
        for p, q in self.pairs:
            if ranks() > 1 and q is p or p.grad is not None:
                self.take(p, q)
                if self.inside:
                    self.one(q)
        squares, self.last, self.squares = self.squares, False, []
        norm = math.sqrt(summed(float(sum(squares)))[0])
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


def ahead(batches, step):
    """(micro-batch, is it the step's last?, seconds that it was waited for)."""
    began, held = time.perf_counter(), None
    following = iter(batches(step))
    while True:
        micro = next(following, None)
        waited = time.perf_counter() - began
        if held:
            yield held[0], micro is None, held[1]
        if micro is None:
            return
        held, began = (micro, waited), time.perf_counter()


def product_rate(device):
    """FLOPs a second of a bf16 product of 8192³ on this GPU: what utilisation is a share of."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    spans = []
    for _ in range(30):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        spans.append(time.perf_counter() - began)
    return 2 * 8192 ** 3 / sorted(spans[10:])[10]


class Speed:
    """Figures of the last 50 steps: how fast, of what is possible, and waiting for data how much.

    MFU is the share of `product_rate` that useful FLOPs make, what is computed again not counted;
    there is none on a CPU. Peak memory: the GPU's, or this process's."""

    def __init__(self, device, steps):
        self.device, self.left, self.steps = device, steps, deque(maxlen=50)
        self.rate = product_rate(device) if device.type == "cuda" else 0
        self.began = time.perf_counter()

    def step(self, samples, tokens, flops, waited):
        """A step is done. Returns its figures."""
        now = time.perf_counter()
        self.steps.append((now - self.began, samples, tokens, flops, waited))
        self.began, self.left = now, self.left - 1
        seconds, samples, tokens, flops, waited = map(sum, zip(*self.steps))
        cuda = self.device.type == "cuda"
        peak = (torch.cuda.max_memory_allocated(self.device) if cuda else
                1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return {"samples_per_second": round(samples / seconds, 1),
                **({"tokens_per_second": round(tokens / seconds)} if tokens else {}),
                **({"mfu": round(flops / seconds / self.rate, 3)} if flops and cuda else {}),
                "peak_gb": round(peak / 1e9, 2), "data_wait": round(waited / seconds, 3),
                "eta": round(self.left * seconds / len(self.steps))}


def fit(job, out, args):
    """Train to the end; returns an exit code. Raises data.TrainingFailed on NaN or infinity."""
    try:
        return loop(job, out, args)
    finally:
        if job.samples:
            job.samples.close()                     # workers that outlive it end in a traceback


def loop(job, out, args):
    """See `fit`."""
    first = rank() == 0                             # who writes
    for left in out.glob("step-??????.tmp") if first else ():   # of a kill in the middle of a save
        shutil.rmtree(left)
    step = restore(job, out) if args.resume else 0
    for name in ("metrics.jsonl", "samples.jsonl", *LISTS) if first else ():
        rewind(out / name, step)
    if job.samples:
        job.samples.journal.begin(step, first)
    stop, started, told, update = Stop(), time.time(), 0.0, Update(job)
    weight = next(iter(job.trained().values()))
    speed = Speed(weight.device, job.steps - step)
    bar = tqdm(total=job.steps, initial=step, disable=not (first and sys.stderr.isatty()))

    def stopped(loss, norm):
        numbers = range(step * job.batch, (step + 1) * job.batch)
        if first:
            (out / f"nan-step-{step + 1}.json").write_text(json.dumps(
                {"step": step + 1, "loss": str(loss), "grad_norm": str(norm), "samples": [
                    job.samples.id(i) if job.samples else i for i in numbers]}) + "\n")
        raise data.TrainingFailed(f"step {step + 1}: loss {loss}, gradient norm {norm}: stopped "
                                  f"after step {step}, no update of this one is kept; lower --lr "
                                  "or look at the data")

    def agree(loss, usable):
        """The ranks add up their loss and usable samples, and agree when to stop."""
        loss, usable, term, ctrl = summed(float(loss), usable, stop.code == 143, stop.code == 130)
        stop.code = (143 if term else 130 if ctrl else 0) if ranks() > 1 else stop.code
        return loss, usable

    while step < job.steps:
        # schedule
        for o in job.optimizers:
            for g in o.param_groups:
                g["lr"] = g["peak"] * job.factor(step)
        # data, accumulate
        loss, told_apart, work, waited, usable = 0.0, Counter(), (0, 0), 0.0, 0
        update.last = False
        for micro, update.last, seconds in ahead(job.batches, step):
            with torch.autocast(weight.device.type, job.dtype,
                                enabled=job.dtype not in (torch.float32, weight.dtype)):
                made = job.loss(micro)
                part = sum(made.values()) if type(made) is dict else made
            loss = loss + part.detach()
            for name, value in made.items() if type(made) is dict else ():
                told_apart[name] += float(value.detach())
            usable += len(micro.counts) if type(micro) is Micro else 1
            if update.last:                 # waits for the GPU
                loss, usable = agree(loss, usable)
                if not math.isfinite(loss):
                    stopped(loss, "not computed")
                update.last = usable > 0    # adamw8 steps inside this backward
            if part.requires_grad:          # text alone has nothing to teach a bridge
                part.backward()
            waited += seconds
            work = [a + b for a, b in zip(work, job.work(micro) if job.work else (0, 0))]
        # step; without a usable sample there is none
        if usable:
            if not math.isfinite(norm := update.norm()):
                stopped(loss, norm)
            update.step()
        else:
            norm = 0.
            update.drop()
        step += 1
        # log
        line = {"step": step, "loss": round(loss, 5) if usable else None,
                "grad_norm": round(norm, 4),
                **{name: round(value, 5) for name, value in told_apart.items()},
                "lr": job.optimizers[-1].param_groups[-1]["lr"],
                # tokens of all ranks; the FLOPs are this GPU's, as its MFU is
                **speed.step(job.batch, *summed(work[0]), work[1], waited)}
        if first:
            with open(out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
        bar.set_postfix({k: line[k] for k in ("loss", "tokens_per_second", "mfu", "peak_gb",
                                              "data_wait") if k in line})
        bar.update()
        if first and bar.disable and time.time() - told > 10:
            told = time.time()
            shown = f"loss {loss:.3f}" if usable else "no usable sample"
            print(f"step {step}/{job.steps}  {shown}  {told - started:.0f} s, "
                  f"{line['eta']:,} s left, {line['samples_per_second']} samples/s, "
                  f"{line['data_wait']:.1%} waiting for data", flush=True)
        if job.watch and (step == job.steps or step % max(1, job.steps // 5) == 0):
            with together(job.model):
                seen = [json.dumps({"step": step, **x}) + "\n" for x in job.watch()]
            if first:
                with open(out / "samples.jsonl", "a") as f:
                    f.writelines(seen)
        if stop.code or step % args.save_every == 0 or step == job.steps:
            save(job, out, step, args.keep_last)
        if stop.code:
            if first:
                print(f"stopped at step {step}, saved; go on with --resume auto", file=sys.stderr)
            return stop.code
    bar.close()
    for line in job.samples.journal.report() if first and job.samples else ():
        print(line, file=sys.stderr)
    with together(job.model):
        if first:
            aside = out / "model.tmp"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            job.finish(aside)
            plot(out)                       # before the model, which says that all is done
            publish(aside, out / "model")
            print(f"{out / 'model'} written after {job.steps} steps, {time.time() - started:.0f} s")
    return 0


def plot(out):
    """loss.png from metrics.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([x["step"] for x in lines], [x["loss"] for x in lines])
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(out / "loss.png", dpi=100)
    pyplot.close(figure)


# ----------------------------------------------------------------------- stages 1 and 2: samples

DETAILS = 300           # MiniGPT-4 curated 3,500 pictures after five million pairs


def toy_sample(seed, stage, index, told):
    """Sample of the toy world, a function of its arguments: (picture, conversation).

    told: captions (short ones and descriptions), dialogue, conversation (neither descriptions nor
    reasoning in it), short (one of five short captions), web (noisy ones), descriptions, details
    (those of a few pictures, again and again), imagined (descriptions by somebody who has read a
    short caption and not seen the picture)."""
    if told == "details":
        index %= DETAILS
    scene, dice = world.scene(f"{seed}-{stage}-{index}"), random.Random(f"{seed}-{stage}-{index}")
    if told not in ("dialogue", "conversation"):
        text = (world.description(scene) if told in ("details", "descriptions") else
                world.web_caption(scene, dice) if told == "web" else
                world.imagined(scene, dice) if told == "imagined" else
                dice.choice([world.description(scene)] * 5 * (told == "captions")
                            + world.captions(scene)))
        return world.draw(scene), [{"from": "human", "value": "<image>\n" + world.DESCRIBE[1]},
                                   {"from": "gpt", "value": text}]
    # what the shipped LLaMA is weakest at, oftener: lists of what fits a word, and of everything
    all_three = told == "dialogue"
    pairs = world.dialogue(scene, dice, 5, (6, 6, 5, 8, 9, 30, 8, 12, 20 * all_three, 4),
                           .25 * all_three)
    talk = [{"from": who, "value": text} for pair in pairs
            for who, text in zip(("human", "gpt"), pair)]
    talk[0]["value"] = "<image>\n" + talk[0]["value"]
    return world.draw(scene), talk


class Samples:
    """Where samples come from: the toy world, without end, or a file in LLaVA's format.

    Without --on-bad-sample skip a file with bad samples is refused here, before anything loads."""

    def __init__(self, args):
        self.args = args
        self.rows = Rows(args.data, self.check) if args.data else None
        self.epoch, self.order, self.drawn = -1, (), {}
        self.ahead = self.journal = None        # micro-batches that workers make ahead
        if self.rows and args.on_bad_sample == "error":
            self.rows.refuse()

    def steps(self):
        row = self.args.row
        if row.steps:
            return row.steps
        if not self.rows:
            raise data.Usage("the toy world has no end: give --steps")
        steps = math.ceil(len(self.rows) * row.epochs / row.batch)
        if steps >= 10 ** 6:
            raise data.Usage(f"{steps:,} steps, a million or more: give a larger --batch, or fewer "
                             "--epochs")
        if steps == 1 and row.schedule == "llava" and row.warmup:
            raise data.Usage(f"{len(self.rows)} samples are one step, and the rate of the first "
                             "step is 0: give more --epochs or a smaller --batch")
        return steps

    def number(self, index):
        """Where the run's sample number `index` is in the file; every epoch has an order of its
        own. Of the toy world: the index."""
        if not self.rows:
            return index
        epoch, at = divmod(index, len(self.rows))
        if epoch != self.epoch:
            dice, row = torch.Generator().manual_seed(self.args.seed * 1000 + epoch), self.args.row
            if row.order == "modality":
                order = data.modality_order(self.rows.words, row.batch // row.groups, row.groups,
                                            dice)
            else:
                order = torch.randperm(len(self.rows), generator=dice).tolist()
            self.epoch, self.order = epoch, array("q", order)
        return self.order[at]

    def close(self):
        """The workers go."""
        self.ahead = None

    def used(self, step):
        """Numbers of the samples that the first `step` steps have drawn."""
        return {self.number(i) for i in range(min(step * self.args.row.batch, len(self.rows)))}

    def fault(self, index):
        """What was found wrong with the sample when the file was read, or None."""
        return self.rows.bad.get(self.number(index)) if self.rows else None

    def id(self, index):
        return self.rows[self.number(index)]["id"] if self.rows else index

    def name(self, index):
        return f"sample {self.id(index)}" if self.rows else f"toy sample {index}"

    def sample(self, index):
        """Number `index` of the run, whatever the epoch: a row of the file, or of the toy world
        {image: the picture itself, conversations}."""
        if self.rows is not None:
            return self.rows[self.number(index)]
        if index not in self.drawn:             # asked for its words, then for its picture
            if len(self.drawn) > 2 * self.args.row.batch:
                self.drawn.clear()
            self.drawn[index] = toy_sample(self.args.seed, self.args.stage, index,
                                           self.args.row.told)
        picture, talk = self.drawn[index]
        return {"image": picture, "conversations": talk}

    def asked(self, index):
        """MiniGPT-4's instruction. quirk: one for a batch, not for a sample."""
        if self.args.row.template != "minigpt4":
            return ""
        dice = random.Random(f"{self.args.seed}-{index // self.args.row.batch}")
        # the toy LLaMA knows the words of its own
        return dice.choice(world.DESCRIBE if self.rows is None else data.INSTRUCTIONS)

    def check(self, sample):
        """Raises data.BadData for a row that cannot be trained on, without counting its tokens."""
        row = self.args.row
        if row.template:
            data.sample_pieces(sample, row.template)
        elif len(data.images_of(sample)) != 1:
            many = len(data.images_of(sample)) or "no"
            raise data.BadData(f"{many} pictures; BLIP-2 learns from one and its caption: correct "
                               "the row")
        elif not data.caption_text(sample["conversations"][-1]["value"]):
            raise data.BadData("its caption has no words: correct the row, or take it out")

    def read(self, index):
        """(picture, conversation) as its template learns it; of a file the picture's name. Text
        alone has None, and a sample of several pictures their list."""
        sample, template = self.sample(index), self.args.row.template
        talk = data._lesson(sample, template, self.asked(index)) if template else (
            sample["conversations"])
        return sample.get("image"), talk

    def pictures(self, sample):
        """The pictures themselves, in order. Raises data.Failure."""
        if self.rows is None:
            return data.images_of(sample)
        links = getattr(self.args, "follow_links", False)
        return [data.load_image(data.picture_path(self.args.images, name, links))
                for name in data.images_of(sample)]

    def __getitem__(self, index):
        """`read`, with the picture itself in place of its name."""
        pictures = self.pictures(self.sample(index)) or [None]
        return pictures[0] if len(pictures) == 1 else pictures, self.read(index)[1]


class Micro(NamedTuple):
    """A micro-batch: what VLM.loss takes, and the sizes of its texts after splicing."""
    ids: torch.Tensor               # (B, T); packed, (1, T): all texts in one row
    labels: torch.Tensor            # (B, T)
    pixels: torch.Tensor | None     # (n, 3, S, S)
    keep: torch.Tensor | None       # (B, T); packed, None
    weights: torch.Tensor | None    # (B, T); None: the mean over what is learned
    lengths: list | None            # packed: ids of each text
    counts: list                    # of each text: its tokens, learned ones, pictures
    questions: list | None          # of each picture, for a Q-Former that reads; None: reads not
    left_out: list                  # (BAD or NOTHING, number in the file, why) of samples


class Batches(torch.utils.data.Dataset):
    """step -> this rank's micro-batches, one after the other.

    A step is planned from its texts alone: which samples stand in which micro-batch, and what each
    learned token of theirs weighs. Officially the loss is the mean over the learned tokens of one
    rank's 16 samples (stage 1: 32), then the mean over 8 ranks. So

        weight of a token = 1 / (groups · learned tokens of its group)      group: 16 in a row

    and a step's loss is a plain sum, however it is cut into rows, micro-batches or ranks. Pictures
    are read when a micro-batch is made, by workers ahead of time if there are any: it is a function
    of (step, its number) alone, whoever makes it.

    A sample that cannot be used, or teaches nothing, has no place in a micro-batch. One micro-batch
    in which nobody is left is passed over; among several ranks it becomes a `blank` one, so that
    all come to the same places."""

    def __init__(self, samples, model, args, rank=0, ranks=1):
        self.samples, self.args, self.rank, self.ranks = samples, args, rank, ranks
        self.left_out = []
        self.words, self.side, self.places = model.words, model.image_size, model.places()
        self.reads = model.reader is not None
        self.device, self.planned = model.llm.embed.weight.device, (None, None)
        if not args.pack and args.row.batch % (args.accum * ranks):
            raise data.Usage(f"--batch {args.row.batch} does not divide into --accum {args.accum} "
                             f"micro-batches on each of {ranks} ranks; give another, or --pack")

    def text(self, index):
        """(ids, labels) of a sample. Raises data.Failure with its name; data.NothingToLearn, which
        says why, where no token of it is learned."""
        args, samples = self.args, self.samples
        try:
            return data.encode_sample(
                samples.sample(index), args.row.template, self.words, self.places, args.pack,
                args.max_length, args.official_quirks, asked=samples.asked(index))
        except data.Failure as error:
            raise type(error)(f"{samples.name(index)}: {error}") from None

    def size(self, ids):
        return len(ids) + (self.places - 1) * ids.count(data.IMAGE)

    def plan(self, step):
        """[[(index, ids, labels, weight)]]: the samples of each micro-batch of all ranks.

        Samples with nothing to learn are left out."""
        if self.planned[0] == step:
            return self.planned[1]
        row, first = self.args.row, step * self.args.row.batch
        texts, left_out, causes = [], [], Counter()
        for index in range(first, first + row.batch):
            text = [], []
            try:
                if self.samples.fault(index) is None:       # else it was listed at the start
                    text = self.text(index)
            except data.NothingToLearn as error:
                left_out.append((NOTHING, self.samples.number(index), str(error)))
                causes[str(error).removeprefix(f"{self.samples.name(index)}: ")] += 1
            except data.Failure as error:
                if self.args.on_bad_sample == "error":
                    raise
                left_out.append((BAD, self.samples.number(index), str(error)))
            texts.append(text)
        learned = [sum(x != data.IGNORE for x in labels) for _, labels in texts]
        if not any(learned) and self.args.on_bad_sample == "error":
            why = "; ".join(f"{n} of them: {cause}" for cause, n in causes.most_common())
            raise data.BadData(f"{self.samples.name(first)} and the {row.batch - 1} after it have "
                               f"nothing to train on: {why}")
        group = row.batch // row.groups
        sums = [sum(learned[i:i + group]) for i in range(0, row.batch, group)]
        taught = [(first + i, *text, 1 / (row.groups * sums[i // group]))
                  for i, text in enumerate(texts) if learned[i]]
        if self.args.pack:
            rows = data.pack([self.size(t[1]) for t in taught], self.args.pack)
            micros = [[taught[i] for i in row] for row in rows]
        else:
            size = row.batch // (self.args.accum * self.ranks)
            micros = [[t for t in taught if (t[0] - first) // size == m]
                      for m in range(row.batch // size)]
        self.planned, self.left_out = (step, [m for m in micros if m]), left_out
        return self.planned[1]

    def __getitem__(self, at):
        """Micro-batch (step, number), or the data.Failure that it met: a worker must not raise."""
        step, number = at
        try:
            planned = self.plan(step)
            left_out = list(self.left_out) if number == 0 else []
            # a rank that is dealt one less, or nobody who can be used, gets a blank one
            dealt = planned[number] if number < len(planned) else []
            chosen, pixels = [], []
            for sample in dealt:
                try:
                    pictures = self.pictures(sample)
                except data.Failure as error:       # what it weighs is lost: the others are planned
                    if self.args.on_bad_sample == "error":
                        raise
                    left_out.append((BAD, self.samples.number(sample[0]), str(error)))
                    continue
                chosen.append(sample)
                pixels += pictures
        except data.Failure as error:
            return error
        if not chosen:
            return self.blank(left_out)
        texts = [(ids, labels) for _, ids, labels, _ in chosen]
        lengths = [len(ids) for ids, _ in texts]
        weights = torch.tensor([t[-1] for t in chosen])
        if self.args.pack:
            ids, labels = (torch.tensor([[x for t in texts for x in t[i]]]) for i in (0, 1))
            weights, keep = weights.repeat_interleave(torch.tensor(lengths))[None], None
        else:
            ids, labels = data.collate(texts, self.words.pad)
            keep = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
            weights = weights[:, None].expand(ids.shape)
            if len(planned) == self.args.row.groups == self.ranks == 1 and chosen == dealt:
                weights = None              # one group in one micro-batch: the plain mean
        counts = [(sum(x != data.IMAGE for x in ids), sum(x != data.IGNORE for x in labels),
                   ids.count(data.IMAGE)) for ids, labels in texts]
        return Micro(ids, labels, torch.cat(pixels) if pixels else None, keep, weights,
                     lengths if self.args.pack else None, counts,
                     [data.question(self.samples.read(i)[1]) for i, ids, _, _ in chosen
                      if data.IMAGE in ids] if self.reads else None, left_out)

    def blank(self, left_out):
        """A micro-batch without a sample: two tokens that weigh nothing."""
        ids = torch.full((1, 2), self.words.pad)
        labels = torch.tensor([[data.IGNORE, self.words.pad]])
        packed = bool(self.args.pack)
        return Micro(ids, labels, None, None if packed else torch.ones(1, 2, dtype=torch.bool),
                     torch.zeros(1, 2), [2] if packed else None, [], None, left_out)

    def pictures(self, planned):
        """[pixels (1, 3, S, S)] of a planned sample. Raises data.Failure with its name."""
        try:
            return [data.preprocess(picture, self.side, self.args.row.aspect)
                    for picture in self.samples.pictures(self.samples.sample(planned[0]))]
        except data.Failure as error:
            raise type(error)(f"{self.samples.name(planned[0])}: {error}") from None

    def numbers(self, first, last):
        """Of this rank's micro-batches in steps first .. last-1, all ranks having as many."""
        for step in range(first, last):
            try:
                many = -(-max(1, len(self.plan(step))) // self.ranks) * self.ranks
            except data.Failure:
                many = self.ranks           # __getitem__ will meet it and hand it over
            yield from ((step, number) for number in range(self.rank, many, self.ranks))

    def __call__(self, step):
        if self.args.workers and self.samples.ahead is None:
            self.samples.ahead = iter(torch.utils.data.DataLoader(
                self, batch_size=None, sampler=self.numbers(step, self.samples.steps()),
                num_workers=self.args.workers, worker_init_fn=apart, generator=torch.Generator(),
                multiprocessing_context="fork",     # they share the block of `Rows`
                pin_memory=self.device.type == "cuda"))
        left_out = []
        for at in self.numbers(step, step + 1):
            micro = next(self.samples.ahead) if self.args.workers else self[at]
            if isinstance(micro, data.Failure):
                raise micro
            left_out += micro.left_out
            if not micro.counts and self.ranks == 1:
                continue
            yield micro._replace(**{name: t.to(self.device, non_blocking=True)
                                    for name, t in micro._asdict().items() if torch.is_tensor(t)})
        if self.samples.journal:
            self.samples.journal.add(step + 1, gathered(left_out))


def apart(worker):
    """A worker's first act. Ctrl-C, and what a scheduler sends to the whole group, is for the
    process that trains: it saves, and ends its workers."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def make_batches(samples, model, args, out):
    """step -> this rank's micro-batches."""
    return Batches(samples, model, args, rank(), ranks())


def cosine(step, steps, warmup):
    """Linear warm-up over ceil(warmup · steps), or `warmup` from 1 on, then half a cosine to 0. The
    first update is 0, as in the official runs."""
    warm = warmup if warmup >= 1 else math.ceil(warmup * steps)
    if step < warm:
        return step / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def factor_of(row, steps):
    """step -> multiple of the peak learning rate, of a recipe's row.

    llava       `cosine`
    lavis       quirk: the rate stands still within an epoch, and only the first one warms up:
                after 5,000 steps at the latest it stays at the peak until epoch 1
    minigpt4    quirk: the cosine counts the steps of the warm-up too, so that after it the rate
                falls at once to where the cosine has got to meanwhile"""
    if row.schedule == "llava":
        return lambda step: cosine(step, steps, row.warmup)
    warm = row.warmup if row.warmup >= 1 else math.ceil(row.warmup * steps)
    low, start = row.min_lr / row.lr, row.warm_lr / row.lr
    epoch = math.ceil(steps / row.epochs) if row.schedule == "lavis" else 1
    ends = row.epochs if row.schedule == "lavis" else steps

    def factor(step):
        if step < warm and (row.schedule == "minigpt4" or step < epoch):
            return start + (1 - start) * step / warm
        return low + (1 - low) * (1 + math.cos(math.pi * (step // epoch) / ends)) / 2
    return factor


def set_trained(model, parts, lora=0):
    """The whole freezing policy: only the named parts learn, of a LLaMA with LoRA only what that
    added. A part that ends in a number and + is a list from there on. Returns {name: parameter}.

    Raises data.Usage for a name that the model has no parameters for."""
    model.requires_grad_(False)
    for part in parts:
        top, first = re.fullmatch(r"(.*?)(?:\.(\d+)\+)?", part).groups()
        found = [p for n, p in model.named_parameters() if f"{n}.".startswith(f"{top}.") and (
            first is None or (at := n[len(top) + 1:].split(".")[0]).isdigit()
            and int(at) >= int(first))]
        if not found:
            tops = ", ".join(dict.fromkeys(n.split(".")[0] for n, _ in model.named_parameters()))
            raise data.Usage(f"--train {part}: the model has no such part; it has {tops}, and "
                             "theirs with a dot")
        for p in found:
            p.requires_grad_(True)
    for n, p in model.named_parameters() if lora else ():
        if n.startswith("llm.") and not n.endswith((".a", ".b")):
            p.requires_grad_(False)
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def adamw(trained, row):
    """AdamW over {name: parameter}. Vectors, biases and norms do not decay.

    quirk: LAVIS lets whatever is not of one dimension decay: the queries, and the temperature,
    which has none."""
    decays = lambda p: p.dim() > 1 or p.dim() == 0 and row.schedule == "lavis"
    groups = {}
    for name, p in sorted(trained.items(), key=lambda pair: not pair[0].startswith("bridge.")):
        lr = name.startswith("bridge.") and row.bridge_lr or row.lr
        groups.setdefault((lr, row.decay if decays(p) else 0.0), []).append(p)
    return torch.optim.AdamW([{"params": g, "lr": lr, "weight_decay": d}
                              for (lr, d), g in groups.items()],
                             betas=(.9, .999), eps=1e-8, fused=True)


def optimizers(trained, row, args):
    """AdamW, or an adamw8 for each weight: see `Update`."""
    whole = adamw(trained, row)
    if args.optimizer == "adamw":
        return [whole]
    each = [(p, group) for group in whole.param_groups for p in group["params"]]
    return [AdamW([p], group["lr"], weight_decay=group["weight_decay"],
                  stochastic=args.stochastic, seed=args.seed << 16 ^ i)
            for i, (p, group) in enumerate(each)]


def stored(args):
    """The weights' dtype: adamw8 keeps the rest of an fp32 weight in its state."""
    return (torch.bfloat16 if args.optimizer == "adamw8" and args.dtype != "fp32" else
            torch.float32)


def watcher(model, row):
    """Describes the same four held-out scenes as training goes on: watching it learn to see."""
    scenes = [world.scene(i, "test", count=i) for i in (1, 2, 3, 4)]
    ids = ask(["Describe this image"], row.template, model.words)

    def look():
        for scene in scenes:
            pixels = data.preprocess(world.draw(scene), model.image_size, row.aspect)
            tokens = list(generate(model, ids, pixels, max_new_tokens=80))
            yield {"truth": world.description(scene),
                   "says": model.words.decode(tokens).strip().split("\n")[0]}
    return look


def parts(args):
    """(picture tower, LLaMA): folders or hub ids. The toy's are beside this file."""
    base = [HERE / p if args.base == "toy" else p for p in BASES[args.base]]
    if args.base != "toy" and args.recipe == "llava":
        base[0] = SMALL
    if args.base != "toy" and args.row.bridge == "qformer":
        base[0] = EVA
    return args.vision or base[0], args.llm or base[1]


def new_retriever(args):
    """BLIP-2 before its first step: a picture tower and a Q-Former that knows BERT, or, for the
    toy, nothing."""
    vision = parts(args)[0]
    if args.base == "toy":
        scenes = [world.scene(i) for i in range(2000)]
        words = Words.build([x for s in scenes for x in (*world.captions(s), world.description(s))])
        config = QFormerConfig(**TOY_QFORMER, vision=TOY_QFORMER["width"], vocab=len(words))
        return Retriever.from_parts(vision, words, config, args.seed)
    return Retriever.from_parts(vision, Words(data.resolve(args.qformer or BERT)), QFormerConfig(),
                                args.seed, bert=args.qformer or BERT)


def new_model(args, start, out):
    """A VLM of parts, its bridge new; blip2's second stage begins with its first stage's Q-Former,
    MiniGPT-4 with that of BLIP-2's second stage."""
    row, (vision, llm) = args.row, parts(args)
    if row.bridge != "qformer":
        return VLM.from_parts(vision, llm, row.bridge, row.template, row.aspect, args.seed,
                              stored(args))
    if args.recipe == "blip2":
        qformer = new_retriever(args) if start == "none" else start
    else:
        qformer = args.qformer or (FLAN if args.base != "toy" else
                                   out.absolute().parents[1] / "blip2/stage2/model")
        if args.base == "toy" and not args.qformer and not qformer.exists():
            raise data.BadModel(f"{qformer}: MiniGPT-4 starts from BLIP-2's Q-Former and there is "
                                "none; run --recipe blip2, stages 1 and 2, or give --qformer")
    return VLM.from_parts(args.vision, llm, row.bridge, row.template, row.aspect, args.seed,
                          stored(args), qformer=qformer)


def bridge_job(args, out, device):
    """Stages 1 and 2 of everything that has a LLaMA."""
    row, samples = args.row, Samples(args)
    samples.journal = Journal(samples, out, args.most_bad)
    steps = samples.steps()
    before = ("none" if args.stage == 1 else out.parent / "stage1/model")
    if args.stage == 1 and args.recipe == "sharegpt4v":
        before = out.absolute().parents[1] / "llava-1.5/stage1/model"
    start = str(args.start or before)
    if args.start is None and start != "none" and not Path(start).exists():
        raise data.BadModel(f"{start}: this stage starts from that model, beside its own folder, "
                            "and there is none; run "
                            f"{'--recipe llava-1.5 ' * (args.stage == 1)}--stage 1 first, or give "
                            "--from FOLDER or --from none")
    if start == "none" or args.recipe == "blip2":
        model = new_model(args, start, out)
        if args.projector:
            model.load_bridge(args.projector)
    else:
        model = VLM.from_pretrained(start, stored(args))
        if model.aspect == "anyres":
            raise data.BadModel(f"{start}: a LLaVA-NeXT; its pictures in tiles are not trained on "
                                "here; take a LLaVA-1.5")
        if model.kind != row.bridge:
            raise data.BadModel(f"{start}: its bridge is {model.kind}, this run's is {row.bridge}; "
                                f"give --bridge {model.kind}, or another --from")
        if getattr(model.template, "known", True) is False and args.template is None:
            raise data.Usage(f"{start}: its chat template is none of ours, and training teaches it "
                             f"another: give --template {row.template}, the recipe's, or one of "
                             f"{', '.join(data.TEMPLATES)}")
        model.template, model.aspect = row.template, row.aspect
    if args.lora:
        model.llm.adapt(args.lora, args.seed)
    model.to(device)
    model.llm.checkpoint, model.llm.offload = args.checkpoint, args.offload
    set_trained(model, row.train, args.lora)
    deal(model)
    held = {n: share(p) for n, p in model.named_parameters() if p.requires_grad}
    made = optimizers(held, row, args)
    count = flops(model)
    loss, report = gauged(lambda micro: model.loss(*micro[:6], micro.questions), model, args)

    def work(micro):
        useful = [count(*text) for text in micro.counts]
        return (sum(text + pictures * model.places() for text, _, pictures in micro.counts),
                sum(forward + backward + eye for forward, backward, _, eye in useful))

    def finish(folder):
        report()
        model.llm.merge()               # of LoRA: what is saved loads like any other
        model.save_pretrained(folder)

    return Job(model, made, steps, make_batches(samples, model, args, out), loss,
               factor_of(row, steps), finish, row.clip,
               watcher(model, row) if args.base == "toy" and not args.data else None,
               batch=row.batch, work=work, held=held, samples=samples)


def retriever_job(args, out, device):
    """BLIP-2's first stage: pictures and captions, no LLaMA."""
    row, samples = args.row, Samples(args)
    samples.journal = Journal(samples, out, args.most_bad)
    steps, model = samples.steps(), new_retriever(args).to(device)

    def micro(first):
        pixels, texts = [], []
        for index in range(first, first + row.batch // args.accum):
            try:
                picture, talk = samples[index]
                if picture is None:
                    raise data.BadData("no picture; BLIP-2 learns from pictures and captions")
                texts.append(data.caption_text(talk[-1]["value"]))
                model.words.encode(texts[-1])           # refuses what holds no word
            except data.Failure as error:
                raise type(error)(f"{samples.name(index)}: {error}") from None
            pixels.append(data.preprocess(picture, model.image_size, row.aspect))
        ids, mask = model.words.encode(texts)
        return torch.cat(pixels).to(device), ids.to(device), mask.to(device), first

    return Job(model, [adamw(set_trained(model, row.train), row)], steps,
               lambda step: [micro(step * row.batch + m * row.batch // args.accum)
                             for m in range(args.accum)],
               # the negatives are drawn by the index of the first sample
               lambda x: {name: loss / args.accum for name, loss in
                          model.losses(*x[:3], seed=x[3], only=row.losses).items()},
               factor_of(row, steps),
               model.save_pretrained, row.clip, batch=row.batch, samples=samples)


# ------------------------------------------------------------------------------- the forecast
# What a run will need, worked out before anything loads: from the sizes in config.json and a model
# on the meta device, which has shapes and no memory. GB = 10⁹ bytes, GiB = 2³⁰ bytes.

# the hub's parts that recipes begin with: a plan needs no network
SIZES = {BASES["7b"][0]: TowerConfig(image=336), SMALL: TowerConfig(image=224),
         BASES["7b"][1]: LlamaConfig(eps=1e-5, context=4096),
         BASES["13b"][1]: LlamaConfig(32000, 5120, 40, 40, 40, 13824, 1e-5, context=4096),
         EVA: TowerConfig(1408, 39, 16, 6144, 1e-6, eva=True, tail=False)}
SAMPLES = {"llava": (595_375, 157_712), "llava-1.5": (558_128, 665_298),       # as released
           "sharegpt4v": (1_246_000, 665_298)}
# Kinds of samples: share, tokens of text, of them learned, pictures. Estimates, and the one soft
# number of a forecast (100 tokens more in stage 2 are 11 % more hours): --data counts the file's.
CAPTIONS, TALKS = ((1., 30, 28, 1),), ((1., 324, 180, 1),)
DESCRIPTIONS = ((1., 208, 206, 1),)     # 826 characters
MIXED = ((1 - 40_688 / 665_298, 324, 180, 1), (40_688 / 665_298, 1200, 800, 0))
ROWS = (8192, 6144, 4096, 3072, 2048)   # a row holds the longest sample: 2,048 in the official runs
A100 = 312e12                           # bf16 multiplications and additions a second
# An A100 of 80 GB hands a process 79.1 of 80 GiB, less half a GB for CUDA itself; one part in
# twenty is left alone, because an allocator cannot fill every gap.
HANDED, CONTEXT, FILLED = 79.1 / 80, .5e9, .95


def blank(args):
    """The model of this run without memory; what trains is marked."""
    def sizes(name, read):
        if name in SIZES:
            return SIZES[name]
        if args.plan and not Path(name).is_dir():
            raise data.Usage(f"--plan: {name} is no folder, and its sizes are not known here; give "
                             "a folder with its config.json")
        return read(data.read_config(data.resolve(name)))

    row, (vision, llm) = args.row, parts(args)
    if args.start not in (None, "none"):
        eye, tongue = settings(args.start, sizes(args.start, dict))[:2]
    else:
        eye, tongue = sizes(vision, TowerConfig.eye), sizes(llm, LlamaConfig.from_hf)
    with torch.device("meta"):
        eye, bridge = ViT(eye), row.bridge
        if bridge == "qformer":
            eye, own = eye.docked(), TOY_QFORMER if args.base == "toy" else {}
            asks = QFormer(QFormerConfig(**own, vision=eye.config.width, vocab=0))
            bridge = Queries(LayerNorm(eye.config.width, eye.config.eps), asks, tongue.width)
        model = VLM(eye, bridge, Llama(tongue), None, row.template, row.aspect)
        if args.lora:
            model.llm.adapt(args.lora)
    set_trained(model, row.train, args.lora)
    return model


def kinds_of(args):
    """(samples of an epoch, their kinds, where that is from)."""
    row, llm = args.row, parts(args)[1]
    if args.data:
        samples = Samples(args)
        good = [i for i in range(len(samples.rows)) if i not in samples.rows.bad]
        some = [samples.rows[i] for i in good[::max(1, -(-len(good) // 200))]]
        talks = [(f"{args.data}: sample {sample['id']}", sample) for sample in some]
        total, source = len(samples.rows), f"{len(talks)} samples of {args.data}"
    elif args.base == "toy":
        talks = [("toy sample", dict(zip(("image", "conversations"), toy_sample(
            args.seed, args.stage, i, row.told)))) for i in range(64)]
        total, source = row.steps * row.batch, "64 samples of the toy world"
    else:
        kinds = (DESCRIPTIONS if row.told == "descriptions" else
                 CAPTIONS if row.told != "dialogue" else
                 TALKS if args.recipe == "llava" else MIXED)
        total = SAMPLES.get(args.recipe, (0, 0))[args.stage - 1] or row.steps * row.batch
        if not total:
            raise data.Usage("--plan: how many samples? give --data or --steps")
        return total, kinds, "estimates of the official data's lengths, no --data"
    words, kinds = data.Tokenizer(llm) if Path(llm).is_dir() else None, []
    for name, sample in talks:
        pictures, talk = len(data.images_of(sample)), sample["conversations"]
        if words:
            try:
                ids, labels = data.encode_sample(sample, row.template, words, 1)
            except data.NothingToLearn:
                continue
            except data.BadData as error:
                if args.on_bad_sample == "skip":
                    continue
                raise data.BadData(f"{name}: {error}") from None
            text, learned = len(ids) - pictures, sum(x != data.IGNORE for x in labels)
        else:                           # three words of English are about four tokens
            counts = [len(t["value"].split()) * 4 / 3 for t in talk]
            text, learned = 40 + sum(counts), sum(counts[1::2])
        kinds.append((text, learned, pictures))
    if not kinds:
        raise data.BadData(f"{args.data}: not one of {len(talks)} samples can be learned from: "
                           "python data.py check lists what is wrong")
    kinds = [(1 / len(kinds), *kind) for kind in kinds]
    return total, tuple(kinds), source + ("" if words else ", 4 tokens for 3 words")


def products(module):
    """FLOPs of a module's matrix products for one place, forward and backward. A product of n
    weights is 2 n; its input's gradient as much again; a weight's, where it trains, too."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters() if p.dim() > 1]
    return 2 * sum(n for n, _ in sizes), 2 * sum(n * (1 + trains) for n, trains in sizes)


def tuned(eye):
    """The picture tower's blocks that run and have a backward: from the first that trains on."""
    blocks = eye.blocks[:-1] if eye.config.tail else eye.blocks
    return next((blocks[i:] for i, b in enumerate(blocks) if next(b.parameters()).requires_grad),
                blocks[:0])


def flops(model):
    """A function that counts a sample's FLOPs: forward, backward, computed again, the eye's."""
    c, eye, places, P = model.llm.config, model.vision, model.places(), model.patches + 1
    blocks = eye.blocks[:-1] if eye.config.tail else eye.blocks
    look = 4 * P * P * eye.config.width                         # a block's attention
    seen = 2 * P * eye.patch.numel() + P * products(blocks)[0] + look * len(blocks) + (
        P * products(tuned(eye))[1] + 2.5 * look * len(tuned(eye)))
    layers, head, bridge = products(model.llm.blocks), products(model.llm.head), products(
        model.bridge)
    last = sum(products(block.down)[0] for block in model.llm.blocks)

    def of(text, learned, pictures, policy=None):
        T = text + pictures * places
        look = 2 * T * T * c.heads * c.head_dim * c.depth       # causal: half of 4 T² a layer
        forward, backward = (T * layers[i] + learned * head[i] + pictures * places * bridge[i]
                             for i in (0, 1))
        spared = T * (layers[0] - last)
        again = {"attention": spared, "full": T * layers[0] + look + spared}.get(policy, 0)
        return forward + look, backward + 2.5 * look, again, pictures * seen
    return of


def kept(model, tokens, learned, pictures, policy, stream=2, made=2, kernels=True,
         offload=False):
    """Bytes that wait from forward to backward, and bytes that one layer's backward needs besides.

    stream: bytes of a number that goes from layer to layer; made: of one that a matrix product has
    made (2 where stream is 4: autocast). kernels: what kernels/ keep, or what PyTorch's functions
    in their place do. offload: all but two regions on the host. kernels/checkpoint.py has the terms
    one by one."""
    c, llm = model.llm.config, model.llm
    C, F, L, V, own = c.width, c.mlp, c.depth, c.vocab, c.heads * c.head_dim
    trains = any(p.requires_grad for p in llm.blocks.parameters())
    norms, head = llm.norm.weight.requires_grad, llm.head.weight.requires_grad
    casts = made < stream                                   # and keeps what it casts
    plain = 0 if kernels else 1
    matrices = [p for p in llm.blocks.parameters() if p.dim() > 1]
    low = sum(p.shape[0] for n, p in llm.blocks[0].named_parameters() if n.endswith(".a"))

    x = C * stream                                                          # of a token and layer
    attended = own * made + 4 * c.heads                     # attention's result, its log-sum-exp
    inputs = 2 * C * made * trains                          # what qkv and gate_up read
    work = (own + 2 * c.kv_heads * c.head_dim + 2 * F + low) * made + x    # the x before the MLP
    again = inputs * (not casts) + F * made * trains + plain * (F * made + 2 * x * norms)
    sparing = x + attended
    whole = sparing + work + inputs * casts
    segment = max(1, round(math.sqrt(L)))
    here = 2 if offload else L
    blocks = {"full": x * min(here, math.ceil(L / segment)), "attention": sparing * min(here, L),
              "none": whole * L, None: (whole + again) * L}[policy]

    bridge = 0
    if any(p.requires_grad for p in model.bridge.parameters()):
        layers = [m for m in model.bridge.modules()
                  if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
        places = [model.patches if m.in_features == model.vision.config.width else model.places()
                  for m in layers]
        bridge = sum(n * (m.in_features + m.out_features) for n, m in zip(places, layers))
        bridge -= places[-1] * layers[-1].out_features      # the words' own x is counted above
    last = tokens * (x + plain * x * norms + 4 * c.head_dim) + learned * (
        C * made * head + plain * 4 * V)
    eye = model.vision.config           # no policy there; rough without kernels
    seen = len(tuned(model.vision)) * (model.patches + 1) * (
        2 * eye.width * stream + made * (5 * eye.width + (2 + plain) * eye.mlp) + 4 * eye.heads)
    if casts and policy in (None, "none"):
        last += made * (sum(p.numel() for p in matrices) + llm.head.weight.numel())
    if kernels and head:
        last += made * V * C                                # the head's gradient is made in forward
    backward = tokens * (made * (3 * F + 4 * C) + {                # gradients, what is made again
        "full": whole + again + segment * sparing, "attention": whole + again,
        "none": F * made, None: 0}[policy]) + made * max(p.numel() for p in matrices)
    return tokens * blocks + pictures * (made * bridge + seen) + last, backward


def widths(args):
    """Bytes of a weight and of what a matrix product makes of it."""
    if stored(args) == torch.bfloat16:
        return 2, 2
    fast = args.base != "toy" or torch.cpu._is_amx_tile_supported()
    return 4, 2 if args.dtype == "bf16" or args.dtype == "auto" and fast else 4


def mean(kinds):
    """Tokens of text, learned ones and pictures of a sample on average."""
    return [sum(kind[0] * kind[i] for kind in kinds) for i in (1, 2, 3)]


def state(model, args, gpus=1):
    """{what: bytes} of one GPU of so many, whatever the micro-batch is."""
    weight, trained = widths(args)[0], [p.numel() for p in model.parameters() if p.requires_grad]
    small = args.optimizer == "adamw8"
    sizes = {"weights": weight * sum(p.numel() for p in model.parameters()),
             "gradients": weight * sum(trained),
             "masters": 2 * sum(trained) * (small and weight == 2 and not args.stochastic),
             "moments": (2 + 8 / 256 if small else 8) * sum(trained)}
    sizes = {name: size / gpus for name, size in sizes.items()}
    if gpus > 1:        # whole on every GPU: a layer, the next, a gradient, and what is no layer
        inside, layer = ([p.numel() for p in part.parameters()]
                         for part in (model.llm.blocks, model.llm.blocks[0]))
        rest = sum(p.numel() for p in model.parameters()) - sum(inside)
        sizes["gathered"] = weight * (3 * sum(layer) + rest)
    return sizes


def forecast(model, args, kinds, pack, policy, gpus=1):
    """{what: bytes} of one GPU of so many; a micro-batch is a row of `pack` tokens, or padded."""
    (weight, made), (text, learned, pictures) = widths(args), mean(kinds)
    P, eye, size = model.places(), model.vision.config, args.row.batch // args.accum
    share = pack / (text + pictures * P) if pack else size      # samples of a micro-batch
    tokens = pack or size * max(kind[1] + kind[3] * P for kind in kinds)
    learned, pictures = share * learned, math.ceil(share * pictures)
    activations, backward = kept(model, tokens, learned, pictures, policy, weight, made,
                                 offload=args.offload)
    looking = made * pictures * (model.patches + 1) * (6 * eye.width + 2 * eye.mlp)
    return {**state(model, args, gpus), "activations": activations,
            "workspace": max(backward, looking, min(learned, 4096) * model.llm.config.vocab * made)}


def room(memory=None):
    """Bytes that a run may count on, of a card of `memory` GB, the one at hand, or an A100."""
    if memory is None and torch.cuda.is_available():
        return FILLED * (torch.cuda.get_device_properties(0).total_memory - CONTEXT)
    return FILLED * ((memory or 80) * 2 ** 30 * HANDED - CONTEXT)


def choose(model, args, kinds, space, gpus=1):
    """(tokens a row, policy) that fit into `space` bytes; None if none do. Policies first: what is
    computed again costs a quarter of the time and more, a short row a few percent."""
    policies = ("none", "attention", "full") if "checkpoint" in args.free else (args.checkpoint,)
    rows = ROWS if "pack" in args.free else (args.pack,)
    return next(((pack, policy) for policy in policies for pack in rows
                 if sum(forecast(model, args, kinds, pack, policy, gpus).values()) <= space), None)


def advice(args, space, kinds):
    """Lines for one whose run does not fit, the cheapest way out first."""
    def fits(change, gpus=1, **flags):
        other = argparse.Namespace(**{**vars(args), "free": ["pack", "checkpoint"], **flags})
        other.free = [n for n in other.free if n not in flags]
        found = choose(blank(other), other, kinds, space, gpus)
        how = found and f"with --pack {found[0]} --checkpoint {found[1]}"
        return f"{change}: {'fits ' + how if found else 'does not fit'}"

    yield fits("shorter rows", checkpoint=args.checkpoint)
    yield fits("computing more again")
    if "llm" in args.row.train and not args.lora:
        yield fits("--lora 128", lora=128)
    if args.base == "13b":
        yield fits("--base 7b", base="7b")
    for gpus in (2, 4, 8):
        line = fits(f"{gpus} GPUs", gpus)
        if "fits with" in line or gpus == 8:
            yield line
            return


def settle(args):
    """Row length and policy as the card at hand allows, where the flags leave them open."""
    gpus = int(os.environ.get("WORLD_SIZE", 1))                 # torchrun's
    found = args.free and choose(blank(args), args, kinds_of(args)[1], room(), gpus)
    if found is None:
        raise data.Usage(f"does not fit into {room() / 1e9:.1f} GB of "
                         f"{torch.cuda.get_device_name()}; --plan says what would")
    args.pack, args.checkpoint = found or (args.pack, args.checkpoint)


def gauged(loss, model, args):
    """loss(micro-batch), of which the first is looked at: what does it keep for backward? And a
    function that says so, and the memory at its highest, beside the forecast."""
    found, told = {}, []

    def pack(x):
        memory = x.untyped_storage()
        found[memory.data_ptr()] = memory.nbytes()
        return x.detach()

    def first(micro):
        if told or ranks() > 1:                 # a rank's layers are whole only while they run
            return loss(micro)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = loss(micro)
        kind, stream = micro.ids.device.type, model.llm.embed.weight.element_size()
        if kind == "cpu" and micro.lengths:     # there PyTorch keeps a mask of T² for each layer
            told.append(None)
            return value
        made = 2 if torch.is_autocast_enabled(kind) else stream
        sizes = [text + pictures * model.places() for text, _, pictures in micro.counts]
        told.append(kept(model, sum(sizes) if micro.lengths else len(sizes) * max(sizes),
                         *(sum(x) for x in list(zip(*micro.counts))[1:]), args.checkpoint, stream,
                         made, kind == "cuda", args.offload and kind == "cuda"))
        for p in model.parameters():
            found.pop(p.untyped_storage().data_ptr(), None)
        return value

    def report():
        if told and told[0]:
            print(f"kept for backward: {sum(found.values()) / 1e6:,.1f} MB, forecast "
                  f"{told[0][0] / 1e6:,.1f} MB")
        if told and told[0] and model.llm.embed.weight.is_cuda:
            print(f"peak memory: {torch.cuda.max_memory_allocated() / 1e9:,.2f} GB, forecast "
                  f"{(sum(state(model, args).values()) + sum(told[0])) / 1e9:,.2f} GB")
    return first, report


def plan(args):
    """Print what the run needs, and where it does not fit, what to do."""
    model, (samples, kinds, source), space = blank(args), kinds_of(args), room(args.memory)
    pack, policy = choose(model, args, kinds, space, args.gpus) or (args.pack, args.checkpoint)
    row, (text, learned, pictures) = args.row, mean(kinds)
    print(f"{args.recipe} stage {args.stage}, base {args.base}" + f", LoRA {args.lora}" * (
        args.lora > 0) + "\n\n              weights     trained")
    for name, part in model.named_children():
        n = [sum(p.numel() for p in part.parameters() if p.requires_grad >= t) for t in (0, 1)]
        print(f"  {name:8} {n[0] / 1e6:10,.1f} M {n[1] / 1e6:9,.1f} M")
    needs = forecast(model, args, kinds, pack, policy, args.gpus)
    total = sum(needs.values())
    rows = f"rows of {pack:,} tokens" if pack else f"{row.batch // args.accum} padded samples"
    unit, name = (1e9, "GB = 10⁹") if total > 2e9 else (1e6, "MB = 10⁶")
    print(f"\n  memory, {name} bytes{', of each GPU' * (args.gpus > 1)}: {rows}, "
          f"--checkpoint {policy}, --optimizer {args.optimizer}")
    for name, size in needs.items():
        print(f"  {name:12} {size / unit:8.2f}")
    card = (f"a card of {args.memory or 80:g} GB" if args.memory or not torch.cuda.is_available()
            else torch.cuda.get_device_name())
    print(f"  {'total':12} {total / unit:8.2f}   {'fits' if total <= space else 'does not fit'} "
          f"into {space / 1e9:.1f} GB, what {card} leaves ({FILLED:.0%} of what it hands out)")
    count = flops(model)
    each = [sum(k[0] * x for k, x in zip(kinds, column))
            for column in zip(*(count(*kind[1:], policy) for kind in kinds))]
    work = sum(each)
    steps = row.steps or math.ceil(samples * row.epochs / row.batch)
    tokens = text + pictures * model.places()
    dealt = math.ceil(row.batch * tokens / pack) if pack else args.accum    # rows of a step
    busy = dealt / (args.gpus * math.ceil(dealt / args.gpus))       # a GPU without a row waits
    hours = steps * row.batch * work / (args.mfu * A100 * args.gpus * busy) / 3600
    print(f"\n  {tokens:,.0f} tokens a sample, {learned:,.0f} learned ({source})\n  "
          f"{work / 1e12:.4g} TFLOP a sample: forward {each[0] / 1e12:.4g}, backward "
          f"{each[1] / 1e12:.4g}, again {each[2] / 1e12:.4g}, eye {each[3] / 1e12:.4g}\n  "
          f"{row.batch * work / 1e12:,.4g} TFLOP a step, {steps:,} steps\n  {hours:,.3g} hours at "
          f"{args.mfu:.0%} of an A100's 312 TFLOP/s (--mfu, an assumption)"
          + f" on each of {args.gpus}, {busy:.0%} of the time" * (args.gpus > 1))
    if total > space:
        print("\n  what to do, the cheapest first")
        for line in advice(args, space, kinds):
            print(f"    {line}")


# ---------------------------------------------------------------- stage 0: the parts, from nothing

def muon(model, lr, rest_lr, betas):
    """[Muon] for the blocks' matrices, AdamW for the rest: a fifth of AdamW's time on the toy."""
    blocks = {id(p) for n, p in model.named_parameters() if p.dim() == 2 and "blocks" in n}
    parts = [[p for p in model.parameters() if (id(p) in blocks) == wanted]
             for wanted in (True, False)]
    return [torch.optim.Muon(parts[0], lr, weight_decay=.01, momentum=.95),
            torch.optim.AdamW(parts[1], rest_lr, betas, weight_decay=0, fused=True)]


def clip_tokenizer(folder):
    """A word-level tokenizer.json of the toy captions; the end token has the largest id."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    texts = ["object photo picture image of the with"]
    for i in range(2000):
        scene = world.scene(i)
        texts += world.captions(scene) + [f"a {scene.background} background"]
    words = sorted({w for t in texts for w in t.lower().replace(",", " ,").split()})
    ids = {w: i for i, w in enumerate(["<pad>", "<unk>", *words, "<start>", "<end>"])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(w, ids[w]) for w in ("<start>", "<end>")])
    made.save(str(folder / "tokenizer.json"))
    return len(ids)


def clip_job(out):
    """The eye: phrases to patches, and captions to the class token at a quarter of the weight.

    Pictures come with a twin that differs in one attribute of every object, so that neither
    colours nor places alone can tell which phrase is whose."""
    vocab = clip_tokenizer(out)
    ids_of = read_tokenizer(out)
    torch.manual_seed(0)
    model = CLIP(TowerConfig(128, 5, 4, 512, image=world.SIDE, patch=8),
                 TowerConfig(128, 2, 4, 512, vocab=vocab, context=64, end=vocab - 1), 128)
    steps, pairs = 2400, 64

    def batch(step):
        scenes = []
        for i in range(step * pairs, (step + 1) * pairs):
            scenes += [world.scene(i), world.twin(world.scene(i), i)]
        dice, facts, links = random.Random(f"phrases:{step}"), {}, []
        for b, scene in enumerate(scenes):
            for text, fact in world.phrases(scene, dice):
                facts.setdefault(text, (len(facts), fact))
                links.append((b, facts[text][0]))
        truth = torch.tensor([[world.holds(f, s) for _, f in facts.values()] for s in scenes])
        captions = [world.captions(s)[0] for s in scenes]
        same = torch.tensor([[a == b for b in captions] for a in captions])
        pixels = torch.cat([data.preprocess(world.draw(s), world.SIDE, "square") for s in scenes])
        return [(pixels, ids_of(facts), truth, torch.tensor(links), ids_of(captions), same)]

    def loss(micro):
        pixels, phrases, truth, links, captions, same = micro
        seen, scale = model.patches(pixels), model.scale.clamp(max=math.log(100)).exp()
        fine = contrastive_loss(late_scores(seen[:, 1:], model.encode_text(phrases)) * scale,
                                truth, links)
        whole = contrastive_loss(seen[:, 0] @ model.encode_text(captions).T * scale, same,
                                 torch.arange(len(pixels))[:, None].expand(-1, 2))
        return fine + .25 * whole

    def finish(folder):
        model.vision.unit_loudness(batch(0)[0][0])
        model.save_pretrained(folder)
        shutil.copy(out / "tokenizer.json", folder)

    def factor(step):
        return min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    return Job(model, muon(model, .02, 2e-3, (.9, .98)), steps, batch, loss, factor, finish), 128


def llama_tokenizer(folder):
    """tokenizer.json and its config in LLaMA's layout: BPE, bytes for what it has never seen.

    Merges are learned inside words, so every common word of the toy world is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    texts = [data.prompt([{"from": "human", "value": "hi"}], "v1"),
             "Yes. No. yes no none No The notes: . , ; ? ! ' object shape thing"]
    for words in (world.COLOURS, world.SHAPES, world.SIZES, world.BACKGROUNDS, world.NUMBERS):
        texts += [t for w in words for t in (w, w.capitalize())]
    for i in range(4000):
        scene, dice = world.scene(i), random.Random(i)
        texts += world.captions(scene) + [world.web_caption(scene, dice), world.notes(scene, dice)]
        texts += [t for pair in world.dialogue(scene, dice, 3) for t in pair]
        texts.append(dice.choice(world.DESCRIBE))
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
        pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)])
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2048, min_frequency=1, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]))
    spec = json.loads(made.to_str())
    one = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    two = [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    spec |= {"added_tokens": spec["added_tokens"][:3], "normalizer": None,
             "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                               "split": False},
             "post_processor": {
                 "type": "TemplateProcessing", "single": one, "pair": one + two,
                 "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
             "decoder": {"type": "Sequence", "decoders": [
                 {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                 {"type": "ByteFallback"}, {"type": "Fuse"},
                 {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "legacy": False, "add_bos_token": True,
        "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "model_max_length": 1024, "padding_side": "right",
        "clean_up_tokenization_spaces": False}, indent=1) + "\n")


def llama_job(out):
    """The language model: a scene told in words, then questions about it, or another telling.

    Answers count fully, everything else a twentieth: what notes say cannot be predicted.

    After the first steps half of the scenes are told in *blends*: "large red star top left" is
    one vector, the sum of its words' embeddings, and 64 of them are laid out as patches are. A
    million weights grow circuits that count on one word a place, and no bridge found a way into
    them (README); a model of Vicuna's size, which LLaVA's bridge can speak to, seems not to need
    this lesson."""
    llama_tokenizer(out)
    words = data.Tokenizer(out)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(-(-len(words) // 64) * 64, 128, 5, 4, 4, 352, 1e-5, 1e5, 1024))
    start_copying(model)
    steps, size, pool, blends_from = 4500, 16, [], 200

    def row(i):
        scene, dice = world.scene(i), random.Random(f"row:{i}")
        told = world.notes(scene, dice)
        if dice.random() < .12:
            second = dice.choice(world.captions(scene) + [world.description(scene)] * 3)
            first, second = words.encode(told + "\n"), words.encode(second + "\n", bos=False)
            return first + second, [.05] * len(first) + [1.] * len(second)
        talk = []
        for question, answer in world.dialogue(scene, dice, 8):
            talk += [{"from": "human", "value": question if talk else f"{told}\n{question}"},
                     {"from": "gpt", "value": answer}]
        ids, labels = data.encode(talk, "v1", words, has_image=False)
        return ids, [.05 if x == data.IGNORE else 1. for x in labels]

    def blended(i):
        """A row whose ids hold, for each blend, the tuple of its words' ids; nothing is predicted
        of blends."""
        scene, dice = world.scene(i), random.Random(f"blend:{i}")
        told = [tuple(words.encode(text, bos=False)) for text in world.word_picture(scene, dice)]
        if dice.random() < .35:
            text = dice.choice([world.description(scene)] * 5 + world.captions(scene))
            talk, template = [("<image>", text)], "plain"
        else:
            talk, template = world.dialogue(scene, dice, 7), "v1"
            talk[0] = (f"<image>\n{talk[0][0]}", talk[0][1])
        turns = [{"from": who, "value": text} for pair in talk
                 for who, text in zip(("human", "gpt"), pair)]
        ids, labels = data.encode(turns, template, words)
        at = ids.index(data.IMAGE)
        weights = [.05 if x == data.IGNORE else 1. for x in labels]
        return ids[:at] + told + ids[at + 1:], weights[:at] + [0.] * len(told) + weights[at + 1:]

    def batch(step):
        # rows of like length side by side: four batches' worth are sorted, then dealt out
        at, part = divmod(step, 4)
        if not pool or pool[0] != at:
            first = 4 * at * size
            made = [blended(i) if step >= blends_from and i % 2 else row(i)
                    for i in range(first, first + 4 * size)]
            pool[:] = [at, sorted(made, key=lambda r: len(r[0]))]
        rows = pool[1][part * size:(part + 1) * size]
        length = -(-max(len(r[0]) for r in rows) // 32) * 32 + 1   # few lengths: few compilations
        five = lambda x: [*x, -1, -1, -1, -1][:5] if type(x) is tuple else [x, -1, -1, -1, -1]
        blank = [[-1] * 5]
        ids = torch.tensor([[five(x) for x in a] + blank * (length - len(a)) for a, _ in rows])
        weights = torch.tensor([b + [0.] * (length - len(b)) for _, b in rows])
        return [(ids, weights)]

    torch._dynamo.config.recompile_limit = 32           # one compilation a length; 8 allowed else

    @torch.compile(dynamic=False)           # 40 s to start, twice as fast after
    def loss(micro):
        ids, weights = micro                    # (B, T, 5): up to 5 words a place, -1 for none
        there, weights = (ids >= 0)[:, :-1, :, None], weights[:, 1:]
        x = (model.embed(ids[:, :-1].clamp(min=0)) * there).sum(2) / there.sum(2).clamp(min=1) ** .5
        return linear_cross_entropy(
            model.hidden(x).flatten(0, 1), model.head.weight, ids[:, 1:, 0].clamp(min=0).flatten(),
            (weights / weights.sum()).flatten())

    def finish(folder):
        model.save_pretrained(folder)
        data.save_tokenizer(words, folder)

    def factor(step):                       # constant, then straight to 0 over the last 64 %
        return min(1, (step + 1) / 50) * min(1, (steps - step) / (.64 * steps))
    return Job(model, muon(model, .015, 2e-3, (.9, .95)), steps, batch, loss, factor, finish,
               clip=1.0), size


# --------------------------------------------------------------------------------- one run of it

def resolved(args):
    """What decides the finished bits: the content of config.json."""
    skip = {"free", "plan", "memory", "gpus", "mfu", "resume", "overwrite", "save_every",
            "keep_last", "debug", "row", "show_batch", "part", "output_dir", "workers",
            "checkpoint", "offload", "on_bad_sample", "most_bad", "follow_links",
            *(f.name for f in fields(Stage))}
    return json.loads(json.dumps({**{k: v for k, v in sorted(vars(args).items()) if k not in skip},
                                  "stage_row": vars(args.row)}))


def claim(out):
    """The output folder, ours alone while the result is open."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)     # workers do not inherit this kind
        return lock
    except BlockingIOError:
        lock.close()
        raise data.BadData(f"{out} is in use by another run; wait for it, or give another "
                           "--output-dir") from None


def check(out, args):
    """Refuses, and changes nothing, if the folder holds what the flags do not fit."""
    if not (out / "config.json").exists():
        if (out / "model").exists() or any(out.glob("step-??????")):
            raise data.BadData(f"{out} holds a model but no config.json of a run; give another "
                               "--output-dir")
        return
    old, new = data.read_config(out), resolved(args)
    if not isinstance(old.get("stage_row"), dict):
        raise data.BadData(f"{out} holds something that is not a run; give another --output-dir")
    if args.overwrite:
        return
    if not args.resume:
        raise data.BadData(f"{out} holds a run already; --resume auto goes on with it, --overwrite "
                           "deletes it, --output-dir goes elsewhere")
    old, new = ({**c, **c["stage_row"], "from": c.get("start")} for c in (old, new))
    changed = [f"--{k.replace('_', '-')}" for k in new
               if k not in ("stage_row", "start") and old.get(k) != new[k]]
    if changed:
        raise data.BadData(f"{out}: --resume with other flags ({', '.join(changed)}); give the "
                           "flags of its config.json, or --overwrite to start anew")


def compare_finished(args, out):
    """A run that is finished: refuses another --data file than it has learned from."""
    samples = Samples(argparse.Namespace(**{**vars(args), "on_bad_sample": "skip"}))
    Journal(samples, out, args.most_bad).compare(samples.steps())


def manifest(out, args, job):
    """The run begins: config.json, and run.json: what would have to be equal for the same bits.

    config.json is the first file of a run to come and the last to go."""
    if args.overwrite:
        for name in ("step-*", "model", "model.tmp", "metrics.jsonl", "samples.jsonl",
                     *LISTS, "rows.safetensors", "loss.png",
                     "nan-step-*.json", "run.json", "config.json"):
            for path in out.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    put(out / "config.json", json.dumps(resolved(args), indent=1) + "\n")
    sha = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, text=True,
                                                 capture_output=True).stdout.strip()
    put(out / "run.json", json.dumps({
        "python": platform.python_version(), "torch": torch.__version__,
        "machine": platform.machine(), "device": str(next(job.model.parameters()).device),
        "threads": torch.get_num_threads(), "dtype": str(job.dtype), "seed": args.seed,
        "git": sha or None, "steps": job.steps,
        "trained": sum(p.numel() for p in job.trained().values()),
        "frozen": sum(p.numel() for p in job.model.parameters() if not p.requires_grad)},
        indent=1) + "\n")


def show(args):
    """Samples as the model reads them, what is learned in colour (in brackets off a terminal). What
    a run would refuse is refused."""
    model, samples = blank(args), Samples(args)
    folder = parts(args)[1] if args.start in (None, "none") else args.start
    model.words = data.Tokenizer(data.resolve(folder))
    batches = Batches(samples, model, args)
    for index in range(args.show_batch):
        try:
            if why := samples.fault(index):
                raise data.BadData(why)
            ids, labels = batches.text(index)
            batches.pictures((index, ids, labels))
        except data.NothingToLearn as error:
            print(f"sample {index}: teaches nothing: {error}")
        except data.Failure as error:
            if args.on_bad_sample == "error":
                raise
            print(f"sample {index}: left out: {error}")
        else:
            many = ids.count(data.IMAGE)
            seen = ("", " and a picture")[many] if many < 2 else f" and {many} pictures"
            print(f"sample {index}: {len(ids) - many} tokens{seen}")
            print(data.marked(ids, labels, model.words))


def train(args):
    """One run; returns an exit code."""
    torch.manual_seed(args.seed)
    if args.threads or args.stage == 0:
        torch.set_num_threads(args.threads or 1)
    if args.row.template and args.row.template not in data.TEMPLATES:
        raise data.Usage(f"--template {args.row.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    if args.plan:
        plan(args)
        return 0
    if args.base != "toy" and not args.data and args.stage:
        raise data.Usage(f"--base {args.base} learns from your data: give --data FILE and --images "
                         "FOLDER")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = best if args.device == "auto" else args.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise data.Usage(f"--device {device} is not to be had here; give cpu, or auto") from None
    if device.startswith("cuda") and args.stage and not (args.row.losses or args.show_batch):
        settle(args)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if args.show_batch:
        show(args)
        return 0
    if args.stage == 0:
        for part, make in (("clip", clip_job), ("llama", llama_job)):
            out = Path(args.output_dir or "runs/toy/stage0") / part
            if args.part not in ("both", part):
                continue
            with claim(out):
                check(out, args)
                if args.resume and (out / "model").exists():
                    continue
                job, job.batch = make(out)
                manifest(out, args, job)
                if code := fit(job, out, args):
                    return code
        return 0
    out = Path(args.output_dir or f"runs/{args.base}/{args.recipe}/stage{args.stage}")
    device = join(device)
    if ranks() > 1 and args.row.losses:
        raise data.Usage("torchrun is for stages with a LLaMA; start this one with python")
    try:
        with claim(out) if rank() == 0 else nullcontext():
            if rank() == 0:
                check(out, args)
            if args.resume and (out / "model").exists():
                if args.data and os.path.exists(args.data):
                    compare_finished(args, out)
                print(f"{out / 'model'} is finished already")
                return 0
            job = (retriever_job if args.row.losses else bridge_job)(args, out, device)
            if args.dtype != "fp32":
                fast = device != "cpu" or torch.cpu._is_amx_tile_supported()
                job.dtype = torch.bfloat16 if fast or args.dtype == "bf16" else torch.float32
            if rank() == 0:
                manifest(out, args, job)
            code = fit(job, out, args)
            summed(0)                           # nobody goes before all is written
            return code
    except RuntimeError as error:
        if ranks() == 1 or not re.search("peer|gloo|NCCL", str(error)):
            raise
        why = str(error).strip().splitlines()[0][:100]
        raise data.TrainingFailed(f"another rank is gone ({why}): see what it said, and go on with "
                                  "--resume auto") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(data.guarded(lambda: train(ARGS), ARGS.debug))
