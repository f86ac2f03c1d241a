"""--plan: what a run needs in memory and hours, before anything is downloaded or started."""

import argparse
import math

import torch

from trainer.forecast import (
    A100_FLOPS,
    choose_row_and_policy,
    flops_per_sample,
    memory_forecast,
    meta_model,
    USABLE,
    usable_bytes,
)
from trainer.lengths import mean_lengths, sample_lengths


def print_plan(args, set_trainable):
    """Print what the run needs, and where it does not fit, what to do."""
    model, space = meta_model(args, set_trainable), usable_bytes(args.memory)
    samples, kinds, source = sample_lengths(args)
    found = choose_row_and_policy(model, args, kinds, space, args.gpus)
    pack, policy = found or (args.pack, args.checkpoint)
    print_parts(args, model)
    total = print_memory(args, memory_forecast(model, args, kinds, pack, policy, args.gpus), pack,
                         policy, space)
    print_time(args, model, samples, kinds, source, pack, policy)
    if total > space:
        print("\n  what to do, the cheapest first")
        for line in advice(args, space, kinds, set_trainable):
            print(f"    {line}")


def print_parts(args, model):
    """Weights and trained weights of each part."""
    lora = f", LoRA {args.lora}" if args.lora else ""
    print(f"{args.recipe} stage {args.stage}, base {args.base}{lora}\n\n"
          "              weights     trained")
    for name, part in model.named_children():
        total = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        print(f"  {name:8} {total / 1e6:10,.1f} M {trained / 1e6:9,.1f} M")


def print_memory(args, needs, pack, policy, space):
    """Bytes by what they are for, and whether they fit. Returns their sum."""
    total = sum(needs.values())
    rows = f"{args.row.batch // args.accum} padded samples"
    if pack:
        rows = f"rows of {pack:,} tokens"
    unit, name = (1e9, "GB = 10⁹") if total > 2e9 else (1e6, "MB = 10⁶")
    each = ", of each GPU" if args.gpus > 1 else ""
    print(f"\n  memory, {name} bytes{each}: {rows}, --checkpoint {policy}, "
          f"--optimizer {args.optimizer}")
    for what, size in needs.items():
        print(f"  {what:12} {size / unit:8.2f}")
    card = f"a card of {args.memory or 80:g} GB"
    if not args.memory and torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    verdict = "fits" if total <= space else "does not fit"
    print(f"  {'total':12} {total / unit:8.2f}   {verdict} into {space / 1e9:.1f} GB, what {card} "
          f"leaves ({USABLE:.0%} of what it hands out)")
    return total


def print_time(args, model, samples, kinds, source, pack, policy):
    """FLOPs and hours. samples: of an epoch; kinds: see trainer/lengths.py."""
    row, (text, learned, pictures) = args.row, mean_lengths(kinds)
    each = mean_flops(flops_per_sample(model), kinds, policy)
    work = sum(each)                                            # of a sample
    steps = row.steps or math.ceil(samples * row.epochs / row.batch)
    tokens = text + pictures * model.num_image_tokens()
    micro_batches = args.accum                                  # of a step, of all GPUs
    if pack:
        micro_batches = math.ceil(row.batch * tokens / pack)
    rounds = math.ceil(micro_batches / args.gpus)
    busy = micro_batches / (args.gpus * rounds)                 # a GPU without a row waits
    rate = args.mfu * A100_FLOPS * args.gpus * busy
    hours = steps * row.batch * work / rate / 3600
    several = f" on each of {args.gpus}, {busy:.0%} of the time" if args.gpus > 1 else ""
    print(f"\n  {tokens:,.0f} tokens a sample, {learned:,.0f} with loss ({source})\n  "
          f"{work / 1e12:.4g} TFLOP a sample: forward {each[0] / 1e12:.4g}, backward "
          f"{each[1] / 1e12:.4g}, again {each[2] / 1e12:.4g}, vision {each[3] / 1e12:.4g}\n  "
          f"{row.batch * work / 1e12:,.4g} TFLOP a step, {steps:,} steps\n  {hours:,.3g} hours at "
          f"{args.mfu:.0%} of an A100's 312 TFLOP/s (--mfu, an assumption){several}")


def mean_flops(count, kinds, policy):
    """[forward, backward, recomputed, vision] of a sample on average."""
    sums = [0, 0, 0, 0]
    for share, *lengths in kinds:
        for i, flops in enumerate(count(*lengths, policy)):
            sums[i] += share * flops
    return sums


def advice(args, space, kinds, set_trainable):
    """Lines for one whose run does not fit, the cheapest way out first."""
    def fits(change, gpus=1, **flags):
        free = [name for name in ("pack", "checkpoint") if name not in flags]
        other = argparse.Namespace(**{**vars(args), "free": free, **flags})
        found = choose_row_and_policy(meta_model(other, set_trainable), other, kinds, space, gpus)
        if not found:
            return f"{change}: does not fit"
        return f"{change}: fits with --pack {found[0]} --checkpoint {found[1]}"

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
