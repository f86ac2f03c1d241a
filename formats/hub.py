"""formats/hub.py: from a folder or a hub id to a folder that holds safetensors.

A hub id (owner/name) is downloaded or found in the hub's cache, json and safetensors files only.
Where a folder has no weights that can be read, the error says which files it has instead and how
to convert or download them.
"""

import re
from pathlib import Path

from formats.errors import BadModel, Offline

# What the user runs once, on his own machine. weights_only: the restricted unpickler; clone:
# tensors that share memory are stored once each.
CONVERT = ("python -c \"import glob, torch; from safetensors.torch import save_file as s; "
           "[s({k: v.clone() for k, v in torch.load(f, 'cpu', weights_only=True).items()}, "
           "f[:-3] + 'safetensors') for f in glob.glob('%s')]\"")


def hub_id(folder):
    """owner/name, if the folder is of the hub's cache, in which only json and safetensors are."""
    found = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", f"{folder}/")
    return f"{found[1]}/{found[2]}" if found else None


def shard_set(files) -> bool:
    """Are these all shards of one model, NAME-00001-of-00003.safetensors ...? Then they need no
    index."""
    found = [re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", Path(f).name) for f in files]
    if not found or None in found:
        return False
    name, count = found[0][1], int(found[0][3])
    return [(m[1], int(m[2]), int(m[3])) for m in found] == [
        (name, i, count) for i in range(1, count + 1)]


def refuse_pickle(path):
    """One line for a file such as LLaVA's mm_projector.bin."""
    if str(path).endswith(".bin") and Path(path).is_file():
        raise BadModel(f"{path}: pickled weights, which can run code: convert them once: "
                       f"{CONVERT % path}; then give the .safetensors file")


def refuse_folder(folder):
    """Say in one line why a folder without model.safetensors cannot be loaded, and what to do."""
    if (folder / "adapter_config.json").exists():
        raise BadModel(f"{folder}: a LoRA adapter, no whole model: give it to generate.py --model "
                       "ADAPTER --model-base BASE, or to VLM.from_pretrained(ADAPTER, base=BASE), "
                       "whose save_pretrained writes the whole")
    hub = hub_id(folder)
    if hub and (folder / "pytorch_model.bin.index.json").exists():      # the rest was not fetched
        name = hub.split("/")[1]
        raise BadModel(f"{hub}: only pickled weights, which can run code: fetch the folder and "
                       f"convert it once: hf download {hub} --local-dir {name} && "
                       f"{CONVERT % f'{name}/pytorch_model*.bin'}; then give {name}")
    for end in ("bin", "pt", "pth"):
        old = sorted(folder.glob(f"*.{end}"))
        if old and end == "bin":
            several = "pytorch_model*.bin" if old[0].match("pytorch_model*.bin") else old[0].name
            raise BadModel(f"{folder}: only pickled weights ({old[0].name}), which can run code: "
                           f"convert them once: {CONVERT % (folder / several)}")
        if old:
            raise BadModel(f"{folder}: only pickled weights ({old[0].name}), which can run code: "
                           "save its dict of tensors once by safetensors.torch.save_file, as "
                           "model.safetensors")
    several = sorted(f.name for f in folder.glob("*.safetensors"))
    if several:
        raise BadModel(f"{folder}: {several[0]} and {len(several) - 1} more, without "
                       "model.safetensors.index.json and not a whole set of shards: download the "
                       "index and all its files")
    if hub:
        name = hub.split("/")[1]
        raise BadModel(f"{hub}: no model.safetensors on the hub: fetch all that it has (hf "
                       f"download {hub} --local-dir {name}), and give {name}")
    if (folder / "model/config.json").exists():
        raise BadModel(f"{folder}: the folder of a run, whose model lies one deeper: give "
                       f"{folder / 'model'}")
    if (folder / "run.json").exists():
        raise BadModel(f"{folder}: a run that has not finished, so there is no model yet: let it "
                       f"finish (train.py --resume auto), then give {folder / 'model'}")
    raise BadModel(f"{folder}: no model.safetensors: give the folder that holds it")


def weight_files(folder) -> list:
    """[(name, size, time of the last change)] of a folder's weights: what tells a model from the
    one that is trained next into the same folder, without reading it."""
    files = []
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        files.append((path.name, status.st_size, status.st_mtime_ns))
    return files


def resolve(folder_or_hub_id) -> Path:
    """The local folder of a model; a hub id (owner/name) is downloaded, or found in the cache.

    Raises BadModel for a path that is no folder, Offline if the download is not possible."""
    path, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise BadModel(f"{name}: not a model folder: give a folder, or a hub id like owner/name")
    import huggingface_hub  # slow to import, and rarely needed
    try:
        return Path(huggingface_hub.snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (OSError, ValueError) as error:
        why = str(error).strip().split("\n")[0]
        raise Offline(f"{name}: no such folder, and not to be had from the hub ({why}): "
                      f"check the name and the network, or give a local folder") from None
