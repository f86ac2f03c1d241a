"""--plan: what a run needs in memory and hours, before anything is downloaded or started."""

import argparse
import math

import torch

from trainer.forecast import (
    choose_row_and_policy,
    host_forecast,
    memory_forecast,
    meta_model,
    step_cost,
    USABLE,
    usable_bytes,
)
from trainer.lengths import mean_lengths, sample_lengths
from trainer.qlora import weights_in

# what of a plan is computed, and was never run on a GPU by us: flag -> its words
NEVER_RUN = {"offload_optimizer": "--offload-optimizer", "offload_gradients": "--offload-gradients",
             "offload": "--offload", "quantize": "--quantize"}


def print_plan(args, set_trainable):
    """Print what the run needs, and where it does not fit, what to do."""
    model, space = meta_model(args, set_trainable), usable_bytes(args.memory)
    samples, kinds, source = sample_lengths(args)
    found = choose_row_and_policy(model, args, kinds, space, args.gpus)
    pack, policy = found or (args.pack, args.checkpoint)
    print_parts(args, model)
    total = print_memory(args, memory_forecast(model, args, kinds, pack, policy, args.gpus), pack,
                         policy, space)
    print_host(host_forecast(model, args, kinds, pack, policy, args.gpus))
    print_time(args, model, samples, kinds, source, pack, policy)
    print_never_run(args)
    if total > space:
        print("\n  what to do, the cheapest first")
        for line in advice(args, space, kinds, samples, set_trainable):
            print(f"    {line}")


def print_parts(args, model):
    """Weights and trained weights of each part."""
    lora = f", LoRA {args.lora}" if args.lora else ""
    if args.quantize:
        lora += f" beside frozen weights in {args.quantize}"
    task = f", {args.task}" if args.task else ""
    print(f"{args.recipe} stage {args.stage}{task}, base {args.base}{lora}\n\n"
          "              weights     trained")
    for name, part in model.named_children():
        total = weights_in(part)
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
    recomputed = f"--checkpoint {policy}" if policy else "nothing recomputed (no --checkpoint)"
    print(f"\n  memory, {name} bytes{each}: {rows}, {recomputed}, "
          f"--optimizer {args.optimizer}{other_flags(args)}")
    for what, size in needs.items():
        print(f"  {what:12} {size / unit:8.2f}")
    card = f"a card of {args.memory or 80:g} GB"
    if not args.memory and torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    verdict = "fits" if total <= space else "does not fit"
    print(f"  {'total':12} {total / unit:8.2f}   {verdict} into {space / 1e9:.1f} GB, what {card} "
          f"leaves ({USABLE:.0%} of what it hands out)")
    return total


def other_flags(args):
    """The flags that change the memory and stand nowhere else in the plan."""
    words = {"--stochastic": args.stochastic, "--offload": args.offload,
             "--offload-optimizer": args.offload_optimizer,
             "--offload-gradients": args.offload_gradients}
    return "".join(f" {name}" for name, is_given in words.items() if is_given)


def print_host(host):
    """Bytes that wait in the host's memory, by what they are for."""
    if host:
        print(f"  in the host's memory, pinned: {sum_and_parts(host)}")


def sum_and_parts(sizes):
    """{what: bytes} as "40.8 GB (moments 13.7, ...)"."""
    total = sum(sizes.values())
    unit, name = (1e9, "GB") if total > 1e9 else (1e6, "MB")
    parts = ", ".join(f"{what} {size / unit:,.1f}" for what, size in sizes.items())
    return f"{total / unit:,.1f} {name} ({parts})"


def print_time(args, model, samples, kinds, source, pack, policy):
    """FLOPs and hours. samples: of an epoch; kinds: see trainer/lengths.py."""
    row, (text, learned, pictures) = args.row, mean_lengths(kinds)
    cost = step_cost(model, args, kinds, pack, policy, args.gpus)
    each, work = cost.flops, sum(cost.flops)                    # of a sample
    steps = steps_of(row, samples)
    tokens = text + pictures * model.num_image_tokens()
    hours = steps * cost.computing / 3600
    several = f" on each of {args.gpus}, {cost.busy:.0%} of the time" if args.gpus > 1 else ""
    print(f"\n  {tokens:,.0f} tokens a sample, {learned:,.0f} with loss ({source})\n  "
          f"{work / 1e12:.4g} TFLOP a sample: forward {each[0] / 1e12:.4g}, backward "
          f"{each[1] / 1e12:.4g}, again {each[2] / 1e12:.4g}, vision {each[3] / 1e12:.4g}\n  "
          f"{row.batch * work / 1e12:,.4g} TFLOP a step, {steps:,} steps\n  {hours:,.3g} hours at "
          f"{args.mfu:.0%} of an A100's 312 TFLOP/s (--mfu, an assumption){several}")
    if cost.copied:
        print_traffic(args, cost, steps)


