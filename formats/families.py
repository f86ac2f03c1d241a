"""formats/families.py: which LLaVA or BLIP-2 a folder holds, and its weights into our model.

    config.json, processor files -- read_family --> Family: class, sizes, kind of pictures
    chat template, tokenizer ------ choose_template --> conversation format
    model.safetensors ------------- load_vlm -----> the weights of a VLM built with these sizes

Two layouts are known: that of transformers (model_type llava, llava_next, blip-2, instructblip),
and the official one of LLaVA, a flat config.json that names the CLIP it was trained with. Where the
two cut a picture into different tiles (anyres.anyres_grid), each model is shown pictures as its own
code does it. Source: transformers 5.23, models/llava*/ and models/*blip*/; haotian-liu/LLaVA.
"""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from formats import configs, language_models, names, unused
from formats.anyres import ANYRES_GRIDS, TRANSPOSED
from formats.bert import BertTokenizer
from formats.chat_templates import ChatTemplate, end_ids, folder_template
from formats.checkpoints import check_identity_layer, expand_names, load_into, resolve
from formats.errors import BadModel
from formats.processors import Processor
from formats.strict_json import read_config
from formats.templates import caption_end

# CLIP's ViT-L/14-336, which folders name or leave out
L336 = configs.vit_from_hf({"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336,
                            "num_attention_heads": 16, "intermediate_size": 4096,
                            "patch_size": 14})
EMBED = "language_model." + names.LLAMA["embed.weight"]
HEAD = "language_model." + names.LLAMA["head.weight"]


@dataclass
class Family:
    """What the files of a folder say about a model."""
    name: str                       # llava | llava_next | blip2: the class in projector.py
    folder: Path
    config: dict                    # config.json
    vision: dict                    # for clip.Config(**vision)
    llm: dict                       # for the Config of its llm_kind
    projector: str                  # linear | mlp | qformer
    aspect: str                     # square | pad | squash | anyres
    grids: tuple | None = None      # of anyres: (tiles across, tiles down) to choose from
    template: str | None = None     # where no file names one; None: the vocabulary decides
    qformer: dict | None = None     # for qformer.Config(**qformer)
    llm_kind: str = "llama"         # llama | opt | t5: formats/language_models.py, llms/
    llm_unused: dict = field(default_factory=dict)  # {pattern of the file's names: reason}
    ln_vision_eps: float | None = None
    official: bool = False          # the official layout
    tower: str | None = None        # where the vision tower is, if it is not in the weights
    hf_names: dict = field(default_factory=dict)    # {canonical name: the weight file's name}


def family_of_config(folder):
    """The Family of a folder by its small files alone: sizes, and no names of weights."""
    config = read_config(folder)
    official = "mm_projector_type" in config or "mm_vision_tower" in config
    read = read_official_config if official else read_vlm_config
    return read(folder, config)


def read_family(folder, weights):
    """The Family of a folder and its weights. Raises BadModel, Offline."""
    family = family_of_config(folder)
    family.hf_names = names.canonical_names(weights)
    if family.llm_kind == "llama":
        embed, head = family.hf_names.get(EMBED), family.hf_names.get(HEAD)
        if family.llm["tie_embeddings"] and not unused.head_is_embedding(weights, embed, head):
            family.llm["tie_embeddings"] = False        # it has a head of its own
    else:
        kind, prefix = family.llm_kind, "language_model."
        table, family.llm_unused, family.llm = language_models.choose_head(
            kind, family.llm, weights, prefix)
        # a tied file may hold the embedding as the head alone
        embed = prefix + language_models.TABLES[kind]["embed.weight"]
        family.hf_names.setdefault(embed, prefix + table["embed.weight"])
    if family.official and not any(name.startswith("vision_tower.") for name in family.hf_names):
        family.tower = family.config["mm_vision_tower"]
    return family


# ------------------------------------------------------------------------------- config.json

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


