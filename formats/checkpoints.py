"""formats/checkpoints.py: weight files, read without surprises and written whole.

    load_weights(folder or hub id) -> LazyWeights, {name: tensor}, each read when it is asked for
    load_into(module, names, weights) -> the module with these weights; every tensor of the file is
                                         used, or left out for a reason (formats/unused.py)
    export(module, names) -> {name: tensor};  save_weights(folder, tensors)

Only safetensors files are opened: a pickle can run code when it is opened (formats/hub.py).
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

import torch
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from formats.errors import BadModel, TrainingFailed
from formats.files import atomic_write, interrupted_later
from formats.hub import refuse_folder, refuse_pickle, resolve, shard_set
from formats.names import ZEROS
from formats.strict_json import loads, read_model_json
from formats.unused import Claim

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}        # as safetensors spells them


class LazyWeights(Mapping):
    """{name: tensor} of safetensors files, in sorted order; a tensor is read when it is asked for.

    The file is opened anew for each tensor, whose memory is given back with the tensor. A file that
    stays open keeps all pages that were read: then a loaded model and its file would be in memory
    side by side."""

    def __init__(self, paths, listed=None):
        """listed: {name: file} of an index. A tensor of two files is the last file's, as in
        transformers; if the index names another, they must be equal."""
        self.listed = listed or {}
        self._entries, clashes = {}, []                 # name -> (path, shape, dtype)
        for path in paths:
            for name, (shape, dtype) in read_header(path).items():
                file = Path(path).name
                if name in self._entries and self.listed.get(name, file) != file:
                    clashes.append((name, self._entries[name][0]))
                self._entries[name] = path, shape, dtype
        self._entries = dict(sorted(self._entries.items()))
        for name, first in clashes:
            last = Path(self._entries[name][0]).name
            older = self._read(first, name)
            if older.shape != self[name].shape or not bool((older == self[name]).all()):
                raise BadModel(f"{first}: tensor {name} is in {last} too, with other values, and "
                               f"the index names the first: make it name {last}, if that is to be "
                               "loaded, or take the tensor out of that file")

    @staticmethod
    def _read(path, name) -> Tensor:
        try:
            with interrupted_later(), safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadModel(f"{path}: damaged ({error}): download it again") from None
        if tensor.dtype.is_floating_point:
            low, high = tensor.aminmax()                # NaN comes through; no copy of the tensor
            if not math.isfinite(low) or not math.isfinite(high):
                raise BadModel(f"{path}: tensor {name} holds NaN or infinity: use another "
                               "checkpoint")
        return tensor

    def __getitem__(self, name) -> Tensor:
        return self._read(self._entries[name][0], name)

    def shape(self, name) -> tuple:
        """Shape of a tensor, without reading it."""
        return self._entries[name][1]

    @property
    def dtype(self):
        """That of most of the numbers, if they are floating point; else BadModel."""
        total = Counter()
        for _, shape, dtype in self._entries.values():
            total[dtype] += math.prod(shape)
        dtype = total.most_common(1)[0][0] if total else torch.float32
        if not dtype.is_floating_point:
            path = next(iter(self._entries.values()))[0]
            raise BadModel(f"{path}: holds {dtype} weights: take a checkpoint that is not "
                           "quantised")
        return dtype

    def __contains__(self, name):
        return name in self._entries                # Mapping's own would read the tensor

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)


def read_header(path) -> dict:
    """{name: (shape, dtype)} of a safetensors file. Raises BadModel.

    The library checks the file. It accepts a name twice and tensors without elements; here both
    are refused."""
    def unique(pairs):
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError(f"a name twice among {sorted(k for k, _ in pairs)[:3]}")
        return table

    entries = {}
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= 100_000_000:
                raise ValueError(f"a header of {length} bytes")
            table = loads(file.read(length), object_pairs_hook=unique)
        table.pop("__metadata__", None)
        for name, entry in table.items():
            shape = tuple(entry["shape"])
            if not all(type(n) is int and n > 0 for n in shape):
                raise ValueError(f"tensor {name} of shape {shape}")
            entries[name] = shape, entry["dtype"]
    except (AttributeError, LookupError, OSError, RecursionError, TypeError,
            ValueError) as error:
        raise BadModel(f"{path}: damaged ({error!r}): download it again") from None
    try:
        safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise BadModel(f"{path}: damaged ({error}): download it again") from None
    for name, (shape, dtype) in entries.items():
        if dtype not in DTYPES:
            raise BadModel(f"{path}: tensor {name} has dtype {dtype}, which is not read here: take "
                           "the checkpoint in float32, float16 or bfloat16")
        entries[name] = shape, DTYPES[dtype]
    return entries


def dtype_name(dtype) -> str:
    """As config.json spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def load_weights(folder_or_hub_id) -> LazyWeights:
    """All tensors of a model folder: model.safetensors, or its shards by their index; or of a file.

    Memory-mapped: nothing is read before it is asked for. Raises BadModel for a folder without
    safetensors, damaged files, repeated or empty tensors, and, when read, NaN or infinity."""
    if str(folder_or_hub_id).endswith(".safetensors") and Path(folder_or_hub_id).is_file():
        return LazyWeights([Path(folder_or_hub_id)])
    refuse_pickle(folder_or_hub_id)
    folder = resolve(folder_or_hub_id)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return LazyWeights([single])
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if (len(files) == 1 or shard_set(files)) and not (folder / "adapter_config.json").exists():
            return LazyWeights(files)
        refuse_folder(folder)
    table = read_model_json(index, 64_000_000)
    table = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not table or not all(
            type(f) is str and PureWindowsPath(f).name == f and f.endswith(".safetensors")
            for f in table.values()):
        raise BadModel(f"{index}: weight_map must name files beside it: download it again")
    # as transformers: all that is in these files, listed or not
    return LazyWeights([folder / file for file in sorted(set(table.values()))], table)


