"""What a run will need, worked out before anything loads: bytes of memory and FLOPs.

Everything comes from the sizes in config.json and a model on the meta device, which has shapes and
no memory. GB = 10⁹ bytes, GiB = 2³⁰ bytes; FLOPs count a multiplication and an addition as two.
trainer/plan.py prints it (--plan); `fit_to_card` chooses row length and recomputation by it."""

import math
import os
from typing import NamedTuple

import torch

import llms
from clip import Config as TowerConfig, LayerNorm, ViT
from formats import configs, language_models
from formats.errors import UsageError
from formats.hub import resolve
from formats.strict_json import read_config
from llama import Config as LlamaConfig
from llms import OptConfig, T5Config
from projector import Blip2, QFormerProjector, VLM
from qformer import Config as QFormerConfig, QFormer
from trainer import build
from trainer.flags import BASES, EVA, LLAVA_TOWER
from trainer.lengths import mean_lengths, sample_lengths
from trainer.qlora import add_additions, code_bytes, coded_weights, written_out_bytes
from trainer.stacks import cross_flops, cross_weights, last_products, stacks
from trainer.start import base_models, check_is_here, start_family
from trainer.traffic import bytes_a_step, split_by_place

# the hub's parts that recipes begin with: a plan needs no network
KNOWN_SIZES = {
    BASES["small"][0]: TowerConfig(768, 12, 12, 3072, image_size=224, patch_size=16),
    BASES["small"][1]: LlamaConfig(49152, 960, 32, 15, 5, 2560, 1e-5, 100000., 8192, True),
    BASES["7b"][0]: TowerConfig(image_size=336), LLAVA_TOWER: TowerConfig(image_size=224),
    BASES["7b"][1]: LlamaConfig(eps=1e-5, context=4096),
    BASES["13b"][1]: LlamaConfig(32000, 5120, 40, 40, 40, 13824, 1e-5, context=4096),
    "facebook/opt-2.7b": OptConfig(), "google/flan-t5-xl": T5Config(),
    "facebook/opt-6.7b": OptConfig(width=4096, mlp=16384),
    "google/flan-t5-xxl": T5Config(width=4096, heads=64, mlp=10240),
    EVA: TowerConfig(1408, 39, 16, 6144, 1e-6, eva=True, has_final_block=False)}
ROW_LENGTHS = (8192, 6144, 4096, 3072, 2048)    # the longest official sample has 2,048 tokens
# where every row but one sends all gradients to the host and back: the fewer rows, the better
LONG_ROWS = (32768, 24576, 16384, 12288, *ROW_LENGTHS)
A100_FLOPS = 312e12                             # bf16 multiplications and additions a second
POLICIES = ("none", "attention", "full")        # of --checkpoint, the fastest first
# An A100 of 80 GB shows a process 79.1 of 80 GiB, less half a GB for CUDA itself; 5 % is kept free
# for allocator fragmentation.
VISIBLE, CUDA_CONTEXT_BYTES, USABLE = 79.1 / 80, .5e9, .95


# ---------------------------------------------------------------------------------------- the model

def meta_model(args, set_trainable):
    """The model of this run without memory; set_trainable (train.py) marks what trains."""
    row = args.row
    vision_config, llm_config = part_configs(args)
    with torch.device("meta"):
        vision, llm = ViT(vision_config), llms.new(llm_config)
        if row.projector_type == "qformer":
            vision = vision.without_final_block()
            sizes = build.TOY_QFORMER if args.base == "toy" else {}
            width = vision.config.width
            qformer = QFormer(QFormerConfig(**sizes, vision_width=width, vocab=0))
            norm = LayerNorm(width, vision.config.eps)
            projector = QFormerProjector(norm, qformer, llm_config.width)
            model = Blip2(vision, projector, llm, None, row.template)
        else:
            model = VLM(vision, row.projector_type, llm, None, row.template, row.image_aspect)
        add_additions(model.llm, args)
    set_trainable(model, row.train, args.lora)
    return model


def part_configs(args):
    """(TowerConfig, the language model's Config) of the run's parts, or of its first model's."""
    if family := start_family(args):
        return TowerConfig(**family.vision), llms.config_of(family.llm_kind, family.llm)
    vision_name, llm_name = base_models(args)
    vision, llm = KNOWN_SIZES.get(vision_name), KNOWN_SIZES.get(llm_name)
    if vision is None:
        vision = TowerConfig(**configs.vision_tower(read_sizes(args, vision_name)))
    if llm is None:
        c = read_sizes(args, llm_name)
        llm = llms.config_of(language_models.kind_of(c), language_models.sizes_of(c))
    return vision, llm


def read_sizes(args, name):
    """config.json of a folder, or, without --plan, of a hub id."""
    check_is_here(args, name)
    return read_config(resolve(name))


