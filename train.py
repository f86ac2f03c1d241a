"""train.py: one loop that runs every stage of every recipe.

    python train.py --stage 1                     train the projector on pictures with captions
    python train.py --stage 2                     then projector and LLaMA on conversations
    python train.py --stage 1 --show-batch 2      print two samples, the tokens with loss in colour
    python train.py --stage 2 --plan --base 7b    print the memory and the hours that it would need
    python train.py --stage 0                     train the toy's CLIP and LLaMA from nothing
    python train.py --stage 0 --part qformer      train its Q-Former on these two

    recipe      stage   starts from                     trains              learns to
                0       nothing                         CLIP; LLaMA; and    see; read and answer;
                                                        Q-Former            ask a picture
    llava and   1       CLIP + LLaMA + new projector    projector           show LLaMA the patches
    llava-1.5   2       stage 1                         projector + LLaMA   answer about pictures
    blip2       1       ViT + new Q-Former, no LLaMA    Q-Former            match and write captions
                2       stage 1 + LLaMA, OPT or FlanT5  Q-Former, linear    show LLaMA the queries
    minigpt4    1       BLIP-2's Q-Former + LLaMA       linear              caption
                2       stage 1                         linear              describe at length
    sharegpt4v  1       llava-1.5's stage 1             all but lower ViT   describe at length
                2       stage 1                         projector + LLaMA   answer about pictures

A recipe is two rows of the table RECIPES: what the paper and the released script say. Every field
of a row is a flag, too. `--base toy` (shipped) runs on two CPU cores; TOY has its rates and steps.

A step of `train_loop` is five movements: schedule, data, accumulate, step, log. A batch depends
only on (seed, stage, step), so a run that was killed and resumed ends with the same bits as one
that was not (on the same machine, with the same number of threads). What such a run needs besides
- checkpoints, logs, several GPUs, bad samples - is in the folder trainer/.
Next: generate.py, which asks what has been trained.
"""

from dataclasses import dataclass

from trainer.environment import before_torch
from trainer.flags import parse


@dataclass(frozen=True)
class Stage:
    """One row of a paper's table of hyper-parameters."""
    source: str                     # where the numbers come from
    projector_type: str             # linear | mlp | qformer: ln_vision, Q-Former, linear layer
    train: tuple                    # the parts that train, by their names in the model
    template: str                   # how the text is laid out: data.TEMPLATES; "": no LLaMA
    image_aspect: str               # how an image becomes a square: data.preprocess
    lr: float
    batch: int                      # samples a step
    epochs: float = 1               # where steps is 0, and for the schedule lavis
    steps: int = 0                  # 0: from epochs and the number of samples
    warmup: float = .03             # share of the steps; 1 and more: a number of steps
    decay: float = 0.0              # weight decay
    clip: float = 0.0               # largest norm of the gradients; 0: no clipping, as in LLaVA's
    schedule: str = "llava"         # llava | lavis | minigpt4: trainer/schedules.py
    warm_lr: float = 0.0            # where the warm-up begins
    min_lr: float = 0.0             # where the cosine ends
    projector_lr: float = 0.0       # of the projector alone; 0: lr
    muon: float = 0.0               # the toy's: rate of the matrices under Muon; 0: AdamW
    losses: tuple = ()              # BLIP-2's itc, itm, itg: qformer.py; (): the next token's
    loss_groups: int = 8            # mean of each group's mean loss; officially one group a GPU
    order: str = "shuffled"         # of the samples in --data; or modality: data.modality_order
    caption_style: str = ""         # the toy world's texts: toy.texts.training_sample


