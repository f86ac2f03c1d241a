"""formats/names.py: what every weight is called in the files, beside what it is called here.

A table is {our name: name in the file}. {} stands for the number of a layer. A tuple of names means
that the file holds several tensors which are one here, on top of each other: (q, k, v) -> qkv.
ZEROS stands for a piece that no file holds. `weight_and_bias` writes a table of layers out as a
table of their weights and biases. A table may have more rows than a model has parameters: a tower
without a final block does not use those of the final norm.

At the end: functions that choose the table by what a file holds, and every spelling of LLaVA's
names. Which tensors are left unused, and why: formats/unused.py.
"""

import re

from formats import unused
from formats.errors import BadModel

ZEROS = "(zeros)"


def weight_and_bias(table):
    """A table of layers -> a table of their weights and biases."""
    out = {}
    for name, hf_name in table.items():
        for kind in ("weight", "bias"):
            parts = hf_name if isinstance(hf_name, tuple) else (hf_name,)
            named = tuple(f"{part}.{kind}" for part in parts)
            out[f"{name}.{kind}"] = named if isinstance(hf_name, tuple) else named[0]
    return out


def prefixed(table, name_prefix, hf_prefix):
    """The table with a prefix on either side: ours, the file's."""
    out = {}
    for name, hf_name in table.items():
        if isinstance(hf_name, tuple):
            out[name_prefix + name] = tuple(hf_prefix + part for part in hf_name)
        else:
            out[name_prefix + name] = hf_prefix + hf_name
    return out


# ------------------------------------------------------------------------------ vision and text

CLIP_BLOCKS = weight_and_bias({                         # the same in both towers of CLIP
    "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
    "blocks.{}.qkv": ("encoder.layers.{}.self_attn.q_proj", "encoder.layers.{}.self_attn.k_proj",
                      "encoder.layers.{}.self_attn.v_proj"),
    "blocks.{}.out": "encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
    "blocks.{}.up": "encoder.layers.{}.mlp.fc1",
    "blocks.{}.down": "encoder.layers.{}.mlp.fc2"})
VIT = {
    "cls": "embeddings.class_embedding",
    "patch": "embeddings.patch_embedding.weight",
    "position": "embeddings.position_embedding.weight",
    "norm_pre.weight": "pre_layrnorm.weight",           # quirk: spelled so in every file
    "norm_pre.bias": "pre_layrnorm.bias",
    **CLIP_BLOCKS,
    "norm_post.weight": "post_layernorm.weight",
    "norm_post.bias": "post_layernorm.bias"}
EVA = {
    "cls": "embeddings.class_embedding",
    "patch": "embeddings.patch_embedding.weight",
    "patch_bias": "embeddings.patch_embedding.bias",
    "position": "embeddings.position_embedding",
    **weight_and_bias({
        "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
        "blocks.{}.qkv": "encoder.layers.{}.self_attn.qkv",
        "blocks.{}.out": "encoder.layers.{}.self_attn.projection",
        "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
        "blocks.{}.up": "encoder.layers.{}.mlp.fc1",
        "blocks.{}.down": "encoder.layers.{}.mlp.fc2"})}
EVA_LAVIS = {
    "cls": "visual_encoder.cls_token",
    "patch": "visual_encoder.patch_embed.proj.weight",
    "patch_bias": "visual_encoder.patch_embed.proj.bias",
    "position": "visual_encoder.pos_embed",
    **weight_and_bias({
        "blocks.{}.norm1": "visual_encoder.blocks.{}.norm1",
        "blocks.{}.out": "visual_encoder.blocks.{}.attn.proj",
        "blocks.{}.norm2": "visual_encoder.blocks.{}.norm2",
        "blocks.{}.up": "visual_encoder.blocks.{}.mlp.fc1",
        "blocks.{}.down": "visual_encoder.blocks.{}.mlp.fc2"}),
    "blocks.{}.qkv.weight": "visual_encoder.blocks.{}.attn.qkv.weight",
    # quirk: k has no bias. One number added to all scores of a query changes no softmax.
    "blocks.{}.qkv.bias": ("visual_encoder.blocks.{}.attn.q_bias", ZEROS,
                           "visual_encoder.blocks.{}.attn.v_bias")}