# ----------------------------------------------------------------------------------------- FLOPs

def products(module):
    """FLOPs of a token in the module's matrix products: (forward, backward).

    A product of n weights is 2 n; its input's gradient as much again; a weight's, where it trains,
    too. To write coded weights out is not counted."""
    forward = backward = 2 * coded_weights(module)
    for p in module.parameters():
        if p.dim() > 1:
            forward += 2 * p.numel()
            backward += 2 * p.numel() * (1 + p.requires_grad)
    return forward, backward


def run_vit_blocks(vision):
    """The vision tower's blocks that run: LLaVA leaves out CLIP's last."""
    return vision.blocks[:-1] if vision.config.has_final_block else vision.blocks


def trainable_vit_blocks(vision):
    """Those that have a backward: from the first that trains on."""
    blocks = run_vit_blocks(vision)
    for i, block in enumerate(blocks):
        if next(block.parameters()).requires_grad:
            return blocks[i:]
    return blocks[:0]


def vision_flops(model):
    """FLOPs of a picture in the vision tower, its backward included where blocks of it train."""
    vision, P = model.vision, model.patches + 1                 # with the class token
    blocks, trained = run_vit_blocks(vision), trainable_vit_blocks(vision)
    attention = 4 * P * P * vision.config.width                 # of one block
    forward = 2 * P * vision.patch.numel() + P * products(blocks)[0] + attention * len(blocks)
    return forward + (P * products(trained)[1] + 2.5 * attention * len(trained))


def flops_per_sample(model):
    """A function (text tokens, tokens with loss, pictures, policy) -> FLOPs of a sample:
    (forward, backward, recomputed, the vision tower's)."""
    c, num_image_tokens = model.llm.config, model.num_image_tokens()
    of_a_picture, head = vision_flops(model), products(model.llm.head)
    projector = products(model.projector)
    parts = [(stack, products(stack.blocks), products(last_products(stack))[0],
              products(cross_weights(stack))) for stack in stacks(model.llm)]

    def count(text, learned, pictures, policy=None):
        image_tokens, recomputed = pictures * num_image_tokens, 0
        forward = learned * head[0] + image_tokens * projector[0]
        backward = learned * head[1] + image_tokens * projector[1]
        for stack, layers, down, cross in parts:
            T, prompt = stack.tokens(text + image_tokens, learned), text + image_tokens - learned
            # causal: half of 4 T² a layer
            attention = (4 - 2 * stack.causal) * T * T * c.heads * c.head_dim * stack.depth
            attention += cross_flops(stack, prompt, T)
            first = T * (layers[0] - cross[0]) + prompt * cross[0]
            forward += first + attention
            backward += T * (layers[1] - cross[1]) + prompt * cross[1] + 2.5 * attention
            # kernels/checkpoint.py: of a layer all products but `down`; `full` runs it whole, too
            recomputed += {"attention": first - T * down,
                           "full": first + attention + first - T * down}.get(policy, 0)
        return forward, backward, recomputed, pictures * of_a_picture
    return count


def flops_counter(model):
    """A function micro-batch -> (tokens after splicing, useful FLOPs); recomputing is no use."""
    count, num_image_tokens = flops_per_sample(model), model.num_image_tokens()

    def count_flops(micro):
        tokens = flops = 0
        for text, learned, pictures in micro.counts:
            tokens += text + pictures * num_image_tokens
            forward, backward, _, vision = count(text, learned, pictures)
            flops += forward + backward + vision
        return tokens, flops
    return count_flops


# ----------------------------------------------------------------------------------------- memory

