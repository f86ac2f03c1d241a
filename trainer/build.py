"""TODO"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import data
from clip import LayerNorm, prefixed, ViT
from formats import configs
from formats.bert import BertTokenizer
from formats.checkpoints import load_into, resolve
from formats.families import ln_vision_eps
from formats.names import canonical_names
from formats.strict_json import read_config
from formats.unused import POSITIONS, tied_decoder
from llama import Llama
from projector import QFormerProjector, VLM
from qformer import Blip2Stage1, block_table, HEAD_NAMES, init_weights, LMHead, QFormer, table
from qformer import Config as QFormerConfig
from toy import texts as toy_texts
from toy.texts import description
from toy.world import make_scene
from trainer.flags import BASES, BERT, EVA, FLAN, SMALL

HERE = Path(__file__).parents[1]
TOY_QFORMER = dict(width=128, depth=4, heads=4, mlp=256, num_queries=16)


def weight_dtype(args):
    """The weights' dtype: adamw8 keeps the rest of an fp32 weight in its state."""
    return (torch.bfloat16 if args.optimizer == "adamw8" and args.dtype != "fp32" else
            torch.float32)


def base_models(args):
    """(picture tower, LLaMA): folders or hub ids. The toy's are beside this file."""
    base = [HERE / p if args.base == "toy" else p for p in BASES[args.base]]
    if args.base != "toy" and args.recipe == "llava":
        base[0] = SMALL
    if args.base != "toy" and args.row.projector_type == "qformer":
        base[0] = EVA
    return args.vision or base[0], args.llm or base[1]


def build_blip2_stage1(args):
    """BLIP-2 before its first step: a picture tower and a Q-Former that knows BERT, or, for the
    toy, nothing."""
    vision = base_models(args)[0]
    if args.base == "toy":
        scenes = [make_scene(i) for i in range(2000)]
        words = BertTokenizer.build([x for s in scenes for x in (*toy_texts.captions(s), description(s))])
        config = QFormerConfig(**TOY_QFORMER, vision_width=TOY_QFORMER["width"], vocab=len(words))
        return new_blip2_stage1(vision, words, config, args.seed)
    return new_blip2_stage1(vision, BertTokenizer(resolve(args.qformer or BERT)), QFormerConfig(),
                                args.seed, bert=args.qformer or BERT)


def build_vlm(args, start, out):
    """A VLM of parts, its bridge new; blip2's second stage begins with its first stage's Q-Former,
    MiniGPT-4 with that of BLIP-2's second stage."""
    row, (vision, llm) = args.row, base_models(args)
    if row.projector_type != "qformer":
        return new_vlm(vision, llm, row.projector_type, row.template, row.aspect, args.seed,
                              weight_dtype(args))
    if args.recipe == "blip2":
        qformer = build_blip2_stage1(args) if start == "none" else start
    else:
        qformer = args.qformer or (FLAN if args.base != "toy" else
                                   out.absolute().parents[1] / "blip2/stage2/model")
        if args.base == "toy" and not args.qformer and not qformer.exists():
            raise data.BadModel(f"{qformer}: MiniGPT-4 starts from BLIP-2's Q-Former and there is "
                                "none; run --recipe blip2, stages 1 and 2, or give --qformer")
    return new_vlm(args.vision, llm, row.projector_type, row.template, row.aspect, args.seed,
                          weight_dtype(args), qformer=qformer)


