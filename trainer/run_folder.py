"""The output folder of a run, and what a long run needs besides the five movements of its loop.

    config.json         the flags that decide the result, and the recipe's row
    run.json            what else would have to be equal for the same bits: versions, threads, dtype
    metrics.jsonl       a line a step: loss, gradient norm, rate, speed
    samples.jsonl       what the model says of four held-out scenes, at steps 0, 50, 100, 200 ...
    step-000500/        a checkpoint, trainer/checkpoint.py
    best-000400/        the weights of the lowest held-out loss, trainer/held_out.py
    nan-step-7.json     the samples of a step whose loss or gradient was NaN or infinite
    loss.png  learning.png  model/      at the end; with --keep-adapter adapter/ beside them
    lock                held while a process trains here

Only the first rank writes."""

import argparse
import fcntl
import json
import math
import platform
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import data
from formats.errors import TrainingFailed
from formats.files import atomic_write, rename_into_place
from formats.strict_json import read_config
from trainer.allocator import setting as allocator_setting
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.compare import report
from trainer.distributed import all_reduce_sum, rank, StopSignal, unsharded, world_size
from trainer.held_out import best_so_far, HeldOutSamples, load_best, save_best
from trainer.learning import draw_learning, is_sampled, plot_loss
from trainer.loader import MicroBatch, Samples
from trainer.logs import append_lines, truncate_log
from trainer.model_card import git_commit, write_card
from trainer.qlora import weights_in
from trainer.rows import LISTS
from trainer.speed import Throughput

LOGS = ("metrics.jsonl", "samples.jsonl", *LISTS)
# what --overwrite deletes; config.json comes first of a run's files and goes last
OWN_FILES = ("step-*", "best-*", "model", "model.tmp", "adapter", "adapter.tmp", *LOGS,
             "rows.safetensors", "held_out.safetensors", "loss.png", "learning.png",
             "nan-step-*.json", "run.json", "config.json")
# flags that do not change the finished bits, so that a run may be resumed with others
FREE_FLAGS = {"free", "plan", "memory", "gpus", "mfu", "resume", "overwrite", "save_every",
              "keep_last", "debug", "row", "show_batch", "part", "output_dir", "workers",
              "checkpoint", "offload", "offload_optimizer", "offload_gradients", "pcie",
              "on_bad_sample", "most_bad", "follow_links", "sample_every", "published",
              "llm_template", "keep_adapter", "compare"}
SHOWN = ("loss", "tokens_per_second", "mfu", "peak_gb", "data_wait")    # beside the progress bar


# ------------------------------------------------------------------------------ files of the folder

def run_config(args):
    """What decides the finished bits: the content of config.json."""
    fixed = {name: value for name, value in sorted(vars(args).items())
             if name not in FREE_FLAGS and name not in vars(args.row)}
    # through JSON, so that it can be compared with what is read from a file
    return json.loads(json.dumps({**fixed, "stage_row": vars(args.row)}))


def lock_folder(out):
    """Make the output folder and lock it for this process, as long as the result is open."""
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
    old, new = as_flags(old), as_flags(new)
    if set(old) != set(new):
        raise data.BadData(f"{out} was begun by another version, with other names in its "
                           "checkpoints; finish it with that one, or --overwrite to start anew")
    changed = ", ".join(flag for flag in new if old[flag] != new[flag])
    if changed:
        raise data.BadData(f"{out}: --resume with other flags ({changed}); give the "
                           "flags of its config.json, or --overwrite to start anew")


def compare_data(args, out):
    """Refuse another --data file than the finished run in `out` was trained on."""
    samples = Samples(argparse.Namespace(**{**vars(args), "on_bad_sample": "skip"}), out)
    samples.journal.compare(samples.steps())


def as_flags(config):
    """config.json as {flag: value}; the flag of `start` is --from."""
    values = {**config, **config["stage_row"], "from": config.get("start")}
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()
            if name not in ("stage_row", "start")}


