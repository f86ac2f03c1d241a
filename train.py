"""train.py: run one stage of one recipe.

    python train.py --stage 1                     align the bridge: pictures and captions
    python train.py --stage 2                     instruction tuning: pictures and conversations
    python train.py --stage 1 --show-batch 2      what is learned, in colour, and exit
    python train.py --stage 0                     make the toy parts in weights/toy from nothing

    stage   starts from                  trains                  learns to
    0       nothing                      CLIP; LLaMA, apart      see; read and answer
    1       CLIP + LLaMA + new bridge    bridge                  turn patches into words
    2       stage 1                      bridge + LLaMA          answer about pictures

A recipe is two rows of one table, below: what the paper and the released script say. Every field
is a flag too. `--base toy` (shipped) runs on two CPU cores; its sizes have their own small table.

One step is five movements, always in this order: schedule, data, accumulate, step, log.
Every batch is a function of (seed, stage, step) alone, so a run that is killed and resumed ends
with the same bits as one that was not, on the same machine with the same number of threads.
Weights are fp32; the forward runs in bf16 where the processor multiplies bf16 faster.
"""

import argparse
import math
import os
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Stage:
    """One row of a paper's table of hyper-parameters."""
    source: str                     # where the numbers come from
    bridge: str                     # linear | mlp
    train: tuple                    # parts that learn: bridge, llm
    template: str                   # how the text is laid out, data.TEMPLATES
    aspect: str                     # how pictures are made square, data.preprocess
    lr: float
    batch: int                      # samples a step
    epochs: float = 1
    steps: int = 0                  # 0: from epochs and the data
    warmup: float = .03             # fraction of the steps; then cosine to 0
    decay: float = 0.0
    clip: float = 0.0               # 0: not clipped, as the official runs were


RECIPES = {
    # [LLaVA] 2304.08485, scripts/pretrain.sh, finetune.sh. Paper: stage 2 with batch 32, 3 epochs;
    # a later script says 128. Not run by us at 7B.
    "llava": (
        Stage("LLaVA, April 2023", "linear", ("bridge",), "plain", "square", 2e-3, 128),
        Stage("LLaVA, April 2023", "linear", ("bridge", "llm"), "v1", "square", 2e-5, 32, 3)),
    # [LLaVA15] 2310.03744, scripts/v1_5/pretrain.sh, finetune.sh. Not run by us at 7B.
    # quirk: stage 1 crops pictures to a square, stage 2 and inference pad them.
    "llava-1.5": (
        Stage("LLaVA-1.5, October 2023", "mlp", ("bridge",), "plain", "square", 1e-3, 256),
        Stage("LLaVA-1.5, October 2023", "mlp", ("bridge", "llm"), "v1", "pad", 2e-5, 128)),
}
# What two CPU cores need instead: a model 5,000 times smaller wants larger steps and fewer.
TOY = (dict(lr=1.2e-2, batch=16, steps=340, clip=1.0),
       dict(lr=1.5e-3, batch=12, steps=520, clip=1.0))
