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

import os
from dataclasses import dataclass

from trainer.flags import parse


@dataclass(frozen=True)
class Stage:
    """One row of a paper's table of hyper-parameters."""
    source: str                     # where the numbers come from
    projector_type: str             # linear | mlp | qformer
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
    projector_lr: float = 0.0          # the bridge's; 0: lr, as everything's
    losses: tuple = ()              # of the Q-Former alone: itc, itm, itg; (): the next token's
    groups: int = 8                 # the official ranks: the loss is a mean of their means
    order: str = "shuffled"         # of --data's samples; or modality: data.modality_order
    told: str = ""                  # what the toy world says of its pictures, `toy_sample`


RECIPES = {
    # [LLaVA] 2304.08485, scripts/pretrain.sh, finetune.sh. Paper: stage 2 with batch 32, 3 epochs;
    # a later script says 128. Not run by us at 7B.
    "llava": (
        Stage("LLaVA, April 2023", "linear", ("projector",), "plain", "square", 2e-3, 128,
              told="captions"),
        Stage("LLaVA, April 2023", "linear", ("projector", "llm"), "v1", "square", 2e-5, 32, 3,
              told="dialogue")),
    # [LLaVA15] 2310.03744, scripts/v1_5/pretrain.sh, finetune.sh. Not run by us at 7B.
    # quirk: stage 1 crops pictures to a square, stage 2 and inference pad them.
    "llava-1.5": (
        Stage("LLaVA-1.5, October 2023", "mlp", ("projector",), "plain", "square", 1e-3, 256,
              told="captions"),
        Stage("LLaVA-1.5, October 2023", "mlp", ("projector", "llm"), "v1", "pad", 2e-5, 128,
              order="modality", told="dialogue")),
    # [BLIP2] 2301.12597, LAVIS blip2_pretrain_stage{1,2}.yaml. Paper: stage 1 250k steps of 1,680
    # pictures, stage 2 80k of 1,920 (OPT), warm-up 2k, least rate 5e-5 in stage 2, beta2 .98; here
    # is the script. Its stage 2 speaks through OPT or FlanT5, which are not LLaMAs: this one is our
    # composition, InstructBLIP-Vicuna its nearest official relative. Not run by us at full size.
    "blip2": (
        Stage("BLIP-2, January 2023", "qformer", ("ln_vision", "qformer", "vision_proj",
              "text_proj", "itm_head", "lm_head", "temp"), "", "squash", 1e-4, 1600, 10, warmup=5000,
              decay=.05, schedule="lavis", warm_lr=1e-6, min_lr=1e-5,
              losses=("itc", "itm", "itg"), told="short"),
        Stage("BLIP-2's stage 2 with a LLaMA: our composition", "qformer", ("projector",), "blip2",
              "squash", 1e-4, 1024, 10, warmup=2000, decay=.05, schedule="lavis", warm_lr=1e-6,
              min_lr=1e-5, groups=16, told="captions")),
    # [MiniGPT4] 2304.10592, minigpt4_stage{1,2}_*.yaml. Paper: 400 steps in stage 2. Both stages
    # train one linear layer. It was made with Vicuna v0, of which only differences to LLaMA are
    # public: give yours by --llm. Not run by us at full size.
    "minigpt4": (
        Stage("MiniGPT-4, April 2023", "qformer", ("projector.proj",), "minigpt4_caption", "squash",
              1e-4, 256, 4, 20000, 5000, .05, schedule="minigpt4", warm_lr=1e-6, min_lr=8e-5,
              groups=4, told="web"),
        Stage("MiniGPT-4, April 2023", "qformer", ("projector.proj",), "minigpt4", "squash",
              3e-5, 12, 5, 1000, 200, .05, schedule="minigpt4", warm_lr=1e-6, min_lr=1e-5,
              groups=1, told="details")),
    # [ShareGPT4V] 2311.12793, its pretrain.sh and finetune.sh. Stage 1 goes on from LLaVA-1.5's
    # stage 1. The tuned tower is saved inside the model; officially in a folder apart.
    # quirk: block 23 is unlocked, but LLaVA reads the block before it, so that nothing moves it.
    "sharegpt4v": (
        Stage("ShareGPT4V, November 2023", "mlp", ("vision.blocks.12+", "projector", "llm"), "plain",
              "square", 2e-5, 256, groups=16, told="descriptions"),
        Stage("ShareGPT4V, November 2023", "mlp", ("projector", "llm"), "v1", "pad", 2e-5, 128,
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
                           train=("vision.blocks.2+", "projector", "llm")), LLAVA_TOY[1])}


def parse_args(argv=None):
    """The command line: a recipe's row, each field of which is a flag too."""
    return parse(Stage, RECIPES, TOY, argv)