def write_manifest(out, args, job, dtype):
    """A run begins: delete the old one, if --overwrite; write config.json and run.json."""
    if args.overwrite:
        for name in OWN_FILES:
            for path in out.glob(name):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    atomic_write(out / "config.json", json.dumps(run_config(args), indent=1) + "\n")
    trained = sum(p.numel() for p in job.trained().values())
    atomic_write(out / "run.json", json.dumps({
        "python": platform.python_version(), "torch": torch.__version__,
        "machine": platform.machine(), "device": str(next(job.model.parameters()).device),
        "threads": torch.get_num_threads(), "dtype": str(dtype), "seed": args.seed,
        "allocator": allocator_setting(),
        "git": git_commit(), "steps": job.steps,
        "trained": trained, "frozen": weights_in(job.model) - trained},
        indent=1) + "\n")


def autocast_dtype(args, device):
    """What the forward computes in: bf16 where the processor multiplies it faster, unless --dtype
    says otherwise. The toy's parts are trained in fp32."""
    fast = device.type != "cpu" or torch.cpu._is_amx_tile_supported()
    if args.stage and (args.dtype == "bf16" or args.dtype == "auto" and fast):
        return torch.bfloat16
    return torch.float32


# ------------------------------------------------------------------------------------------ the run

def with_last(batches, step):
    """(micro-batch, is it the step's last?, seconds that it was waited for).

    One is fetched ahead, because only an iterator's end says which was the last."""
    following, began = iter(batches(step)), time.perf_counter()
    ahead = next(following, None)
    waited = time.perf_counter() - began
    while ahead is not None:
        micro, seconds = ahead, waited
        began = time.perf_counter()
        ahead = next(following, None)
        waited = time.perf_counter() - began
        yield micro, ahead is None, seconds


