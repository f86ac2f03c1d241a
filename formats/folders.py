"""formats/folders.py: the model folders of single parts, written as transformers reads them.

    save_clip      config.json, model.safetensors                   CLIPModel
    save_llama     config.json, model.safetensors                   Llama- or MistralForCausalLM
    save_stage1    these, the tokenizer, preprocessor_config.json   Blip2ForImageTextRetrieval

and BLIP-2's first stage read back (load_stage1), whose files come in two layouts. A whole VLM is
written by formats/export.py.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from formats import configs, names, unused
from formats.checkpoints import dtype_name, export, load_into, load_weights, save_weights
from formats.errors import BadModel, UsageError
from formats.files import atomic_write
from formats.processors import MEAN, STD

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
    the vision tower, where a LAVIS file was saved without it. Raises BadModel."""
    if names.is_lavis(weights):
        load_lavis(model, folder, weights, dtype, tower)
    else:
        lm_head, temp = starting_head(model, folder)
        model.lm_head = model.temp = None               # not in the main file
        load_into(model, names.stage1(model.vision.config), weights, unused.STAGE1, dtype)
        model.lm_head, model.temp = lm_head, temp
    for name, p in model.named_parameters():
        if not name.startswith("vision."):
            p.data = p.data.float()
    return model


def starting_head(model, folder):
    """(lm_head, temp) of the folder's second file. transformers' own folders have none: both start
    anew, which ITC's cosine and ITM do not notice, and ITG must learn."""
    extra = nn.Module()
    extra.lm_head = model.lm_head.to_empty(device="cpu")
    extra.temp = nn.Parameter(torch.tensor(.07))
    init_weights(extra.lm_head, model.qformer.config.width)
    if (folder / PRETRAINING).exists():
        load_into(extra, names.STAGE1_PRETRAINING, load_weights(folder / PRETRAINING))
    return extra.lm_head, extra.temp


def load_lavis(model, folder, weights, dtype, tower):
    """LAVIS' tensors; all but the vision tower's are in one spelling."""
    if tower is not None:
        model.vision = None                             # not in the file
    elif not any(name.startswith("visual_encoder.") for name in weights):
        raise BadModel(f"{folder}: saved without its frozen vision tower; name the tower's folder "
                       "as well (vision=)")
    load_into(model, names.STAGE1_LAVIS, weights, unused.STAGE1, dtype)
    if tower is not None:
        model.vision = tower.without_final_block().requires_grad_(False)
        configs.check_stage1(model.vision.config, model.qformer.config)


def scoring_model(args):
    """The folder or hub id that `python qformer.py IMAGE CAPTION ...` loads. Raises UsageError,
    BadModel."""
    if not args.captions:
        raise UsageError('no caption: give one or more behind the image, each "in quotes"')
    if args.model is not None:
        return args.model
    folder = Path(__file__).parents[1] / "runs/toy/blip2/stage1/model"
    if not folder.exists():
        raise BadModel(f"{folder}: no such folder; make it by python train.py --recipe blip2 "
                       "--stage 1, or give --model FOLDER_OR_HUB_ID")
    return folder


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
    save_file(extra, tmp)
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
