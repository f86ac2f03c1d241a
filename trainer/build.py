"""trainer/build.py: the model that a run starts with, put together from its parts.

    recipe                   parts                                        new
    llava, llava-1.5, ...    CLIP, LLaMA                                  the projector
    blip2 stage 1            EVA (or a CLIP), BERT                        the rest of the Q-Former
    blip2 stage 2            the Q-Former and tower of stage 1, or the    the projection
                             toy's shipped ones; LLaMA, OPT or FlanT5
    minigpt4                 BLIP-2's Q-Former and tower (the toy's are   the projection
                             shipped), LLaMA

What is new is drawn from the run's seed. A run may also start from a whole model: `start_model`.
Sources: [LLaVA] 2304.08485 4.2; [BLIP-2] 2301.12597 3.1 and 3.2; [MiniGPT4] 2304.10592 3.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import data
import llms
from clip import LayerNorm, ViT
from formats import configs, language_models, names
from formats.bert import BertTokenizer
from formats.checkpoints import load_into
from formats.errors import UsageError
from formats.families import ln_vision_eps
from formats.folders import init_weights, SHIPPED_QFORMER, tower_folder
from formats.hub import resolve
from formats.strict_json import read_config
from formats.templates import caption_end
from projector import Blip2, QFormerProjector, VLM
from qformer import Blip2Stage1, LMHead, QFormer
from qformer import Config as QFormerConfig
from toy import texts as toy_texts
from toy.world import make_scene
from trainer.flags import BERT, FLAN
from trainer.qlora import add_additions
from trainer.start import base_models, chosen_start, HERE

TOY_QFORMER = dict(width=128, depth=4, heads=4, mlp=256, num_queries=16)


def weight_dtype(args):
    """The weights' dtype: adamw8 keeps the rest of an fp32 weight in its state."""
    if args.optimizer == "adamw8" and args.dtype != "fp32":
        return torch.bfloat16
    return torch.float32


# ---------------------------------------------------------------------- BLIP-2's first stage

def build_blip2_stage1(args):
    """BLIP-2 before its first step. The toy's Q-Former is random, others begin as BERT."""
    vision = base_models(args)[0]
    if args.base != "toy":
        bert = args.qformer or BERT
        tokenizer = BertTokenizer(resolve(bert))
        return new_blip2_stage1(vision, tokenizer, QFormerConfig(), args.seed, bert=bert)
    return new_toy_stage1(vision, args.seed)


def new_toy_stage1(vision, seed=0):
    """The toy's BLIP-2 before its first step, which knows the words of the toy world."""
    texts = []
    for scene in map(make_scene, range(2000)):
        texts += [*toy_texts.captions(scene), toy_texts.description(scene)]
    tokenizer = BertTokenizer.build(texts)
    config = QFormerConfig(**TOY_QFORMER, vision_width=TOY_QFORMER["width"], vocab=len(tokenizer))
    return new_blip2_stage1(vision, tokenizer, config, seed)


def new_blip2_stage1(vision, tokenizer, config, seed=0, bert=None, shared=256):
    """vision: folder or hub id (see ViT.from_pretrained); tokenizer: a BertTokenizer; config: of
    the Q-Former, which begins at random or as `bert`, a folder or hub id; shared: E."""
    tower = ViT.from_pretrained(vision).without_final_block().requires_grad_(False)
    with torch.device("meta"):
        model = Blip2Stage1(tower.config, config, shared)
    model.vision, model.temp = tower, nn.Parameter(torch.tensor(.07))
    for i, (name, part) in enumerate(model.named_children()):
        if name != "vision":
            init_weights(part.to_empty(device="cpu"), config.width, 100 * seed + i)
    if bert is not None:
        init_from_bert(model, bert)
    for block in model.qformer.blocks:                  # equal at first, as published
        block.mlp.load_state_dict(block.text_mlp.state_dict())
    model.tokenizer = tokenizer.check_fits(config.vocab)
    return model.eval()


