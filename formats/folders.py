"""formats/folders.py: the model folders of single parts, written as transformers reads them.

    save_clip      config.json, model.safetensors                   CLIPModel
    save_llama     config.json, model.safetensors                   Llama- or MistralForCausalLM
    save_stage1    these, the tokenizer, preprocessor_config.json   Blip2ForImageTextRetrieval

and BLIP-2's first stage read back (load_stage1), whose files come in two layouts. A whole VLM is
written by formats/export.py.

toy/weights/qformer has no vision tower of its own: its config.json names the folder that has it,
and the SHA-256 of the file there (leave_out_tower, tower_folder).
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import nn

from formats import configs, names, unused
from formats.checkpoints import (
    dtype_name,
    export,
    load_into,
    load_weights,
    save_tensors,
    save_weights,
)
from formats.errors import BadModel, UsageError
from formats.files import atomic_write
from formats.processors import MEAN, STD
from formats.strict_json import read_config

ROOT = Path(__file__).parents[1]
SHIPPED_QFORMER = "toy/weights/qformer"     # relative to ROOT
TOWER = r"vision_model\.(?!post_layernorm\.).*"      # its tensors; ln_vision is none of them
PRETRAINING = "pretraining.safetensors"     # what transformers has no place for


def write_json(folder, name, content):
    atomic_write(Path(folder) / name, json.dumps(content, indent=2) + "\n")


def save_clip(model, folder):
    """model: clip.CLIP."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    shared = model.visual_projection.weight.shape[0]
    vision = {**configs.vit_to_hf(model.vision.config), "projection_dim": shared}
    text = {**configs.vit_to_hf(model.text.config, text=True), "projection_dim": shared}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": shared,
              "dtype": dtype_name(model.logit_scale.dtype), "vision_config": vision,
              "text_config": text}
    write_json(folder, "config.json", config)
    save_weights(folder, export(model, names.CLIP))


def save_llama(model, folder):
    """model: llama.Llama."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = configs.llama_to_hf(model.config)
    config["dtype"] = dtype_name(model.head.weight.dtype)
    write_json(folder, "config.json", config)
    save_weights(folder, export(model, names.LLAMA, names.fused_rows(model.config)))


# ------------------------------------------------------------------------- BLIP-2's first stage

@torch.no_grad()
def init_weights(module, width, seed=0):
    """Starting values: N(0, 0.02) at the published width of 768, more where sums are shorter; norms
    1, biases 0. Drawn from a generator of its own, so the program's is left where it was."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.dim() > 1:
            p.normal_(0, .02 * (768 / width) ** .5, generator=rng)
        else:
            p.fill_(float(name.endswith("norm.weight") or name == "weight"))


def load_stage1(model, folder, weights, dtype=None, tower=None):
    """Fill a qformer.Blip2Stage1 on the meta device; returns it. dtype: of the vision tower. tower:
    the vision tower, where the file was saved without it, or has another. Raises BadModel."""
    table, ignore = names.stage1(model.vision.config), unused.STAGE1
    if tower is not None:
        model.vision = None                             # not of the file
        ignore = {**ignore, TOWER: "another vision tower was given"}
    if names.is_lavis(weights):
        load_lavis(model, folder, weights, dtype)
    else:
        lm_head = model.lm_head
        model.lm_head = model.temp = None               # not in the main file
        load_into(model, table, weights, ignore, dtype)
        # only now: it takes memory and time, if the config is not that of the weights much of both
        model.lm_head, model.temp = starting_head(lm_head, model.qformer.config.width, folder)
    if tower is not None:
        model.vision = tower.without_final_block().requires_grad_(False)
        configs.check_stage1(model.vision.config, model.qformer.config)
    for name, p in model.named_parameters():
        if not name.startswith("vision."):
            p.data = p.data.float()
    return model


def starting_head(lm_head, width, folder):
    """(lm_head, temp) of the folder's second file; lm_head: on the meta device. transformers' own
    folders have none: both start anew, which ITC's cosine and ITM do not notice, and ITG must
    learn."""
    extra = nn.Module()
    extra.lm_head = lm_head.to_empty(device="cpu")
    extra.temp = nn.Parameter(torch.tensor(.07))
    init_weights(extra.lm_head, width)
    if (folder / PRETRAINING).exists():
        load_into(extra, names.STAGE1_PRETRAINING, load_weights(folder / PRETRAINING))
    return extra.lm_head, extra.temp


