"""TODO"""

import argparse
import math
import os
from pathlib import Path

import torch

import data
from clip import Config as TowerConfig
from clip import LayerNorm, ViT
from formats import configs
from formats.checkpoints import resolve
from formats.conversations import images_of
from formats.errors import NothingToLearn, UsageError
from formats.families import read_vlm_config
from formats.strict_json import read_config
from llama import Config as LlamaConfig
from llama import Llama
from projector import QFormerProjector, VLM
from qformer import Config as QFormerConfig
from qformer import QFormer
from toy.texts import training_sample
from trainer.build import base_models, TOY_QFORMER, weight_dtype
from trainer.distributed import world_size
from trainer.flags import BASES, EVA, SMALL
from trainer.loader import Samples
from trainer.lora import add_lora
from trainer.samples import encode_sample

# What a run will need, worked out before anything loads: from the sizes in config.json and a model
# on the meta device, which has shapes and no memory. GB = 10⁹ bytes, GiB = 2³⁰ bytes.

# the hub's parts that recipes begin with: a plan needs no network
KNOWN_SIZES = {BASES["7b"][0]: TowerConfig(image_size=336), SMALL: TowerConfig(image_size=224),
         BASES["7b"][1]: LlamaConfig(eps=1e-5, context=4096),
         BASES["13b"][1]: LlamaConfig(32000, 5120, 40, 40, 40, 13824, 1e-5, context=4096),
         EVA: TowerConfig(1408, 39, 16, 6144, 1e-6, eva=True, has_final_block=False)}
SAMPLES = {"llava": (595_375, 157_712), "llava-1.5": (558_128, 665_298),       # as released
           "sharegpt4v": (1_246_000, 665_298)}
# Kinds of samples: share, tokens of text, of them learned, pictures. Estimates, and the one soft
# number of a forecast (100 tokens more in stage 2 are 11 % more hours): --data counts the file's.
CAPTIONS, TALKS = ((1., 30, 28, 1),), ((1., 324, 180, 1),)
DESCRIPTIONS = ((1., 208, 206, 1),)     # 826 characters
MIXED = ((1 - 40_688 / 665_298, 324, 180, 1), (40_688 / 665_298, 1200, 800, 0))
ROW_LENGTHS = (8192, 6144, 4096, 3072, 2048)   # a row holds the longest sample: 2,048 in the official runs
A100_FLOPS = 312e12                           # bf16 multiplications and additions a second
# An A100 of 80 GB hands a process 79.1 of 80 GiB, less half a GB for CUDA itself; one part in
# twenty is left alone, because an allocator cannot fill every gap.
VISIBLE, CUDA_CONTEXT_BYTES, USABLE = 79.1 / 80, .5e9, .95


def meta_model(args, set_trainable):
    """The model of this run without memory; what trains is marked."""
    def sizes(name, read):
        if name in KNOWN_SIZES:
            return KNOWN_SIZES[name]
        if args.plan and not Path(name).is_dir():
            raise UsageError(f"--plan: {name} is no folder, and its sizes are not known here; give "
                             "a folder with its config.json")
        return read(read_config(resolve(name)))

    row, (vision, llm) = args.row, base_models(args)
    if args.start not in (None, "none"):
        eye, tongue = read_vlm_config(args.start, sizes(args.start, dict))[:2]
        eye, tongue = TowerConfig(**eye), LlamaConfig(**tongue)
    else:
        eye, tongue = (sizes(vision, lambda c: TowerConfig(**configs.vision_tower(c))),
                       sizes(llm, lambda c: LlamaConfig(**configs.llama_from_hf(c))))
    with torch.device("meta"):
        eye, projector = ViT(eye), row.projector_type
        if projector == "qformer":
            eye, own = eye.without_final_block(), TOY_QFORMER if args.base == "toy" else {}
            asks = QFormer(QFormerConfig(**own, vision_width=eye.config.width, vocab=0))
            projector = QFormerProjector(LayerNorm(eye.config.width, eye.config.eps), asks, tongue.width)
        model = VLM(eye, projector, Llama(tongue), None, row.template, row.aspect)
        if args.lora:
            add_lora(model.llm, args.lora)
    set_trainable(model, row.train, args.lora)
    return model


