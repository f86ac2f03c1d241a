"""TODO"""

import fcntl
import json
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import data
from formats.files import atomic_write
from formats.strict_json import read_config
from trainer.rows import LISTS


def truncate_log(path, step):
    """Drop the lines of a .jsonl that a resumed run will write again, and one cut short."""
    if path.exists():
        lines = [x for x in path.read_text().splitlines(True) if x.endswith("}\n")]
        atomic_write(path, "".join(x for x in lines if json.loads(x)["step"] <= step))


def plot_loss(out):
    """loss.png from metrics.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([x["step"] for x in lines], [x["loss"] for x in lines])
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(out / "loss.png", dpi=100)
    pyplot.close(figure)


def run_config(args):
    """What decides the finished bits: the content of config.json."""
    skip = {"free", "plan", "memory", "gpus", "mfu", "resume", "overwrite", "save_every",
            "keep_last", "debug", "row", "show_batch", "part", "output_dir", "workers",
            "checkpoint", "offload", "on_bad_sample", "most_bad", "follow_links",
            *vars(args.row)}
    return json.loads(json.dumps({**{k: v for k, v in sorted(vars(args).items()) if k not in skip},
                                  "stage_row": vars(args.row)}))


def lock_folder(out):
    """The output folder, ours alone while the result is open."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)     # workers do not inherit this kind
        return lock
    except BlockingIOError:
        lock.close()
        raise data.BadData(f"{out} is in use by another run; wait for it, or give another "
                           "--output-dir") from None


def check_resumable(out, args):
    """Refuses, and changes nothing, if the folder holds what the flags do not fit."""
    if not (out / "config.json").exists():
        if (out / "model").exists() or any(out.glob("step-??????")):
            raise data.BadData(f"{out} holds a model but no config.json of a run; give another "
                               "--output-dir")
        return
    old, new = read_config(out), run_config(args)
    if not isinstance(old.get("stage_row"), dict):
        raise data.BadData(f"{out} holds something that is not a run; give another --output-dir")
    if args.overwrite:
        return
    if not args.resume:
        raise data.BadData(f"{out} holds a run already; --resume auto goes on with it, --overwrite "
                           "deletes it, --output-dir goes elsewhere")
    old, new = ({**c, **c["stage_row"], "from": c.get("start")} for c in (old, new))
    changed = [f"--{k.replace('_', '-')}" for k in new
               if k not in ("stage_row", "start") and old.get(k) != new[k]]
    if changed:
        raise data.BadData(f"{out}: --resume with other flags ({', '.join(changed)}); give the "
                           "flags of its config.json, or --overwrite to start anew")


def write_manifest(out, args, job):
    """The run begins: config.json, and run.json: what would have to be equal for the same bits.

    config.json is the first file of a run to come and the last to go."""
    if args.overwrite:
        for name in ("step-*", "model", "model.tmp", "metrics.jsonl", "samples.jsonl",
                     *LISTS, "rows.safetensors", "loss.png",
                     "nan-step-*.json", "run.json", "config.json"):
            for path in out.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    atomic_write(out / "config.json", json.dumps(run_config(args), indent=1) + "\n")
    sha = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parents[1], text=True,
                                                 capture_output=True).stdout.strip()
    atomic_write(out / "run.json", json.dumps({
        "python": platform.python_version(), "torch": torch.__version__,
        "machine": platform.machine(), "device": str(next(job.model.parameters()).device),
        "threads": torch.get_num_threads(), "dtype": str(job.dtype), "seed": args.seed,
        "git": sha or None, "steps": job.steps,
        "trained": sum(p.numel() for p in job.trained().values()),
        "frozen": sum(p.numel() for p in job.model.parameters() if not p.requires_grad)},
        indent=1) + "\n")