def init_from_bert(model, folder):
    """Take BERT's weights for what a Q-Former has of BERT: self-attention, the text MLP, the
    embeddings and the head. Cross-attention, queries and the row of [DEC] stay random.
    [BLIP-2] 3.1"""
    weights, qformer = data.load_weights(resolve(folder)), model.qformer
    table, ignore = names.bert(weights)
    embeddings = table["token.weight"]
    if embeddings not in weights:
        raise data.BadModel(f"{folder}: no word embeddings of a BERT; give bert-base-uncased")
    rows = weights.shape(embeddings)[0]                 # one less than ours: [DEC] is not BERT's
    head = LMHead(replace(qformer.config, vocab=rows))
    head.dense, head.norm = model.lm_head.dense, model.lm_head.norm
    blocks = nn.ModuleList()
    for block in qformer.blocks:
        blocks.append(nn.ModuleDict({"attention": block.attention, "text_mlp": block.text_mlp}))
    parts = nn.ModuleDict({
        "token": nn.Embedding(rows, qformer.config.width), "position": qformer.position,
        "norm": qformer.norm, "blocks": blocks, "lm_head": head})
    load_into(parts, table, weights, ignore)
    with torch.no_grad():
        qformer.token.weight[:rows] = parts["token"].weight
        model.lm_head.bias[:rows] = head.bias


# ------------------------------------------------------------------------------------ VLMs

def build_vlm(args, start):
    """A VLM with a new projector. start: BLIP-2's first stage, a model or its folder, or "none"."""
    row, (vision, llm) = args.row, base_models(args)
    if row.projector_type != "qformer":
        return new_vlm(vision, llm, row.projector_type, row.template, row.image_aspect, args.seed,
                       weight_dtype(args))
    if args.recipe == "blip2":
        qformer = build_blip2_stage1(args) if start == "none" else start
    else:
        qformer = args.qformer or (HERE / SHIPPED_QFORMER if args.base == "toy" else FLAN)
    # the tower stays the Q-Former's, unless another was asked for
    return new_vlm(args.vision, llm, row.projector_type, row.template, row.image_aspect, args.seed,
                   weight_dtype(args), qformer=qformer)


