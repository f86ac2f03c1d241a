"""What is done to a run: kills, signals, full and read-only disks, flipped bits, a clock set back.

Each trial takes (room, kind, seed) and returns {done, held, failures, ...}, see records.py. After
each fault the run is resumed to its end and compared with the undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from safetensors.numpy import load_file

from soak.kinds import STEPS
from soak.room import Tally

PAGE = 4096
PARTS = 4               # pieces that the file operations of a save are cut into
PASSES = 8              # and the sizes of a full disk
LONGEST_CHAIN = 12      # kills of one run


def dice(kind, seed):
    return random.Random(f"{kind.name}:{seed}")


class Moments:
    """Random moments of a run. The machine is busier at some times than at others: after one that
    came too late the next come earlier, else a little later."""

    def __init__(self, room, kind, seed):
        self.rng, self.longest = dice(kind, seed), room.reference(kind)[2]

    def draw(self):
        return self.rng.uniform(.02, self.longest)

    def learn(self, too_late):
        self.longest *= .8 if too_late else 1.05


# --------------------------------------------------------------------------------- kills, signals

def kill_at_random(room, kind, seed, amount=25):
    """SIGKILL at a random moment, of all ranks at once; then again, until the run is finished."""
    moments, tally = Moments(room, kind, seed), Tally()
    while tally.done < amount:
        out, kills, faults = room.fresh(), 0, []
        while not faults:
            wait = moments.draw()
            if kills == LONGEST_CHAIN or tally.done + kills >= amount:
                wait = 0
            result = room.run(kind, out, "--resume", "auto", kill_after=wait)
            if wait:
                moments.learn(result.ended(0))
            if result.ended(0):                 # the kill came too late, or none was wanted
                break
            kills += 1
            faults = result.faults(-signal.SIGKILL, 0)
        tally.add(kills, faults or room.differences(kind, out), f"{kills} kills")
    return tally.record()


def kill_at_each(room, kind, fault, start, *after, points=slice(None)):
    """SIGKILL before each file operation of a stretch. start(): a new folder and the flags of the
    run that is killed; after: flags of the run behind it. points: which of the operations."""
    log, tally = room.folder / "operations", Tally()

    def run(k):
        out, flags, save_every = start()
        log.unlink(missing_ok=True)
        return out, room.run(kind, out, *flags, save_every=save_every, fault={fault: (k, str(log))})

    out, result = run(0)
    faults = result.faults(0)
    tally.add(0, faults, "counted")
    operations = list(enumerate(log.read_text().splitlines(), 1))
    for k, name in operations[points]:
        out, result = run(k)
        happened = result.codes[0] == -signal.SIGKILL and len(log.read_text().splitlines()) == k
        faults = result.faults(-signal.SIGKILL, 1)      # 1: another rank, which notices
        if not happened:
            faults.append("the kill did not happen")
        again = room.run(kind, out, *after)
        faults += again.faults(0) or room.differences(kind, out)
        where = name.replace(str(room.folder), "")
        tally.add(1, faults, f"before operation {k}, {where}")
    return tally.record()


def kill_in_save(room, kind, seed, points=None):
    """Before each file operation from the second of two saves to the end of the run. A seed is
    every PARTS-th of them."""
    points = points or slice(seed, None, PARTS)
    return kill_at_each(room, kind, "kill_save", lambda: (room.fresh(), ["--keep-last", 1], 4),
                        "--resume", "auto", "--keep-last", 1, points=points)


def kill_in_resume(room, kind, seed):
    """Before each file operation from the start of a resumed run to its first step."""
    return kill_at_each(room, kind, "kill_start",
                        lambda: (room.interrupted(kind), ["--resume", "auto"], 2),
                        "--resume", "auto")


def kill_in_overwrite(room, kind, seed):
    """Before each file operation of --overwrite, up to the first step of the new run."""
    def start():
        out = room.fresh()
        shutil.copytree(room.reference(kind)[0], out)
        return out, ["--overwrite"], 2
    return kill_at_each(room, kind, "kill_start", start, "--overwrite")


def signal_at_random(room, kind, seed, number, code, amount=10):
    """SIGTERM or Ctrl-C at a random moment. Before the first step nothing is saved: the signal
    ends the process as it does any. Ranks that lose another then end with 1."""
    moments, tally = Moments(room, kind, seed), Tally()
    while tally.done < amount:
        out, wait = room.fresh(), moments.draw()
        result = room.run(kind, out, save_every=100, signal_after=[wait, number])
        moments.learn(result.ended(0))
        if result.ended(0):
            continue                            # it came too late
        allowed = (code, -number, 0) if kind.ranks == 1 else (code, -number, 0, 1)
        saved = "stopped at step" in result.errors[0]
        faults = result.faults(*allowed)
        if saved and not (result.ended(code) and any(out.glob("step-??????"))):
            faults.append("it says that it has saved, and has not")
        tally.add(1, faults + room.resumed(kind, out), f"after {wait:.3f} s")
    return tally.record()


def sigterm(room, kind, seed):
    return signal_at_random(room, kind, seed, signal.SIGTERM, 143)


def ctrl_c(room, kind, seed):
    return signal_at_random(room, kind, seed, signal.SIGINT, 130)


# -------------------------------------------------------------------------------------- the disk

@contextmanager
def small_disk(folder, options):
    """A tmpfs mounted at `folder`; root, or a user namespace of one's own, is needed."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def full_disk(room, kind, seed, sizes=None):
    """A disk of each size in pages from one page to what the run needs: so it is full at every
    page that is written. The run must end with 1 and one line; with more room it goes on."""
    tally, pages = Tally(), 1 + seed
    while True:
        with small_disk(room.folder / "disk", f"size={pages * PAGE}") as disk:
            out = disk / "run"
            result = room.run(kind, out)
            if result.ended(0):
                break                           # it had enough
            faults = result.faults(1)
            remount(disk, "size=64m")
            faults += room.resumed(kind, out)
            tally.add(1, faults, f"{pages} pages")
        pages += PASSES
        if sizes and tally.done == sizes:
            break
    return tally.record()