def ln_vision_eps(folder, c, eps):
    """ln_vision's epsilon. quirk: PyTorch's default in LAVIS, the tower's in transformers, whose
    files cannot say anything else; ours can, in a key that transformers passes over."""
    eps = c.get("ln_vision_eps", eps)
    if type(eps) not in (int, float) or not eps > 0:
        raise BadModel(f"{folder}: config.json says ln_vision_eps {eps!r}, which is not a "
                       "positive number; take the config.json of the weights")
    return eps


def read_vlm_config(folder, c):
    """The Family of a folder in transformers' layout; c: its config.json."""
    kind = c.get("model_type")
    if kind not in ("llava", "llava_next", "blip-2", "instructblip"):
        alone = ""
        if kind in ("llama", "mistral"):
            alone = ", or ask this language model alone: generate.py --text"
        raise BadModel(f"{folder}: config.json says model_type {kind!r}, not 'llava', "
                       "'llava_next', 'blip-2' or 'instructblip'; give the model/ folder of a "
                       f"run{alone}")
    with_qformer = kind in ("blip-2", "instructblip")
    aspects = ("squash",) if with_qformer else ("square", "pad", "squash", "anyres")
    require_values(folder, c, vision_feature_select_strategy=("default",),
                   projector_hidden_act=("gelu", "linear"), tie_word_embeddings=(True, False),
                   image_aspect_ratio=aspects)
    read = read_blip2_config if with_qformer else read_llava_config
    return read(folder, c)


def read_blip2_config(folder, c):
    """A BLIP-2 or InstructBLIP in transformers' layout."""
    if "text_config" not in c:
        raise BadModel(f"{folder}: a Q-Former without a language model, BLIP-2's first stage: "
                       "go on with train.py --recipe blip2 --stage 2 --from FOLDER")
    text, instruct = c["text_config"], c["model_type"] == "instructblip"
    kind = text.get("model_type", "opt") if type(text) is dict else text
    # transformers' default is an OPT; of InstructBLIPs only Vicuna's is known here
    known = ("llama", "mistral") if instruct else ("llama", "mistral", "opt", "t5")
    if kind not in known:
        raise BadModel(
            f"{folder}: its language model is {kind!r}, and only {', '.join(known)} are built "
            "here; take its vision tower and Q-Former to one of them (train.py --recipe blip2 "
            "--stage 2 --from FOLDER), or Salesforce/instructblip-vicuna-7b, which has one")
    text = {"model_type": kind, **text}
    llm_kind = language_models.kind_of(text)
    vision = configs.vision_tower(c)
    processor = Processor(folder, c["model_type"])
    processor.expect(vision["image_size"], "squash", "a Q-Former's are squashed")
    processor.image_tokens(None, c.get("num_query_tokens", 32))
    template = "instructblip" if instruct else language_models.BLIP2_TEMPLATES[llm_kind]
    return Family("blip2", folder, c, vision, language_models.sizes_of(text), "qformer", "squash",
                  template=template, qformer=configs.qformer(c),
                  ln_vision_eps=ln_vision_eps(folder, c, vision["eps"]), llm_kind=llm_kind)


