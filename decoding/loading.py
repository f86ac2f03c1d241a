"""decoding/loading.py: a folder or hub id becomes a model that is ready to write, on its device.

Also here: how fast it wrote, against the speed at which this machine can read its weights. One
token reads every weight of the language model once, so that is the limit of decoding alone."""

import math
import time
from pathlib import Path

import torch

import data
from decoding.cuda_graph import WARMUP_STEPS
from decoding.defaults import apply_defaults
from decoding.flags import DEFAULT_MODEL, LAID_BYTES
from decoding.prompt import prompt_length
from decoding.text_model import check_answers_text, is_language_model, TextModel
from formats.checkpoints import dtype_name
from formats.errors import note, UsageError
from formats.templates import BLIP2
from kernels.quantize import fast_bf16, lay, quantize
from projector import VLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_for_inference(model, codes=None, lay_out=None):
    """The model with its weights as decoding reads them best, or quantized (kernels/quantize.py).

    codes: "int8", "int4" or None. lay_out: on a CPU, into the layout that it reads fastest; None:
    unless it takes much memory. The model is not to be trained or saved after this."""
    if codes:
        if model.llm.embed.weight.device.type == "cpu":
            note("note: --quantize saves memory; on a CPU the weights are written out again for "
                 "every token, which is several times slower")
        if codes == "int4":
            note("note: int4 made a model of 135 M weights guess the next token worse, perplexity "
                 "33.1 to 36.7 (docs/weights.md); --quantize int8 hardly changes it")
        try:
            quantize(model.llm, {"int8": 8, "int4": 4}[codes])
        except ValueError as error:
            raise data.BadModel(f"--quantize {codes}: {error}") from None
    if lay_out is None:
        lay_out = is_cheap_to_lay_out(model)
    return lay(model) if lay_out else model


def is_cheap_to_lay_out(model):
    """bf16 weights take no more memory in the CPU's layout; fp32 ones take it twice, and while they
    are laid out 2.3 times, for little (docs/weights.md)."""
    fp32 = [p for p in model.parameters() if p.dtype == torch.float32]
    return sum(p.nbytes for p in fp32) <= LAID_BYTES


def say_what_is_laid_out(model, codes):
    """A note where --lay-out changes nothing, or not the language model."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        note(f"note: --lay-out is for a CPU with oneDNN: on this {weight.device.type} it changes "
             "nothing")
    elif weight.dtype != torch.float32:
        note(f"note: --lay-out is for fp32 weights, and these are {dtype_name(weight.dtype)}: it "
             "changes nothing")
    elif codes:
        note(f"note: --lay-out changes nothing for the language model: its weights are in {codes}")


def cast_for_cpu(model, device):
    """The model in the dtype that its device computes well, with a note where it changes.

    A CPU: 16 bits become bf16 if it multiplies bf16 in hardware, else fp32. A GPU that has bf16:
    fp16 becomes bf16, because some models overflow in fp16."""
    here = model.llm.embed.weight.dtype
    if device.type == "cuda" and here == torch.float16:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return model
        note("note: the weights are float16, in which some models overflow: they become bf16, 3 "
             "bits fewer of each number (--dtype keeps or chooses)")
        return model.to(torch.bfloat16)
    if device.type != "cpu":
        return model
    if fast_bf16():
        best, name, price = torch.bfloat16, "bf16", "3 bits fewer of each number"
    else:
        best, name, price = torch.float32, "fp32", "twice the memory"
    if here in (best, torch.float32):               # fp32 is exact: it is never made smaller
        return model
    note(f"note: the weights are {dtype_name(here)}, which this CPU is slow at: they become "
         f"{name}, {price} (--dtype keeps or chooses)")
    return model.to(best)


def find_device(name):
    """torch.device of --device. Raises UsageError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()                                # "meta" is a device without values
    except (RuntimeError, AssertionError) as error:         # what torch raises for no such device
        why = str(error).strip().split("\n")[0]
        raise UsageError(f"--device {name}: {why}: try --device cpu") from None
    return probe.device


