"""TODO"""

import hashlib
import json
import shutil
import sys

import torch
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
    """out/step-N: weights that train, optimizer state, and trainer.json with their checksums."""
    final, aside = out / f"step-{step:06d}", out / f"step-{step:06d}.tmp"
    trained = job.trained()
    names = {id(q): (n, q is not trained[n]) for n, q in job.held.items()}
    weights = {n: gather_to_rank0(q.data, q is not trained[n]) for n, q in job.held.items()}
    state = {f"{names[id(q)][0]}|{key}": gather_to_rank0(value, names[id(q)][1])
             for o in job.optimizers for q, entry in o.state.items()
             for key, value in entry.items()}
    if rank():
        return
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_file({n: p.contiguous() for n, p in weights.items()},
                  aside / "trained.safetensors")
        save_file({n: v.contiguous() for n, v in state.items()}, aside / "optimizer.safetensors")
        files = {p.name: sha256_file(p) for p in sorted(aside.iterdir())}
        (aside / "trainer.json").write_text(json.dumps({"step": step, "sha256": files}) + "\n")
        if final.exists():                          # `restore` passed it over: it is damaged
            shutil.rmtree(final)
        rename_into_place(aside, final)
    except (OSError, data.SafetensorError) as error:       # a full disk arrives as either
        shutil.rmtree(aside, ignore_errors=True)
        raise TrainingFailed(f"{aside}: {error}; the checkpoint before is whole: free space "
                                  "and go on with --resume auto") from None
    # a later one is damaged, or this run would have begun there: it is none of those to keep
    for old in sorted(f for f in out.glob("step-??????") if f.name <= final.name)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(job, out):
    """Load the newest good checkpoint; returns its step, 0 if there is none."""
    for folder in sorted(out.glob("step-??????"), reverse=True):
        try:
            trainer = json.loads((folder / "trainer.json").read_text())
            if folder.name != f"step-{trainer['step']:06d}":
                raise ValueError(f"trainer.json says step {trainer['step']}")
            if any(sha256_file(folder / n) != d for n, d in trainer["sha256"].items()):
                raise ValueError("a checksum differs")
            weights = LazyWeights([folder / "trained.safetensors"])
            state = LazyWeights([folder / "optimizer.safetensors"])
        except (OSError, ValueError, KeyError, TypeError, UserError) as error:
            print(f"{folder} passed over: {error}", file=sys.stderr)
            continue
        trained = job.trained()
        shapes = {n: tuple(p.shape) for n, p in trained.items()}
        if {n: weights.shape(n) for n in weights} != shapes:
            raise data.BadModel(f"{folder}: holds other weights than this run trains; resume with "
                                "the flags it was started with")
        mine = lambda name, x: x if job.held[name] is trained[name] or not x.dim() else (
            x.chunk(world_size())[rank()])
        with torch.no_grad():
            for name, q in job.held.items():
                q.copy_(mine(name, weights[name]))
        names = {n: (o, q) for o in job.optimizers for g in o.param_groups for q in g["params"]
                 for n, held in job.held.items() if held is q}
        for key in state:
            name, entry = key.split("|")
            optimizer, q = names[name]
            device = "cpu" if type(optimizer) is AdamW and entry == "step" else q.device
            optimizer.state[q][entry] = mine(name, state[key]).to(device, copy=True)
        return trainer["step"]
    return 0