class Run:
    """A run in its folder. The calls of one run, in order:

        with Run(out, args) as run:         the folder is locked
            run.is_finished()               refuses a folder that the flags do not fit
            run.begin(job)                  writes config.json and run.json
            step = run.resume(job)          loads the newest checkpoint, cuts the logs back to it
            run.micro_batches(step)  run.autocast()  run.add_losses(...)  run.check_finite(...)
            run.log(step + 1, grad_norm)    metrics, progress, samples, checkpoint
            run.finish()                    model/, loss.png and learning.png
    """

    def __init__(self, out, args):
        self.out, self.args = out, args
        self.writes = rank() == 0
        self.dtype = torch.float32
        self.job = self.lock = None
        self.exit_code = 0                  # not 0: a signal has asked the run to stop

    def __enter__(self):
        if self.writes:
            self.lock = lock_folder(self.out)
        return self

    def __exit__(self, *_):
        if self.lock:
            self.lock.close()
        if self.job and self.job.samples:
            self.job.samples.close()        # workers that outlive it end in a traceback

    def is_finished(self):
        """Is the finished model there, and --resume given? Refuses a folder of another run."""
        if self.writes:
            check_resumable(self.out, self.args)
        if not (self.args.resume and (self.out / "model").exists()):
            return False
        if self.args.data and Path(self.args.data).exists():
            compare_data(self.args, self.out)           # was it trained on this file?
        if self.args.eval_data and Path(self.args.eval_data).exists():
            HeldOutSamples(self.args).check_unchanged(self.out, step=1)
        print(f"{self.out / 'model'} is finished already")
        if self.writes:
            report(self.out, self.args)
        return True

    def begin(self, job):
        self.job = job
        self.dtype = autocast_dtype(self.args, next(job.model.parameters()).device)
        if self.writes:
            write_manifest(self.out, self.args, job, self.dtype)

    def resume(self, job):
        """Load the newest good checkpoint, if --resume is given. Returns the steps done so far."""
        self.job = job
        if self.writes:
            for unfinished in self.out.glob("*-??????.tmp"):    # killed in the middle of a save
                shutil.rmtree(unfinished)
        step = 0
        if self.args.resume:
            step = load_checkpoint(job, self.out)
        if job.held_out:
            job.held_out.begin(self.out, step, self.writes)
        self.best = best_so_far(self.out / "metrics.jsonl", step)
        if self.writes:
            for name in LOGS:
                truncate_log(self.out / name, step or -1)       # a new run has no lines at all
        if job.samples:
            job.samples.journal.begin(step, self.writes)
        self.stop = StopSignal()
        self.weight = next(iter(job.trained().values()))
        self.speed = Throughput(self.weight.device, job.steps - step)
        hidden = not (self.writes and sys.stderr.isatty())
        self.bar = tqdm(total=job.steps, initial=step, disable=hidden)
        self.started, self.printed = time.monotonic(), -math.inf
        # FSDP2 must run the loss before anything inside the model
        if step == 0 and world_size() == 1 and is_sampled(0, job.steps, self.args.sample_every):
            self.write_samples(step)
        return step

    # ------------------------------------------------------------------------------------ one step

    def micro_batches(self, step):
        """Pairs (micro-batch, is it the last one of the step?)."""
        self.loss, self.terms, self.usable = 0.0, Counter(), 0
        self.waited, self.tokens, self.flops = 0.0, 0, 0
        for batch, is_last, waited in with_last(self.job.batches, step):
            self.waited += waited
            if self.job.count_flops:
                tokens, flops = self.job.count_flops(batch)
                self.tokens, self.flops = self.tokens + tokens, self.flops + flops
            if isinstance(batch, MicroBatch):
                self.usable += len(batch.counts)        # 0: a blank one, trainer/loader.py
            else:
                self.usable += 1
            yield batch, is_last

    def autocast(self):
        """Matrix products in self.dtype; nothing where the weights have it already."""
        wanted = self.dtype not in (torch.float32, self.weight.dtype)
        return torch.autocast(self.weight.device.type, self.dtype, enabled=wanted)

    def add_losses(self, losses, is_last, step):
        """Add a micro-batch's losses, {name: scalar}, to those of the step.

        Returns True if the coming backward completes the gradients of a step: at the last
        micro-batch, if the step has a usable sample at all. Before that all ranks add up their
        losses (this waits for the GPU), and a loss that is NaN or infinite ends the run."""
        self.loss = self.loss + sum(value.detach() for value in losses.values())
        for name, value in losses.items():
            self.terms[name] += value.detach().double()
        if not is_last:
            return False
        code = self.stop.code
        self.loss, self.usable, terminated, interrupted = all_reduce_sum(
            float(self.loss), self.usable, code == 143, code == 130)
        if world_size() > 1:                # the ranks stop together
            self.exit_code = 130 if interrupted else 0
            self.exit_code = 143 if terminated else self.exit_code
        if not math.isfinite(self.loss):
            self.fail(step, "not computed")
        return self.usable > 0

    def check_finite(self, grad_norm, step):
        """End the run before an update with a gradient that is NaN or infinite."""
        if not math.isfinite(grad_norm):
            self.fail(step, grad_norm)

    def fail(self, step, grad_norm):
        """Name the samples of the step, and raise TrainingFailed. `step` steps are done."""
        samples, size = self.job.samples, self.job.batch
        names = list(range(step * size, (step + 1) * size))
        if samples:
            names = [samples.id(index) for index in names]
        if self.writes:
            text = json.dumps({"step": step + 1, "loss": str(self.loss),
                               "grad_norm": str(grad_norm), "samples": names})
            atomic_write(self.out / f"nan-step-{step + 1}.json", text + "\n")
        raise TrainingFailed(f"step {step + 1}: loss {self.loss}, gradient norm {grad_norm}: "
                             f"stopped after step {step}, no update of this one is kept; lower "
                             "--lr or look at the data")

    def log(self, step, grad_norm):
        """Write down that `step` steps are done; save where it is time. True: stop now."""
        job = self.job
        line = {"step": step, "loss": None, "grad_norm": round(grad_norm, 4)}
        if self.usable:
            line["loss"] = round(self.loss, 5)
        for name, value in self.terms.items():
            if name != "loss":                                  # BLIP-2's three
                line[name] = round(float(value), 5)
        line["lr"] = job.optimizers[-1].param_groups[-1]["lr"]
        # tokens of all ranks; the FLOPs are this GPU's, as its MFU is
        (tokens,) = all_reduce_sum(self.tokens)
        line.update(self.speed.step(job.batch, tokens, self.flops, self.waited))
        is_end = step == job.steps
        if job.held_out and (is_end or step % self.args.eval_every == 0):
            line["eval_loss"] = self.evaluate(step)
        if self.writes:
            append_lines(self.out / "metrics.jsonl", [line])
        self.show_progress(step, line)
        if is_sampled(step, job.steps, self.args.sample_every):
            self.write_samples(step)
        if world_size() == 1:
            self.exit_code = self.stop.code
        if self.exit_code or is_end or step % self.args.save_every == 0:
            save_checkpoint(job, self.out, step, self.args.keep_last)
        if self.exit_code and self.writes:
            print(f"stopped at step {step}, saved; go on with --resume auto", file=sys.stderr)
        return self.exit_code != 0

    def evaluate(self, step):
        """The loss on --eval-data after `step` steps; None if it is not finite."""
        with self.autocast():
            loss = round(self.job.held_out(), 5)
        is_best = loss < self.best[1]
        if is_best:
            self.best = step, loss
            if self.args.keep_best:
                save_best(self.job, self.out, step, loss)
        if self.writes:
            tqdm.write(f"step {step}: held-out loss {loss:.4f}" + ", the lowest so far" * is_best)
        self.speed.restart_clock()
        return loss if math.isfinite(loss) else None

    def write_samples(self, step):
        """What the model says of four pictures now, into samples.jsonl."""
        if self.job.sample:
            with unsharded(self.job.model):     # every rank takes part
                rows = [{"step": step, **row} for row in self.job.sample()]
            if self.writes:
                append_lines(self.out / "samples.jsonl", rows)

    def show_progress(self, step, line):
        """On a terminal the bar; elsewhere a line every ten seconds."""
        self.bar.set_postfix({name: line[name] for name in SHOWN if name in line})
        self.bar.update()
        now = time.monotonic()      # the clock of the day may be set back
        if self.writes and self.bar.disable and now - self.printed > 10:
            self.printed, loss = now, "no usable sample"
            if self.usable:
                loss = f"loss {self.loss:.3f}"
            print(f"step {step}/{self.job.steps}  {loss}  {now - self.started:.0f} s, "
                  f"{line['eta']:,} s left, {line['samples_per_second']} samples/s, "
                  f"{line['data_wait']:.1%} waiting for data", flush=True)

    def finish(self):
        """Write model/, loss.png and learning.png. Returns 0."""
        job, final, tmp = self.job, self.out / "model", self.out / "model.tmp"
        self.bar.close()
        if self.writes and job.samples:
            for line in job.samples.journal.report():
                print(line, file=sys.stderr)
        best = ""
        if self.args.keep_best and self.best[0]:
            load_best(job, self.out, self.best[0])
            best = " with the weights of step {}, of held-out loss {:.4f}".format(*self.best)
        with unsharded(job.model):          # every rank takes part
            if self.writes:
                shutil.rmtree(tmp, ignore_errors=True)
                tmp.mkdir()
                job.save_model(tmp)
                write_card(tmp, self)
                plot_loss(self.out)         # before the model, which says that all is done
                draw_learning(self.out)
                rename_into_place(tmp, final)
                print(f"{final} written after {job.steps} steps, "
                      f"{time.monotonic() - self.started:.0f} s{best}")
                report(self.out, self.args)
        return 0
