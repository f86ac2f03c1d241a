"""formats/configs.py: config.json of the Hugging Face layout -> the sizes of our models, and back.

Functions of a folder (read_...) and of a parsed config.json return plain dicts, and a model does
`Config(**configs.read_llama(folder))`. Fields that old files leave out get the values that
transformers documents. What cannot be a model's sizes is refused before any memory is taken. A
writer (..._to_hf) takes a Config and returns what transformers would write.
"""

import math

from formats import names, unused
from formats.errors import BadModel
from formats.processors import Processor
from formats.strict_json import read_config

TAKE = "take the config.json of the weights"


def check_sizes(whose, values, **limits):
    """Raises BadModel where a size is not a whole number from low to high."""
    for name, (low, high) in limits.items():
        value = values[name]
        if type(value) is not int or not low <= value <= high:
            raise BadModel(f"config.json: {whose}{name} = {value!r} is not a whole number from "
                           f"{low} to {high}; {TAKE}")


def is_positive(value):
    """Of a number: a positive one that PyTorch can hold."""
    return type(value) in (int, float) and 0 < value < (2 ** 63 if type(value) is int else math.inf)


def require_object(c, what):
    if type(c) is not dict:
        raise BadModel(f"config.json: {what} must be an object; {TAKE}")


# ---------------------------------------------------------------------------------- CLIP and EVA

def read_vision_tower(folder):
    """clip.Config of the vision tower in a folder whose pictures are shown in a way known here."""
    c = read_config(folder)
    out = vision_tower(c)
    Processor(folder, c.get("model_type")).aspect(out["image_size"])
    return out


def read_clip(folder):
    """(vision, text: clip.Config; width of the shared space) of a CLIP's folder."""
    out = clip(read_config(folder))
    Processor(folder, "clip").aspect(out[0]["image_size"])
    return out


def vit_from_hf(c, text=False):
    """clip.Config of `vision_config` or (text) `text_config` of a config.json of CLIP or BLIP-2."""
    require_object(c, "a tower's settings")
    # defaults: those of ViT-B/32, or of EVA's ViT-g/14
    eva = c.get("model_type") in ("blip_2_vision_model", "instructblip_vision_model")
    if text:
        width, depth, heads, mlp, eps, image, patch = 512, 12, 8, 2048, 1e-5, 224, 14
    elif eva:
        width, depth, heads, mlp, eps, image, patch = 1408, 39, 16, 6144, 1e-6, 224, 14
    else:
        width, depth, heads, mlp, eps, image, patch = 768, 12, 12, 3072, 1e-5, 224, 32
    act = "gelu" if eva else "quick_gelu"
    if c.get("hidden_act", act) != act or c.get("qkv_bias", True) is not True:
        raise BadModel(f"config.json: hidden_act {c.get('hidden_act')!r} is not "
                       f"{'EVA' if eva else 'CLIP'}'s {act}, or qkv_bias is not true; "
                       f"give {'a BLIP-2 with ViT-g' if eva else 'an OpenAI CLIP'}")
    eos = c.get("eos_token_id", 49407)
    out = {"width": c.get("hidden_size", width), "depth": c.get("num_hidden_layers", depth),
           "heads": c.get("num_attention_heads", heads), "mlp": c.get("intermediate_size", mlp),
           "eps": c.get("layer_norm_eps", eps), "image_size": c.get("image_size", image),
           "patch_size": c.get("patch_size", patch), "vocab": c.get("vocab_size", 49408),
           "context": c.get("max_position_embeddings", 77),
           "eos_id": tuple(eos) if type(eos) is list else eos,
           "eva": eva, "has_final_block": not eva}
    check_vit(out)
    return out