RECIPES = {
    # [LLaVA] 2304.08485, scripts/pretrain.sh, finetune.sh. Paper: stage 2 with batch 32, 3 epochs;
    # a later script says 128. The third row is stage 2 with --task scienceqa: finetune_sqa.sh, and
    # the paper's 12 epochs. Not run by us at 7B.
    "llava": (
        Stage("LLaVA, April 2023", "linear", ("projector",), "plain", "square", 2e-3, 128,
              caption_style="captions"),
        Stage("LLaVA, April 2023", "linear", ("projector", "llm"), "v1", "square", 2e-5, 32, 3,
              caption_style="dialogue"),
        Stage("LLaVA, ScienceQA", "linear", ("projector", "llm"), "v1", "square", 2e-5, 128, 12,
              caption_style="dialogue")),
    # [LLaVA15] 2310.03744, scripts/v1_5/pretrain.sh, finetune.sh. Not run by us at 7B.
    # quirk: stage 1 crops pictures to a square, stage 2 and inference pad them.
    "llava-1.5": (
        Stage("LLaVA-1.5, October 2023", "mlp", ("projector",), "plain", "square", 1e-3, 256,
              caption_style="captions"),
        Stage("LLaVA-1.5, October 2023", "mlp", ("projector", "llm"), "v1", "pad", 2e-5, 128,
              order="modality", caption_style="dialogue")),
    # [BLIP2] 2301.12597, LAVIS blip2_pretrain_stage{1,2}.yaml. Paper: stage 1 250k steps of 1,680
    # pictures, stage 2 80k of 1,920 (OPT), warm-up 2k, lowest rate 5e-5 in stage 2, beta2 .98. The
    # rows follow the script. Its stage 2 uses OPT or FlanT5: give one by --llm, and the template
    # becomes blip2_opt or blip2_t5. With a LLaMA it is our composition, InstructBLIP-Vicuna its
    # nearest official relative. Not run by us at full size.
    "blip2": (
        Stage("BLIP-2, January 2023", "qformer", ("ln_vision", "qformer", "vision_proj",
              "text_proj", "itm_head", "lm_head", "temp"), "", "squash", 1e-4, 1600, 10,
              warmup=5000, decay=.05, schedule="lavis", warm_lr=1e-6, min_lr=1e-5,
              losses=("itc", "itm", "itg"), caption_style="short"),
        Stage("BLIP-2, January 2023; with a LLaMA ours", "qformer", ("projector",), "blip2",
              "squash", 1e-4, 1024, 10, warmup=2000, decay=.05, schedule="lavis", warm_lr=1e-6,
              min_lr=1e-5, loss_groups=16, caption_style="captions")),
    # [MiniGPT4] 2304.10592, minigpt4_stage{1,2}_*.yaml. Paper: 400 steps in stage 2. Both stages
    # train one linear layer. It was trained with Vicuna v0, whose difference to LLaMA alone is
    # public: give yours by --llm. Not run by us at full size.
    "minigpt4": (
        Stage("MiniGPT-4, April 2023", "qformer", ("projector.proj",), "minigpt4_caption", "squash",
              1e-4, 256, 4, 20000, 5000, .05, schedule="minigpt4", warm_lr=1e-6, min_lr=8e-5,
              loss_groups=4, caption_style="mixed"),
        Stage("MiniGPT-4, April 2023", "qformer", ("projector.proj",), "minigpt4", "squash",
              3e-5, 12, 5, 1000, 200, .05, schedule="minigpt4", warm_lr=1e-6, min_lr=1e-5,
              loss_groups=1, caption_style="details")),
    # [ShareGPT4V] 2311.12793, its pretrain.sh and finetune.sh. Stage 1 starts from LLaVA-1.5's
    # stage 1. The trained tower is saved inside the model; officially in a folder of its own.
    # quirk: block 23 trains, but LLaVA reads the output of block 22, so it gets no gradient.
    "sharegpt4v": (
        Stage("ShareGPT4V, November 2023", "mlp", ("vision.blocks.12+", "projector", "llm"),
              "plain", "square", 2e-5, 256, loss_groups=16, caption_style="descriptions"),
        Stage("ShareGPT4V, November 2023", "mlp", ("projector", "llm"), "v1", "pad", 2e-5, 128,
              loss_groups=16, order="modality", caption_style="dialogue")),
}
# --base small. TinyLLaVA Factory (2405.11788), scripts/train/openelm: LLaVA-1.5's data, projector,
# rates and batches before OpenELM-270M, on 2 GPUs x 2 micro-batches of 64, then on 4 x 2 of 16. It
# crops pictures in stage 2, too; here they are padded. Not run by us. ShareGPT4V's upper half is
# that of a tower of 12 blocks.
SMALL = {"llava-1.5": (dict(lr=1e-3, batch=256, loss_groups=4),
                       dict(lr=2e-5, batch=128, loss_groups=8)),
         "sharegpt4v": (dict(train=("vision.blocks.6+", "projector", "llm")), {})}