def sample_lengths(args):
    """(samples of an epoch, their kinds, where that is from)."""
    row, llm = args.row, base_models(args)[1]
    if args.data:
        samples = Samples(args)
        good = [i for i in range(len(samples.rows)) if i not in samples.rows.bad]
        some = [samples.rows[i] for i in good[::max(1, -(-len(good) // 200))]]
        talks = [(f"{args.data}: sample {sample['id']}", sample) for sample in some]
        total, source = len(samples.rows), f"{len(talks)} samples of {args.data}"
    elif args.base == "toy":
        talks = [("toy sample", dict(zip(("image", "conversations"), training_sample(
            args.seed, args.stage, i, row.told)))) for i in range(64)]
        total, source = row.steps * row.batch, "64 samples of the toy world"
    else:
        kinds = (DESCRIPTIONS if row.told == "descriptions" else
                 CAPTIONS if row.told != "dialogue" else
                 TALKS if args.recipe == "llava" else MIXED)
        total = SAMPLES.get(args.recipe, (0, 0))[args.stage - 1] or row.steps * row.batch
        if not total:
            raise UsageError("--plan: how many samples? give --data or --steps")
        return total, kinds, "estimates of the official data's lengths, no --data"
    words, kinds = data.Tokenizer(llm) if Path(llm).is_dir() else None, []
    for name, sample in talks:
        pictures, talk = len(images_of(sample)), sample["conversations"]
        if words:
            try:
                ids, labels = encode_sample(sample, row.template, words, 1)
            except NothingToLearn:
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


def trainable_vit_blocks(eye):
    """The picture tower's blocks that run and have a backward: from the first that trains on."""
    blocks = eye.blocks[:-1] if eye.config.has_final_block else eye.blocks
    return next((blocks[i:] for i, b in enumerate(blocks) if next(b.parameters()).requires_grad),
                blocks[:0])


def flops_per_sample(model):
    """A function that counts a sample's FLOPs: forward, backward, computed again, the eye's."""
    c, eye, places, P = model.llm.config, model.vision, model.num_image_tokens(), model.patches + 1
    blocks = eye.blocks[:-1] if eye.config.has_final_block else eye.blocks
    look = 4 * P * P * eye.config.width                         # a block's attention
    seen = 2 * P * eye.patch_size.numel() + P * products(blocks)[0] + look * len(blocks) + (
        P * products(trainable_vit_blocks(eye))[1] + 2.5 * look * len(trainable_vit_blocks(eye)))
    layers, head, projector = products(model.llm.blocks), products(model.llm.head), products(
        model.projector)
    last = sum(products(block.down)[0] for block in model.llm.blocks)

    def of(text, learned, pictures, policy=None):
        T = text + pictures * places
        look = 2 * T * T * c.heads * c.head_dim * c.depth       # causal: half of 4 T² a layer
        forward, backward = (T * layers[i] + learned * head[i] + pictures * places * projector[i]
                             for i in (0, 1))
        keep_output = T * (layers[0] - last)
        again = {"attention": keep_output, "full": T * layers[0] + look + keep_output}.get(policy, 0)
        return forward + look, backward + 2.5 * look, again, pictures * seen
    return of


def activation_bytes(model, tokens, learned, pictures, policy, stream=2, made=2, kernels=True,
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

    projector = 0
    if any(p.requires_grad for p in model.projector.parameters()):
        layers = [m for m in model.projector.modules()
                  if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
        places = [model.patches if m.in_features == model.vision.config.width else model.num_image_tokens()
                  for m in layers]
        projector = sum(n * (m.in_features + m.out_features) for n, m in zip(places, layers))
        projector -= places[-1] * layers[-1].out_features      # the words' own x is counted above
    last = tokens * (x + plain * x * norms + 4 * c.head_dim) + learned * (
        C * made * head + plain * 4 * V)
    eye = model.vision.config           # no policy there; rough without kernels
    seen = len(trainable_vit_blocks(model.vision)) * (model.patches + 1) * (
        2 * eye.width * stream + made * (5 * eye.width + (2 + plain) * eye.mlp) + 4 * eye.heads)
    if casts and policy in (None, "none"):
        last += made * (sum(p.numel() for p in matrices) + llm.head.weight.numel())
    if kernels and head:
        last += made * V * C                                # the head's gradient is made in forward
    backward = tokens * (made * (3 * F + 4 * C) + {                # gradients, what is made again
        "full": whole + again + segment * sparing, "attention": whole + again,
        "none": F * made, None: 0}[policy]) + made * max(p.numel() for p in matrices)
    return tokens * blocks + pictures * (made * projector + seen) + last, backward


def number_bytes(args):
    """Bytes of a weight and of what a matrix product makes of it."""
    if weight_dtype(args) == torch.bfloat16:
        return 2, 2
    fast = args.base != "toy" or torch.cpu._is_amx_tile_supported()
    return 4, 2 if args.dtype == "bf16" or args.dtype == "auto" and fast else 4


def mean_lengths(kinds):
    """Tokens of text, learned ones and pictures of a sample on average."""
    return [sum(kind[0] * kind[i] for kind in kinds) for i in (1, 2, 3)]


def static_bytes(model, args, gpus=1):
    """{what: bytes} of one GPU of so many, whatever the micro-batch is."""
    weight, trained = number_bytes(args)[0], [p.numel() for p in model.parameters() if p.requires_grad]
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


def memory_forecast(model, args, kinds, pack, policy, gpus=1):
    """{what: bytes} of one GPU of so many; a micro-batch is a row of `pack` tokens, or padded."""
    (weight, made), (text, learned, pictures) = number_bytes(args), mean_lengths(kinds)
    P, eye, size = model.num_image_tokens(), model.vision.config, args.row.batch // args.accum
    share = pack / (text + pictures * P) if pack else size      # samples of a micro-batch
    tokens = pack or size * max(kind[1] + kind[3] * P for kind in kinds)
    learned, pictures = share * learned, math.ceil(share * pictures)
    activations, backward = activation_bytes(model, tokens, learned, pictures, policy, weight, made,
                                 offload=args.offload)
    looking = made * pictures * (model.patches + 1) * (6 * eye.width + 2 * eye.mlp)
    return {**static_bytes(model, args, gpus), "activations": activations,
            "workspace": max(backward, looking, min(learned, 4096) * model.llm.config.vocab * made)}


def usable_bytes(memory=None):
    """Bytes that a run may count on, of a card of `memory` GB, the one at hand, or an A100."""
    if memory is None and torch.cuda.is_available():
        return USABLE * (torch.cuda.get_device_properties(0).total_memory - CUDA_CONTEXT_BYTES)
    return USABLE * ((memory or 80) * 2 ** 30 * VISIBLE - CUDA_CONTEXT_BYTES)


def choose_row_and_policy(model, args, kinds, space, gpus=1):
    """(tokens a row, policy) that fit into `space` bytes; None if none do. Policies first: what is
    computed again costs a quarter of the time and more, a short row a few percent."""
    policies = ("none", "attention", "full") if "checkpoint" in args.free else (args.checkpoint,)
    rows = ROW_LENGTHS if "pack" in args.free else (args.pack,)
    return next(((pack, policy) for policy in policies for pack in rows
                 if sum(memory_forecast(model, args, kinds, pack, policy, gpus).values()) <= space), None)


def advice(args, space, kinds, set_trainable):
    """Lines for one whose run does not fit, the cheapest way out first."""
    def fits(change, gpus=1, **flags):
        other = argparse.Namespace(**{**vars(args), "free": ["pack", "checkpoint"], **flags})
        other.free = [n for n in other.free if n not in flags]
        found = choose_row_and_policy(meta_model(other, set_trainable), other, kinds, space, gpus)
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


def fit_to_card(args, set_trainable):
    """Row length and policy as the card at hand allows, where the flags leave them open."""
    gpus = int(os.environ.get("WORLD_SIZE", 1))                 # torchrun's
    found = args.free and choose_row_and_policy(meta_model(args, set_trainable), args, sample_lengths(args)[1], usable_bytes(), gpus)
    if found is None:
        raise UsageError(f"does not fit into {usable_bytes() / 1e9:.1f} GB of "
                         f"{torch.cuda.get_device_name()}; --plan says what would")
    args.pack, args.checkpoint = found or (args.pack, args.checkpoint)


def measure_saved_bytes(loss, model, args):
    """loss(micro-batch), of which the first is looked at: what does it keep for backward? And a
    function that says so, and the memory at its highest, beside the forecast."""
    found, told = {}, []

    def pack(x):
        memory = x.untyped_storage()
        found[memory.data_ptr()] = memory.nbytes()
        return x.detach()

    def first(micro):
        if told or world_size() > 1:                 # a rank's layers are whole only while they run
            return loss(micro)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = loss(micro)
        kind, stream = micro.ids.device.type, model.llm.embed.weight.element_size()
        if kind == "cpu" and micro.lengths:     # there PyTorch keeps a mask of T² for each layer
            told.append(None)
            return value
        made = 2 if torch.is_autocast_enabled(kind) else stream
        sizes = [text + pictures * model.num_image_tokens() for text, _, pictures in micro.counts]
        told.append(activation_bytes(model, sum(sizes) if micro.lengths else len(sizes) * max(sizes),
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
                  f"{(sum(static_bytes(model, args).values()) + sum(told[0])) / 1e9:,.2f} GB")
    return first, report


def print_plan(args, set_trainable):
    """Print what the run needs, and where it does not fit, what to do."""
    model, (samples, kinds, source), space = meta_model(args, set_trainable), sample_lengths(args), usable_bytes(args.memory)
    pack, policy = choose_row_and_policy(model, args, kinds, space, args.gpus) or (args.pack, args.checkpoint)
    row, (text, learned, pictures) = args.row, mean_lengths(kinds)
    print(f"{args.recipe} stage {args.stage}, base {args.base}" + f", LoRA {args.lora}" * (
        args.lora > 0) + "\n\n              weights     trained")
    for name, part in model.named_children():
        n = [sum(p.numel() for p in part.parameters() if p.requires_grad >= t) for t in (0, 1)]
        print(f"  {name:8} {n[0] / 1e6:10,.1f} M {n[1] / 1e6:9,.1f} M")
    needs = memory_forecast(model, args, kinds, pack, policy, args.gpus)
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
          f"into {space / 1e9:.1f} GB, what {card} leaves ({USABLE:.0%} of what it hands out)")
    count = flops_per_sample(model)
    each = [sum(k[0] * x for k, x in zip(kinds, column))
            for column in zip(*(count(*kind[1:], policy) for kind in kinds))]
    work = sum(each)
    steps = row.steps or math.ceil(samples * row.epochs / row.batch)
    tokens = text + pictures * model.num_image_tokens()
    dealt = math.ceil(row.batch * tokens / pack) if pack else args.accum    # rows of a step
    busy = dealt / (args.gpus * math.ceil(dealt / args.gpus))       # a GPU without a row waits
    hours = steps * row.batch * work / (args.mfu * A100_FLOPS * args.gpus * busy) / 3600
    print(f"\n  {tokens:,.0f} tokens a sample, {learned:,.0f} learned ({source})\n  "
          f"{work / 1e12:.4g} TFLOP a sample: forward {each[0] / 1e12:.4g}, backward "
          f"{each[1] / 1e12:.4g}, again {each[2] / 1e12:.4g}, eye {each[3] / 1e12:.4g}\n  "
          f"{row.batch * work / 1e12:,.4g} TFLOP a step, {steps:,} steps\n  {hours:,.3g} hours at "
          f"{args.mfu:.0%} of an A100's 312 TFLOP/s (--mfu, an assumption)"
          + f" on each of {args.gpus}, {busy:.0%} of the time" * (args.gpus > 1))
    if total > space:
        print("\n  what to do, the cheapest first")
        for line in advice(args, space, kinds, set_trainable):
            print(f"    {line}")