def check_vit(c):
    check_sizes("", c, width=(1, 2 ** 15), depth=(1, 2 ** 9), heads=(1, 2 ** 9), mlp=(1, 2 ** 17),
                image_size=(1, 2 ** 13), patch_size=(1, 2 ** 10), vocab=(1, 2 ** 20),
                context=(1, 2 ** 20))
    eos = c["eos_id"] if type(c["eos_id"]) is tuple else (c["eos_id"],)
    if not eos or any(type(i) is not int for i in eos) or not is_positive(c["eps"]):
        raise BadModel("config.json: eos_token_id must be a whole number or a list of them and "
                       f"layer_norm_eps positive; {TAKE}")
    if c["width"] % c["heads"] or c["patch_size"] > c["image_size"]:
        raise BadModel(f"config.json: width {c['width']} / heads {c['heads']} or image "
                       f"{c['image_size']} / patch {c['patch_size']} do not divide; {TAKE}")


def check_pixels(c, pixels):
    """Raises ValueError where pixels do not fit a vision tower with this clip.Config."""
    if pixels.shape[1:] != (3, c.image_size, c.image_size):
        raise ValueError(f"pixels {tuple(pixels.shape)} do not fit a tower for (B, 3, "
                         f"{c.image_size}, {c.image_size}); use data.preprocess")


def check_text_length(c, ids):
    """Raises ValueError where ids (B, T) are too long for a text tower with this clip.Config."""
    if ids.shape[1] > c.context:
        raise ValueError(f"a text of {ids.shape[1]} tokens; this CLIP has positions for "
                         f"{c.context}: cut the text, and keep its end token")


def vision_tower(c):
    """clip.Config of the vision tower in a config.json of CLIP, of its tower or of BLIP-2."""
    inner = c.get("vision_config", c)
    if c.get("model_type") not in ("blip-2", "instructblip"):
        return vit_from_hf(inner)
    if type(inner) is dict:
        inner = {"model_type": "blip_2_vision_model", **inner}
    # a CLIP in front of a Q-Former is saved without its final block
    return {**vit_from_hf(inner), "has_final_block": False}


def clip(c):
    """(vision, text: clip.Config; width of the shared space) of a whole CLIP's config.json."""
    text, vision = vit_from_hf(c.get("text_config", {}), text=True), c.get("vision_config", {})
    shared = c.get("projection_dim", 512)
    check_sizes("", {"projection_dim": shared}, projection_dim=(1, 2 ** 15))
    return vit_from_hf(vision), text, shared


def vit_to_hf(c, text=False):
    out = {"hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.heads,
           "intermediate_size": c.mlp, "layer_norm_eps": c.eps,
           "hidden_act": "gelu" if c.eva else "quick_gelu"}
    if text:
        ids = c.eos_id if type(c.eos_id) is tuple else (c.eos_id,)
        return {"model_type": "clip_text_model", **out, "vocab_size": c.vocab,
                "max_position_embeddings": c.context, "bos_token_id": ids[0] - 1,
                # transformers' own CLIP cannot read a list of one
                "pad_token_id": 0, "eos_token_id": c.eos_id if len(ids) > 1 else ids[0]}
    out |= {"image_size": c.image_size, "patch_size": c.patch_size}
    if c.eva:
        return {"model_type": "blip_2_vision_model", **out, "qkv_bias": True}
    return {"model_type": "clip_vision_model", **out, "num_channels": 3}


# ---------------------------------------------------------------------------- LLaMA and Mistral

def read_llama(folder, weights):
    """llama.Config of a LLaMA's or Mistral's folder, and the weights in it. The ids that end a text
    are those of generation_config.json, where the folder has one, as in transformers."""
    c = read_config(folder)
    written = read_config(folder, "generation_config.json", missing_ok=True)
    if written.get("eos_token_id") is not None:
        c["eos_token_id"] = written["eos_token_id"]
    return untie(llama_from_hf(c), weights, names.LLAMA["embed.weight"], names.LLAMA["head.weight"])


def untie(out, weights, embed, head):
    """llama.Config, no longer tied where the weights' head is not their embedding. embed, head:
    their names in the file."""
    if out["tie_embeddings"] and not unused.head_is_embedding(weights, embed, head):
        return {**out, "tie_embeddings": False}
    return out