TEXT_TOWER = {
    "token": "embeddings.token_embedding.weight",
    "position": "embeddings.position_embedding.weight",
    **CLIP_BLOCKS,
    "norm.weight": "final_layer_norm.weight",
    "norm.bias": "final_layer_norm.bias"}
CLIP = {
    **prefixed(VIT, "vision.", "vision_model."),
    **prefixed(TEXT_TOWER, "text.", "text_model."),
    "visual_projection.weight": "visual_projection.weight",
    "text_projection.weight": "text_projection.weight",
    "logit_scale": "logit_scale"}


# ---------------------------------------------------------------------------------- the decoder

LLAMA = {
    "embed.weight": "model.embed_tokens.weight",
    "blocks.{}.norm1.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.qkv.weight": ("model.layers.{}.self_attn.q_proj.weight",
                             "model.layers.{}.self_attn.k_proj.weight",
                             "model.layers.{}.self_attn.v_proj.weight"),
    "blocks.{}.out.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.norm2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.gate_up.weight": ("model.layers.{}.mlp.gate_proj.weight",
                                 "model.layers.{}.mlp.up_proj.weight"),
    "blocks.{}.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight"}


def fused_rows(config, prefix=""):
    """{our name: rows of the tensors it is made of} of a LLaMA's fused weights: with grouped heads
    k and v are shorter than q. `checkpoints.export` splits by it."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {f"{prefix}blocks.{{}}.qkv.weight": [q, kv, kv],
            f"{prefix}blocks.{{}}.gate_up.weight": [config.mlp, config.mlp]}


# --------------------------------------------------------------------------------- the Q-Former

def qformer_blocks(block, attention):
    """The blocks in one spelling. block: where a block stands; attention: the name of the part of
    its attention that holds q, k and v."""
    return weight_and_bias({
        "blocks.{}.attention.q": f"{block}.attention.{attention}.query",
        "blocks.{}.attention.kv": (f"{block}.attention.{attention}.key",
                                   f"{block}.attention.{attention}.value"),
        "blocks.{}.attention.out": f"{block}.attention.output.dense",
        "blocks.{}.attention.norm": f"{block}.attention.output.LayerNorm",
        "blocks.{}.cross.q": f"{block}.crossattention.{attention}.query",
        "blocks.{}.cross.kv": (f"{block}.crossattention.{attention}.key",
                               f"{block}.crossattention.{attention}.value"),
        "blocks.{}.cross.out": f"{block}.crossattention.output.dense",
        "blocks.{}.cross.norm": f"{block}.crossattention.output.LayerNorm",
        "blocks.{}.mlp.up": f"{block}.intermediate_query.dense",
        "blocks.{}.mlp.down": f"{block}.output_query.dense",
        "blocks.{}.mlp.norm": f"{block}.output_query.LayerNorm",
        "blocks.{}.text_mlp.up": f"{block}.intermediate.dense",
        "blocks.{}.text_mlp.down": f"{block}.output.dense",
        "blocks.{}.text_mlp.norm": f"{block}.output.LayerNorm"})


# quirk: BLIP-2 and InstructBLIP hold the same embeddings under different names
QFORMER = {
    "query_tokens": "query_tokens",
    "token.weight": "embeddings.word_embeddings.weight",
    "position.weight": "embeddings.position_embeddings.weight",
    "norm.weight": "qformer.layernorm.weight",
    "norm.bias": "qformer.layernorm.bias",
    **qformer_blocks("qformer.encoder.layer.{}", "attention")}
QFORMER_INSTRUCT = {
    "query_tokens": "query_tokens",
    "token.weight": "qformer.embeddings.word_embeddings.weight",
    "position.weight": "qformer.embeddings.position_embeddings.weight",
    "norm.weight": "qformer.embeddings.layernorm.weight",
    "norm.bias": "qformer.embeddings.layernorm.bias",
    **qformer_blocks("qformer.encoder.layer.{}", "attention")}
QFORMER_LAVIS = {
    "query_tokens": "query_tokens",
    "token.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "position.weight": "Qformer.bert.embeddings.position_embeddings.weight",
    "norm.weight": "Qformer.bert.embeddings.LayerNorm.weight",
    "norm.bias": "Qformer.bert.embeddings.LayerNorm.bias",
    **qformer_blocks("Qformer.bert.encoder.layer.{}", "self")}
BERT = {                            # the Q-Former's parts that begin as BERT
    "token.weight": "bert.embeddings.word_embeddings.weight",
    "position.weight": "bert.embeddings.position_embeddings.weight",
    "norm.weight": "bert.embeddings.LayerNorm.weight",
    "norm.bias": "bert.embeddings.LayerNorm.bias",
    **qformer_blocks("bert.encoder.layer.{}", "self"),
    "lm_head.dense.weight": "cls.predictions.transform.dense.weight",
    "lm_head.dense.bias": "cls.predictions.transform.dense.bias",
    "lm_head.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "lm_head.norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "lm_head.bias": "cls.predictions.bias"}


# ------------------------------------------------------------------------- BLIP-2's first stage

STAGE1_PRETRAINING = {              # transformers has no place for these; the names are LAVIS'
    "lm_head.dense.weight": "Qformer.cls.predictions.transform.dense.weight",
    "lm_head.dense.bias": "Qformer.cls.predictions.transform.dense.bias",
    "lm_head.norm.weight": "Qformer.cls.predictions.transform.LayerNorm.weight",
    "lm_head.norm.bias": "Qformer.cls.predictions.transform.LayerNorm.bias",
    "lm_head.bias": "Qformer.cls.predictions.bias",
    "temp": "temp"}
STAGE1 = {                          # without the vision tower: see `stage1`
    **prefixed(QFORMER, "qformer.", ""),
    **weight_and_bias({
        "ln_vision": "vision_model.post_layernorm",
        "vision_proj": "vision_projection",
        "text_proj": "text_projection",
        "itm_head": "itm_head"})}
STAGE1_LAVIS = {
    **prefixed(EVA_LAVIS, "vision.", ""),
    **prefixed(QFORMER_LAVIS, "qformer.", ""),
    **weight_and_bias({
        "ln_vision": "ln_vision",
        "vision_proj": "vision_proj",
        "text_proj": "text_proj",
        "itm_head": "itm_head"}),
    **STAGE1_PRETRAINING}


# ----------------------------------------------------------------- LLaVA, BLIP-2's second stage

LLAVA_PROJECTOR = weight_and_bias({         # LLaVA's first projector has no second layer
    "projector.first": "multi_modal_projector.linear_1",
    "projector.second": "multi_modal_projector.linear_2"})
LLAVA = {
    **prefixed(VIT, "vision.", "vision_tower.vision_model."),
    **LLAVA_PROJECTOR,
    "image_newline": "image_newline",       # of LLaVA-NeXT
    **prefixed(LLAMA, "llm.", "language_model.")}
QFORMER_PROJECTOR = weight_and_bias({
    "projector.norm": "vision_model.post_layernorm",
    "projector.proj": "language_projection"})


# --------------------------------------------------------------------------------- the choice

def vit(config):
    """The table of a tower with this clip.Config, in transformers' spelling."""
    return EVA if config.eva else VIT