def load_qformer_parts(source, vision, dtype):
    """(eye, norm, Q-Former) for a bridge, without words unless it is an InstructBLIP's.

    source: a Retriever, a QFormer, or the folder or hub id of a BLIP-2 (of either kind, with any
    language model: that is left where it is) or InstructBLIP. vision: folder of another eye."""
    if isinstance(source, Blip2Stage1):
        eye = ViT.from_pretrained(vision, dtype) if vision else source.vision
        return eye.without_final_block(), source.ln_vision, source.qformer.drop_text_branch()
    if isinstance(source, QFormer):
        eye = ViT.from_pretrained(vision, dtype).without_final_block()
        return eye, LayerNorm(eye.config.width, eye.config.eps), source.drop_text_branch()
    folder = resolve(source)
    eye, weights = ViT.from_pretrained(vision or folder, dtype).without_final_block(), data.load_weights(folder)
    c = read_config(folder)
    reads = c.get("model_type") == "instructblip"
    asks = QFormer.from_pretrained(folder, dtype, words=reads)
    lavis = "ln_vision.weight" in weights
    eps = ln_vision_eps(folder, c, 1e-5 if lavis else configs.vision_tower(c)["eps"])
    norm = LayerNorm(asks.config.vision_width, eps)
    name = "ln_vision." if lavis else "vision_model.post_layernorm."
    table = {kind: name + kind for kind in ("weight", "bias")}
    return eye, load_into(norm.to(asks.query_tokens.dtype), table, weights,
                          {".*": "not of the norm"}), asks


def has_matching_projection(source, template, weight):
    """Is source a folder with a projection of this shape to a LLaMA asked by this template?"""
    if isinstance(source, nn.Module):
        return False
    folder = resolve(source)
    c, weights = read_config(folder), data.load_weights(folder)
    text, name = c.get("text_config"), "language_projection.weight"
    return (type(text) is dict and text.get("model_type") in ("llama", "mistral")
            and name in weights and weights.shape(name) == tuple(weight.shape)
            and c.get("template", c["model_type"].replace("-", "")) == template)


def init_from_bert(model, folder):
    """BERT's weights where the Q-Former is a BERT: attention of a row to itself, the words' MLP,
    embeddings, head. Cross-attention, queries and the row of [DEC] stay random. [BLIP-2] 3.1"""
    weights, q = data.load_weights(resolve(folder)), model.qformer
    at = "bert." if any(k.startswith("bert.") for k in weights) else ""
    if at + "embeddings.word_embeddings.weight" not in weights:
        raise data.BadModel(f"{folder}: no word embeddings of a BERT; give bert-base-uncased")
    rows = weights.shape(at + "embeddings.word_embeddings.weight")[0]
    head = LMHead(replace(q.config, vocab=rows))              # BERT has a row less, that of [DEC]
    head.dense, head.norm = model.head.dense, model.head.norm
    parts = nn.ModuleDict({
        "word": nn.Embedding(rows, q.config.width), "position": q.position, "norm": q.norm,
        "blocks": nn.ModuleList(nn.ModuleDict({"attention": b.attention, "words_mlp": b.words_mlp})
                                for b in q.blocks), "head": head})
    names = {**table(block_table(at + "encoder.layer.{}.", "self"), at + "embeddings.LayerNorm",
                     at + "embeddings"), **prefixed(HEAD_NAMES, "head.", "cls.predictions.")}
    if at + "embeddings.LayerNorm.gamma" in weights:        # quirk: TensorFlow's names, on the hub
        names = {k: v if type(v) is tuple else v.replace("LayerNorm.weight", "LayerNorm.gamma")
                 .replace("LayerNorm.bias", "LayerNorm.beta") for k, v in names.items()}
    load_into(parts, names, weights, {
        **POSITIONS,
        r".*token_type_embeddings\..*": "first or second sentence: a Q-Former knows one",
        r".*pooler\..*|cls\.seq_relationship\..*": "the task of which sentence follows",
        **tied_decoder(r"cls\.predictions\.decoder", at + "embeddings.word_embeddings.weight",
                       "cls.predictions.bias")})
    with torch.no_grad():
        q.word.weight[:rows] = parts["word"].weight
        model.head.bias[:rows] = head.bias