BASES = {"toy": ("weights/toy/clip", "weights/toy/llama"),
         "7b": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"),
         "13b": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-13b-v1.5")}


def arguments(argv=None):
    """The command line: the recipe's row of this stage, each field overridable."""
    p = argparse.ArgumentParser(description="Run one stage of one recipe.", allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"error: {message}; see --help\n")
    p.add_argument("--stage", type=int, choices=(0, 1, 2), required=True)
    p.add_argument("--recipe", choices=RECIPES, default="llava-1.5")
    p.add_argument("--base", choices=BASES, default="toy", help="the parts to start from")
    p.add_argument("--vision", help="CLIP folder or hub id, instead of the base's")
    p.add_argument("--llm", help="LLaMA folder or hub id, instead of the base's")
    p.add_argument("--from", dest="start", help="model to start stage 2 from; 'none' skips stage 1")
    p.add_argument("--data", help="LLaVA JSON or JSONL; without it, the toy world")
    p.add_argument("--images", default=".", help="folder that the data's pictures are relative to")
    p.add_argument("--projector", help="start the bridge from this file or folder, where it is new")
    p.add_argument("--official-quirks", action="store_true",
                   help="learn nothing from samples that the official code masks with a warning")
    p.add_argument("--output-dir", help="default: runs/<base>/<recipe>/stage<n>")
    p.add_argument("--resume", choices=("auto",), help="go on from the newest good checkpoint")
    p.add_argument("--overwrite", action="store_true", help="delete what the output folder holds")
    p.add_argument("--accum", type=int, default=1, help="micro-batches a step")
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
            kind = {"train": str, "steps": int, "batch": int}.get(f.name, f.type)
            p.add_argument(f"--{f.name}", type=kind, help="field of the recipe's stage")
    a = p.parse_args(argv)
    row = RECIPES[a.recipe][max(a.stage, 1) - 1]
    if a.base == "toy" and not a.data:
        row = replace(row, **TOY[max(a.stage, 1) - 1])
    given = {f.name: getattr(a, f.name) for f in fields(Stage)
             if f.name != "source" and getattr(a, f.name) is not None}
    if "train" in given:
        given["train"] = tuple(given["train"].split(","))
    a.row = replace(row, **given)
    for name, low in (("accum", 1), ("save_every", 1), ("keep_last", 1), ("threads", 0),
                      ("show_batch", 0), ("seed", 0)):
        if getattr(a, name) < low:
            p.error(f"--{name.replace('_', '-')} must be at least {low}")
    r = a.row
    if not (0 <= r.lr < 10 and r.batch >= 1 and 0 < r.epochs < 1e6 and 0 <= r.warmup < 1
            and 0 <= r.steps < 10 ** 6 and 0 <= r.clip < math.inf and 0 <= r.decay < math.inf
            and a.seed < 2 ** 32):
        p.error("lr, batch, epochs, steps, warmup, decay, clip or seed is out of range")
    if set(r.train) - {"bridge", "llm"} or not r.train or r.bridge not in ("linear", "mlp"):
        p.error("--train takes bridge and llm with a comma, --bridge linear or mlp")
    if a.stage == 0 and a.show_batch:
        p.error("--show-batch is for stages 1 and 2")
    if a.projector and (a.start != "none" if a.stage == 2 else a.stage == 0):
        p.error("--projector is for a new bridge: stage 1, or stage 2 with --from none")
    if r.aspect not in ("square", "pad"):
        p.error(f"--aspect {r.aspect!r} must be square or pad")
    if r.batch % a.accum:
        p.error(f"--batch {r.batch} does not divide into --accum {a.accum} micro-batches")
    return a


if __name__ == "__main__":
    ARGS = arguments()              # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # spinning threads starve each other

import fcntl
import hashlib
import json
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import data
import world
from clip import CLIP, contrastive_loss, late_scores, read_tokenizer
from clip import Config as TowerConfig
from generate import generate
from kernels import linear_cross_entropy
from llama import Config as LlamaConfig
from llama import Llama, start_copying
from projector import VLM

HERE = Path(__file__).parent


@dataclass
class Job:
    """What the loop needs to know of a stage."""
    model: torch.nn.Module
    optimizers: list
    steps: int
    batches: object                 # step -> list of micro-batches
    loss: object                    # micro-batch -> scalar
    factor: object                  # step -> multiple of the peak learning rate
    finish: object                  # folder -> writes the finished model into it
    clip: float = 0.0
    watch: object = None            # () -> list of dicts for samples.jsonl
    dtype: torch.dtype = torch.float32
    batch: int = 0                  # samples a step, for the log

    def __post_init__(self):
        for o in self.optimizers:
            for g in o.param_groups:
                g["peak"] = g["lr"]

    def trained(self):
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


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
    names = {id(p): n for n, p in trained.items()}
    state = {f"{names[id(p)]}|{key}": value for o in job.optimizers
             for p, entry in o.state.items() for key, value in entry.items()}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_file({n: p.data.contiguous() for n, p in trained.items()},
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
    for old in sorted(out.glob("step-??????"))[:-keep]:
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
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(weights[name])
        names = {n: (o, p) for o in job.optimizers for g in o.param_groups for p in g["params"]
                 for n, q in trained.items() if q is p}
        for key in state:
            name, entry = key.split("|")
            optimizer, p = names[name]
            optimizer.state[p][entry] = state[key].to(p.device, copy=True)
        return trainer["step"]
    return 0


# ------------------------------------------------------------------------------------ the loop

class Stop:
    """Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.code = 0
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            signal.signal(number, lambda n, frame, code=code: self.ask(n, code))

    def ask(self, number, code):
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = code


def rewind(path, step):
    """Drop the lines of a .jsonl that a resumed run will write again, and one cut short."""
    if path.exists():
        lines = [x for x in path.read_text().splitlines(True) if x.endswith("}\n")]
        put(path, "".join(x for x in lines if json.loads(x)["step"] <= step))


def fit(job, out, args):
    """Train to the end; returns an exit code. Raises data.TrainingFailed on NaN or infinity."""
    for left in out.glob("step-??????.tmp"):        # of a kill in the middle of a save
        shutil.rmtree(left)
    step = restore(job, out) if args.resume else 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        rewind(out / name, step)
    stop, started, seen, told = Stop(), time.time(), 0, 0.0
    parameters = list(job.trained().values())
    bar = tqdm(total=job.steps, initial=step, disable=not sys.stderr.isatty())
    while step < job.steps:
        # schedule
        for o in job.optimizers:
            for g in o.param_groups:
                g["lr"] = g["peak"] * job.factor(step)
        # data, accumulate
        micros, loss = job.batches(step), 0.0
        for micro in micros:
            with torch.autocast(parameters[0].device.type, job.dtype,
                                enabled=job.dtype != torch.float32):
                part = job.loss(micro) / len(micros)
            if part.requires_grad:          # text alone has nothing to teach a bridge
                part.backward()
            loss += float(part.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, job.clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            (out / f"nan-step-{step}.json").write_text(json.dumps(
                {"step": step, "loss": str(loss), "grad_norm": str(norm),
                 "samples": [step * job.batch, (step + 1) * job.batch - 1]}) + "\n")
            raise data.TrainingFailed(f"step {step}: loss {loss}, gradient norm {norm}: stopped "
                                      "before the update; lower --lr or look at the data")
        # step
        for o in job.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        # log
        seen += job.batch
        line = {"step": step, "loss": round(loss, 5), "grad_norm": round(norm, 4),
                "lr": job.optimizers[-1].param_groups[0]["lr"],
                "samples_per_second": round(seen / (time.time() - started), 1)}
        with open(out / "metrics.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{loss:.3f}")
        bar.update()
        if bar.disable and time.time() - told > 10:
            told = time.time()
            print(f"step {step}/{job.steps}  loss {loss:.3f}  {told - started:.0f} s", flush=True)
        if job.watch and (step == job.steps or step % max(1, job.steps // 5) == 0):
            with open(out / "samples.jsonl", "a") as f:
                f.writelines(json.dumps({"step": step, **x}) + "\n" for x in job.watch())
        if stop.code or step % args.save_every == 0 or step == job.steps:
            save(job, out, step, args.keep_last)
        if stop.code:
            print(f"stopped at step {step}, saved; go on with --resume auto", file=sys.stderr)
            return stop.code
    bar.close()
    aside = out / "model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    job.finish(aside)
    plot(out)                               # before the model, which says that all is done
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

def toy_sample(seed, stage, index):
    """Sample of the toy world, a function of its arguments: (picture, conversation)."""
    scene, dice = world.scene(f"{seed}-{stage}-{index}"), random.Random(f"{seed}-{stage}-{index}")
    if stage == 1:
        text = dice.choice([world.description(scene)] * 5 + world.captions(scene))
        return world.draw(scene), [{"from": "human", "value": "<image>\n" + world.DESCRIBE[1]},
                                   {"from": "gpt", "value": text}]
    # what the shipped LLaMA is weakest at, oftener: lists of what fits a word, and of everything
    pairs = world.dialogue(scene, dice, 5, (6, 6, 5, 8, 9, 30, 8, 12, 20, 4), .25)
    talk = [{"from": who, "value": text} for pair in pairs
            for who, text in zip(("human", "gpt"), pair)]
    talk[0]["value"] = "<image>\n" + talk[0]["value"]
    return world.draw(scene), talk


class Samples:
    """Where samples come from: the toy world, without end, or a file in LLaVA's format."""

    def __init__(self, args):
        self.args = args
        self.rows = data.read_conversations(args.data) if args.data else None
        self.epoch, self.order = -1, []

    def steps(self):
        row = self.args.row
        if row.steps:
            return row.steps
        if not self.rows:
            raise data.Usage("the toy world has no end: give --steps")
        return math.ceil(len(self.rows) * row.epochs / row.batch)

    def row(self, index):
        """The file's sample number `index` of the run; every epoch has an order of its own."""
        epoch, at = divmod(index, len(self.rows))
        if epoch != self.epoch:
            dice = torch.Generator().manual_seed(self.args.seed * 1000 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.rows), generator=dice).tolist()
        return self.rows[self.order[at]]

    def name(self, index):
        return f"sample {self.row(index)['id']}" if self.rows else f"toy sample {index}"

    def __getitem__(self, index):
        """(picture or None, conversation) number `index` of the run, whatever the epoch."""
        if self.rows is None:
            return toy_sample(self.args.seed, self.args.stage, index)
        chosen = self.row(index)
        picture = chosen.get("image")
        if picture is not None:
            picture = data.load_image(data.picture_path(self.args.images, picture))
        return picture, chosen["conversations"]


def make_batches(samples, model, args):
    """step -> micro-batches of (ids, labels, pixels, keep)."""
    row, device = args.row, model.llm.embed.weight.device
    size = row.batch // args.accum

    def micro(first):
        pairs, pixels = [], []
        for index in range(first, first + size):
            try:
                picture, talk = samples[index]
                ids, labels = data.encode(talk, row.template, model.words, picture is not None,
                                          args.official_quirks)
                if (places := ids.count(data.IMAGE)) != (picture is not None):
                    raise data.BadData(f"one picture, but {places} <image> places in the text")
            except data.Failure as error:
                raise type(error)(f"{samples.name(index)}: {error}") from None
            pairs.append((ids, labels))
            if picture is not None:
                pixels.append(data.preprocess(picture, model.image_size, row.aspect))
        ids, labels = data.collate(pairs, model.words.pad)
        if (labels == data.IGNORE).all():
            raise data.BadData(f"{samples.name(first)} and the {size - 1} after it have nothing to "
                               "train on: no answer in them; correct them, or look at --show-batch")
        lengths = torch.tensor([len(i) for i, _ in pairs])
        keep = torch.arange(ids.shape[1])[None] < lengths[:, None]
        stacked = torch.cat(pixels) if pixels else None
        return tuple(t if t is None else t.to(device) for t in (ids, labels, stacked, keep))

    return lambda step: [micro(step * row.batch + m * size) for m in range(args.accum)]


def cosine(step, steps, warmup):
    """Linear warm-up over ceil(warmup · steps), then half a cosine to 0. The first update is 0,
    as in the official runs."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return step / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def set_trained(model, parts):
    """The whole freezing policy: only the named parts learn. Returns their parameters."""
    model.requires_grad_(False)
    for part in parts:
        getattr(model, part).requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def watcher(model, row):
    """Describes the same four held-out scenes as training goes on: watching it learn to see."""
    scenes = [world.scene(i, "test", count=i) for i in (1, 2, 3, 4)]
    turns = [{"from": "human", "value": "<image>\nDescribe this image"}]
    ids = data.chat_ids(turns, row.template, model.words)

    def look():
        for scene in scenes:
            pixels = data.preprocess(world.draw(scene), model.image_size, row.aspect)
            tokens = list(generate(model, ids, pixels, max_new_tokens=80))
            yield {"truth": world.description(scene),
                   "says": model.words.decode(tokens).strip().split("\n")[0]}
    return look


def parts(args):
    """(CLIP, LLaMA): folders or hub ids. The toy's are beside this file."""
    base = [HERE / p if args.base == "toy" else p for p in BASES[args.base]]
    return args.vision or base[0], args.llm or base[1]


def bridge_job(args, out, device):
    """Stages 1 and 2."""
    row, (vision, llm), samples = args.row, parts(args), Samples(args)
    steps = samples.steps()
    start = args.start or (out.parent / "stage1/model" if args.stage == 2 else "none")
    if str(start) == "none":
        model = VLM.from_parts(vision, llm, row.bridge, row.template, row.aspect, args.seed,
                               torch.float32)
        if args.projector:
            model.load_bridge(args.projector)
    elif args.start is None and not Path(start).exists():
        raise data.BadModel(f"{start}: stage 2 starts from stage 1's model and there is none; run "
                            "--stage 1 first, or give --from FOLDER or --from none")
    else:
        model = VLM.from_pretrained(start, torch.float32)
        if model.aspect == "anyres":
            raise data.BadModel(f"{start}: a LLaVA-NeXT; its pictures in tiles are not trained on "
                                "here; take a LLaVA-1.5")
        if model.kind != row.bridge:
            raise data.BadModel(f"{start}: its bridge is {model.kind}, this run's is {row.bridge}; "
                                f"give --bridge {model.kind}, or another --from")
        model.template, model.aspect = row.template, row.aspect
    model.to(device)
    parameters = set_trained(model, row.train)
    optimizer = torch.optim.AdamW(parameters, row.lr, betas=(.9, .999), eps=1e-8,
                                  weight_decay=row.decay, fused=True)
    return Job(model, [optimizer], steps, make_batches(samples, model, args),
               lambda micro: model.loss(*micro), lambda step: cosine(step, steps, row.warmup),
               model.save_pretrained, row.clip,
               watcher(model, row) if args.base == "toy" and not args.data else None,
               batch=row.batch)


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
    skip = {"resume", "overwrite", "save_every", "keep_last", "debug", "row", "show_batch", "part",
            "output_dir", *(f.name for f in fields(Stage))}
    return json.loads(json.dumps({**{k: v for k, v in sorted(vars(args).items()) if k not in skip},
                                  "stage_row": vars(args.row)}))


def claim(out):
    """The output folder, ours alone while the result is open."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    changed = [f"--{k}" for k in new if k not in ("stage_row", "start") and old.get(k) != new[k]]
    if changed:
        raise data.BadData(f"{out}: --resume with other flags ({', '.join(changed)}); give the "
                           "flags of its config.json, or --overwrite to start anew")


def manifest(out, args, job):
    """The run begins: config.json, and run.json: what would have to be equal for the same bits.

    config.json is the first file of a run to come and the last to go."""
    if args.overwrite:
        for name in ("step-*", "model", "model.tmp", "metrics.jsonl", "samples.jsonl", "loss.png",
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


def show(samples, words, args):
    """Samples as the model reads them, what is learned in colour (in brackets off a terminal)."""
    for index in range(args.show_batch):
        picture, talk = samples[index]
        ids, labels = data.encode(talk, args.row.template, words, picture is not None,
                                  args.official_quirks)
        print(f"sample {index}: {len(ids)} tokens")
        print(data.marked(ids, labels, words))


def train(args):
    """One run; returns an exit code."""
    torch.manual_seed(args.seed)
    if args.threads or args.stage == 0:
        torch.set_num_threads(args.threads or 1)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = best if args.device == "auto" else args.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise data.Usage(f"--device {device} is not to be had here; give cpu, or auto") from None
    if args.row.template not in data.TEMPLATES:
        raise data.Usage(f"--template {args.row.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if args.show_batch:
        show(Samples(args), data.Tokenizer(data.resolve(parts(args)[1])), args)
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
    with claim(out):
        check(out, args)
        if args.resume and (out / "model").exists():
            print(f"{out / 'model'} is finished already")
            return 0
        job = bridge_job(args, out, device)
        if args.dtype != "fp32":
            fast = device != "cpu" or torch.cpu._is_amx_tile_supported()
            job.dtype = torch.bfloat16 if fast or args.dtype == "bf16" else torch.float32
        manifest(out, args, job)
        return fit(job, out, args)


if __name__ == "__main__":
    sys.exit(data.guarded(lambda: train(ARGS), ARGS.debug))
