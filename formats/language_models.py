"""formats/language_models.py: OPT and T5 in the files: config.json, names of weights, the head.

    kind_of(c)              "llama", "opt" or "t5" of a config.json or its text_config
    sizes_of(c)             the fields of that kind's Config; refuses what llms/ does not compute
    load, save              a folder of a language model alone
    choose_head             tied or not: what the file holds decides

BLIP-2's folders hold the same settings in `text_config`, the same names behind "language_model.".
Source: transformers 5.23, models/opt and models/t5 (configuration_*.py, modeling_*.py).
"""

import re
from pathlib import Path

import torch

from formats import configs, names, unused
from formats.checkpoints import (
    dtype_name,
    export,
    load_into,
    load_weights,
    materialize,
    resolve,
    save_weights,
)
from formats.errors import BadModel
from formats.folders import write_json
from formats.names import LLAMA, weight_and_bias
from formats.strict_json import read_config
from formats.unused import Claim, same_as

OPT = {
    "embed.weight": "model.decoder.embed_tokens.weight",
    "position.weight": "model.decoder.embed_positions.weight",
    **weight_and_bias({
        "blocks.{}.norm1": "model.decoder.layers.{}.self_attn_layer_norm",
        "blocks.{}.qkv": ("model.decoder.layers.{}.self_attn.q_proj",
                          "model.decoder.layers.{}.self_attn.k_proj",
                          "model.decoder.layers.{}.self_attn.v_proj"),
        "blocks.{}.out": "model.decoder.layers.{}.self_attn.out_proj",
        "blocks.{}.norm2": "model.decoder.layers.{}.final_layer_norm",  # quirk: not the last norm
        "blocks.{}.up": "model.decoder.layers.{}.fc1",
        "blocks.{}.down": "model.decoder.layers.{}.fc2",
        "norm": "model.decoder.final_layer_norm"}),
    "head.weight": "lm_head.weight"}
T5 = {
    "embed.weight": "shared.weight",
    # quirk: one table a stack, which the files keep in the stack's first layer
    "encoder_bias.weight":
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.{}.norm1.weight": "encoder.block.{}.layer.0.layer_norm.weight",
    "encoder.{}.qkv.weight": ("encoder.block.{}.layer.0.SelfAttention.q.weight",
                              "encoder.block.{}.layer.0.SelfAttention.k.weight",
                              "encoder.block.{}.layer.0.SelfAttention.v.weight"),
    "encoder.{}.out.weight": "encoder.block.{}.layer.0.SelfAttention.o.weight",
    "encoder.{}.norm2.weight": "encoder.block.{}.layer.1.layer_norm.weight",
    "encoder.{}.mlp.gate_up.weight": ("encoder.block.{}.layer.1.DenseReluDense.wi_0.weight",
                                      "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight"),
    "encoder.{}.mlp.down.weight": "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
    "encoder_norm.weight": "encoder.final_layer_norm.weight",
    "decoder_bias.weight":
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.{}.norm1.weight": "decoder.block.{}.layer.0.layer_norm.weight",
    "decoder.{}.qkv.weight": ("decoder.block.{}.layer.0.SelfAttention.q.weight",
                              "decoder.block.{}.layer.0.SelfAttention.k.weight",
                              "decoder.block.{}.layer.0.SelfAttention.v.weight"),
    "decoder.{}.out.weight": "decoder.block.{}.layer.0.SelfAttention.o.weight",
    "decoder.{}.norm_cross.weight": "decoder.block.{}.layer.1.layer_norm.weight",
    "decoder.{}.cross_q.weight": "decoder.block.{}.layer.1.EncDecAttention.q.weight",
    "decoder.{}.cross_kv.weight": ("decoder.block.{}.layer.1.EncDecAttention.k.weight",
                                   "decoder.block.{}.layer.1.EncDecAttention.v.weight"),
    "decoder.{}.cross_out.weight": "decoder.block.{}.layer.1.EncDecAttention.o.weight",
    "decoder.{}.norm2.weight": "decoder.block.{}.layer.2.layer_norm.weight",
    "decoder.{}.mlp.gate_up.weight": ("decoder.block.{}.layer.2.DenseReluDense.wi_0.weight",
                                      "decoder.block.{}.layer.2.DenseReluDense.wi_1.weight"),
    "decoder.{}.mlp.down.weight": "decoder.block.{}.layer.2.DenseReluDense.wo.weight",
    "norm.weight": "decoder.final_layer_norm.weight",
    "head.weight": "lm_head.weight"}