def load_lavis(model, folder, weights, dtype):
    """LAVIS' tensors; all but the vision tower's are in one spelling."""
    if model.vision is not None and not any(name.startswith("visual_encoder.") for name in weights):
        raise BadModel(f"{folder}: saved without its frozen vision tower; name the tower's folder "
                       "as well (vision=)")
    load_into(model, names.STAGE1_LAVIS, weights, unused.STAGE1, dtype)


def leave_out_tower(folder, tower):
    """Take the vision tower out of a saved first stage, if it is that of `tower`, a folder relative
    to ROOT: its config names that instead, and no weight is shipped twice. Raises BadModel."""
    weights, theirs, kept = load_weights(folder), load_weights(ROOT / tower), {}
    for name in weights:
        if not re.fullmatch(TOWER, name):
            kept[name] = weights[name]
        elif name not in theirs or not torch.equal(weights[name], theirs[name]):
            raise BadModel(f"{folder}: tensor {name} of its vision tower is not that of {tower}; "
                           "keep the tower in the folder")
    save_weights(folder, kept)
    write_json(folder, "config.json", {**read_config(folder), "vision_tower": {
        "folder": tower, "sha256": sha256(ROOT / tower / "model.safetensors")}})


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tower_folder(folder):
    """The folder that has the vision tower of a model saved without it; None: its own. Raises
    BadModel if it is not there, or holds another tower than the model was trained with."""
    named = read_config(folder).get("vision_tower")
    if named is None:
        return None
    if type(named) is not dict or {type(named.get(k)) for k in ("folder", "sha256")} != {str}:
        raise BadModel(f"{folder}: config.json says vision_tower {named!r:.60}; it must give the "
                       "folder and the sha256 of its model.safetensors")
    tower = (ROOT / named["folder"]).resolve()
    if ROOT.resolve() not in tower.parents:
        raise BadModel(f"{folder}: config.json says that its vision tower lies in "
                       f"{named['folder']}, outside this program's folder; give --vision FOLDER")
    if not (tower / "model.safetensors").exists():
        raise BadModel(f"{folder}: its vision tower lies in {tower}, and there is none; restore "
                       "that folder, or give --vision FOLDER")
    if sha256(tower / "model.safetensors") != named["sha256"]:
        raise BadModel(f"{folder}: was trained with another vision tower than {tower} holds now; "
                       "restore that folder, or train this one again: python train.py --stage 0 "
                       "--part qformer")
    return tower


def scoring_model(args):
    """The folder or hub id that `python qformer.py IMAGE CAPTION ...` loads. Raises UsageError,
    BadModel."""
    if not args.captions:
        raise UsageError('no caption: give one or more behind the image, each "in quotes"')
    if args.model is not None:
        return args.model
    return ROOT / SHIPPED_QFORMER


def save_stage1(model, folder):
    """model: qformer.Blip2Stage1. The language-model head and the temperature go into a file of
    their own. With a CLIP as its vision tower the names are CLIP's, and transformers, whose BLIP-2
    has no such tower, cannot load it."""
    folder, vision = Path(folder), model.vision.config
    folder.mkdir(parents=True, exist_ok=True)
    table = names.stage1(vision)
    tensors = export(model, {**table, **names.STAGE1_PRETRAINING})
    extra = {}
    for name in names.STAGE1_PRETRAINING.values():
        extra[name] = tensors.pop(name).contiguous()
    save_weights(folder, tensors)
    tmp = folder / f"{PRETRAINING}.tmp"
    save_tensors(extra, tmp)
    tmp.replace(folder / PRETRAINING)
    write_json(folder, "config.json", {
        "model_type": "blip-2", "dtype": dtype_name(model.vision.patch.dtype),
        "architectures": ["Blip2ForImageTextRetrieval"] if vision.eva else [],
        "num_query_tokens": model.qformer.config.num_queries, "image_token_index": None,
        "image_text_hidden_size": model.vision_proj.out_features,
        "ln_vision_eps": model.ln_vision.eps, "vision_config": configs.vit_to_hf(vision),
        "qformer_config": configs.qformer_to_hf(model.qformer.config)})
    write_json(folder, "preprocessor_config.json", {
        "image_processor_type": "BlipImageProcessor", "processor_class": "Blip2Processor",
        "do_resize": True, "resample": 3,
        "size": {"height": vision.image_size, "width": vision.image_size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": list(MEAN), "image_std": list(STD)})
    model.tokenizer.save(folder)
