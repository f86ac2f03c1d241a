"""TODO"""
import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

import torch
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from formats.errors import BadModel, Offline, TrainingFailed
from formats.names import ZEROS
from formats.strict_json import loads, read_model_json
from formats.unused import Claim, release


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


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}        # as safetensors spells them


class LazyWeights(Mapping):
    """Name → tensor of safetensors files, in sorted order, read from disk only when asked for.

    The library checks the file; the tensors are views of a memory map of ours, so that `release`
    can hand pages back: else a loaded model and its file would stand in memory side by side."""

    def __init__(self, paths, listed=None):
        """listed: {name: file} of an index. A tensor of two files is the last file's, as in
        transformers; if the index names another, they must agree."""
        self._where, clashes = {}, []                   # name → (map, path, shape, dtype, offset)
        self.listed = listed or {}
        for path in paths:
            start, entries = self._header(path)
            try:
                with safe_open(path, framework="pt"), open(path, "rb") as file:
                    # private: whoever writes into a tensor changes it for himself, not the file
                    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (SafetensorError, OSError, ValueError) as error:
                raise BadModel(f"{path}: damaged ({error}): download it again") from None
            for name, (shape, dtype, offset) in entries.items():
                file = Path(path).name
                if name in self._where and self.listed.get(name, file) != file:
                    clashes.append((name, self._where[name]))
                if dtype not in DTYPES:
                    raise BadModel(f"{path}: tensor {name} has dtype {dtype}, which is not read "
                                   "here: take the checkpoint in float32, float16 or bfloat16")
                self._where[name] = pages, path, shape, DTYPES[dtype], start + offset
        self._where = dict(sorted(self._where.items()))
        for name, (_, path, *_) in clashes:
            older = LazyWeights([path])[name]
            if older.shape != self[name].shape or not bool((older == self[name]).all()):
                last = Path(self._where[name][1]).name
                raise BadModel(f"{path}: tensor {name} is in {last} too, with other values, and "
                               f"the index names the first: make it name {last}, if that is to be "
                               "loaded, or take the tensor out of that file")

    @staticmethod
    def _header(path) -> tuple:
        """(where the data begins, {name: (shape, dtype, offset)}).

        The library accepts a name twice, and tensors without elements."""
        def once(pairs):
            table = dict(pairs)
            if len(table) != len(pairs):
                raise ValueError(f"a name twice among {sorted(k for k, _ in pairs)[:3]}")
            return table
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= 100_000_000:
                    raise ValueError(f"a header of {length} bytes")
                table = loads(file.read(length), object_pairs_hook=once)
            table.pop("__metadata__", None)
            entries = {name: (tuple(entry["shape"]), entry["dtype"], entry["data_offsets"][0])
                       for name, entry in table.items()}
            for name, (shape, _, _) in entries.items():
                if not all(type(n) is int and n > 0 for n in shape):
                    raise ValueError(f"tensor {name} of shape {shape}")
        except (AttributeError, LookupError, OSError, RecursionError, TypeError,
                ValueError) as error:
            raise BadModel(f"{path}: damaged ({error!r}): download it again") from None
        return 8 + length, entries

    def __getitem__(self, name) -> Tensor:
        pages, path, shape, dtype, offset = self._where[name]
        flat = torch.frombuffer(pages, dtype=dtype, count=math.prod(shape), offset=offset)
        if dtype.is_floating_point:
            low, high = flat.aminmax()              # NaN comes through; no copy of the tensor
            if not math.isfinite(low) or not math.isfinite(high):
                raise BadModel(f"{path}: tensor {name} holds NaN or infinity: use another "
                               "checkpoint")
        return flat.view(shape)

    def release(self, name):
        """Drop a tensor's pages from memory; they are read again if the tensor is used again.
        What was written into them is lost. A system that cannot drop pages keeps them."""
        pages, _, shape, dtype, offset = self._where[name]
        first = offset - offset % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED, first,
                          offset - first + math.prod(shape) * dtype.itemsize)

    @property
    def dtype(self):
        """That of most of the numbers, if they are floating point; else BadModel."""
        total = Counter()
        for _, _, shape, dtype, _ in self._where.values():
            total[dtype] += math.prod(shape)
        dtype = total.most_common(1)[0][0] if total else torch.float32
        if not dtype.is_floating_point:
            raise BadModel(f"{next(iter(self._where.values()))[1]}: holds {dtype} weights: take a "
                           "checkpoint that is not quantised")
        return dtype

    def __contains__(self, name):
        return name in self._where                  # Mapping's own would read the tensor

    def __iter__(self):
        return iter(self._where)

    def __len__(self):
        return len(self._where)

    def shape(self, name) -> tuple:
        """Shape of a tensor, without reading it."""
        return self._where[name][2]


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