# The same rows for the toy: a model 5,000 times smaller needs higher rates, fewer updates.
LLAVA_TOY = (dict(lr=1.2e-2, muon=.01, batch=16, steps=340, clip=1.0),
             dict(lr=1.5e-3, batch=12, steps=520, clip=1.0))
FROM_ZERO = dict(warmup=.05, clip=1.0, warm_lr=0.)
TOY = {"llava": (*LLAVA_TOY, LLAVA_TOY[1]), "llava-1.5": LLAVA_TOY,
       "blip2": (FROM_ZERO | dict(lr=1e-3, muon=.01, batch=32, steps=400, warmup=.1, min_lr=1e-4),
                 FROM_ZERO | dict(lr=2e-3, muon=.01, batch=16, steps=400, min_lr=2e-4)),
       "minigpt4": (FROM_ZERO | dict(lr=6e-2, batch=8, steps=600, min_lr=3e-3),
                    FROM_ZERO | dict(lr=6e-2, batch=4, steps=500, min_lr=1e-3)),
       "sharegpt4v": (dict(lr=1e-3, batch=12, steps=300, clip=1.0,
                           train=("vision.blocks.2+", "projector", "llm")), LLAVA_TOY[1])}


def parse_args(argv=None):
    """The command line. args.row is the recipe's row of this stage, with what the flags change."""
    return parse(Stage, RECIPES, {"toy": TOY, "small": SMALL}, argv)


if __name__ == "__main__":
    ARGS = parse_args()                 # before torch is imported: --help answers at once
before_torch()


import torch

import data
from formats.errors import exit_status
from generate import build_prompt, generate
from kernels.adamw import AdamW
from toy.parts import clip_job, llama_job, muon
from toy.texts import description
from toy.world import draw
from trainer.adapter import kept_adapter
from trainer.allocator import reserve
from trainer.build import build_blip2_stage1, find_parameters, start_model
from trainer.caption_loader import CaptionBatches
from trainer.distributed import all_ranks, leave, rank, shard_model, world_size
from trainer.forecast import flops_counter
from trainer.golden import run_golden
from trainer.held_out import held_out
from trainer.learning import shown_scenes
from trainer.loader import MicroBatches, Samples
from trainer.machine import prepare
from trainer.plan import print_plan
from trainer.qformer_job import qformer_job
from trainer.qlora import merge_additions
from trainer.run_folder import Run
from trainer.saved_bytes import measure_saved_bytes
from trainer.schedules import lr_schedule
from trainer.show import show_batch
from trainer.start import output_folders
from trainer.step import GradientStep


# ---------------------------------------------------------------- what trains, and with which rate

def set_trainable(model, parts, lora=0):
    """The freezing policy: only the named parts train; of a LLaMA with LoRA only LoRA's weights.

    parts: names of modules or parameters; "vision.blocks.12+" is block 12 and all after it.
    Returns {name: parameter} of what trains. An unknown name is a UsageError."""
    model.requires_grad_(False)
    for part in parts:
        for p in find_parameters(model, part):
            p.requires_grad_(True)
    if lora:
        for name, p in model.llm.named_parameters():
            if not name.endswith((".a", ".b")):             # LoRA's matrices: trainer/lora.py
                p.requires_grad_(False)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(trained, row):
    """[{params, lr, weight_decay}] for an optimizer, of {name: parameter}: the projector first.

    Vectors (biases, scales of norms) do not decay. quirk: in LAVIS everything else does, also the
    temperature, a parameter without dimensions."""
    groups = {}                                             # (lr, weight decay) -> parameters
    for name, p in sorted(trained.items(), key=lambda item: not item[0].startswith("projector.")):
        lr, decay = row.lr, 0.0
        if name.startswith("projector.") and row.projector_lr:
            lr = row.projector_lr
        if p.dim() > 1 or (p.dim() == 0 and row.schedule == "lavis"):
            decay = row.decay
        groups.setdefault((lr, decay), []).append(p)
    return [{"params": params, "lr": lr, "weight_decay": decay}
            for (lr, decay), params in groups.items()]