if __name__ == "__main__":
    ARGS = parse_args()                 # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # spinning threads starve each other

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from formats.checkpoints import resolve
from formats.conversations import blip_caption
from formats.errors import exit_status, NothingToLearn, TrainingFailed, UsageError, UserError
from formats.files import rename_into_place
from generate import build_prompt, generate
from kernels.adamw import AdamW
from projector import VLM
from toy.parts import clip_job, llama_job
from toy.texts import description
from toy.world import draw, make_scene
from trainer.build import base_models, build_blip2_stage1, build_vlm, load_projector, weight_dtype
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.distributed import (
    all_reduce_sum,
    init_distributed,
    local_shard,
    rank,
    shard_model,
    StopSignal,
    unsharded,
    world_size,
)
from trainer.forecast import (
    fit_to_card,
    flops_per_sample,
    measure_saved_bytes,
    meta_model,
    print_plan,
)
from trainer.loader import MicroBatch, MicroBatches, Samples, with_last
from trainer.lora import add_lora, merge_lora
from trainer.rows import Journal, LISTS
from trainer.run_folder import check_resumable, lock_folder, plot_loss, truncate_log, write_manifest
from trainer.schedules import lr_schedule
from trainer.speed import Throughput
from trainer.step import GradientStep


@dataclass
class TrainJob:
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


def train_loop(job, out, args):
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
    step = load_checkpoint(job, out) if args.resume else 0
    for name in ("metrics.jsonl", "samples.jsonl", *LISTS) if first else ():
        truncate_log(out / name, step)
    if job.samples:
        job.samples.journal.begin(step, first)
    stop, started, told, update = StopSignal(), time.time(), 0.0, GradientStep(job)
    weight = next(iter(job.trained().values()))
    speed = Throughput(weight.device, job.steps - step)
    bar = tqdm(total=job.steps, initial=step, disable=not (first and sys.stderr.isatty()))

    def stopped(loss, norm):
        numbers = range(step * job.batch, (step + 1) * job.batch)
        if first:
            (out / f"nan-step-{step + 1}.json").write_text(json.dumps(
                {"step": step + 1, "loss": str(loss), "grad_norm": str(norm), "samples": [
                    job.samples.id(i) if job.samples else i for i in numbers]}) + "\n")
        raise TrainingFailed(f"step {step + 1}: loss {loss}, gradient norm {norm}: stopped "
                                  f"after step {step}, no update of this one is kept; lower --lr "
                                  "or look at the data")

    def agree(loss, usable):
        """The ranks add up their loss and usable samples, and agree when to stop."""
        loss, usable, term, ctrl = all_reduce_sum(float(loss), usable, stop.code == 143, stop.code == 130)
        stop.code = (143 if term else 130 if ctrl else 0) if world_size() > 1 else stop.code
        return loss, usable

    while step < job.steps:
        # schedule
        for o in job.optimizers:
            for g in o.param_groups:
                g["lr"] = g["peak"] * job.factor(step)
        # data, accumulate
        loss, told_apart, work, waited, usable = 0.0, Counter(), (0, 0), 0.0, 0
        update.last = False
        for micro, update.last, seconds in with_last(job.batches, step):
            with torch.autocast(weight.device.type, job.dtype,
                                enabled=job.dtype not in (torch.float32, weight.dtype)):
                made = job.loss(micro)
                part = sum(made.values()) if type(made) is dict else made
            loss = loss + part.detach()
            for name, value in made.items() if type(made) is dict else ():
                told_apart[name] += float(value.detach())
            usable += len(micro.counts) if type(micro) is MicroBatch else 1
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
                **speed.step(job.batch, *all_reduce_sum(work[0]), work[1], waited)}
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
            with unsharded(job.model):
                seen = [json.dumps({"step": step, **x}) + "\n" for x in job.watch()]
            if first:
                with open(out / "samples.jsonl", "a") as f:
                    f.writelines(seen)
        if stop.code or step % args.save_every == 0 or step == job.steps:
            save_checkpoint(job, out, step, args.keep_last)
        if stop.code:
            if first:
                print(f"stopped at step {step}, saved; go on with --resume auto", file=sys.stderr)
            return stop.code
    bar.close()
    for line in job.samples.journal.report() if first and job.samples else ():
        print(line, file=sys.stderr)
    with unsharded(job.model):
        if first:
            aside = out / "model.tmp"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            job.finish(aside)
            plot_loss(out)                       # before the model, which says that all is done
            rename_into_place(aside, out / "model")
            print(f"{out / 'model'} written after {job.steps} steps, {time.time() - started:.0f} s")
    return 0


