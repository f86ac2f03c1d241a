"""trainer/adapter.py: what --lora trained, kept beside its base: a LoRA adapter in PEFT's layout.

    adapter/adapter_config.json         r, alpha, which layers, the model that it is added to
            adapter_model.safetensors   A and B of each layer; the projector, trained in full
            config.json and others      of the whole: template, kind of pictures, tokenizer

`generate.py --model adapter` adds it to its base (formats/adapters.py), and so does PEFT. The names
are those of transformers' model in memory, which PEFT looks its layers up by.
[LoRA] 2106.09685; PEFT's peft/tuners/lora/layer.py and peft/utils/save_and_load.py.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from formats import names
from formats.adapters import is_adapter, PREFIX
from formats.checkpoints import load_weights, save_tensors
from formats.errors import UsageError
from formats.files import atomic_write, rename_into_place
from formats.hub import resolve
from trainer.lora import LoRALinear
from trainer.start import chosen_start, output_folders

# part that trains, by its name here: (its tensors in the file, its module in transformers' model)
WHOLE = {"projector": ("multi_modal_projector.", "multi_modal_projector"),
         "vision": ("vision_tower.vision_model.", "vision_tower")}
LAYERS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


def check_base(args):
    """Refuse --keep-adapter for a run that starts from an adapter: its base is no whole model.
    Raises UsageError, BadModel, Offline."""
    start = chosen_start(args, output_folders(args)[0])
    downloads_nothing = args.plan or not args.start
    if not args.keep_adapter or downloads_nothing and not Path(start).is_dir():
        return
    if is_adapter(resolve(start)):
        whole = Path(start).parent / "model"
        advice = f"give the merged model beside it, --from {whole}"
        if not (whole / "config.json").exists():
            advice = ("write the whole once, VLM.from_pretrained(ADAPTER).save_pretrained(FOLDER), "
                      "and give --from FOLDER")
        raise UsageError(f"--keep-adapter: {start} is an adapter, and what is kept would be one "
                         f"of an adapter, which cannot be loaded: {advice}")


@contextmanager
def kept_adapter(model, folder, args):
    """Around merging and saving: with --keep-adapter it writes adapter/ beside the model's folder.

    folder: where the model is saved, in the run's folder."""
    if not args.keep_adapter:
        yield
        return
    tensors = lora_tensors(model.llm)               # before they are merged
    parts = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: WHOLE[name] for name in sorted(parts & set(WHOLE))}
    yield
    tensors |= whole_tensors(load_weights(folder), whole)
    out = Path(folder).parent
    config = config_of(chosen_start(args, out), args, [module for _, module in whole.values()])
    write_adapter(out / "adapter", Path(folder), tensors, config)


def lora_tensors(llm):
    """{PEFT's name: tensor} of all A and B. A fused layer is several in the file: q, k and v."""
    tensors = {}
    for number, block in enumerate(llm.blocks):
        for name, layer in block.named_children():
            if not isinstance(layer, LoRALinear):
                continue
            files = names.LLAMA[f"blocks.{{}}.{name}.weight"]
            files = files if isinstance(files, tuple) else (files,)
            pairs = zip(layer.a.detach().chunk(len(files)), layer.b.detach().split(layer.sizes))
            for file, (a, b) in zip(files, pairs):
                # model.layers.0.self_attn.q_proj.weight, inside transformers' LLaVA
                module = file.format(number).removeprefix("model.").removesuffix(".weight")
                for kind, tensor in (("lora_A", a), ("lora_B", b)):
                    key = f"{PREFIX}model.language_model.{module}.{kind}.weight"
                    tensors[key] = tensor.cpu().contiguous().clone()
    return tensors


def whole_tensors(weights, whole):
    """{PEFT's name: tensor} of the parts that were trained in full, out of the saved model."""
    tensors = {}
    for prefix, module in whole.values():
        for name in weights:
            if name.startswith(prefix):
                tensors[f"{PREFIX}model.{module}.{name.removeprefix(prefix)}"] = weights[name]
    return tensors


def config_of(base, args, modules):
    """adapter_config.json as PEFT writes it. The layers are a pattern, because those of a vision
    tower have the same names."""
    if os.path.isdir(base):
        base = os.path.abspath(base)
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
            "r": args.lora, "lora_alpha": 2 * args.lora, "lora_dropout": 0.0, "bias": "none",
            "target_modules": rf".*language_model.*\.({'|'.join(LAYERS)})",
            "modules_to_save": modules or None, "fan_in_fan_out": False, "use_rslora": False,
            "use_dora": False, "init_lora_weights": True, "inference_mode": True}


def write_adapter(final, saved, tensors, config):
    """The adapter's folder, whole or not at all; the small files are those of the saved model."""
    tmp = final.with_name("adapter.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    for path in sorted(saved.iterdir()):
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copyfile(path, tmp / path.name)
    save_tensors(tensors, tmp / "adapter_model.safetensors", {"format": "pt"})
    atomic_write(tmp / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)        # of the same run, killed before it ended
    rename_into_place(tmp, final)