def adamw(groups):
    """PyTorch's AdamW with the constants of all these papers' scripts."""
    return torch.optim.AdamW(groups, betas=(.9, .999), eps=1e-8, fused=True)


def make_optimizers(trained, row, args):
    """[AdamW]; the toy's Muon and AdamW; or an 8-bit AdamW for each weight, which can step while
    backward still runs."""
    if row.muon:
        return muon(trained, row.muon, row.lr)
    groups = parameter_groups(trained, row)
    if args.optimizer == "adamw":
        return [adamw(groups)]
    optimizers = []
    for group in groups:
        for p in group["params"]:
            seed = args.seed << 16 ^ len(optimizers)        # each rounds with its own numbers
            optimizers.append(AdamW([p], group["lr"], weight_decay=group["weight_decay"],
                                    stochastic=args.stochastic, seed=seed,
                                    offload=args.offload_optimizer))
    return optimizers


# ------------------------------------------------------------------------- what a stage consists of

@dataclass
class TrainJob:
    """What the loop needs to know of a stage."""
    model: torch.nn.Module
    optimizers: list
    steps: int
    batches: object                 # step -> its micro-batches
    loss: object                    # micro-batch -> {name: scalar}; a step sums all of them
    lr_scale: object                # step -> factor of the peak learning rate
    save_model: object              # folder -> writes the finished model into it
    clip: float = 0.0
    sample: object = None           # () -> dicts for samples.jsonl
    held_out: object = None         # () -> the loss on --eval-data
    batch: int = 0                  # samples a step, for the log
    count_flops: object = None      # micro-batch -> (tokens, FLOPs), for the log
    samples: object = None          # where the micro-batches come from, trainer.loader.Samples
    local_params: dict | None = None    # name -> what optimizers hold: this rank's shard
    offload_gradients: bool = False     # sums over micro-batches on the host: trainer/step.py

    def __post_init__(self):
        self.local_params = self.local_params or self.trained()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    def trained(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def vlm_job(args, out, device):
    """A stage of a model with a LLaMA: all stages but BLIP-2's first."""
    row, samples = args.row, Samples(args, out)
    steps = samples.steps()
    model = start_model(args, out).to(device)               # new, or the result of the stage before
    model.llm.checkpoint, model.llm.offload = args.checkpoint, args.offload
    set_trainable(model, row.train, args.lora)
    local_params = shard_model(model, whole=row.muon)       # one GPU: the parameters themselves
    reserve(model, args)                                    # does the largest step fit the GPU?

    def loss(batch):
        # each token with loss has a weight: over a step they add up to the official mean of means
        return {"loss": model.loss(batch.ids, batch.labels, batch.pixels, batch.attention_mask,
                                   batch.weights, batch.lengths, batch.questions)}
    # the same loss; its first call also counts the bytes that backward keeps
    loss, report = measure_saved_bytes(loss, model, args)

    def save_model(folder):
        report()                        # the memory that was needed, beside the forecast
        with kept_adapter(model, folder, args):
            merge_additions(model.llm)  # what is saved loads like any other model
            model.save_pretrained(folder)

    sample = None
    if args.base == "toy" and not args.data:
        sample = sample_captions(model, row)
    return TrainJob(
        model, make_optimizers(local_params, row, args), steps,
        batches=MicroBatches(samples, model, args, rank(), world_size()), loss=loss,
        lr_scale=lr_schedule(row, steps), save_model=save_model, clip=row.clip, sample=sample,
        held_out=held_out(model, args), batch=row.batch, count_flops=flops_counter(model),
        samples=samples, local_params=local_params, offload_gradients=args.offload_gradients)


def blip2_stage1_job(args, out, device):
    """BLIP-2's first stage: a Q-Former learns from pictures and captions, without a LLaMA."""
    row, samples = args.row, Samples(args, out)
    steps = samples.steps()
    model = build_blip2_stage1(args).to(device)
    optimizers = make_optimizers(set_trainable(model, row.train), row, args)

    def loss(batch):
        # seed: of ITM's negatives. With --accum they come from one micro-batch only
        pixels, ids, mask, seed = batch
        losses = model.losses(pixels, ids, mask, seed=seed, only=row.losses)
        return {name: value / args.accum for name, value in losses.items()}

    return TrainJob(
        model, optimizers, steps, batches=CaptionBatches(samples, model, args, device), loss=loss,
        lr_scale=lr_schedule(row, steps), save_model=model.save_pretrained, clip=row.clip,
        batch=row.batch, samples=samples)


def sample_captions(model, row):
    """A function that describes four held-out scenes, always the same: see the model learn."""
    # BLIP-2 is a captioner: its OPT or FlanT5 would go on from the words of a question
    question = "" if row.template.startswith("blip2") else "Describe this image"
    ids = build_prompt([question], row.template, model.tokenizer)

    def sample():
        for scene in shown_scenes():
            pixels = data.preprocess(draw(scene), model.image_size, row.image_aspect)
            tokens = list(generate(model, ids, pixels, max_new_tokens=80))
            text = model.tokenizer.decode(tokens).strip().split("\n")[0]
            yield {"truth": description(scene), "says": text}
    return sample


# ----------------------------------------------------------------------------------------- the loop

def train_loop(job, run):
    """Train to the end: five movements a step. Returns an exit code.

    run: trainer.run_folder.Run, which logs, saves, resumes, and ends the run at NaN or infinity."""
    step = run.resume(job)              # 0, or the step of the newest whole checkpoint
    gradients = GradientStep(job)
    while step < job.steps:
        for optimizer in job.optimizers:                    # schedule
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * job.lr_scale(step)

        for batch, is_last in run.micro_batches(step):      # data
            with run.autocast():                            # accumulate
                losses = job.loss(batch)                    # {name: scalar}: BLIP-2 has three
            # adds up for the log; after the last one the sum over all ranks must be finite. True:
            # this is the last micro-batch, and some rank has a sample to learn from
            gradients.begin(run.add_losses(losses, is_last, step))
            loss = sum(losses.values())
            if loss.requires_grad:      # False: only the projector trains, and no image is here
                loss.backward()         # 8-bit AdamW steps inside the last one: trainer/step.py

        grad_norm = gradients.finish()                      # of all ranks; clipped
        run.check_finite(grad_norm, step)
        gradients.step()                                    # step
        step += 1

        if run.log(step, grad_norm):                        # log: metrics, samples, checkpoints
            return run.exit_code                            # it was asked to stop, and has saved
    return run.finish()                                     # writes model/ and learning.png


def make_job(args, out, device):
    """The stage that the flags name."""
    if args.stage == 0:
        make = {"clip": clip_job, "llama": llama_job, "qformer": qformer_job}[out.name]
        return TrainJob(**make(out))
    if args.row.losses:
        return blip2_stage1_job(args, out, device)
    return vlm_job(args, out, device)


def main(args):
    """One command; returns an exit code."""
    if args.compare_golden or args.write_golden:            # all toy stages, 20 steps of each
        return run_golden(args, RECIPES, parse_args=parse_args, set_trainable=set_trainable,
                          make_job=make_job, train_loop=train_loop)
    device = prepare(args, set_trainable)       # threads, seed, the device; judges flags by them
    if args.plan:
        print_plan(args, set_trainable)
        return 0
    if args.show_batch:
        show_batch(args, set_trainable)
        return 0
    with all_ranks(args, device) as device:     # torchrun starts one process a GPU
        for out in output_folders(args):
            with Run(out, args) as run:         # locks the folder; refuses one that does not fit
                if run.is_finished():
                    continue
                job = make_job(args, out, device)
                run.begin(job)
                if code := train_loop(job, run):
                    return code
    return 0


if __name__ == "__main__":
    leave(exit_status(lambda: main(ARGS), ARGS.debug))
