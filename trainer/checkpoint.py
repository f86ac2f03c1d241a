"""Checkpoints: what a killed run needs to end with the same bits as one that was not killed.

    step-000500/trained.safetensors      the weights that train, under the model's names
                optimizer.safetensors    "name|key": the optimizer's state of each weight
                trainer.json             the step, and the SHA-256 of both files

A folder is written under another name, flushed to the disk, and renamed; then older ones go. A
folder whose checksums are wrong is passed over in favour of the one before. With several ranks
rank 0 writes whole tensors, so a run may be resumed with another number of ranks."""

import hashlib
import json
import shutil
import sys

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import data
from formats.checkpoints import LazyWeights
from formats.errors import TrainingFailed, UserError
from formats.files import rename_into_place
from kernels.adamw import AdamW
from trainer.distributed import gather_to_rank0, rank, world_size


def sha256_file(path):
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def save_checkpoint(job, out, step, keep):
    """Write out/step-N, then delete all but the last `keep`. Every rank must come here."""
    weights, state = gather_weights(job), gather_state(job)
    if rank():
        return
    final, tmp = out / f"step-{step:06d}", out / f"step-{step:06d}.tmp"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        save_file(weights, tmp / "trained.safetensors")
        save_file(state, tmp / "optimizer.safetensors")
        sums = {path.name: sha256_file(path) for path in sorted(tmp.iterdir())}
        (tmp / "trainer.json").write_text(json.dumps({"step": step, "sha256": sums}) + "\n")
        if final.exists():                  # load_checkpoint passed it over: it is damaged
            shutil.rmtree(final)
        rename_into_place(tmp, final)
    except (OSError, SafetensorError) as error:       # a full disk arrives as either
        shutil.rmtree(tmp, ignore_errors=True)
        raise TrainingFailed(f"{tmp}: {error}; the checkpoint before is whole: free space "
                             "and go on with --resume auto") from None
    # a later one is damaged, or this run would have begun there: it is none of those to keep
    until_now = sorted(folder for folder in out.glob("step-??????") if folder.name <= final.name)
    for old in until_now[:-keep]:
        shutil.rmtree(old)


def gather_weights(job):
    """{name: whole tensor} of what trains, on rank 0."""
    trained, whole = job.trained(), {}
    for name, local in job.local_params.items():
        is_shard = local is not trained[name]
        whole[name] = on_disk(gather_to_rank0(local.data, is_shard))
    return whole


def gather_state(job):
    """{"name|key": whole tensor} of what the optimizers remember, on rank 0."""
    trained, whole = job.trained(), {}
    names = {id(local): name for name, local in job.local_params.items()}
    for optimizer in job.optimizers:
        for local, entries in optimizer.state.items():
            name = names[id(local)]
            is_shard = local is not trained[name]
            for key, value in entries.items():
                if is_shard and value.dim():    # from the host, with --offload-optimizer
                    value = value.to(local.device)
                whole[f"{name}|{key}"] = on_disk(gather_to_rank0(value, is_shard))
    return whole


def on_disk(x):
    """As safetensors wants it; None on ranks that do not write."""
    return None if x is None else x.contiguous()


def load_checkpoint(job, out):
    """Load the newest good checkpoint; returns its step, 0 if there is none."""
    for folder in sorted(out.glob("step-??????"), reverse=True):
        try:
            step, weights, state = open_checkpoint(folder)
        except (OSError, ValueError, KeyError, TypeError, UserError) as error:
            print(f"{folder} passed over: {error}", file=sys.stderr)
            continue
        wanted = {name: tuple(p.shape) for name, p in job.trained().items()}
        if {name: weights.shape(name) for name in weights} != wanted:
            raise data.BadModel(f"{folder}: holds other weights than this run trains; resume with "
                                "the flags it was started with")
        restore(job, weights, state)
        return step
    return 0


def open_checkpoint(folder):
    """(step, weights, optimizer state) of a folder. Raises ValueError and others if damaged."""
    trainer = json.loads((folder / "trainer.json").read_text())
    if folder.name != f"step-{trainer['step']:06d}":
        raise ValueError(f"trainer.json says step {trainer['step']}")
    for name, digest in trainer["sha256"].items():
        if sha256_file(folder / name) != digest:
            raise ValueError("a checksum differs")
    weights = LazyWeights([folder / "trained.safetensors"])
    return trainer["step"], weights, LazyWeights([folder / "optimizer.safetensors"])


def restore(job, weights, state):
    """Copy weights and optimizer state into a job; of a sharded weight this rank's rows."""
    trained = job.trained()

    def rows_here(name, x):
        if job.local_params[name] is trained[name] or not x.dim():
            return x
        return x.chunk(world_size())[rank()]

    with torch.no_grad():
        for name, local in job.local_params.items():
            local.copy_(rows_here(name, weights[name]))
    optimizer_of = {}
    for optimizer in job.optimizers:
        for group in optimizer.param_groups:
            for local in group["params"]:
                optimizer_of[id(local)] = optimizer
    for name_and_key in state:
        name, key = name_and_key.split("|")
        local = job.local_params[name]
        optimizer = optimizer_of[id(local)]
        value = rows_here(name, state[name_and_key])
        if type(optimizer) is AdamW:            # it knows where each of its states belongs
            optimizer.place(local, key, value)
        else:
            optimizer.state[local][key] = value.to(local.device, copy=True)
