"""The machine under a run: its threads, its random seed, its device; flags that depend on them.

trainer/flags.py judges the command line alone, without importing torch. What needs torch, the
templates or the graphics card to be judged is judged here, before anything is loaded."""

from dataclasses import replace

import torch

import data
from formats.errors import UsageError
from trainer.adapter import check_base
from trainer.forecast import fit_to_card
from trainer.held_out import HeldOutSamples
from trainer.rates import fit_rates
from trainer.start import blip2_template, output_folders, set_start, set_template


def prepare(args, set_trainable):
    """Set threads, seed and determinism. Returns the device's name; None for --plan.

    On a GPU, --pack and --checkpoint are set to what fits, where the flags leave them open."""
    torch.manual_seed(args.seed)
    if args.threads or args.stage == 0:
        torch.set_num_threads(args.threads or 1)
    if args.recipe == "blip2" and args.stage == 2 and args.template is None:
        args.row = replace(args.row, template=blip2_template(args))     # its language model's
    template = args.row.template
    if template and template not in data.TEMPLATES:
        raise UsageError(f"--template {template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    if args.stage:
        check_base(args)                    # of --keep-adapter
        set_template(args)                  # of stage 2: the language model's own
    if args.plan:
        return None
    if args.base != "toy" and not args.data and args.stage:
        raise UsageError(f"--base {args.base} learns from your data: give --data FILE and --images "
                         "FOLDER")
    if args.eval_data:
        HeldOutSamples(args)                # a bad file is refused before anything is loaded
    set_start(args, output_folders(args)[0])
    fit_rates(args, set_trainable)          # of the toy, where a larger language model trains
    device = choose_device(args.device)
    trains_llama = args.stage and not args.row.losses
    if device.startswith("cuda") and trains_llama and not args.show_batch:
        fit_to_card(args, set_trainable)
    # quirk: warn_only, because some operations on a GPU have no deterministic version
    torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def choose_device(name):
    """The device of --device, if it is there; auto: a GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):          # PyTorch without CUDA raises the second
        raise UsageError(f"--device {name} is not to be had here; give cpu, or auto") from None
    return name
