"""formats/export.py: the files beside the weights of a saved VLM, as transformers reads them.

    config.json                 sizes; whether pictures are cut into tiles; our keys "template" and
                                "image_aspect_ratio", which transformers passes over
    model.safetensors           the weights (formats/checkpoints.py), named by formats/names.py
    preprocessor_config.json    how a picture is prepared; once more inside processor_config.json
    generation_config.json      the ids that end an answer
    chat_template.json, .jinja  the conversation format in Jinja: for the processor, which adds BOS
                                itself, and for a tokenizer alone, which does not
    tokenizer.json, tokenizer_config.json      with <image> and <pad> added
    qformer_tokenizer/          of an InstructBLIP

Every file is written whole or not at all. Source: transformers 5.23, models/llava*/ and
models/*blip*/ (configuration_*.py, processing_*.py, image_processing_*.py).
"""

import json
from pathlib import Path

import torch

from formats import configs, language_models
from formats.chat_templates import ChatTemplate, for_processor
from formats.checkpoints import dtype_name, export, save_weights
from formats.conversations import IMAGE_TOKEN
from formats.files import atomic_write
from formats.folders import write_json
from formats.prefix import write_prefix
from formats.processors import MEAN, STD
from formats.strict_json import read_model_json
from formats.templates import chat_template
from formats.tokenizers import token_dict, tokenizer_config

PAD_TOKEN = "<pad>"


# ----------------------------------------------------------------------------------- whole models

def save_llava(model, folder, template, stop_ids):
    """Save a VLM or LlavaNext. template: its data.Template; stop_ids: ids that end an answer.

    The linear projector is written as two layers, the second of them the identity, and the
    activation as "linear": the one form of it that transformers can express."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model_tensors(model)
    if model.projector_type == "linear":
        first = model.projector.first
        identity = torch.eye(len(first.bias)).to(first.weight)
        tensors["multi_modal_projector.linear_2.weight"] = identity
        tensors["multi_modal_projector.linear_2.bias"] = torch.zeros_like(first.bias)
    save_weights(folder, tensors)
    save_chat_template(folder, model.template, template, model.tokenizer)
    kind = "Llava" if model.grids is None else "LlavaNext"
    side = {"height": model.image_size, "width": model.image_size}
    picture = clip_pixels()
    picture["size"] = side if model.aspect == "squash" else {"shortest_edge": model.image_size}
    picture |= {"do_center_crop": True, "crop_size": side,
                "do_pad": model.aspect in ("pad", "anyres"),
                "image_processor_type": f"{kind}ImageProcessor"}
    if model.grids is not None:
        picture["image_grid_pinpoints"] = pinpoints(model)
    processor = {"processor_class": f"{kind}Processor",
                 "patch_size": model.vision.config.patch_size,
                 "vision_feature_select_strategy": "default", "image_token": IMAGE_TOKEN,
                 "num_additional_image_tokens": 1}              # the class token, which is dropped
    save_rest(model, folder, llava_config(model, kind), picture, processor, stop_ids)


def save_blip2(model, folder, template, stop_ids):
    """Save a Blip2; arguments as in `save_llava`. No chat template is written: the format has one
    question and one answer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, model_tensors(model))
    if model.qformer_tokenizer is not None:
        model.qformer_tokenizer.save(folder / "qformer_tokenizer")
    kind = "Blip2" if model.qformer_tokenizer is None else "InstructBlip"
    picture = clip_pixels()
    picture |= {"size": {"height": model.image_size, "width": model.image_size},
                "image_processor_type": "BlipImageProcessor"}
    processor = {"processor_class": f"{kind}Processor",
                 "num_query_tokens": model.num_image_tokens()}
    config = blip2_config(model)
    if model.llm.kind != "llama":       # quirk: transformers' BLIP-2 stops by these alone
        config["text_config"]["eos_token_id"] = eos_token_id(stop_ids, model.tokenizer)
    save_rest(model, folder, config, picture, processor, stop_ids)