def activation_bytes(model, tokens, learned, pictures, policy, stream=2, product=2, kernels=True,
                     offload=False):
    """Bytes that wait from forward to backward, and bytes that one layer's backward needs besides.

    stream: bytes per element of the residual stream; product: of matmul outputs (2 under autocast).
    kernels: what kernels/ keep, or what PyTorch's functions in their place do. offload: all but two
    regions on the host. kernels/checkpoint.py has the terms one by one."""
    llm, c = model.llm, model.llm.config
    C, F, V = c.width, c.mlp, c.vocab
    trains = any(p.requires_grad for p in llm.blocks.parameters())
    norms, head = llm.norm.weight.requires_grad, llm.head.weight.requires_grad
    casts, plain = product < stream, not kernels                # autocast keeps what it casts
    matrices = [p for p in llm.blocks.parameters() if p.dim() > 1]
    x = C * stream                                              # of a token and a layer
    inputs = 2 * C * product * trains                           # what qkv and gate_up read

    kept = extra = 0
    for stack in stacks(llm):
        T, L = stack.tokens(tokens, learned), stack.depth
        attention = stack.own * product + 4 * c.heads           # its output, its log-sum-exp
        work = stack.kept * product + x                         # x: before the MLP
        recomputed = inputs * (not casts) + F * product * trains
        recomputed += plain * (stack.mlp * product + 2 * x * norms)
        layer = x + attention + work + inputs * casts
        segment = max(1, round(math.sqrt(L)))
        here = 2 if offload else L                              # layers whose input is on the GPU
        kept += T * {"full": x * min(here, math.ceil(L / segment)),
                     "attention": (x + attention) * min(here, L),
                     "none": layer * L, None: (layer + recomputed) * L}[policy]
        # gradients of one layer, and what is recomputed for it
        extra = max(extra, T * {"full": layer + recomputed + segment * (x + attention),
                                "attention": layer + recomputed, "none": F * product,
                                None: 0}[policy])

    # of both ends: the last norm, rotary tables, the head's input, and in PyTorch's form its logits
    ends = tokens * (x + plain * x * norms + 4 * c.head_dim)
    ends += learned * (C * product * head + plain * 4 * V)
    if casts and policy in (None, "none"):                      # copies of all weights in bf16
        ends += product * (sum(p.numel() for p in matrices) + llm.head.weight.numel())
    if kernels and head:
        ends += product * V * C                         # the head's gradient is computed in forward
    images = pictures * (product * projector_numbers(model)
                         + vision_bytes(model.vision, model.patches + 1, stream, product, plain))

    backward = tokens * product * (3 * F + 4 * C) + extra
    backward += max(product * max(p.numel() for p in matrices), written_out_bytes(llm, product))
    return kept + images + ends, backward


def projector_numbers(model):
    """Numbers that the projector keeps of a picture: inputs and outputs of what trains."""
    if not any(p.requires_grad for p in model.projector.parameters()):
        return 0
    kept = last = 0
    for layer in model.projector.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.requires_grad:
            tokens = model.num_image_tokens()           # a Q-Former's projection reads its queries
            if layer.in_features == model.vision.config.width:
                tokens = model.patches
            last = tokens * layer.out_features
            kept += tokens * layer.in_features + last
    return kept - last                                  # that is the x of the first layer


def vision_bytes(vision, P, stream, product, plain):
    """Bytes that the tower's trained blocks keep of a picture; no policy there, rough if plain."""
    c = vision.config
    block = 2 * c.width * stream + product * (5 * c.width + (2 + plain) * c.mlp) + 4 * c.heads
    return len(trainable_vit_blocks(vision)) * P * block


def number_bytes(args):
    """Bytes of a weight and of a matmul's output."""
    if build.weight_dtype(args) == torch.bfloat16:
        return 2, 2
    fast = args.base != "toy" or torch.cpu._is_amx_tile_supported()
    if args.dtype == "bf16" or args.dtype == "auto" and fast:
        return 4, 2
    return 4, 4


def state_bytes(model, args):
    """({what: bytes} on the GPU, on the host) of the weights and of what belongs to the trained."""
    weight = number_bytes(args)[0]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = {"weights": weight * total, "gradients": weight * trained, "masters": 0,
             "moments": 8 * trained}
    if args.optimizer == "adamw8":
        sizes["moments"] = (2 + 8 / 256) * trained      # two bytes and a share of two fp32 scales
        if weight == 2 and not args.stochastic:
            sizes["masters"] = 2 * trained              # the lower half of an fp32 weight
    return split_by_place(sizes, model, args)


def static_bytes(model, args, gpus=1):
    """{what: bytes} of one GPU of so many, whatever the micro-batch is."""
    sizes = {name: size / gpus for name, size in state_bytes(model, args)[0].items()}
    sizes["weights"] += code_bytes(model)               # not sharded
    if gpus > 1:        # whole on every GPU: a layer, the next, a gradient, and what is no layer
        layers = sum(p.numel() for p in model.llm.blocks.parameters())
        layer = sum(p.numel() for p in model.llm.blocks[0].parameters())
        total = sum(p.numel() for p in model.parameters())
        sizes["gathered"] = number_bytes(args)[0] * (3 * layer + total - layers)
    return sizes


def micro_batch_size(model, args, kinds, pack):
    """(tokens, tokens with loss, pictures) of a micro-batch: a row of `pack` tokens, or padded."""
    text, learned, pictures = mean_lengths(kinds)
    num_image_tokens = model.num_image_tokens()
    if pack:
        tokens, samples = pack, pack / (text + pictures * num_image_tokens)
    else:                               # padded to the longest
        samples = args.row.batch // args.accum
        tokens = samples * max(kind[1] + kind[3] * num_image_tokens for kind in kinds)
    return tokens, samples * learned, math.ceil(samples * pictures)