def steps_of(row, samples):
    """The number of steps of a run; samples: of an epoch."""
    return row.steps or math.ceil(samples * row.epochs / row.batch)


def print_traffic(args, cost, steps):
    """Bytes over PCIe, and what they add to the hours."""
    print(f"  over PCIe, both ways, {sum_and_parts(cost.copied)} a step: {cost.copying:.3g} s at "
          f"{args.pcie:g} GB/s (--pcie, an assumption)\n  {hours_in_all(cost, steps)} in all: the "
          "first if all copies run beside the computation, the second if none does")


def hours_in_all(cost, steps):
    """"36.6 hours", or "46.2 to 57.1 hours" where copies may or may not run beside."""
    least, most = max(cost.computing, cost.copying), cost.in_turn()
    least, most = (f"{steps * value / 3600:,.3g}" for value in (least, most))
    return f"{least} to {most} hours" if cost.copied else f"{least} hours"


def print_never_run(args):
    """What of the plan nobody has seen on a GPU."""
    names = [words for name, words in NEVER_RUN.items() if getattr(args, name)]
    if args.quantize:
        print("  not counted: writing the coded weights out for each product")
    if names:
        print(f"  computed for {', '.join(names)}: none of it has run on a GPU yet; tested on a "
              "CPU, with the toy")


def advice(args, space, kinds, samples, set_trainable):
    """Lines for one whose run does not fit, the cheapest way out first."""
    def find(gpus, flags):
        """The quickest run with other flags that fits, with --offload or without: (its flags, its
        model, its cost); or None."""
        free, found = [name for name in ("pack", "checkpoint") if name not in flags], []
        for offload in {args.offload, True}:
            other = argparse.Namespace(**{**vars(args), "free": free, "offload": offload, **flags})
            model = meta_model(other, set_trainable)
            if chosen := choose_row_and_policy(model, other, kinds, space, gpus):
                other.pack, other.checkpoint = chosen
                found.append((other, model, step_cost(model, other, kinds, *chosen, gpus)))
        return min(found, key=lambda run: run[2].in_turn(), default=None)

    def fits(change, gpus=1, **flags):
        run = find(gpus, flags)
        if run is None:
            return f"{change}: does not fit"
        other, model, cost = run
        line = f"{change}: fits with --pack {other.pack}"
        if other.checkpoint:
            line += f" --checkpoint {other.checkpoint}"
        if other.offload:
            line += " --offload"
        line += f": {hours_in_all(cost, steps_of(other.row, samples))}"
        host = host_forecast(model, other, kinds, other.pack, other.checkpoint, gpus)
        if host:
            line += f", {sum(host.values()) / 1e9:.0f} GB of the host's memory"
        return line

    yield fits("shorter rows", checkpoint=args.checkpoint)
    yield fits("computing more again")
    yield from host_advice(args, fits)
    if "llm" in args.row.train and not args.lora:
        line = fits("--lora 128", lora=128)
        yield line
        if "fits with" not in line:
            yield fits("--lora 128 --quantize int4", lora=128, quantize="int4")
    if args.lora and not args.quantize:
        yield fits("--quantize int4", quantize="int4")
    if args.base == "13b":
        yield fits("--base 7b", base="7b")
    for gpus in (2, 4, 8):
        line = fits(f"{gpus} GPUs", gpus)
        if "fits with" in line or gpus == 8:
            yield line
            return


def host_advice(args, fits):
    """Lines for what adamw8 may keep in the host's memory, up to the first that fits."""
    if args.optimizer != "adamw8":
        return
    line = ""
    if not args.offload_optimizer:
        line = fits("--offload-optimizer", offload_optimizer=True)
        yield line
    if "fits with" not in line and not args.offload_gradients and not args.row.clip:
        yield fits("--offload-optimizer --offload-gradients", offload_optimizer=True,
                   offload_gradients=True)