def set_trainable(model, parts, lora=0):
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
            raise UsageError(f"--train {part}: the model has no such part; it has {tops}, and "
                             "theirs with a dot")
        for p in found:
            p.requires_grad_(True)
    for n, p in model.named_parameters() if lora else ():
        if n.startswith("llm.") and not n.endswith((".a", ".b")):
            p.requires_grad_(False)
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def parameter_groups(trained, row):
    """AdamW over {name: parameter}. Vectors, biases and norms do not decay.

    quirk: LAVIS lets whatever is not of one dimension decay: the queries, and the temperature,
    which has none."""
    decays = lambda p: p.dim() > 1 or p.dim() == 0 and row.schedule == "lavis"
    groups = {}
    for name, p in sorted(trained.items(), key=lambda pair: not pair[0].startswith("projector.")):
        lr = name.startswith("projector.") and row.projector_lr or row.lr
        groups.setdefault((lr, row.decay if decays(p) else 0.0), []).append(p)
    return torch.optim.AdamW([{"params": g, "lr": lr, "weight_decay": d}
                              for (lr, d), g in groups.items()],
                             betas=(.9, .999), eps=1e-8, fused=True)


def make_optimizers(trained, row, args):
    """AdamW, or an adamw8 for each weight: see `Update`."""
    whole = parameter_groups(trained, row)
    if args.optimizer == "adamw":
        return [whole]
    each = [(p, group) for group in whole.param_groups for p in group["params"]]
    return [AdamW([p], group["lr"], weight_decay=group["weight_decay"],
                  stochastic=args.stochastic, seed=args.seed << 16 ^ i)
            for i, (p, group) in enumerate(each)]


def sample_captions(model, row):
    """Describes the same four held-out scenes as training goes on: watching it learn to see."""
    scenes = [make_scene(i, "test", count=i) for i in (1, 2, 3, 4)]
    ids = build_prompt(["Describe this image"], row.template, model.tokenizer)

    def look():
        for scene in scenes:
            pixels = data.preprocess(draw(scene), model.image_size, row.aspect)
            tokens = list(generate(model, ids, pixels, max_new_tokens=80))
            yield {"truth": description(scene),
                   "says": model.tokenizer.decode(tokens).strip().split("\n")[0]}
    return look


def vlm_job(args, out, device):
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
        model = build_vlm(args, start, out)
        if args.projector:
            load_projector(model, args.projector)
    else:
        model = VLM.from_pretrained(start, weight_dtype(args))
        if model.aspect == "anyres":
            raise data.BadModel(f"{start}: a LLaVA-NeXT; its pictures in tiles are not trained on "
                                "here; take a LLaVA-1.5")
        if model.projector_type != row.projector_type:
            raise data.BadModel(f"{start}: its bridge is {model.projector_type}, this run's is {row.projector_type}; "
                                f"give --projector-type {model.projector_type}, or another --from")
        if getattr(model.template, "known", True) is False and args.template is None:
            raise UsageError(f"{start}: its chat template is none of ours, and training teaches it "
                             f"another: give --template {row.template}, the recipe's, or one of "
                             f"{', '.join(data.TEMPLATES)}")
        model.template, model.aspect = row.template, row.aspect
    if args.lora:
        add_lora(model.llm, args.lora, args.seed)
    model.to(device)
    model.llm.checkpoint, model.llm.offload = args.checkpoint, args.offload
    set_trainable(model, row.train, args.lora)
    shard_model(model)
    held = {n: local_shard(p) for n, p in model.named_parameters() if p.requires_grad}
    made = make_optimizers(held, row, args)
    count = flops_per_sample(model)
    loss, report = measure_saved_bytes(lambda micro: model.loss(*micro[:6], micro.questions), model, args)

    def work(micro):
        useful = [count(*text) for text in micro.counts]
        return (sum(text + pictures * model.num_image_tokens() for text, _, pictures in micro.counts),
                sum(forward + backward + eye for forward, backward, _, eye in useful))

    def finish(folder):
        report()
        merge_lora(model.llm)           # of LoRA: what is saved loads like any other
        model.save_pretrained(folder)

    return TrainJob(model, made, steps, MicroBatches(samples, model, args, rank(), world_size()), loss,
               lr_schedule(row, steps), finish, row.clip,
               sample_captions(model, row) if args.base == "toy" and not args.data else None,
               batch=row.batch, work=work, held=held, samples=samples)