def read_llava_config(folder, c):
    """A LLaVA or LLaVA-NeXT in transformers' layout."""
    vision = configs.vit_from_hf(c["vision_config"]) if "vision_config" in c else dict(L336)
    layers = -2, vision["depth"] - 1                # the same one, counted from either end
    require_values(folder, c, vision_feature_layer=(*layers, [layers[0]], [layers[1]]))
    text = c.get("text_config", {})
    llm = configs.llama_from_hf(text)
    # quirk: a tie said in text_config alone counts in LLaVA, not in LLaVA-NeXT (transformers 5)
    in_text = llm["tie_embeddings"] and c["model_type"] == "llava"
    llm["tie_embeddings"] = c.get("tie_word_embeddings", False) or in_text

    # quirk: the hub's LLaVA-1.5 processors crop, though the model was trained on padded pictures
    processor = Processor(folder, c["model_type"])
    aspect = processor.aspect(vision["image_size"])
    if (aspect == "anyres") != (c["model_type"] == "llava_next"):
        processor.refuse("image_processor_type", f"{processor.kind}ImageProcessor",
                         f"config.json says model_type {c['model_type']}")
    aspect = c.get("image_aspect_ratio", aspect)    # our key; transformers goes by the processor
    processor.expect(vision["image_size"], aspect,
                     f"config.json says image_aspect_ratio {aspect}")
    processor.image_tokens(vision["patch_size"])
    grids = TRANSPOSED if aspect == "anyres" else None
    if aspect == "anyres" and c.get("image_grid_pinpoints"):        # (height, width) here
        processor.pinpoints(c["image_grid_pinpoints"])
        pairs = anyres_grids(folder, c["image_grid_pinpoints"], vision["image_size"])
        grids = tuple((across, down) for down, across in pairs)
    return Family("llava_next" if aspect == "anyres" else "llava", folder, c, vision, llm,
                  "linear" if c.get("projector_hidden_act") == "linear" else "mlp", aspect, grids,
                  "mistral_instruct" if text.get("model_type") == "mistral" else None)


def read_official_config(folder, c):
    """A LLaVA or LLaVA-NeXT in the official layout: one flat config.json."""
    kinds = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
    require_values(folder, c, model_type=tuple(kinds), mm_vision_select_layer=(-2,),
                   mm_vision_select_feature=("patch",), mm_use_im_start_end=(False,),
                   mm_projector_type=("linear", "mlp2x_gelu"),
                   image_aspect_ratio=("square", "pad", "anyres", None))
    kind = kinds[c.get("model_type", "llava")]
    aspect = c.get("image_aspect_ratio") or "square"
    if aspect == "anyres":
        require_values(folder, {"mm_patch_merge_type": "flat", **c},
                       mm_patch_merge_type=("spatial_unpad",))
    vision = read_official_tower(folder, c.get("mm_vision_tower"))
    llm = configs.llama_from_hf({**c, "model_type": kind})
    grids = ANYRES_GRIDS if aspect == "anyres" else None
    if aspect == "anyres" and c.get("image_grid_pinpoints"):        # (width, height) here
        grids = anyres_grids(folder, c["image_grid_pinpoints"], vision["image_size"])
    return Family("llava_next" if aspect == "anyres" else "llava", folder, c, vision, llm,
                  "mlp" if c.get("mm_projector_type") == "mlp2x_gelu" else "linear", aspect, grids,
                  "mistral_instruct" if kind == "mistral" else None, official=True)


def read_official_tower(folder, tower):
    """Sizes of the CLIP that an official config.json names."""
    if type(tower) is not str:
        raise BadModel(f"{folder}: config.json's mm_vision_tower {tower!r} must name a CLIP; "
                       "take the config.json of the weights")
    large = re.fullmatch(r"openai/clip-vit-large-patch14(-336)?", tower)
    if large:                                       # its sizes are known: nothing to download
        return {**L336, "image_size": 336 if large[1] else 224}
    tower = resolve(tower)
    config = read_config(tower)
    vision = configs.vit_from_hf(config.get("vision_config", config))
    Processor(tower, "clip").aspect(vision["image_size"])
    return vision


# ----------------------------------------------------------------- tokenizers, templates, ends

def read_qformer_tokenizer(family):
    """The tokenizer of an InstructBLIP's Q-Former; None for others. Raises BadModel."""
    if family.config.get("model_type") != "instructblip":
        return None
    tokenizer = BertTokenizer(family.folder / "qformer_tokenizer")
    rows = family.qformer["vocab"]
    if len(tokenizer) > rows + 1:                   # one more is [DEC], which nothing writes here
        raise BadModel(f"{family.folder}: qformer_tokenizer has {len(tokenizer)} tokens, the "
                       f"Q-Former {rows} rows; take both from one place")
    return tokenizer