def new_vlm(vision, llm, projector="mlp", template="v1", aspect="pad", seed=0, dtype=None,
            qformer=None):
    """A VLM of a CLIP and a LLaMA, folders or hub ids; the projector is drawn from the seed. Behind
    a Q-Former the language model may be an OPT or a FlanT5.

    projector "qformer": see `load_qformer_parts` for qformer and vision. Then only the projection
    is drawn, and that of a model in front of a LLaMA of this width is kept, if it was trained with
    the same template. (MiniGPT-4 has BLIP-2's Q-Former and a projection of its own.)"""
    llm_folder = resolve(llm)
    check_llm(llm_folder, template)
    llm, tokenizer = llms.from_pretrained(llm_folder, dtype), data.Tokenizer(llm_folder)
    rows = -(-(len(tokenizer) + 2) // 64) * 64          # for <image> and <pad>, as on the hub
    if rows > llm.config.vocab:
        llm.resize_embeddings(rows)
    if projector == "qformer":
        model = new_blip2(vision, llm, tokenizer, template, aspect, seed, dtype, qformer)
    else:
        tower = ViT.from_pretrained(vision, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = VLM(tower, projector, llm, tokenizer, template, aspect)
            last = model.projector.first if projector == "linear" else model.projector.second
            match_embedding_scale(last, model.projector, tower.config.width, llm)
    model.projector.to(llm.embed.weight.dtype)
    return model


def check_llm(folder, template):
    """Refuse an OPT or a FlanT5 with a template that is not theirs: before it is loaded."""
    kind = language_models.kind_of(read_config(folder))
    if kind != "llama" and template != language_models.BLIP2_TEMPLATES[kind]:
        raise UsageError(f"{folder}: its language model is {kind!r}, which only stage 2 of "
                         "--recipe blip2 trains, with the template "
                         f"{language_models.BLIP2_TEMPLATES[kind]}; give a LLaMA")


def new_blip2(vision, llm, tokenizer, template, aspect, seed, dtype, source):
    """A Blip2 in front of a Llama; see `new_vlm`."""
    if aspect != "squash":
        raise UsageError(f"aspect {aspect!r}: a Q-Former is shown pictures squashed, and its "
                         "files cannot say anything else; choose squash")
    tower, norm, qformer = load_qformer_parts(source, vision, dtype)
    if qformer.config.vision_width != tower.config.width:
        raise data.BadModel(f"the Q-Former reads features of width {qformer.config.vision_width}, "
                            f"the vision tower's have {tower.config.width}; take both from one "
                            "model")
    qformer_tokenizer, vocab = None, qformer.config.vocab
    if vocab and template != "instructblip":
        raise data.BadModel(f"{source}: its Q-Former reads text of {vocab:,} tokens, and that "
                            f"of template {template!r} reads 0; give a BLIP-2's, not an "
                            "InstructBLIP's")
    if vocab:
        qformer_tokenizer = BertTokenizer(resolve(source) / "qformer_tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = QFormerProjector(norm, qformer, llm.config.width)
        if llm.kind == "llama":                 # with OPT and FlanT5 as published
            # a Q-Former ends in a norm: its outputs have a standard deviation of about 1
            match_embedding_scale(projector.proj, projector.proj, qformer.config.width, llm)
    model = Blip2(tower, projector, llm, tokenizer, template, qformer_tokenizer)
    if llm.kind != "llama":
        model.stop_ids = frozenset(caption_end(template, tokenizer))
    if has_matching_projection(source, template, projector.proj.weight):
        load_projector(model, source)
    return model


@torch.no_grad()
def match_embedding_scale(last, projector, width, llm):
    """Scale the projector's outputs to the token embeddings' standard deviation.

    last: its last linear layer; projector: called on random inputs (1000, width). PyTorch's default
    is larger than Vicuna's embeddings (0.02) and is kept, as in the official runs. The toy's
    embeddings have a deviation of 1, in a quarter of the channels: there the last layer starts as
    random mixtures of embeddings."""
    probe = torch.randn(1000, width)
    embeddings = llm.embed.weight.float()                               # (V, C)
    if embeddings.std() > projector(probe).std():
        last.weight.copy_(embeddings.T @ torch.randn(len(embeddings), last.in_features))
        last.bias.zero_()
        last.weight.mul_(embeddings.std() / projector(probe).std())


# ---------------------------------------------------------------------------- parts of others

def load_qformer_parts(source, vision, dtype):
    """(vision tower, ln_vision, Q-Former) for a projector; an InstructBLIP's has a text branch.

    source: a Blip2Stage1, a QFormer, or the folder or hub id of a BLIP-2 (of either kind; its
    language model is not loaded) or InstructBLIP. vision: folder of another tower, or None."""
    if isinstance(source, Blip2Stage1):
        tower = ViT.from_pretrained(vision, dtype) if vision else source.vision
        return tower.without_final_block(), source.ln_vision, drop_text_branch(source.qformer)
    if isinstance(source, QFormer):
        tower = ViT.from_pretrained(vision, dtype).without_final_block()
        norm = LayerNorm(tower.config.width, tower.config.eps)
        return tower, norm, drop_text_branch(source)
    folder = resolve(source)
    tower = vision or tower_folder(folder) or folder
    tower = ViT.from_pretrained(tower, dtype).without_final_block()
    weights, c = data.load_weights(folder), read_config(folder)
    with_text = c.get("model_type") == "instructblip"
    qformer = QFormer.from_pretrained(folder, dtype, text=with_text)
    lavis = "ln_vision.weight" in weights
    eps = ln_vision_eps(folder, c, 1e-5 if lavis else configs.vision_tower(c)["eps"])
    norm = LayerNorm(qformer.config.vision_width, eps).to(qformer.query_tokens.dtype)
    prefix = "ln_vision." if lavis else "vision_model.post_layernorm."
    table = {"weight": f"{prefix}weight", "bias": f"{prefix}bias"}
    load_into(norm, table, weights, {".*": "not of the norm"})
    return tower, norm, qformer


def drop_text_branch(qformer):
    """Remove what only text uses: in front of a language model there is none. Returns qformer."""
    if qformer.config.vocab:
        qformer.config = replace(qformer.config, vocab=0)
        del qformer.token, qformer.position
        for block in qformer.blocks:
            block.text_mlp = None
    return qformer


def has_matching_projection(source, template, weight):
    """Is source a folder with a projection of this shape to a language model that was trained with
    this template?"""
    if isinstance(source, nn.Module):
        return False
    folder = resolve(source)
    c, weights = read_config(folder), data.load_weights(folder)
    text, name = c.get("text_config"), "language_projection.weight"
    if type(text) is not dict or text.get("model_type") not in ("llama", "mistral", "opt", "t5"):
        return False
    if name not in weights or weights.shape(name) != tuple(weight.shape):
        return False
    trained = c["model_type"].replace("-", "")
    if trained == "blip2":
        trained = language_models.BLIP2_TEMPLATES[language_models.kind_of(text)]
    return c.get("template", trained) == template


def load_projector(model, path):
    """Load a projector alone into a VLM: a folder or a .safetensors file with mm_projector.* or
    multi_modal_projector.*; for a Q-Former language_projection.*, or llama_proj.* of MiniGPT-4.
    Other tensors in the file are not read. Raises data.BadModel."""
    weights = data.load_weights(path)
    if model.projector_type == "qformer":
        name = "language_projection"
        for candidate in ("t5_proj", "opt_proj", "llm_proj", "llama_proj"):     # the last one wins
            if f"{candidate}.weight" in weights:
                name = candidate
        table = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        load_into(model.projector.proj, table, weights,
                  {rf"(?!{name}\.).*": "not of the projection"})
        return
    known, table = names.canonical_names(weights), {}
    for name, hf_name in names.LLAVA_PROJECTOR.items():
        table[name.removeprefix("projector.")] = known.get(hf_name, hf_name)
    load_into(model.projector, table, weights, {r"(?!.*projector).*": "not of the projector"})


# ------------------------------------------------------------------------ what a run starts with

def start_model(args, out):
    """The VLM that a stage starts from: new parts, or the finished model of the stage before.
    Raises BadModel or UsageError for a folder that this stage cannot start from."""
    start = chosen_start(args, out)
    if args.start is None and start != "none" and not Path(start).exists():
        first = "--recipe llava-1.5 " if args.stage == 1 else ""
        raise data.BadModel(f"{start}: this stage starts from that model, beside its own folder, "
                            f"and there is none; run {first}--stage 1 first, or give --from FOLDER "
                            "or --from none")
    if start == SHIPPED_QFORMER:
        start = HERE / start
    if start == "none" or args.recipe == "blip2":
        model = build_vlm(args, start)
        if args.projector:
            load_projector(model, args.projector)
    else:
        model = VLM.from_pretrained(start, weight_dtype(args))
        check_start(model, start, args)
        model.template, model.aspect = args.row.template, args.row.image_aspect
    model.llm_template = getattr(args, "llm_template", None)        # for stage 2: trainer/start.py
    add_additions(model.llm, args)
    return model


def check_start(model, start, args):
    """Refuse a finished model that is of another kind than this run's."""
    row = args.row
    if model.aspect == "anyres":
        raise data.BadModel(f"{start}: a LLaVA-NeXT; its pictures in tiles are not trained on "
                            "here; take a LLaVA-1.5")
    if model.projector_type != row.projector_type:
        raise data.BadModel(f"{start}: its projector is {model.projector_type}, this run's is "
                            f"{row.projector_type}; give --projector-type {model.projector_type}, "
                            "or another --from")
    # a folder's own chat template that is none of data.TEMPLATES
    if getattr(model.template, "known", True) is False and args.template is None:
        raise UsageError(f"{start}: its chat template is none of ours, and training teaches it "
                         f"another: give --template {row.template}, the recipe's, or one of "
                         f"{', '.join(data.TEMPLATES)}")


def find_parameters(model, part):
    """The parameters of one part that --train names: a module or a parameter; a part that ends in
    a number and + is a list of modules from there on. Raises UsageError if there are none."""
    top, first = re.fullmatch(r"(.*?)(?:\.(\d+)\+)?", part).groups()
    found = []
    for name, p in model.named_parameters():
        if not f"{name}.".startswith(f"{top}."):
            continue
        place = name[len(top) + 1:].split(".")[0]           # of "blocks.12.qkv" behind "blocks": 12
        if first is None or place.isdigit() and int(place) >= int(first):
            found.append(p)
    if not found:
        parts = dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters())
        raise UsageError(f"--train {part}: the model has no such part; it has {', '.join(parts)}, "
                         "and theirs with a dot")
    return found