TABLES = {"llama": LLAMA, "opt": OPT, "t5": T5}
# in which template of formats/templates.py a BLIP-2 with this language model is trained
BLIP2_TEMPLATES = {"llama": "blip2", "opt": "blip2_opt", "t5": "blip2_t5"}


# --------------------------------------------------------------------------------- config.json

def kind_of(c):
    """"llama", "opt" or "t5" of a language model's settings; Mistral is a LLaMA here. BLIP-2 leaves
    the key out for an OPT. Raises BadModel."""
    configs.require_object(c, "the language model's settings")
    kind = c.get("model_type", "opt" if "ffn_dim" in c else "llama")
    kind = {"mistral": "llama"}.get(kind, kind)
    if kind not in TABLES:
        raise BadModel(f"config.json: the language model is {kind!r}, and LLaMA, Mistral, OPT and "
                       "FlanT5 are built here; take another model")
    return kind


def sizes_of(c):
    """The fields of llama.Config, llms.opt.Config or llms.t5.Config. Raises BadModel."""
    return READERS[kind_of(c)](c)


def refuse_others(c, what, allowed):
    """Raises BadModel where config.json holds a setting that changes the result and is not computed
    here. allowed: {key: the one value}."""
    for key, value in allowed.items():
        if c.get(key, value) != value:
            raise BadModel(f"config.json: {key} {c[key]!r}: only {value!r} is computed here, as in "
                           f"{what}; take another model")


def token_ids(c, **defaults):
    """Ids of config.json under our names: whole numbers, None, or for eos a list."""
    out = {}
    for name, default in defaults.items():
        value = c.get(f"{name}_token_id", default)
        ids = value if name == "eos" and type(value) is list else [value]
        if not all(i is None or type(i) is int and i >= 0 for i in ids):
            raise BadModel(f"config.json: {name}_token_id {value!r} must be an id; {configs.TAKE}")
        out[name] = tuple(value) if type(value) is list else value
    return out