def llama_from_hf(c):
    """llama.Config of a Hugging Face config.json (or its `text_config`)."""
    require_object(c, "the language model's settings")
    kind = c.get("model_type", "llama")
    biased = any(c.get(key, False) for key in ("attention_bias", "mlp_bias"))
    if kind not in ("llama", "mistral") or c.get("hidden_act", "silu") != "silu" or biased:
        raise BadModel(f"config.json: model_type {kind!r}, a hidden_act other than silu, or "
                       "biases: not a LLaMA; give a LLaMA or Mistral folder")
    mistral = kind == "mistral"
    # as transformers does: a rope_scaling takes the place of rope_parameters
    rotary = c.get("rope_scaling") or c.get("rope_parameters") or {}
    context = c.get("max_position_embeddings", 2 ** 17 if mistral else 2048)
    scaling = rope_scaling(rotary, context)
    if scaling and scaling[0] == "linear":
        context = stretched_context(rotary, context)
    if any(part.get("partial_rotary_factor") not in (None, 1) for part in (c, rotary)):
        raise BadModel("config.json: partial_rotary_factor must be 1, a LLaMA rotates all of a "
                       "head; take another model")
    heads, eos = c.get("num_attention_heads", 32), c.get("eos_token_id", 2)
    out = {"vocab": c.get("vocab_size", 32000), "width": c.get("hidden_size", 4096),
           "depth": c.get("num_hidden_layers", 32), "heads": heads,
           "kv_heads": c.get("num_key_value_heads", 8 if mistral else None) or heads,
           "mlp": c.get("intermediate_size", 14336 if mistral else 11008),
           "eps": c.get("rms_norm_eps", 1e-6), "rope_theta": c.get("rope_theta", 10000.0),
           "context": context, "tie_embeddings": c.get("tie_word_embeddings", False),
           "head_size": c.get("head_dim") or 0, "rope_scaling": scaling,
           "window": c.get("sliding_window", 4096) if mistral else None,
           "bos": c.get("bos_token_id", 1), "eos": tuple(eos) if type(eos) is list else eos}
    check_llama(out)
    out["rope_theta"] = rotary.get("rope_theta", out["rope_theta"])         # this one goes first
    check_llama(out)
    if out["head_size"] * heads == out["width"]:
        out["head_size"] = 0                            # as in all but a few
    return out


