"""A folder to run in, the undisturbed run of each kind, and what a disturbed one is compared with.

Two runs are equal if every file of model/ has the same bytes, metrics.jsonl the same lines but for
speed and memory, samples.jsonl and the lists of bad samples the same bytes, and nothing half
written is left behind."""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from faults import in_child, run_children
from soak.kinds import flags_of, make_kinds, STEPS, write_world

# of metrics.jsonl: what depends on the machine's mood
MOODS = {"samples_per_second", "tokens_per_second", "mfu", "peak_gb", "data_wait", "eta"}
LOGS = ("samples.jsonl", "bad_samples.jsonl", "nothing_to_learn.jsonl")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(out):
    """{what: its content, or a hash of it} of a finished run."""
    found = {"left behind": sorted(p.name for p in out.rglob("*.tmp"))}
    for path in sorted((out / "model").rglob("*")):
        if path.is_file():
            found[f"model/{path.relative_to(out / 'model')}"] = sha256(path)
    if (out / "metrics.jsonl").exists():
        found["metrics.jsonl"] = []
        for line in (out / "metrics.jsonl").read_text().splitlines():
            kept = {k: v for k, v in json.loads(line).items() if k not in MOODS}
            found["metrics.jsonl"].append(kept)
    for name in LOGS:
        if (out / name).exists():
            found[name] = (out / name).read_text()
    found["loss.png"] = (out / "loss.png").exists()
    return found


@dataclass
class Result:
    """codes: of each rank. errors: what each wrote to stderr."""
    codes: list
    errors: list
    seconds: float

    def ended(self, code):
        return all(found == code for found in self.codes)

    def faults(self, *allowed):
        """What is wrong with how it ended: a code that is not allowed, a traceback, more than one
        line that begins with "error: "."""
        found = []
        for code, text in zip(self.codes, self.errors):
            if code not in allowed:
                found.append(f"exit code {code}: {text.strip()[-200:]}")
            elif "Traceback" in text:
                found.append(f"traceback: {text.strip()[-200:]}")
            elif code in (1, 2, 3) and f"\n{text}".count("\nerror: ") != 1:
                found.append(f"no line of its own: {text.strip()[-200:]}")
        return found


class Tally:
    """done: how often the fault happened; held: how often all was well after it."""

    def __init__(self):
        self.done = self.held = 0
        self.failures = []

    def add(self, count, faults, about):
        self.done += count
        if faults:
            self.failures.append(f"{about}: {'; '.join(faults)}"[:500])
        else:
            self.held += count

    def record(self, **more):
        return {"done": self.done, "held": self.held, "failures": self.failures, **more}


class Room:
    """train: the module, imported by faults.warm_up. folder: empty."""

    def __init__(self, train, folder):
        self.train, self.folder = train, Path(folder)
        (self.folder / "world").mkdir()
        in_child(lambda: write_world(self.folder / "world"))
        self.kinds = make_kinds(self.folder / "world")
        self.references, self.count = {}, 0

    def fresh(self):
        """The path of a new output folder; the last one is deleted."""
        shutil.rmtree(self.folder / f"run-{self.count}", ignore_errors=True)
        self.count += 1
        return self.folder / f"run-{self.count}"

    def run(self, kind, out, *more, steps=STEPS, save_every=2, ranks=None, fault=None, **order):
        """One run of this kind; order: see faults.py."""
        log, ranks = self.folder / "child", ranks or kind.ranks
        order = {"argv": flags_of(kind, out, *more, steps=steps, save_every=save_every),
                 "fault": fault or {}, "log": str(log), "cwd": str(self.folder), "ranks": ranks,
                 **order}
        began = time.monotonic()
        codes = run_children(self.train, order)
        seconds, errors = time.monotonic() - began, []
        for rank in range(ranks):
            name = f"{log}-{rank}.err" if rank else f"{log}.err"
            errors.append(Path(name).read_text(errors="replace"))
        return Result(codes, errors, seconds)

    def reference(self, kind, ranks=None):
        """(folder, snapshot, seconds) of the undisturbed run. It is made twice: a run that differs
        from itself is an AssertionError."""
        key = kind.name, ranks or kind.ranks
        if key not in self.references:
            made = []
            for name in ("first", "second"):
                out = self.folder / f"undisturbed-{name}" / f"{kind.name} {key[1]}"
                result = self.run(kind, out, ranks=ranks)
                assert result.ended(0), result.errors
                made.append(snapshot(out))
            assert made[0] == made[1], different(*made)
            self.references[key] = out, made[1], result.seconds
        return self.references[key]

    def differences(self, kind, out):
        """What of a finished run differs from the undisturbed one: names."""
        return different(snapshot(out), self.reference(kind)[1])

    def resumed(self, kind, out, *more):
        """Resume to the end; what is wrong with the result."""
        result = self.run(kind, out, "--resume", "auto", *more)
        return result.faults(0) or self.differences(kind, out)

    def interrupted(self, kind):
        """A new copy of a run that was ended in the middle of its last save."""
        out = self.fresh()
        shutil.copytree(self.reference(kind)[0], out)
        shutil.rmtree(out / "model")
        (out / "step-000008").rename(out / "step-000008.tmp")
        (out / "step-000008.tmp/trainer.json").unlink()
        return out


def different(a, b):
    return [f"{name} differs" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