def memory_forecast(model, args, kinds, pack, policy, gpus=1):
    """{what: bytes} of one GPU of so many; a micro-batch is a row of `pack` tokens, or padded."""
    (weight, product), c = number_bytes(args), model.vision.config
    tokens, learned, pictures = micro_batch_size(model, args, kinds, pack)
    activations, backward = activation_bytes(model, tokens, learned, pictures, policy, weight,
                                             product, offload=args.offload)
    vision = product * pictures * (model.patches + 1) * (6 * c.width + 2 * c.mlp)
    logits = min(learned, 4096) * model.llm.config.vocab * product
    return {**static_bytes(model, args, gpus), "activations": activations,
            "workspace": max(backward, vision, logits)}


def host_forecast(model, args, kinds, pack, policy, gpus=1):
    """{what: bytes} of one GPU of so many that wait on the host, activations of a micro-batch."""
    sizes = {name: size / gpus for name, size in state_bytes(model, args)[1].items()}
    if args.offload:
        what = (model, *micro_batch_size(model, args, kinds, pack), policy, *number_bytes(args))
        kept, here = (activation_bytes(*what, offload=moved)[0] for moved in (False, True))
        sizes["activations"] = kept - here
    return sizes


# ------------------------------------------------------------------------------------------ time

class StepCost(NamedTuple):         # at the assumed --mfu and --pcie
    flops: list                     # of a sample: [forward, backward, recomputed, vision]
    busy: float                     # share of the time in which a GPU has a micro-batch
    computing: float                # seconds
    copied: dict                    # {what: bytes} over PCIe, both ways
    copying: float                  # seconds

    def in_turn(self):
        """Seconds, if copies wait for the computation."""
        return self.computing + self.copying


def mean_flops(count, kinds, policy):
    """[forward, backward, recomputed, vision] of a sample on average."""
    sums = [0, 0, 0, 0]
    for share, *lengths in kinds:
        for i, flops in enumerate(count(*lengths, policy)):
            sums[i] += share * flops
    return sums


def step_cost(model, args, kinds, pack, policy, gpus=1):
    """The StepCost of rows of `pack` tokens, or of --accum padded micro-batches."""
    flops = mean_flops(flops_per_sample(model), kinds, policy)
    text, _, pictures = mean_lengths(kinds)
    micro_batches = args.accum                                  # of a step, of all GPUs
    if pack:
        tokens = text + pictures * model.num_image_tokens()
        micro_batches = math.ceil(args.row.batch * tokens / pack)
    rounds = math.ceil(micro_batches / gpus)
    busy = micro_batches / (gpus * rounds)                      # a GPU without a row waits
    rate = args.mfu * A100_FLOPS * gpus * busy
    copied = bytes_a_step(host_forecast(model, args, kinds, pack, policy, gpus), rounds)
    return StepCost(flops, busy, args.row.batch * sum(flops) / rate, copied,
                    sum(copied.values()) / (args.pcie * 1e9))


# --------------------------------------------------------------------------------------- the card

def usable_bytes(memory=None):
    """Bytes that a run may count on, of a card of `memory` GB, the one at hand, or an A100."""
    if memory is None and torch.cuda.is_available():
        return USABLE * (torch.cuda.get_device_properties(0).total_memory - CUDA_CONTEXT_BYTES)
    return USABLE * ((memory or 80) * 2 ** 30 * VISIBLE - CUDA_CONTEXT_BYTES)


def choose_row_and_policy(model, args, kinds, space, gpus=1):
    """(tokens a row, policy) that fit into `space` bytes, or None. Policies first: to recompute is
    a quarter of the time, a short row a few percent. With --offload-gradients the quickest."""
    policies = POLICIES if "checkpoint" in args.free else (args.checkpoint,)
    if args.offload:                    # the first keeps too much to be moved
        policies = [policy for policy in policies if policy in ("attention", "full")]
    rows = LONG_ROWS if args.offload_gradients else ROW_LENGTHS
    rows, fitting = rows if "pack" in args.free else (args.pack,), []
    for policy in policies:
        for pack in rows:
            need = memory_forecast(model, args, kinds, pack, policy, gpus)
            if sum(need.values()) <= space:
                if not args.offload_gradients:
                    return pack, policy
                fitting.append((pack, policy))
    return min(fitting, key=lambda f: step_cost(model, args, kinds, *f, gpus).in_turn(),
               default=None)


def fit_to_card(args, set_trainable):
    """Row length and policy as the card at hand allows, where the flags leave them open."""
    if not args.free:
        return
    gpus = int(os.environ.get("WORLD_SIZE", 1))                 # torchrun's
    found = choose_row_and_policy(meta_model(args, set_trainable), args, sample_lengths(args)[1],
                                  usable_bytes(), gpus)
    if found is None:
        raise UsageError(f"does not fit into {usable_bytes() / 1e9:.1f} GB of "
                         f"{torch.cuda.get_device_name()}; --plan says what would")
    args.pack, args.checkpoint = found