def model_tensors(model):
    """{name in the file: tensor} of all weights, with rows for <image> and <pad>."""
    last = max(image_token_id(model.tokenizer), pad_token_id(model.tokenizer))
    if last >= model.llm.config.vocab:
        # transformers looks their embeddings up before it replaces them by the picture's
        model.llm.resize_embeddings(last + 1)
    return export(model, model.names(), language_models.fused_rows(model.llm, "llm."))


def save_rest(model, folder, config, picture, processor, stop_ids):
    """The small files that all kinds of models have."""
    write_json(folder, "config.json", config)
    write_json(folder, "preprocessor_config.json", picture)
    write_json(folder, "processor_config.json", {**processor, "image_processor": picture})
    # quirk: sampling settings with do_sample off make transformers refuse to save
    write_json(folder, "generation_config.json", {
        "bos_token_id": model.tokenizer.bos, "do_sample": False,
        "eos_token_id": eos_token_id(stop_ids, model.tokenizer),
        "pad_token_id": pad_token_id(model.tokenizer)})
    save_tokenizer(model.tokenizer, folder, (IMAGE_TOKEN, PAD_TOKEN),
                   not isinstance(model.template, ChatTemplate))


# ------------------------------------------------------------------------------------ config.json

def llava_config(model, kind):
    """config.json as transformers' LlavaConfig or LlavaNextConfig reads it."""
    config = {"model_type": "llava" if model.grids is None else "llava_next",
              "architectures": [f"{kind}ForConditionalGeneration"],
              "dtype": dtype_name(model.llm.head.weight.dtype)}
    if model.grids is not None:
        config["image_grid_pinpoints"] = pinpoints(model)
    config |= {
        "image_token_index": image_token_id(model.tokenizer), "image_seq_length": model.patches,
        "projector_hidden_act": "gelu" if model.projector_type == "mlp" else "linear",
        "multimodal_projector_bias": True, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": model.llm.config.tie_embeddings,
        "text_config": configs.llama_to_hf(model.llm.config),
        "vision_config": configs.vit_to_hf(model.vision.config)}
    if not isinstance(model.template, ChatTemplate):        # a folder's own is in a file of its own
        config["template"] = model.template
    # a captioner's template says nothing of the format in which its language model can converse
    if model.template == "plain" and getattr(model, "llm_template", None) not in (None, "v1"):
        config["llm_template"] = model.llm_template
    config["image_aspect_ratio"] = model.aspect
    return config


def blip2_config(model):
    """config.json as transformers' Blip2Config or InstructBlipConfig reads it."""
    qformer, vision = model.projector.qformer.config, model.vision.config
    instruct = bool(qformer.vocab)
    vision_config = configs.vit_to_hf(vision)
    if instruct and vision.eva:
        vision_config["model_type"] = "instructblip_vision_model"
    name = "InstructBlip" if instruct else "Blip2"
    config = {
        "model_type": "instructblip" if instruct else "blip-2",
        # of a CLIP before a Q-Former transformers has no model
        "architectures": [f"{name}ForConditionalGeneration"] if vision.eva else [],
        "dtype": dtype_name(model.llm.head.weight.dtype),
        "num_query_tokens": qformer.num_queries,
        "image_token_index": image_token_id(model.tokenizer),
        "use_decoder_only_language_model": model.llm.kind != "t5",
        "tie_word_embeddings": model.llm.config.tie_embeddings, "vision_config": vision_config,
        "qformer_config": configs.qformer_to_hf(qformer, instruct)}
    if model.projector.norm.eps != vision.eps:
        config["ln_vision_eps"] = model.projector.norm.eps
    text = language_models.WRITERS[model.llm.kind](model.llm.config)
    return {**config, "text_config": text, "template": model.template,
            "image_aspect_ratio": model.aspect}


def pinpoints(model):
    """[[height, width]] of all canvases, in transformers' order: it cuts pictures as we do."""
    S = model.image_size
    return [[down * S, across * S] for across, down in model.grids]


def clip_pixels():
    """The steps that all kinds of pictures have in common: resize, scale, CLIP's mean and std."""
    return {"do_resize": True, "resample": 3, "do_rescale": True, "do_normalize": True,
            "rescale_factor": 1 / 255, "image_mean": list(MEAN), "image_std": list(STD),
            "do_convert_rgb": True}