def opt_from_hf(c):
    """llms.opt.Config of a config.json. Defaults are transformers'."""
    if c.get("model_type", "opt") != "opt":
        raise BadModel(f"config.json: model_type {c['model_type']!r} is not an OPT; give one")
    width = c.get("hidden_size", 768)
    refuse_others({"word_embed_proj_dim": width, **c}, "all OPTs but OPT-350m", {
        "activation_function": "relu", "do_layer_norm_before": True, "enable_bias": True,
        "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True})
    if c.get("word_embed_proj_dim") not in (None, width):
        raise BadModel(f"config.json: word_embed_proj_dim {c['word_embed_proj_dim']!r} is not the "
                       f"width {width!r}: an OPT-350m, which is not built here; take another")
    out = {"vocab": c.get("vocab_size", 50272), "width": width,
           "depth": c.get("num_hidden_layers", 12), "heads": c.get("num_attention_heads", 12),
           "mlp": c.get("ffn_dim", 3072), "context": c.get("max_position_embeddings", 2048),
           "tie_embeddings": c.get("tie_word_embeddings", True),
           **token_ids(c, bos=2, eos=2, pad=1)}
    configs.check_sizes("", out, vocab=(1, 2 ** 20), width=(1, 2 ** 16), depth=(1, 2 ** 9),
                        heads=(1, 2 ** 10), mlp=(1, 2 ** 18), context=(1, 2 ** 20))
    if out["width"] % out["heads"] or type(out["tie_embeddings"]) is not bool:
        raise BadModel(f"config.json: width {out['width']} must divide by {out['heads']} heads, "
                       f"and tie_word_embeddings be true or false; {configs.TAKE}")
    return out


def t5_from_hf(c):
    """llms.t5.Config of a config.json. Defaults are transformers'."""
    if c.get("model_type") != "t5":
        raise BadModel(f"config.json: model_type {c.get('model_type')!r} is not a T5; give one")
    form = c.get("feed_forward_proj", "relu")
    if form != "gated-gelu":
        raise BadModel(f"config.json: feed_forward_proj {form!r} is that of T5 1.0 or of another "
                       "T5; only FlanT5's gated-gelu is built here; take a FlanT5")
    # quirk: a key of its own overrides the form: BLIP-2's FlanT5 has the exact GELU
    gelu = c.get("dense_act_fn", "gelu_new")
    if gelu not in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        raise BadModel(f"config.json: dense_act_fn {gelu!r}: only gelu and gelu_new are computed "
                       "here; take a FlanT5")
    tied = c.get("tie_word_embeddings", True)
    depth = c.get("num_layers", 6)
    out = {"vocab": c.get("vocab_size", 32128), "width": c.get("d_model", 512),
           "encoder_depth": depth, "depth": c.get("num_decoder_layers") or depth,
           "heads": c.get("num_heads", 8), "head_dim": c.get("d_kv", 64),
           "mlp": c.get("d_ff", 2048),
           "eps": c.get("layer_norm_epsilon", 1e-6),
           "buckets": c.get("relative_attention_num_buckets", 32),
           "max_distance": c.get("relative_attention_max_distance", 128),
           "exact_gelu": gelu == "gelu",
           # quirk: files before transformers 5 say it by tie_word_embeddings
           "scale_outputs": c.get("scale_decoder_outputs", tied is not False),
           "tie_embeddings": tied, **token_ids(c, bos=None, eos=1, pad=0)}
    out["start"] = token_ids(c, decoder_start=None)["decoder_start"]
    if out["start"] is None:
        out["start"] = out["pad"]
    configs.check_sizes("", out, vocab=(1, 2 ** 20), width=(1, 2 ** 16), depth=(1, 2 ** 9),
                        encoder_depth=(1, 2 ** 9), heads=(1, 2 ** 10), head_dim=(1, 2 ** 12),
                        mlp=(1, 2 ** 18), buckets=(4, 2 ** 12), max_distance=(1, 2 ** 20),
                        start=(0, out["vocab"] - 1))
    good = out["buckets"] % 2 == 0 and out["max_distance"] > out["buckets"] // 2
    if not good or not configs.is_positive(out["eps"]) or type(tied) is not bool or (
            type(out["scale_outputs"]) is not bool):
        raise BadModel(
            "config.json: relative_attention_num_buckets must be even and relative_attention_"
            "max_distance larger than half of it, layer_norm_epsilon positive, tie_word_embeddings "
            f"and scale_decoder_outputs true or false; {configs.TAKE}")
    return out


READERS = {"llama": configs.llama_from_hf, "opt": opt_from_hf, "t5": t5_from_hf}


def eos_to_hf(eos):
    return list(eos) if type(eos) is tuple else eos


def opt_to_hf(c):
    """config.json of an llms.opt.Config."""
    return {"model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": c.vocab,
            "hidden_size": c.width, "word_embed_proj_dim": c.width, "num_hidden_layers": c.depth,
            "num_attention_heads": c.heads, "ffn_dim": c.mlp, "max_position_embeddings": c.context,
            "activation_function": "relu", "do_layer_norm_before": True, "enable_bias": True,
            "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False,
            "tie_word_embeddings": c.tie_embeddings, "bos_token_id": c.bos,
            "eos_token_id": eos_to_hf(c.eos), "pad_token_id": c.pad}


def t5_to_hf(c):
    """config.json of an llms.t5.Config."""
    return {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"],
            "vocab_size": c.vocab, "d_model": c.width, "d_kv": c.head_dim, "d_ff": c.mlp,
            "num_layers": c.encoder_depth, "num_decoder_layers": c.depth, "num_heads": c.heads,
            "relative_attention_num_buckets": c.buckets,
            "relative_attention_max_distance": c.max_distance, "layer_norm_epsilon": c.eps,
            "feed_forward_proj": "gated-gelu", "is_gated_act": True,
            "dense_act_fn": "gelu" if c.exact_gelu else "gelu_new", "is_encoder_decoder": True,
            "tie_word_embeddings": c.tie_embeddings, "scale_decoder_outputs": c.scale_outputs,
            "decoder_start_token_id": c.start, "bos_token_id": c.bos,
            "eos_token_id": eos_to_hf(c.eos), "pad_token_id": c.pad}


WRITERS = {"llama": configs.llama_to_hf, "opt": opt_to_hf, "t5": t5_to_hf}


# ------------------------------------------------------------------------------------- weights

def choose_head(kind, sizes, weights, prefix="", hf_names=None):
    """(table, {pattern: reason} of unused tensors, sizes) for a language model in a file.

    A head that the config calls tied is one of its own if the file holds another. quirk: T5's is
    tied if the file has none, whatever the config says (transformers 5). prefix: of the file's
    names, "language_model." in BLIP-2."""
    table = dict(TABLES[kind])
    embed, head = prefix + table["embed.weight"], prefix + table["head.weight"]
    tied = sizes["tie_embeddings"]
    if kind == "t5" and head not in weights:
        tied = True
    if tied and not unused.head_is_embedding(weights, embed, head):
        tied = False
    ignore = {}
    if kind == "t5":
        at = re.escape(prefix)
        ignore = {rf"{at}(encoder|decoder)\.embed_tokens\.weight":
                  Claim("the embedding once more", same_as(embed)),
                  rf"{at}decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias"
                  r"\.weight": "of old files: cross-attention has no bias"}
    if tied and embed in weights:
        ignore[re.escape(head)] = unused.TIED
    elif tied and head in weights:
        table["embed.weight"] = table["head.weight"]        # a tied file may hold it as the head
    return table, ignore, {**sizes, "tie_embeddings": tied}


def load(model_class, config_class, folder, dtype=None):
    """A language model alone, of a folder or hub id. Raises BadModel, Offline."""
    folder = resolve(folder)
    sizes = READERS[model_class.kind](read_config(folder))
    weights = load_weights(folder)
    table, ignore, sizes = choose_head(model_class.kind, sizes, weights)
    with torch.device("meta"):                              # shapes without memory
        model = model_class(config_class(**sizes))
    keep_in_fp32(model, dtype or weights.dtype)
    return load_into(model, table, weights, ignore, dtype).eval()


def keep_in_fp32(model, dtype):
    """Give memory in fp32 to what transformers keeps in fp32 when the rest is fp16: the modules
    that say `fp32_beside_fp16`. `load_into` leaves it as it is. bf16 has fp32's range."""
    if dtype != torch.float16:
        return
    for part in model.modules():
        if getattr(part, "fp32_beside_fp16", False):
            materialize(part, torch.float32)


def save(model, folder):
    """config.json and model.safetensors of an llms model, as transformers reads them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = WRITERS[model.kind](model.config)
    config["dtype"] = dtype_name(model.embed.weight.dtype)
    write_json(folder, "config.json", config)
    save_weights(folder, export(model, TABLES[model.kind], fused_rows(model)))


def fused_rows(model, prefix=""):
    """`names.fused_rows` of a language model; OPT's and T5's pieces are equal."""
    return names.fused_rows(model.config, prefix) if model.kind == "llama" else {}