def blip2_stage1_job(args, out, device):
    """BLIP-2's first stage: pictures and captions, no LLaMA."""
    row, samples = args.row, Samples(args)
    samples.journal = Journal(samples, out, args.most_bad)
    steps, model = samples.steps(), build_blip2_stage1(args).to(device)

    def micro(first):
        pixels, texts = [], []
        for index in range(first, first + row.batch // args.accum):
            try:
                picture, talk = samples[index]
                if picture is None:
                    raise data.BadData("no picture; BLIP-2 learns from pictures and captions")
                texts.append(blip_caption(talk[-1]["value"]))
                model.tokenizer.encode(texts[-1])           # refuses what holds no word
            except UserError as error:
                raise type(error)(f"{samples.name(index)}: {error}") from None
            pixels.append(data.preprocess(picture, model.image_size, row.aspect))
        ids, mask = model.tokenizer.encode(texts)
        return torch.cat(pixels).to(device), ids.to(device), mask.to(device), first

    return TrainJob(model, [parameter_groups(set_trainable(model, row.train), row)], steps,
               lambda step: [micro(step * row.batch + m * row.batch // args.accum)
                             for m in range(args.accum)],
               # the negatives are drawn by the index of the first sample
               lambda x: {name: loss / args.accum for name, loss in
                          model.losses(*x[:3], seed=x[3], only=row.losses).items()},
               lr_schedule(row, steps),
               model.save_pretrained, row.clip, batch=row.batch, samples=samples)


def compare_finished(args, out):
    """A run that is finished: refuses another --data file than it has learned from."""
    samples = Samples(argparse.Namespace(**{**vars(args), "on_bad_sample": "skip"}))
    Journal(samples, out, args.most_bad).compare(samples.steps())


def show(args):
    """Samples as the model reads them, what is learned in colour (in brackets off a terminal). What
    a run would refuse is refused."""
    model, samples = meta_model(args, set_trainable), Samples(args)
    folder = base_models(args)[1] if args.start in (None, "none") else args.start
    model.tokenizer = data.Tokenizer(resolve(folder))
    batches = MicroBatches(samples, model, args)
    for index in range(args.show_batch):
        try:
            if why := samples.fault(index):
                raise data.BadData(why)
            ids, labels = batches.text(index)
            batches.pictures((index, ids, labels))
        except NothingToLearn as error:
            print(f"sample {index}: teaches nothing: {error}")
        except UserError as error:
            if args.on_bad_sample == "error":
                raise
            print(f"sample {index}: left out: {error}")
        else:
            many = ids.count(data.IMAGE)
            seen = ("", " and a picture")[many] if many < 2 else f" and {many} pictures"
            print(f"sample {index}: {len(ids) - many} tokens{seen}")
            print(data.colour_labels(ids, labels, model.tokenizer))


def main(args):
    """One run; returns an exit code."""
    torch.manual_seed(args.seed)
    if args.threads or args.stage == 0:
        torch.set_num_threads(args.threads or 1)
    if args.row.template and args.row.template not in data.TEMPLATES:
        raise UsageError(f"--template {args.row.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    if args.plan:
        print_plan(args, set_trainable)
        return 0
    if args.base != "toy" and not args.data and args.stage:
        raise UsageError(f"--base {args.base} learns from your data: give --data FILE and --images "
                         "FOLDER")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = best if args.device == "auto" else args.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {device} is not to be had here; give cpu, or auto") from None
    if device.startswith("cuda") and args.stage and not (args.row.losses or args.show_batch):
        fit_to_card(args, set_trainable)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if args.show_batch:
        show(args)
        return 0
    if args.stage == 0:
        for part, make in (("clip", clip_job), ("llama", llama_job)):
            out = Path(args.output_dir or "runs/toy/stage0") / part
            if args.part not in ("both", part):
                continue
            with lock_folder(out):
                check_resumable(out, args)
                if args.resume and (out / "model").exists():
                    continue
                job = TrainJob(**make(out))
                write_manifest(out, args, job)
                if code := train_loop(job, out, args):
                    return code
        return 0
    out = Path(args.output_dir or f"runs/{args.base}/{args.recipe}/stage{args.stage}")
    device = init_distributed(device)
    if world_size() > 1 and args.row.losses:
        raise UsageError("torchrun is for stages with a LLaMA; start this one with python")
    try:
        with lock_folder(out) if rank() == 0 else nullcontext():
            if rank() == 0:
                check_resumable(out, args)
            if args.resume and (out / "model").exists():
                if args.data and os.path.exists(args.data):
                    compare_finished(args, out)
                print(f"{out / 'model'} is finished already")
                return 0
            job = (blip2_stage1_job if args.row.losses else vlm_job)(args, out, device)
            if args.dtype != "fp32":
                fast = device != "cpu" or torch.cpu._is_amx_tile_supported()
                job.dtype = torch.bfloat16 if fast or args.dtype == "bf16" else torch.float32
            if rank() == 0:
                write_manifest(out, args, job)
            code = train_loop(job, out, args)
            all_reduce_sum(0)                           # nobody goes before all is written
            return code
    except RuntimeError as error:
        if world_size() == 1 or not re.search("peer|gloo|NCCL", str(error)):
            raise
        why = str(error).strip().splitlines()[0][:100]
        raise TrainingFailed(f"another rank is gone ({why}): see what it said, and go on with "
                                  "--resume auto") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(ARGS), ARGS.debug))