def vision_tower(weights, config):
    """(table, unused) for a vision tower out of a CLIP, a tower alone, a BLIP-2 or a LAVIS file."""
    prefix = ""
    for candidate in ("visual_encoder.", "vision_model."):
        if any(name.startswith(candidate) for name in weights):
            prefix = candidate
    table = prefixed(vit(config), "", prefix)
    if prefix == "visual_encoder.":
        table = EVA_LAVIS
    ignore = dict(unused.VISION)
    if prefix and not config.has_final_block:
        ignore |= unused.beside_tower(prefix)
    return table, ignore


def llama(weights, config):
    """(table, unused) for a LLaMA. A tied file has its embedding under one of two names or both."""
    table, ignore = dict(LLAMA), unused.llama(config)
    embed, head = LLAMA["embed.weight"], LLAMA["head.weight"]
    if config.tie_embeddings and embed not in weights:
        table["embed.weight"] = head
    elif config.tie_embeddings:
        ignore[re.escape(head)] = unused.TIED
    return table, ignore


def is_lavis(weights):
    """Are these the tensors of a LAVIS checkpoint?"""
    return any(name.startswith("Qformer.bert.") for name in weights)


def qformer(weights):
    """The table in whose spelling a file holds a Q-Former."""
    if is_lavis(weights):
        return QFORMER_LAVIS
    if "qformer.embeddings.layernorm.weight" in weights:
        return QFORMER_INSTRUCT
    return QFORMER