def load_model(args, codes=None):
    """The model of --model, ready for inference. Raises BadModel, Offline, UsageError."""
    device = find_device(args.device)
    if args.model == DEFAULT_MODEL and not Path(DEFAULT_MODEL).is_dir():
        raise data.BadModel(f"{DEFAULT_MODEL}: no model yet: run `make demo`, or train.py "
                            "--stage 1 and --stage 2, or name a model with --model")
    if device.type == "cuda":
        torch.cuda.set_device(device)               # kernels start on the current one
    dtype = DTYPES.get(args.dtype)                  # None: auto
    text = getattr(args, "text", False)
    if text and not getattr(args, "model_base", None) and is_language_model(args.model):
        model = TextModel.from_pretrained(args.model, dtype)
    else:
        model = VLM.from_pretrained(args.model, dtype, getattr(args, "model_base", None))
    if dtype is None:
        model = cast_for_cpu(model, device)
    if args.template and args.template not in data.TEMPLATES:
        raise UsageError(f"--template {args.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    model.template = args.template or model.template
    apply_defaults(model, args)
    style = data.template_of(model.template).style
    if text:
        check_answers_text(model)
    elif getattr(args, "caption", False):
        if style not in ("plain", *BLIP2):
            raise UsageError("--caption: this model answers questions: ask one, such as "
                             '"Describe this image"')
    elif style == "plain":
        note("note: this model knows pictures and captions but no questions: yours is ignored, it "
             "writes a caption")
    model = model.to(device)
    if getattr(args, "lay_out", False):
        say_what_is_laid_out(model, codes)
    return prepare_for_inference(model, codes, getattr(args, "lay_out", None) or None)


def memory_bandwidth(device):
    """GB/s at which this machine reads its memory: the best of a few sums of 256 MB."""
    x, best = torch.ones(2 ** 26, device=device), math.inf
    for _ in range(6):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best / 1e9


def read_per_token(llm):
    """The tensors that one token reads: weights of the blocks and of the head, or their codes."""
    tensors = []
    for part in (llm.blocks, llm.head):
        for layer in part.modules():
            for name in ("weight", "codes", "scales"):
                tensor = getattr(layer, name, None)
                if torch.is_tensor(tensor):
                    tensors.append(tensor)
    return tensors


def decode_rate(model, times):
    """Tokens a second of an answer after its first, or None if it is too short to tell.

    times: when each token came."""
    if model.llm.embed.weight.is_cuda:
        times = times[WARMUP_STEPS:]                # those compile and capture
    if len(times) > 1 and times[-1] > times[0]:
        return (len(times) - 1) / (times[-1] - times[0])
    return None


def speed_line(model, prompt_length, start, times, num_beams=1):
    """One line: the prompt's tokens a second, the answer's, and these against the limit.

    start, times: when the prompt began and when each token came. Beams come all at once: of those
    the whole time."""
    first = (times[0] if times else time.perf_counter()) - start
    if num_beams > 1:
        return (f"prompt: {prompt_length} places; answer: {len(times)} tokens, {first:.2f} s for "
                f"both with {num_beams} beams")
    line = f"prompt: {prompt_length} places in {first:.2f} s, {prompt_length / first:,.0f}/s"
    if rate := decode_rate(model, times):
        tensors = read_per_token(model.llm)
        bandwidth = memory_bandwidth(tensors[0].device) * 1e9
        ceiling = bandwidth / sum(tensor.nbytes for tensor in tensors)
        line += (f"; answer: {rate:,.1f} tokens/s, {100 * rate / ceiling:.0f} % of the "
                 f"{ceiling:,.0f} that reading the weights allows")
    return line


def speed_numbers(model, ids, sizes, start, times):
    """What `speed_line` says and more, as numbers, without its measurement of the memory.

    ids: the prompt's; sizes: of its pictures, where the model cuts them; start, times: as above."""
    taken = prompt_length(model, ids, sizes)
    first = (times[0] if times else time.perf_counter()) - start
    texts = sum(token != data.IMAGE for token in ids)
    return {"prompt_tokens": taken, "image_tokens": taken - texts, "answer_tokens": len(times),
            "prefill_seconds": first, "prefill": taken / first, "decode": decode_rate(model, times)}