def read_only(room, kind, seed):
    """An output folder that cannot be written: at the start of a run, and before it is resumed."""
    tally = Tally()
    with small_disk(room.folder / "disk", "size=64m") as disk:
        out = disk / "run"
        remount(disk, "ro")
        result = room.run(kind, out)
        remount(disk, "rw")
        faults = result.faults(3, *refused_by_another(result))
        tally.add(1, faults + room.resumed(kind, out), "at the start")
        shutil.rmtree(out)
        shutil.copytree(room.interrupted(kind), out)
        remount(disk, "ro")
        result = room.run(kind, out, "--resume", "auto")
        remount(disk, "rw")
        faults = result.faults(3, *refused_by_another(result))
        tally.add(1, faults + room.resumed(kind, out), "before it is resumed")
    return tally.record()


def refused_by_another(result):
    """The code of a rank whose other rank has refused the run: to it that one is gone."""
    return [1] if 3 in result.codes else []


def flip_bit(path, rng):
    """Turn one bit of a file around; returns which."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return f"byte {place // 8:,} bit {place % 8}"


def flipped_bit(room, kind, seed, amount=3):
    """One bit flipped in each file of an interrupted run's folder, `amount` times each.

    Held: the weights are the undisturbed run's, or the run is refused with one line and code 3 (of
    two ranks the other may end with 1, because the first is gone). A log keeps what it says: one
    wrong digit in it is nobody's to see, and the model card gives the mean of its losses."""
    rng, tally = dice(kind, seed), Tally()
    base = room.interrupted(kind)
    names = sorted(str(p.relative_to(base)) for p in base.rglob("*")
                   if p.is_file() and p.stat().st_size)
    for name in [name for name in names for _ in range(amount)]:
        out = room.interrupted(kind)
        where = flip_bit(out / name, rng)
        result = room.run(kind, out, "--resume", "auto")
        faults = result.faults(0, 3, *refused_by_another(result))
        if not faults and result.codes[0] == 0:
            told = [name, *["model/README.md"] * (name == "metrics.jsonl")]
            faults = [f for f in room.differences(kind, out) if f[:-len(" differs")] not in told]
        tally.add(1, faults, f"{name}, {where}")
    return tally.record()


def flipped_bit_in_start(room, kind, seed, amount=20):
    """One bit flipped in a file of a model that the run starts from. Other people's weights have
    no checksum: a bit that leaves a finite number is not seen."""
    rng, tally, world = dice(kind, seed), Tally(), room.folder / "world"
    room.reference(kind)
    names = [p for p in sorted(world.rglob("*")) if p.is_file() and "rows" not in p.name]
    names = [p for p in names if p.parent.name in ("clip", "llama", "qformer")]
    names = [p for p in names if str(p.parent) in " ".join(kind.flags)]
    for _ in range(amount):
        path, out = rng.choice(names), room.fresh()
        before = path.read_bytes()
        where = flip_bit(path, rng)
        try:
            result = room.run(kind, out)
        finally:
            path.write_bytes(before)
        faults = result.faults(0, 3)
        if not faults and result.codes[0] == 0:
            faults = room.differences(kind, out)
        tally.add(1, faults, f"{path.relative_to(world)}, {where}")
    return tally.record()


