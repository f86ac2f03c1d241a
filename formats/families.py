"""formats/families.py: which LLaVA or BLIP-2 a folder holds, from its config.json and its processor.

Two layouts: transformers' (llava, llava_next, blip-2, instructblip) and LLaVA's own flat config.json.
"""
import json
import re

from formats import configs
from formats.anyres import ANYRES_GRIDS, TRANSPOSED
from formats.checkpoints import resolve
from formats.errors import BadModel
from formats.processors import Processor
from formats.strict_json import read_config

# CLIP's ViT-L/14-336, which folders name or leave out
L336 = configs.vit_from_hf({"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336,
                            "num_attention_heads": 16, "intermediate_size": 4096,
                            "patch_size": 14})


def require_values(folder, c, **allowed):
    """Raises BadModel where config.json holds a setting that this code does not know."""
    for key, values in allowed.items():
        if key in c and c[key] not in values:
            raise BadModel(f"{folder}: config.json says {key} {c[key]!r}, which is not one of "
                                f"{', '.join(map(str, values))}; take another model")


def anyres_grids(folder, pinpoints, size):
    """[[first, second]] in pixels -> ((tiles, tiles)), in that order. Raises BadModel."""
    try:
        if type(pinpoints) is str:                  # "[(336, 672), ...]", as old files have it
            pinpoints = json.loads(pinpoints.replace("(", "[").replace(")", "]"))
        grids = tuple((a // size, b // size) for a, b in pinpoints)
        good = all(1 <= n <= 16 for pair in grids for n in pair) and 0 < len(grids) <= 64
        if not good or [[a * size, b * size] for a, b in grids] != [list(p) for p in pinpoints]:
            raise ValueError("not multiples of the tower's picture")
    except (TypeError, ValueError, RecursionError) as error:
        raise BadModel(f"{folder}: config.json's image_grid_pinpoints {str(pinpoints)[:80]} "
                            f"({error}); take the config.json of the weights") from None
    return grids


def read_vlm_config(folder, c):
    """Of a folder in transformers' layout: eye, tongue, bridge, aspect, grids, template or None."""
    asks = c.get("model_type") in ("blip-2", "instructblip")
    if not asks and c.get("model_type") not in ("llava", "llava_next"):
        raise BadModel(f"{folder}: config.json says model_type {c.get('model_type')!r}, not "
                            "'llava', 'llava_next', 'blip-2' or 'instructblip'; give the model/ "
                            "folder of a run")
    text, aspects = c.get("text_config", {}), ("squash",) if asks else (
        "square", "pad", "squash", "anyres")
    require_values(folder, c, vision_feature_select_strategy=("default",),
                 projector_hidden_act=("gelu", "linear"), tie_word_embeddings=(True, False),
                 image_aspect_ratio=aspects)
    if asks and "text_config" not in c:
        raise BadModel(f"{folder}: a Q-Former without a language model, BLIP-2's first stage: "
                            "go on with train.py --recipe blip2 --stage 2 --from FOLDER")
    if asks:
        kind = text.get("model_type", "opt") if type(text) is dict else text
        if kind not in ("llama", "mistral"):
            raise BadModel(
                f"{folder}: its language model is {kind!r}, and only LLaMA is built here; take its "
                "eye and Q-Former to a LLaMA (train.py --recipe blip2 --stage 2 --from FOLDER), "
                "or Salesforce/instructblip-vicuna-7b, which has one")
        eye, processor = configs.vision_tower(c), Processor(folder, c["model_type"])
        processor.expect(eye["image_size"], "squash", "a Q-Former's are squashed")
        processor.places(None, c.get("num_query_tokens", 32))
        return (eye, configs.llama_from_hf(text), "qformer", "squash", ANYRES_GRIDS,
                "instructblip" if c["model_type"] == "instructblip" else "blip2")
    eye = configs.vit_from_hf(c["vision_config"]) if "vision_config" in c else L336
    layers = -2, eye["depth"] - 1                      # the same one, counted from either end
    require_values(folder, c, vision_feature_layer=(*layers, *([layer] for layer in layers)))
    tongue = configs.llama_from_hf(text)
    # quirk: a tie said in text_config alone counts in LLaVA, not in LLaVA-NeXT (transformers 5)
    in_text = tongue["tie_embeddings"] and c["model_type"] == "llava"
    tongue["tie_embeddings"] = c.get("tie_word_embeddings", False) or in_text
    # quirk: the hub's LLaVA-1.5 processors crop, though the model was trained on padded pictures
    processor = Processor(folder, c["model_type"])
    aspect, grids = processor.aspect(eye["image_size"]), TRANSPOSED
    if (aspect == "anyres") != (c["model_type"] == "llava_next"):
        processor.refuse("image_processor_type", f"{processor.kind}ImageProcessor",
                         f"config.json says model_type {c['model_type']}")
    aspect = c.get("image_aspect_ratio", aspect)    # ours; transformers goes by the processor
    processor.expect(eye["image_size"], aspect, f"config.json says image_aspect_ratio {aspect}")
    processor.places(eye["patch_size"])
    if aspect == "anyres" and c.get("image_grid_pinpoints"):        # (height, width) here
        processor.pinpoints(c["image_grid_pinpoints"])
        pairs = anyres_grids(folder, c["image_grid_pinpoints"], eye["image_size"])
        grids = tuple((across, down) for down, across in pairs)
    return (eye, tongue, "linear" if c.get("projector_hidden_act") == "linear" else "mlp",
            aspect, grids,
            "mistral_instruct" if text.get("model_type") == "mistral" else None)


def read_official_config(folder, c):
    """The same of an official folder: one flat config.json, which names the tower it began with."""
    kinds = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
    require_values(folder, c, model_type=tuple(kinds), mm_vision_select_layer=(-2,),
                 mm_vision_select_feature=("patch",), mm_use_im_start_end=(False,),
                 mm_projector_type=("linear", "mlp2x_gelu"),
                 image_aspect_ratio=("square", "pad", "anyres", None))
    kind, aspect = kinds[c.get("model_type", "llava")], c.get("image_aspect_ratio") or "square"
    if aspect == "anyres":
        require_values(folder, {"mm_patch_merge_type": "flat", **c},
                     mm_patch_merge_type=("spatial_unpad",))
    tower = c.get("mm_vision_tower")
    if type(tower) is not str:
        raise BadModel(f"{folder}: config.json's mm_vision_tower {tower!r} must name a CLIP; "
                            "take the config.json of the weights")
    large = re.fullmatch(r"openai/clip-vit-large-patch14(-336)?", tower)
    if large:                                       # no need to fetch what everybody knows
        eye = {**L336, "image_size": 336 if large[1] else 224}
    else:
        tower = resolve(tower)
        config = read_config(tower)
        eye = configs.vit_from_hf(config.get("vision_config", config))
        Processor(tower, "clip").aspect(eye["image_size"])
    pinpoints = c.get("image_grid_pinpoints")       # (width, height) here
    return (eye, configs.llama_from_hf({**c, "model_type": kind}),
            "mlp" if c.get("mm_projector_type") == "mlp2x_gelu" else "linear", aspect,
            anyres_grids(folder, pinpoints, eye["image_size"]) if pinpoints and aspect == "anyres"
            else ANYRES_GRIDS, "mistral_instruct" if kind == "mistral" else None)


def ln_vision_eps(folder, c, eps):
    """ln_vision's: PyTorch's default in LAVIS, the tower's in transformers (quirk), whose files
    cannot say anything else; ours do, in a key that transformers passes over."""
    eps = c.get("ln_vision_eps", eps)
    if type(eps) not in (int, float) or not eps > 0:
        raise BadModel(f"{folder}: config.json says ln_vision_eps {eps!r}, which is not a "
                            "positive number; take the config.json of the weights")
    return eps