def choose_template(family, tokenizer, templates, prompt):
    """The conversation format of a folder: that of our own key in config.json, else that of its
    chat template, else the family's, else what the tokens of its vocabulary are for.

    templates: data.TEMPLATES; prompt: data.prompt. Returns a name or a ChatTemplate."""
    if "template" in family.config:
        template = family.config["template"]
        if template not in list(templates):
            raise BadModel(f"{family.folder}: config.json says template {template!r}, which is not "
                           f"one of {', '.join(templates)}; take another model")
        return template
    found = None
    if family.projector != "qformer":
        found = folder_template(tokenizer.folder, tokenizer, templates, prompt)
    if family.official and isinstance(found, ChatTemplate):
        # this chat template is the language model's own, which the official code never reads
        found = str(found) if found.known and found != "qwen_1_5" else None
    if isinstance(found, ChatTemplate) and not found.known:
        print(f"note: {tokenizer.folder}: its chat template ({found.file}) is none of ours: the "
              "model is asked as it says; training needs --template", file=sys.stderr)
    return found or family.template or template_of_vocabulary(tokenizer)


def template_of_vocabulary(tokenizer):
    """The conversation format that the tokens of a vocabulary are for; Vicuna's needs none."""
    if tokenizer.added("<|start_header_id|>") is not None:
        return "llama_3"
    if tokenizer.added("<|im_start|>") is not None:
        return "chatml_direct"
    return "v1"


def read_stop_ids(family, template, tokenizer, templates, template_end_ids):
    """Ids that end an answer, by generation_config.json or config.json: a frozenset.

    template_end_ids(template, tokenizer), templates: data.py's. A captioner's own end, the newline,
    is not taken: it ends captions only, not the answers that the model is trained for later."""
    ids = end_ids(family.folder, family.config)
    if family.llm_kind != "llama":
        # quirk: transformers' BLIP-2 stops by text_config alone
        eos = family.llm["eos"]
        ids |= {*(eos if type(eos) is tuple else (eos,))} - {None}
        return frozenset(ids or caption_end(template, tokenizer))
    if not isinstance(template, ChatTemplate) and templates[template].end == "\n":
        ids -= template_end_ids(template, tokenizer)
    return frozenset(ids)


# ------------------------------------------------------------------------------------ weights

def load_vlm(model, family, weights, dtype, load_tower):
    """Fill a VLM that was built with the sizes in `family`; returns it. Raises BadModel.

    load_tower(folder, dtype): clip.ViT.from_pretrained, for official files without a tower, which
    was frozen in training."""
    model.grids, hf_names = family.grids, dict(family.hf_names)
    model.llm_template = family.config.get("llm_template")      # of a captioner: trainer/start.py
    ignore = {**unused.VISION, **family.llm_unused}
    if family.llm_kind == "llama":
        ignore |= unused.llama(model.llm.config)
    if family.llm_kind == "llama" and model.llm.config.tie_embeddings and HEAD in hf_names:
        ignore[re.escape(hf_names[HEAD])] = unused.TIED
        hf_names.setdefault(EMBED, hf_names[HEAD])      # a tied file may hold it as the head alone
    if family.projector == "linear" and "multi_modal_projector.linear_2.weight" in hf_names:
        ignore |= check_identity_layer(weights, hf_names, model.llm.config.width)
    if family.tower is not None:
        model.vision = None                             # loaded below
    table = {}
    for name, canonical in expand_names(model, model.names()).items():
        table[name] = tuple(hf_names.get(part, part) for part in canonical)
    language_models.keep_in_fp32(model, dtype or weights.dtype)
    load_into(model, table, weights, ignore, dtype)
    if family.tower is not None:
        model.vision = load_tower(family.tower, dtype or weights.dtype)
    return model