def rope_scaling(c, context):
    """How rotary positions are scaled, from rope_scaling (old files) or rope_parameters (new):
    None, ("linear", factor) or ("llama3", factor, low, high, original length)."""
    if type(c) is not dict or any(type(value) is dict for value in c.values()):
        raise BadModel(f"config.json: rope_scaling or rope_parameters {str(c)[:80]} must be one "
                       f"object of numbers; {TAKE}")
    kind = c.get("rope_type", c.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise BadModel(f"config.json: rotary positions scaled by {kind!r} are not known here, only "
                       "linear and llama3; take another model")
    wanted = ["factor"] if kind == "linear" else ["factor", "low_freq_factor", "high_freq_factor"]
    values = [c.get(key) for key in wanted]
    if kind == "llama3":
        values.append(c.get("original_max_position_embeddings", context))
    good = all(is_positive(v) and v < 2 ** 24 for v in values)
    if not good or kind == "llama3" and not values[1] < values[2]:
        raise BadModel(f"config.json: scaled rotary positions need {', '.join(wanted)} as positive "
                       f"numbers; {TAKE}")
    return (kind, *values)


def stretched_context(c, context):
    """The context of a model with linear scaling: max_position_embeddings is the length before it,
    and factor times as many positions are rotated into it (Vicuna-16k: 4 * 4,096). A file that
    names the length before separately may give the one after, too: the larger is right."""
    before = c.get("original_max_position_embeddings", context)
    if type(before) is not int or type(context) is not int:
        return context                                  # check_llama refuses it
    return max(context, int(before * c["factor"]))


def check_llama(c):
    check_sizes("", c, vocab=(1, 2 ** 20), width=(2, 2 ** 16), depth=(1, 2 ** 9),
                heads=(1, 2 ** 10), kv_heads=(1, 2 ** 10), mlp=(1, 2 ** 18), context=(1, 2 ** 24))
    window = c["window"]
    if window is not None and (type(window) is not int or not 1 <= window <= 2 ** 24):
        raise BadModel(f"config.json: sliding_window = {window!r} is not null or a whole number "
                       f"from 1 on; {TAKE}")
    ids = (c["bos"], *(c["eos"] if type(c["eos"]) is tuple else (c["eos"],)))
    if not all(i is None or type(i) is int and i >= 0 for i in ids):
        raise BadModel("config.json: bos_token_id must be a whole number, eos_token_id one or a "
                       f"list of them; {TAKE}")
    head = c["head_size"]
    good = type(head) is int and 0 <= head <= 2 ** 12 and c["heads"] % c["kv_heads"] == 0
    if good and not head:
        good, head = c["width"] % c["heads"] == 0, c["width"] // c["heads"]
    if not good or head % 2:                            # rotary positions need pairs
        raise BadModel(f"config.json: width {c['width']}, heads {c['heads']}, key/value heads "
                       f"{c['kv_heads']} and head_dim {c['head_size'] or None} do not fit "
                       f"together; {TAKE}")
    if not is_positive(c["eps"]) or not is_positive(c["rope_theta"]) or (
            type(c["tie_embeddings"]) is not bool):
        raise BadModel("config.json: rms_norm_eps and rope_theta must be positive, "
                       f"tie_word_embeddings true or false; {TAKE}")


def llama_to_hf(c):
    """A Mistral without a window is written as a LLaMA: it is one."""
    kind, *values = c.rope_scaling or ("default",)
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rotary = {"rope_theta": c.rope_theta, "rope_type": kind, **dict(zip(keys, values))}
    context = c.context
    if kind == "linear" and values[0] > 1:              # the length before: see stretched_context
        context = math.ceil(context / values[0] - 1e-6)
    name = "Llama" if c.window is None else "Mistral"
    out = {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"],
           "vocab_size": c.vocab, "hidden_size": c.width, "num_hidden_layers": c.depth,
           "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
           "intermediate_size": c.mlp, "rms_norm_eps": c.eps, "rope_theta": c.rope_theta,
           "hidden_act": "silu", "rope_parameters": rotary, "head_dim": c.head_dim,
           "max_position_embeddings": context, "tie_word_embeddings": c.tie_embeddings,
           "attention_bias": False, "mlp_bias": False, "bos_token_id": c.bos,
           "eos_token_id": list(c.eos) if type(c.eos) is tuple else c.eos}
    if c.window is not None:
        out["sliding_window"] = c.window
    if c.rope_scaling:
        out["rope_scaling"] = rotary
    return out


# ----------------------------------------------------------------------------------- the Q-Former

def read_qformer(folder, text=True):
    """qformer.Config of a BLIP-2's or InstructBLIP's folder; text=False: without text branch."""
    out = qformer(read_config(folder))
    return out if text else {**out, "vocab": 0}


def read_stage1(folder, weights):
    """(clip.Config, qformer.Config, width of the shared space, ln_vision's eps) of BLIP-2's first
    stage and the weights beside it."""
    c = read_config(folder)
    vision, config = vision_tower(c), qformer(c)
    Processor(folder, c["model_type"]).expect(vision["image_size"], "squash",
                                              "a Q-Former's are squashed")
    shared, eps = c.get("image_text_hidden_size", 256), c.get("ln_vision_eps")
    if eps is None:                     # quirk: PyTorch's default in LAVIS, whatever the tower has
        eps = 1e-5 if names.is_lavis(weights) else vision["eps"]
    if type(shared) is not int or not 1 <= shared <= 2 ** 15 or not is_positive(eps):
        raise BadModel(f"{folder}: config.json says image_text_hidden_size {shared!r} and "
                       f"ln_vision_eps {eps!r}; take the config.json of the weights")
    return vision, config, shared, eps


def check_stage1(vision, config):
    """Raises BadModel where a clip.Config and a qformer.Config cannot be one first stage."""
    if config.vision_width != vision.width or not config.vocab:
        raise BadModel(f"a Q-Former for features of width {config.vision_width} with "
                       f"{config.vocab} text tokens, and a vision tower of width {vision.width}: "
                       "config.json must give one width, and a vocabulary")


def qformer_from_hf(c, queries=32, vision=1408):
    """qformer.Config of `qformer_config`; number of queries and feature width stand outside it."""
    require_object(c, "qformer_config")
    if c.get("hidden_act", "gelu") != "gelu":
        raise BadModel(f"config.json: the Q-Former's hidden_act {c['hidden_act']!r} is not BERT's "
                       "gelu; give a BLIP-2 or InstructBLIP")
    # InstructBLIP's always reads text; BLIP-2's only where the config says so
    reads = c.get("use_qformer_text_input", "instruct" in str(c.get("model_type")))
    out = {"width": c.get("hidden_size", 768), "depth": c.get("num_hidden_layers", 12),
           "heads": c.get("num_attention_heads", 12), "mlp": c.get("intermediate_size", 3072),
           "eps": c.get("layer_norm_eps", 1e-12), "num_queries": queries, "vision_width": vision,
           "vocab": c.get("vocab_size", 30522) if reads else 0,
           "context": c.get("max_position_embeddings", 512),
           "cross_attention_freq": c.get("cross_attention_frequency", 2)}
    check_sizes("the Q-Former's ", out, width=(1, 2 ** 15), depth=(1, 2 ** 9), heads=(1, 2 ** 9),
                mlp=(1, 2 ** 17), num_queries=(1, 2 ** 12), vision_width=(1, 2 ** 15),
                vocab=(0, 2 ** 20), context=(1, 2 ** 20), cross_attention_freq=(1, 2 ** 9))
    if not is_positive(out["eps"]) or out["width"] % out["heads"]:
        raise BadModel(f"config.json: the Q-Former's layer_norm_eps {out['eps']!r} must be "
                       f"positive and its width {out['width']} divide by its {out['heads']} "
                       f"heads; {TAKE}")
    return out


def qformer(c):
    """qformer.Config out of the config.json of a whole BLIP-2 or InstructBLIP."""
    if c.get("model_type") not in ("blip-2", "instructblip"):
        raise BadModel(f"config.json: model_type {c.get('model_type')!r} has no Q-Former; give a "
                       "BLIP-2 or InstructBLIP")
    vision = c.get("vision_config", {})
    if type(vision) is dict:
        vision = vision.get("hidden_size", 1408)
    return qformer_from_hf(c.get("qformer_config", {}), c.get("num_query_tokens", 32), vision)


def check_qformer_call(config, features, ids, past_key_values):
    """Raises ValueError where QFormer.forward's arguments do not go together."""
    if features is None and ids is None or past_key_values is not None and features is not None:
        raise ValueError("QFormer: give features, ids or both; with past_key_values, ids alone")
    room = config.context if config.vocab else 0
    if ids is not None and ids.shape[1] > room:
        raise ValueError(f"QFormer: {ids.shape[1]} text tokens for a Q-Former with room for {room}")


def check_losses(only):
    """Raises ValueError where `only` names no loss of BLIP-2's first stage."""
    unknown = set(only) - {"itc", "itm", "itg"}
    if unknown:
        raise ValueError(f"losses: {', '.join(sorted(unknown))} is none of itc, itm, itg")


def qformer_to_hf(c, instruct=False):
    """`qformer_config` of a BLIP-2, or of an InstructBLIP."""
    out = {"model_type": "instructblip_qformer" if instruct else "blip_2_qformer",
           "hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.heads,
           "intermediate_size": c.mlp, "layer_norm_eps": c.eps, "hidden_act": "gelu",
           "vocab_size": c.vocab or 30523, "max_position_embeddings": c.context,
           "pad_token_id": 0, "cross_attention_frequency": c.cross_attention_freq,
           "encoder_hidden_size": c.vision_width}
    if not instruct:
        out["use_qformer_text_input"] = bool(c.vocab)
    return out