def new_blip2_stage1(vision, words, config, seed=0, bert=None, shared=256):
    """A new one: an eye (folder or hub id, see ViT.from_pretrained), Words, settings of the
    Q-Former, which begins at random or, given a folder or hub id of BERT, as that."""
    eye = ViT.from_pretrained(vision).without_final_block().requires_grad_(False)
    with torch.device("meta"):
        model = Blip2Stage1(eye.config, config, shared)
    model.vision, model.temp = eye, nn.Parameter(torch.tensor(.07))
    for i, (name, part) in enumerate(model.named_children()):
        if name != "vision":
            init_weights(part.to_empty(device="cpu"), config.width, 100 * seed + i)
    if bert is not None:
        init_from_bert(model, bert)
    for block in model.qformer.blocks:                  # as published
        block.mlp.load_state_dict(block.words_mlp.state_dict())
    return model.fits(words).eval()


def load_projector(model, path):
    """Take over a projector alone: a folder or a .safetensors file with mm_projector.* or
    multi_modal_projector.*; before a Q-Former language_projection.*, or llama_proj.* of
    MiniGPT-4 (other tensors in it are passed over). Raises data.BadModel."""
    weights = data.load_weights(path)
    if model.projector_type == "qformer":
        name = next((n for n in ("llama_proj", "llm_proj", "opt_proj", "t5_proj")
                     if f"{n}.weight" in weights), "language_projection")
        load_into(model.projector.proj, {k: f"{name}.{k}" for k in ("weight", "bias")}, weights,
                  {rf"(?!{name}\.).*": "not of the projection"})
        return
    known = canonical_names(weights)
    table = {k.removeprefix("projector."): known.get(v, v) for k, v in model.names().items()
             if k.startswith("projector.")}
    rest = r"(?!.*projector).*"
    load_into(model.projector, table, weights, {rest: "not of the bridge"})


def new_vlm(vision, llm, projector="mlp", template="v1", aspect="pad", seed=0, dtype=None,
            qformer=None):
    """A new model from a CLIP folder and a LLaMA folder; the bridge is drawn from the seed.

    bridge "qformer" takes `queries_of(qformer, vision)`, and draws the projection only: that of
    a model before a LLaMA of this width goes on if it is asked by the same template.
    (MiniGPT-4, too, takes BLIP-2's Q-Former and a projection of its own.)"""
    tongue = Llama.from_pretrained(llm, dtype)
    words, qformer_tokenizer = data.Tokenizer(resolve(llm)), None
    rows = -(-(len(words) + 2) // 64) * 64      # room for <image> and <pad>, as the hub has it
    if rows > tongue.config.vocab:
        tongue.resize_embeddings(rows)
    if projector == "qformer":
        eye, norm, asks = load_qformer_parts(qformer, vision, dtype)
        if asks.config.vision_width != eye.config.width:
            raise data.BadModel(f"the Q-Former reads features of width {asks.config.vision_width}, "
                                f"the eye's have {eye.config.width}; take both from one model")
        if asks.config.vocab:
            qformer_tokenizer = BertTokenizer(resolve(qformer) / "qformer_tokenizer")
    else:
        eye = ViT.from_pretrained(vision, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if projector == "qformer":
            projector = QFormerProjector(norm, asks, tongue.config.width)
        model = VLM(eye, projector, tongue, words, template, aspect, qformer_tokenizer=qformer_tokenizer)
        # The bridge should speak as loudly as words do, and in the channels that words use.
        # Torch's default start is louder than Vicuna's words (0.02) and stays, as in the
        # official runs. The toy's words are at 1, in a quarter of the channels: there the
        # bridge starts with random mixtures of words.
        with torch.no_grad():
            parts = model.projector._modules               # a Q-Former ends in a norm: heard at 1
            last = parts.get("proj", parts.get("second", parts.get("first")))
            speak = last if model.projector_type == "qformer" else model.projector
            heard = torch.randn(1000, last.in_features if speak is last else eye.config.width)
            table = tongue.embed.weight.float()
            if table.std() > speak(heard).std():
                last.weight.copy_(table.T @ torch.randn(len(table), last.in_features))
                last.bias.zero_()
                last.weight.mul_(table.std() / speak(heard).std())
    if model.projector_type == "qformer" and has_matching_projection(qformer, template, last.weight):
        load_projector(model, qformer)
    model.projector.to(tongue.embed.weight.dtype)
    return model