# --------------------------------------------------------------------------------- special tokens

def image_token_id(tokenizer):
    """Id of <image> in the files: the next free one, if the tokenizer has none."""
    return tokenizer.added(IMAGE_TOKEN, len(tokenizer))


def pad_token_id(tokenizer):
    """Id of <pad> in the files: the next free one behind <image>, if the tokenizer has none."""
    return tokenizer.added(PAD_TOKEN, max(len(tokenizer), image_token_id(tokenizer) + 1))


def eos_token_id(stop_ids, tokenizer):
    """stop_ids as generation_config.json has them: None, one id, or EOS and then the others."""
    others = sorted(stop_ids - {tokenizer.eos})
    ids = [tokenizer.eos, *others] if tokenizer.eos in stop_ids else others
    if not ids:
        return None
    return ids if len(ids) > 1 else ids[0]


# ------------------------------------------------------------------------------ templates, tokens


def save_chat_template(folder, name, t, tokenizer):
    """Write the chat templates, or remove those of an earlier save.

    name: the model's template, a name or a ChatTemplate, which is written as it was read, for a
    processor so that it takes parts; t: its data.Template. The .json is for a processor, the .jinja
    for a tokenizer alone."""
    jinja, processor = None, None
    if isinstance(name, ChatTemplate):
        jinja, processor = name.source, for_processor(name)
    else:
        processor = chat_template(t)
        if processor is not None:
            jinja = chat_template(t, tokenizer)
    if processor is not None:
        processor = json.dumps({"chat_template": processor}, indent=2) + "\n"
    for file, text in (("chat_template.jinja", jinja), ("chat_template.json", processor)):
        (folder / file).unlink(missing_ok=True)
        if text is not None:
            atomic_write(folder / file, text)


def begins_with(token, i):
    """The part of tokenizer.json that puts a token, of id i, before every text."""
    def texts(*names):
        rows = []
        for number, name in enumerate(names):
            rows += [{"SpecialToken": {"id": token, "type_id": number}},
                     {"Sequence": {"id": name, "type_id": number}}]
        return rows
    return {"type": "TemplateProcessing", "single": texts("A"), "pair": texts("A", "B"),
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}}}


def save_tokenizer(tokenizer, folder, extra=(), own_template=False):
    """tokenizer.json and tokenizer_config.json of a data.Tokenizer; `extra` tokens get new ids.

    own_template: the chat template is ours, in a file of its own. Then the language model's is left
    out, and other libraries shall tokenize what follows <image> as data.encode does."""
    folder = Path(folder)
    spec = read_model_json(tokenizer.folder / "tokenizer.json", 64_000_000)
    config = tokenizer_config(tokenizer.folder)
    config.pop("added_tokens_decoder", None)        # all are in tokenizer.json, with their ids
    spec["added_tokens"] = spec.get("added_tokens") or []
    for token in spec["added_tokens"]:
        token["id"] = tokenizer.added(token["content"], token["id"])
    for token in tokenizer.added_by_config:                    # of tokenizer_config.json alone
        i = tokenizer.added(token.content)
        spec["added_tokens"].append({"id": i, **token_dict(token)})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    i = len(tokenizer)
    for token in extra:
        if tokenizer.added(token) is None:
            spec["added_tokens"].append({"id": i, "content": token, **flags, "special": True})
            i += 1
    if PAD_TOKEN in extra:
        config["pad_token"] = PAD_TOKEN
    if tokenizer.add_bos and not spec.get("post_processor"):
        # quirk: transformers goes by this part of the file alone, whatever the config says
        spec["post_processor"] = begins_with(tokenizer.token(tokenizer.bos), tokenizer.bos)
    if own_template:
        config.pop("chat_template", None)
        write_prefix(spec, tokenizer.prefix_in_file, tokenizer.prefix, IMAGE_TOKEN)
    atomic_write(folder / "tokenizer.json", json.dumps(spec, ensure_ascii=False))
    atomic_write(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