def save_weights(folder, tensors: Mapping, max_bytes: int = 5_000_000_000):
    """Write model.safetensors, or shards of at most max_bytes with their index.

    Each file is written aside and renamed. Tensors that share memory are stored once each.
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
        index.write_text(json.dumps(table, indent=1))
    else:
        index.unlink(missing_ok=True)
    for stale in set(folder.glob("model*.safetensors")) - {folder / file for file in files}:
        stale.unlink()


def expand_names(module, names) -> dict:
    """{our parameter: (their names)} with every {} replaced by its layer number."""
    table = {}
    for ours, _ in module.named_parameters():
        layers = re.findall(r"(?<=\.)\d+(?=\.)", ours)
        theirs = names.get(ours) or names.get(re.sub(r"(?<=\.)\d+(?=\.)", "{}", ours))
        if theirs is None:
            raise BadModel(f"parameter {ours} has no name in the table of {type(module).__name__}")
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        table[ours] = tuple(name.format(*layers) for name in theirs)
    return table


def materialize(module, dtype):
    """Give memory to parameters on the meta device; tied ones stay tied, unlike in to_empty()."""
    fresh = {}
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None and p.is_meta:
                if id(p) not in fresh:
                    empty = torch.empty_like(p, device="cpu", dtype=dtype)
                    fresh[id(p)] = torch.nn.Parameter(empty, p.requires_grad)
                part._parameters[name] = fresh[id(p)]


def load_into(module, names: Mapping, weights: Mapping, ignore: Mapping | None = None, dtype=None):
    """Copy `weights` into the parameters of `module` in place; returns it.

    names: {ours: theirs}; {} stands for a layer number; a tuple of theirs is concatenated on dim 0
    (fused q, k, v), ZEROS in it is as large as the first. ignore: {regex of theirs: reason}, of
    which a formats.unused.Claim is checked. A module built on the meta device is given memory
    on the CPU, in dtype or the file's own; another keeps its own dtype.
    Nothing is copied unless all fits: BadModel names the tensor that is
    missing, left over, or of the wrong shape, with both shapes."""
    table, used = expand_names(module, names), set()
    ours = dict(module.named_parameters())
    for name, theirs in table.items():
        if lost := [t for t in theirs if t not in weights and t != ZEROS]:
            file = getattr(weights, "listed", {}).get(lost[0])
            raise BadModel(f"tensor {lost[0]} is missing (needed for {name}): " + (
                f"the index names {file}, which does not hold it: download that file again" if file
                else "wrong kind of model?"))
        shapes = [tuple(weights.shape(t) if hasattr(weights, "shape") else weights[t].shape)
                  for t in (theirs[0] if t == ZEROS else t for t in theirs)]
        want = tuple(ours[name].shape)
        got = (sum(s[0] for s in shapes if s), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        if got != want or any(s[1:] != want[1:] for s in shapes):
            raise BadModel(f"tensor {', '.join(theirs)}: shape {' + '.join(map(str, shapes))}, but "
                           f"{name} needs {want}: config.json and weights disagree")
        used.update(theirs)
    rest = []
    for name in (t for t in weights if t not in used):
        reason = next((r for pattern, r in (ignore or {}).items() if re.fullmatch(pattern, name)),
                      None)
        if isinstance(reason, Claim):
            reason.check(name, weights)
        elif reason is None:
            rest.append(name)
    if rest:
        raise BadModel(f"tensor {rest[0]} (and {len(rest) - 1} more) has no place in "
                       f"{type(module).__name__}: wrong kind of model?")
    materialize(module, dtype or getattr(weights, "dtype", None))
    ours = dict(module.named_parameters())
    with torch.no_grad():
        for name, theirs in table.items():
            row = 0
            for their in theirs:
                zeros = their == ZEROS
                tensor = torch.zeros_like(weights[theirs[0]]) if zeros else weights[their]
                target = ours[name] if len(theirs) == 1 else ours[name][row:row + len(tensor)]
                target.copy_(tensor)
                row += len(tensor) if len(theirs) > 1 else 0
                if not zeros:
                    release(weights, their)
    return module


def export(module, names: Mapping, rows: Mapping | None = None) -> dict[str, Tensor]:
    """The reverse of `load_into`: {theirs: tensor}, views where ours is fused.

    rows: {our name, {} for a layer number: rows of its pieces} (names.fused_rows); what is not in
    it is split into equal pieces."""
    ours, out = dict(module.named_parameters()), {}
    for name, theirs in expand_names(module, names).items():
        tensor = ours[name].detach()
        if len(theirs) == 1:
            out[theirs[0]] = tensor
            continue
        equal = [len(tensor) // len(theirs)] * len(theirs)
        sizes = (rows or {}).get(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), equal)
        out.update(zip(theirs, tensor.split(sizes), strict=True))
    out.pop(ZEROS, None)
    return out


def check_identity_layer(weights, known, C):
    """{tensor: reason} of a second linear layer that does nothing. Raises BadModel else."""
    names = [known.get(f"multi_modal_projector.linear_2.{k}") for k in ("weight", "bias")]
    if None in names or weights.shape(names[0]) != (C, C) or not (
            torch.equal(weights[names[0]].float(), torch.eye(C))
            and not weights[names[1]].any()):
        raise BadModel(f"tensor {names[0]}: projector_hidden_act is linear, so this must be "
                            "the identity; take another model")
    return {re.escape(name): "the identity, see save_pretrained" for name in names}
