"""TODO"""

import math
import time
from pathlib import Path

import torch

import data
from decoding.cuda_graph import WARMUP_STEPS
from decoding.flags import DEFAULT_MODEL
from formats.checkpoints import dtype_name
from formats.errors import note, UsageError
from kernels.quantize import fast_bf16, lay, quantize
from projector import VLM


def prepare_for_inference(model, codes=None):
    """The model with its weights as decoding reads them best, or coded: kernels/quantize.py.
    Not to be trained or saved after."""
    if codes:
        if model.llm.embed.weight.device.type == "cpu":
            note("note: --quantize saves memory; on a CPU the weights are written out again for "
                 "every token, which is several times slower")
        try:
            quantize(model.llm, {"int8": 8, "int4": 4}[codes])
        except ValueError as error:
            raise data.BadModel(f"--quantize {codes}: {error}") from None
    return lay(model)


def cast_for_cpu(model, device):
    """The model in the numbers that this device is good at. A CPU: 16 bits stay 16 if it multiplies
    bf16. A GPU that has bf16: not fp16, in which some models overflow."""
    here = model.llm.embed.weight.dtype
    if device.type == "cuda" and here == torch.float16 and torch.cuda.is_bf16_supported(
            including_emulation=False):
        note("note: the weights are float16, in which some models overflow: they become bf16, 3 "
             "bits fewer of each number (--dtype keeps or chooses)")
        return model.to(torch.bfloat16)
    if device.type != "cpu":
        return model
    best = torch.bfloat16 if fast_bf16() else torch.float32
    if here in (best, torch.float32):
        return model
    name, price = ("bf16", "3 bits fewer of each number") if best == torch.bfloat16 else (
        "fp32", "twice the memory")
    note(f"note: the weights are {dtype_name(here)}, which this CPU is slow at: they become "
         f"{name}, {price} (--dtype keeps or chooses)")
    return model.to(best)


def load_model(args, codes=None):
    """The model, on its device, `ready`. Raises data.BadModel, data.Offline, data.Usage."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if args.device == "auto" else args.device
    try:
        there = torch.zeros(1, device=device)
        there.item()
    except (RuntimeError, AssertionError) as error:      # what torch raises for a device not there
        why = str(error).strip().split("\n")[0]
        raise UsageError(f"--device {device}: {why}: try --device cpu") from None
    if args.model == DEFAULT_MODEL and not Path(DEFAULT_MODEL).is_dir():
        raise data.BadModel(f"{DEFAULT_MODEL}: no model yet: run `make demo`, or train.py --stage 1 and "
                            "--stage 2, or name a model with --model")
    if there.is_cuda:
        torch.cuda.set_device(there.device)             # kernels start on the current one
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    model = VLM.from_pretrained(args.model, dtype, getattr(args, "model_base", None))
    if dtype is None:
        model = cast_for_cpu(model, there.device)
    if args.template and args.template not in data.TEMPLATES:
        raise UsageError(f"--template {args.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    model.template = args.template or model.template
    if data.template_of(model.template).style == "plain":
        note("note: this model knows pictures and captions but no questions: yours is ignored, it "
             "writes a caption")
    return prepare_for_inference(model.to(device), codes)


def memory_bandwidth(device):
    """GB/s at which this machine reads its memory: the best of a few sums of 256 MB."""
    x, best = torch.ones(2 ** 26, device=device), math.inf
    for _ in range(6):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best / 1e9


def speed_line(model, taken, start, times, width=1):
    """One line: the prompt's tokens a second, the answer's, and those against what reading the
    weights once a token would allow. Beams come all at once: of those the whole time."""
    first = (times[0] if times else time.perf_counter()) - start
    if width > 1:
        return (f"prompt: {taken} places; answer: {len(times)} tokens, {first:.2f} s for both with "
                f"{width} beams")
    line = f"prompt: {taken} places in {first:.2f} s, {taken / first:,.0f}/s"
    times = times[WARMUP_STEPS if model.llm.embed.weight.is_cuda else 0:]      # those compile and record
    if len(times) > 1 and times[-1] > times[0]:
        rate = (len(times) - 1) / (times[-1] - times[0])
        coded = [t for part in (model.llm.blocks, model.llm.head) for layer in part.modules()
                 for t in (getattr(layer, "weight", None), getattr(layer, "codes", None),
                           getattr(layer, "scales", None)) if torch.is_tensor(t)]
        ceiling = memory_bandwidth(coded[0].device) * 1e9 / sum(t.nbytes for t in coded)
        line += (f"; answer: {rate:,.1f} tokens/s, {100 * rate / ceiling:.0f} % of the "
                 f"{ceiling:,.0f} that reading the weights allows")
    return line
