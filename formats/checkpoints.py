"""What a weight file holds beyond the parameters: checked before it is left unused.

A tensor that is not loaded needs a reason. Some reasons say something about its values ("tied: the
embedding once more", "positions 0, 1, 2 ..."). Such a reason is a `Claim`, and `data.fill` checks
it: a file that says something else is refused by name. A reason that says what a tensor is for
("the half of CLIP that reads text") needs no check, and is a plain str."""
import re
from pathlib import Path

import torch

from formats.errors import BadModel


class Claim(str):
    """A reason that `holds(tensor, weights)` checks; elsewhere it is read as any other str."""

    def __new__(cls, reason, holds):
        claim = super().__new__(cls, reason)
        claim.holds = holds
        return claim

    def check(self, name, weights):
        """Raises BadModel where the tensor is not what the reason says."""
        if not self.holds(weights[name], weights):
            raise BadModel(f"tensor {name} is left unused as {self}, and is not that: file and "
                           "config.json do not fit together; take both from one place")
        release(weights, name)


def release(weights, *names):
    """Hand back the memory of tensors that were only looked at."""
    for name in names:
        getattr(weights, "release", lambda name: None)(name)


def _counts_up(tensor, weights):
    """0, 1, 2 ... in the tensor's own numbers: half precision rounds those above 256 or 2048."""
    return torch.equal(tensor.flatten(), torch.arange(tensor.numel()).to(tensor.dtype))


POSITIONS = {r".*position_ids": Claim("a buffer of old files: 0, 1, 2 ...", _counts_up)}


def same_as(other):
    """A check: is this tensor the tensor `other` of the same file? Absent there: it is not."""
    def holds(tensor, weights):
        if other not in weights or weights[other].shape != tensor.shape:
            return False
        equal = bool((weights[other] == tensor).all())
        release(weights, other)
        return equal
    return holds


def tied_decoder(at, words, bias):
    """{pattern: reason} of a decoder `at` that is the tensors `words` and `bias` once more."""
    return {rf"{at}\.weight": Claim("tied: the word embeddings once more", same_as(words)),
            rf"{at}\.bias": Claim("tied: the bias once more", same_as(bias))}


def rotary(*tables):
    """{pattern: reason} of the buffers inv_freq: one of `tables`, the frequencies (D/2) that
    config.json asks for, within the rounding of the file's numbers."""
    def holds(tensor, weights):
        near = 4 * torch.finfo(tensor.dtype).eps
        return any(tensor.shape == table.shape
                   and torch.allclose(tensor.float(), table, rtol=near, atol=1e-7)
                   for table in tables)
    return {r".*rotary_emb\.inv_freq": Claim("recomputed from rope_theta", holds)}


def head_is_embedding(weights, embed, head) -> bool:
    """May the head of a file that config.json calls tied be left out? Not if the file has both, and
    they differ: then it is a head of its own, whatever config.json says (transformers 5)."""
    if embed not in weights or head not in weights:
        return True
    equal = same_as(embed)(weights[head], weights)
    release(weights, head)
    return equal


# ------------------------------------------------------------------------------- files

# weights_only: the restricted unpickler, on the user's own machine; clone: shared memory is split
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
    raise BadModel(f"{folder}: no model.safetensors: give the folder that holds it")