def bert(weights):
    """(table, unused) for a BERT, with its head (bert. in front) or without."""
    table, prefix = BERT, "bert."
    if not any(name.startswith("bert.") for name in weights):
        prefix = ""
        table = renamed(table, "bert.", "")
    if f"{prefix}embeddings.LayerNorm.gamma" in weights:    # quirk: TensorFlow's names, on the hub
        table = renamed(table, "LayerNorm.weight", "LayerNorm.gamma")
        table = renamed(table, "LayerNorm.bias", "LayerNorm.beta")
    return table, unused.bert(prefix)


def renamed(table, old, new):
    """The table with `old` replaced by `new` in the file's names."""
    out = {}
    for name, hf_name in table.items():
        if isinstance(hf_name, tuple):
            out[name] = tuple(part.replace(old, new) for part in hf_name)
        else:
            out[name] = hf_name.replace(old, new)
    return out


def stage1(vision):
    """The table of qformer.Blip2Stage1 in transformers' spelling; vision: clip.Config."""
    return {**prefixed(vit(vision), "vision.", "vision_model."), **STAGE1}


def blip2(vision, instruct, llm):
    """The table of a VLM with a Q-Former; vision: clip.Config; instruct: an InstructBLIP; llm: the
    table of its language model."""
    table = QFORMER_INSTRUCT if instruct else QFORMER
    return {**prefixed(vit(vision), "vision.", "vision_model."), **QFORMER_PROJECTOR,
            **prefixed(table, "projector.qformer.", ""),
            **prefixed(llm, "llm.", "language_model.")}


# ------------------------------------------------------------------------------ LLaVA's spellings

# Every way in which the tensors of a LLaVA have been spelled, rewritten step by step to the first,
# which `save_pretrained` writes. The prefixes and vision_model. come and go independently.
#   2023-25  language_model.model.*   multi_modal_projector.linear_1   vision_tower.vision_model.*
#   4.52-    model.language_model.*, lm_head, model.multi_modal_projector.*, model.vision_tower.*
#   5.x      as the first, without vision_model.
#   official model.layers.*, model.mm_projector.0, model.vision_tower.vision_tower.vision_model.*
LLAVA_SPELLINGS = [(re.compile(old), new) for old, new in (
    (r"^model\.(?=(language_model|multi_modal_projector|mm_projector|vision_tower)\.)", ""),
    (r"^model\.(?=image_newline$)", ""),
    (r"^(vision_tower\.)+(vision_model\.)?", "vision_tower.vision_model."),
    (r"^(language_model\.|model\.)(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^mm_projector\.(0\.)?(?=weight|bias)", "multi_modal_projector.linear_1."),
    (r"^mm_projector\.2\.", "multi_modal_projector.linear_2."))]


def canonical(name):
    """A tensor's name in the first spelling."""
    for old, new in LLAVA_SPELLINGS:
        name = old.sub(new, name)
    return name


def canonical_names(weights):
    """{our spelling of a tensor's name: the file's}. Raises BadModel if two are the same."""
    table = {}
    for name in weights:
        ours = canonical(name)
        if ours in table:
            raise BadModel(f"tensors {table[ours]} and {name} are the same one in two "
                                "spellings: take the checkpoint from one source")
        table[ours] = name
    return table