def save_tensors(tensors, path, metadata=None):
    """A .safetensors file. A full disk, of which the library makes an error of its own, is
    TrainingFailed."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise TrainingFailed(f"{path}: cannot be written ({error}): free some space") from None


def save_weights(folder, tensors: Mapping, max_bytes: int = 5_000_000_000):
    """Write model.safetensors, or shards of at most max_bytes with their index.

    Each file is written under another name and renamed. Tensors that share memory are each stored.
    Raises TrainingFailed if the disk does not take them."""
    folder, shards, used, seen = Path(folder), [{}], 0, set()
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in sorted(tensors.items()):
        if used and used + tensor.nbytes > max_bytes:
            shards.append({})
            used = 0
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        shards[-1][name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
        used += tensor.nbytes
    n = len(shards)
    files = [f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors"
             for i in range(1, n + 1)]
    try:
        for file, shard in zip(files, shards):
            save_file(shard, folder / f"{file}.tmp", {"format": "pt"})
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(folder / f"{file}.tmp", 0o666 & ~mask)     # the library makes it 0600
            os.replace(folder / f"{file}.tmp", folder / file)
    except SafetensorError as error:
        raise TrainingFailed(f"{folder}: cannot write weights ({error}): free some space") from None
    finally:
        for left in folder.glob("model*.safetensors.tmp"):
            left.unlink()
    index = folder / "model.safetensors.index.json"
    if n > 1:
        table = {name: file for file, shard in zip(files, shards) for name in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        table = {"metadata": {"total_size": size}, "weight_map": table}
        atomic_write(index, json.dumps(table, indent=1))
    else:
        index.unlink(missing_ok=True)
    for stale in set(folder.glob("model*.safetensors")) - {folder / file for file in files}:
        stale.unlink()


# -------------------------------------------------------------------------- files and modules

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")         # the 12 of blocks.12.out.weight


def expand_names(module, names) -> dict:
    """{our parameter: (its names in the file)} with every {} replaced by the layer's number."""
    table = {}
    for name, _ in module.named_parameters():
        hf_names = names.get(name) or names.get(LAYER.sub("{}", name))
        if hf_names is None:
            raise BadModel(f"parameter {name} has no name in the table of {type(module).__name__}")
        if isinstance(hf_names, str):
            hf_names = (hf_names,)
        numbers = LAYER.findall(name)
        table[name] = tuple(part.format(*numbers) for part in hf_names)
    return table


def materialize(module, dtype):
    """Give memory to parameters on the meta device. Tied ones stay tied, unlike in to_empty()."""
    fresh = {}                                          # id of a meta parameter -> its replacement
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is None or not p.is_meta:
                continue
            if id(p) not in fresh:
                empty = torch.empty_like(p, device="cpu", dtype=dtype)
                fresh[id(p)] = torch.nn.Parameter(empty, p.requires_grad)
            part._parameters[name] = fresh[id(p)]