def clock_set_back(room, kind, seed, amount=5):
    """The clock of the day goes back by a day in the middle of a run, the run is killed, its files
    are dated tomorrow, and it is resumed."""
    moments, tally = Moments(room, kind, seed), Tally()
    while tally.done < amount:
        out, wait = room.fresh(), moments.draw()
        fault = {"clock": (moments.rng.randrange(1, 30), 86400)}
        result = room.run(kind, out, kill_after=wait, fault=fault)
        for path in [out, *out.rglob("*")]:
            stamp = path.stat().st_mtime + 86400
            os.utime(path, (stamp, stamp))
        again = room.run(kind, out, "--resume", "auto", fault=fault)
        faults = result.faults(-signal.SIGKILL, 0) + again.faults(0)
        tally.add(1, faults or room.differences(kind, out), f"after {wait:.3f} s")
    return tally.record()


# ------------------------------------------------------------------------------------- the ranks

def rank_died(room, kind, seed, amount=6):
    """One of two ranks is SIGKILLed: the other ends with 1 and one line, or by torchrun's SIGTERM
    if it has not begun, within 40 seconds."""
    moments, tally = Moments(room, kind, seed), Tally()
    while tally.done < amount:
        out, wait, victim = room.fresh(), moments.draw(), moments.rng.randrange(2)
        result = room.run(kind, out, kill_rank=[wait, victim], limit=40)
        too_late = result.codes[victim] != -signal.SIGKILL
        moments.learn(too_late)
        if too_late:
            continue
        other = 1 - victim
        faults = result.faults(-signal.SIGKILL, -signal.SIGTERM, 1)
        if result.codes[other] == 1 and "--resume auto" not in result.errors[other]:
            faults.append(f"the line does not say how to go on: {result.errors[other][-200:]}")
        tally.add(1, faults + room.resumed(kind, out), f"rank {victim} after {wait:.3f} s")
    return tally.record()


LOG_UNIT = 1.01e-5          # metrics.jsonl has five digits behind the point


def largest_gap(one, other):
    """The largest difference between two runs: of the losses, where it is more than one unit of the
    last digit that the log has, and of the weights relative to the largest of their tensor."""
    gaps = [0.]
    losses = [[json.loads(x)["loss"] for x in (out / "metrics.jsonl").read_text().splitlines()]
              for out in (one, other)]
    gaps += [abs(a - b) / abs(b) for a, b in zip(*losses, strict=True) if abs(a - b) > LOG_UNIT]
    weights = [load_file(out / "model/model.safetensors") for out in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, b in weights[1].items():
        gaps.append(float(np.abs(weights[0][name] - b).max() / max(1e-9, np.abs(b).max())))
    return max(gaps)


EXACT = "--muon", "0", "--optimizer", "adamw"       # of two flags the last counts


def other_ranks(room, kind, seed):
    """Two ranks, then one, then two again: within 1e-6 of the run that had two all the time.

    By AdamW in fp32: Muon's bf16 and moments in 8 bits make 1e-3 and more of the last digits of a
    sum, which another number of ranks adds up in another order."""
    kind = replace(kind, name=f"{kind.name}, AdamW", flags=(*kind.flags, *EXACT))
    rng, tally = dice(kind, seed), Tally()
    first = rng.randrange(1, STEPS - 2)
    second = rng.randrange(first + 1, STEPS)
    out = room.fresh()
    faults, gap = [], 1.0
    for ranks, stop in ((2, first), (1, second)):
        result = room.run(kind, out, "--resume", "auto", ranks=ranks,
                          fault={"signal": (stop - 1, signal.SIGTERM)})
        faults += result.faults(143)
    faults += room.run(kind, out, "--resume", "auto", ranks=2).faults(0)
    if not faults:
        gap = largest_gap(out, room.reference(kind, 2)[0])
        if gap > 1e-6:
            faults = [f"largest difference {gap:.2e}"]
    tally.add(1, faults, f"2 ranks to step {first}, 1 to step {second}, 2 to the end")
    return tally.record(note=f"largest difference {gap:.1e}")