def load_into(module, names: Mapping, weights: Mapping, ignore: Mapping | None = None, dtype=None):
    """Copy `weights` into the parameters of `module` in place; returns it.

    names: {our name: the file's}; {} stands for a layer's number; a tuple of names is concatenated
    on dim 0 (q, k, v in one), ZEROS in it is as large as the first. ignore: {pattern of the file's
    names: reason}; a formats.unused.Claim is checked. A module that was built on the meta device
    gets memory on the CPU, in dtype or the file's own; another keeps its own dtype.
    Nothing is copied unless everything fits: BadModel names the tensor that is missing, left over,
    or of the wrong shape, with both shapes."""
    table = expand_names(module, names)
    check_tensors(module, table, weights)
    check_unused(module, table, weights, ignore or {})
    materialize(module, dtype or getattr(weights, "dtype", None))
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, hf_names in table.items():
            row = 0
            for hf_name in hf_names:
                if hf_name == ZEROS:
                    tensor = torch.zeros_like(weights[hf_names[0]])
                else:
                    tensor = weights[hf_name]
                if len(hf_names) == 1:
                    parameters[name].copy_(tensor)
                else:
                    parameters[name][row:row + len(tensor)].copy_(tensor)
                    row += len(tensor)
    return module


def check_tensors(module, table, weights):
    """Is every tensor of the table in the file, with the right shape?"""
    parameters = dict(module.named_parameters())
    for name, hf_names in table.items():
        shapes = []
        for hf_name in hf_names:
            if hf_name == ZEROS:
                hf_name = hf_names[0]
            if hf_name not in weights:
                raise_missing(hf_name, name, weights)
            in_file = hasattr(weights, "shape")
            shapes.append(tuple(weights.shape(hf_name) if in_file else weights[hf_name].shape))
        want = got = tuple(parameters[name].shape)
        if len(shapes) == 1:
            got = shapes[0]
        else:                                           # stacked: rows add up, the rest is equal
            got = (sum(shape[0] for shape in shapes if shape), *shapes[0][1:])
        if got != want or any(shape[1:] != want[1:] for shape in shapes):
            raise BadModel(f"tensor {', '.join(hf_names)}: shape {' + '.join(map(str, shapes))}, "
                           f"but {name} needs {want}: config.json and weights disagree")


def raise_missing(hf_name, name, weights):
    file = getattr(weights, "listed", {}).get(hf_name)
    why = "wrong kind of model?"
    if file:
        why = f"the index names {file}, which does not hold it: download that file again"
    raise BadModel(f"tensor {hf_name} is missing (needed for {name}): {why}")


def check_unused(module, table, weights, ignore):
    """Has every tensor that is not in the table a reason to be left out?"""
    used = {hf_name for hf_names in table.values() for hf_name in hf_names}
    without_reason = []
    for hf_name in weights:
        if hf_name in used:
            continue
        reasons = [why for pattern, why in ignore.items() if re.fullmatch(pattern, hf_name)]
        if not reasons:
            without_reason.append(hf_name)
        elif isinstance(reasons[0], Claim):
            reasons[0].check(hf_name, weights)
    if without_reason:
        raise BadModel(f"tensor {without_reason[0]} (and {len(without_reason) - 1} more) has no "
                       f"place in {type(module).__name__}: wrong kind of model?")


def check_identity_layer(weights, hf_names, width):
    """{pattern: reason} of a linear projector's second layer, which must compute nothing.

    hf_names: {canonical name: the file's}. Raises BadModel if it is not the identity."""
    weight = hf_names.get("multi_modal_projector.linear_2.weight")
    bias = hf_names.get("multi_modal_projector.linear_2.bias")
    good = weight is not None and bias is not None and weights.shape(weight) == (width, width)
    if good:
        is_identity = torch.equal(weights[weight].float(), torch.eye(width))
        good = is_identity and not weights[bias].any()
    if not good:
        raise BadModel(f"tensor {weight}: projector_hidden_act is linear, so this must be the "
                       "identity; take another model")
    return {re.escape(name): "the identity, see save_llava" for name in (weight, bias)}


def export(module, names: Mapping, rows: Mapping | None = None) -> dict[str, Tensor]:
    """The reverse of `load_into`: {the file's name: tensor}, views where ours is fused.

    rows: {our name, {} for a layer's number: rows of its pieces} (names.fused_rows); what is not in
    it is split into equal pieces."""
    parameters, out = dict(module.named_parameters()), {}
    for name, hf_names in expand_names(module, names).items():
        tensor = parameters[name].detach()
        if len(hf_names) == 1:
            out[hf_names[0]] = tensor
            continue
        equal = [len(tensor) // len(hf_names)] * len(hf_names)
        pieces = tensor.split((rows or {}).get(LAYER.sub("{}", name), equal))
        out.update(zip(hf_names, pieces, strict=True))
    out.pop(ZEROS, None)
    return out
