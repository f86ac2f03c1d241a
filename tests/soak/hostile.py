"""Readers of other people's files, and files that were changed at random.

Each input must end in a result, or in one printable line with exit code 3 (4 where something would
have to be downloaded), within 2 seconds of computing and 500 MB of memory above the start.

An input that makes a reader say something new is kept and changed further: so the search goes on
where it found something. A piece of work is a function of its seed. An input that is a fault is
made smaller and put into tests/soak/cases/, where tests/test_hostile.py reads it."""

import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import traceback
from pathlib import Path

from faults import in_child
from formats.errors import exit_status
from soak import mutate, targets
from soak.room import Tally

CASES = Path(__file__).parent / "cases"
SECONDS, BYTES, LONGEST_LINE = 2.0, 500_000_000, 1500
STUCK = 60                  # seconds on the wall after which an input counts as one without end
KINDS = tuple(target.name for target in targets.TARGETS)
SEEDS = 9
SPREAD = 3                  # of so many inputs one is of what was kept


def peak_bytes(reset=False):
    """The most memory that this process had, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", text)[1])


def seconds_used():
    """Computing time of this process and of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def attempt(read, folder):
    """(what is wrong or "", what was said) of reading a folder."""
    words, began = io.StringIO(), seconds_used()
    before = peak_bytes(reset=True)

    def run():
        read(folder)

    try:
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(io.StringIO()):
            code = exit_status(run)
    except BaseException as error:      # a panic of a Rust library is no Exception
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return f"{type(error).__name__} at {place}: {error}"[:300], ""
    said, used, grown = words.getvalue(), seconds_used() - began, peak_bytes() - before
    errors = [line for line in said.split("\n") if line.startswith("error: ")]
    if code not in (0, 3, 4):
        return f"exit code {code}: {said[-200:]}", said
    if code and (len(errors) != 1 or not said.endswith(errors[0] + "\n")):
        return f"{len(errors)} lines that begin with error: {said[-200:]}", said
    if errors and not errors[0].isprintable():
        return f"a line that could command a terminal: {errors[0][:200]!r}", said
    if errors and len(errors[0]) > LONGEST_LINE:
        return f"a line of {len(errors[0]):,} characters: {errors[0][:200]}", said
    if used > SECONDS:
        return f"{used:.1f} s of computing: {said[-200:]}", said
    if grown > BYTES:
        return f"{grown / 1e6:.0f} MB of memory: {said[-200:]}", said
    return "", said


def gist(said):
    """What was said, without the numbers, names and quoted texts that differ from input to
    input."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+|/\S+|\S{25,}", "_", said)[:300]


def kind_of(fault):
    """A fault without its numbers, as two inputs of one kind have it."""
    return re.sub(r"[\d.,]+", "_", fault.split(":")[0])[:40]


def smaller(read, folder, path, content, fault, most=150):
    """A shorter content with the same kind of fault, found by leaving out more and more parts."""
    kind, size = kind_of(fault), max(1, len(content) // 2)
    while size and most:
        at = 0
        while at < len(content) and most:
            shorter, most = content[:at] + content[at + size:], most - 1
            path.write_bytes(shorter)
            if kind_of(attempt(read, folder)[0]) == kind:
                content = shorter
            else:
                at += size
        size //= 2
    path.write_bytes(content)
    return content


class Search:
    """A search in one target: its folder, what was kept, what was found."""

    def __init__(self, target, source, folder, rng):
        self.target, self.folder, self.rng = target, Path(folder), rng
        self.folder.mkdir(parents=True)
        for path in Path(source).iterdir():
            if path.is_file():
                shutil.copyfile(path, self.folder / path.name)
        self.seeds = {name: (self.folder / name).read_bytes() for name in target.files}
        self.kept = {name: [content] for name, content in self.seeds.items()}
        self.said, self.faults, self.done = set(), [], 0

    def one(self):
        """Change one file, read, put the file back."""
        name = self.rng.choice(self.target.files)
        source = self.seeds[name]
        if self.rng.randrange(SPREAD) == 0:
            source = self.rng.choice(self.kept[name])
        content, path = mutate.change(self.rng, self.target.form, source), self.folder / name
        path.write_bytes(content)
        signal.alarm(STUCK)
        fault, said = attempt(self.target.read, self.folder)
        signal.alarm(0)
        if fault:
            if fault.split(":")[0] not in [known[1].split(":")[0] for known in self.faults]:
                content = smaller(self.target.read, self.folder, path, content, fault)
            self.faults.append((name, fault, content.hex()))
        elif gist(said) not in self.said and len(content) < 50_000:
            self.said.add(gist(said))
            self.kept[name].append(content)
        path.write_bytes(self.seeds[name])
        self.done += 1


def search(target, source, folder, seed, amount):
    """In a child: [done, faults, ways to end]; progress goes to `folder`.txt for the parent."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    limit = 8_000_000_000               # of address space: the machine stays usable
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    found = Search(target, source, folder, random.Random(f"{target.name}:{seed}"))
    progress = Path(f"{folder}.txt")
    attempt(target.read, found.folder)      # what is imported by the first read is no input's
    while found.done < amount:
        found.one()
        if found.done % 20 == 0:
            progress.write_text(str(found.done))
    return found.done, found.faults, len(found.said)


def keep_case(target, name, seed, number, content):
    """Write an input that is a fault to where the tests read it; returns its name."""
    CASES.mkdir(exist_ok=True)
    case = CASES / f"{target.name.replace(' ', '_')}--{seed}-{number}--{name}"
    case.write_bytes(content)
    return case.name


def prepare(room):
    """The seeds of all targets, made once by a child."""
    seeds = room.folder / "seeds"
    if not seeds.exists():
        seeds.mkdir()
        in_child(targets.write_seeds, seeds, room.folder / "world")
    return seeds


def piece(room, kind, seed):
    """A piece of the search in the target of this name."""
    target, seeds, tally = targets.BY_NAME[kind], prepare(room), Tally()
    source = targets.seed_folder(seeds, room.folder / "world", target)
    folder = room.folder / "hostile" / f"{kind} {seed}"
    found = in_child(search, target, source, folder, seed, target.amount, limit=7200)
    if found is None:                   # the child came to an end: the input lies there
        done = int(Path(f"{folder}.txt").read_text()) if Path(f"{folder}.txt").exists() else 0
        changed = [(name, (folder / name).read_bytes()) for name in target.files
                   if (folder / name).read_bytes() != (source / name).read_bytes()]
        for name, content in changed:
            case = keep_case(target, name, seed, "end", content)
            tally.add(1, [f"the process came to an end, about input {done}"], case)
        tally.add(done, [], "")
        return tally.record()
    done, faults, ways = found
    known = set()
    for number, (name, fault, content) in enumerate(faults):
        case = name
        if fault.split(":")[0] not in known:
            known.add(fault.split(":")[0])
            case = keep_case(target, name, seed, number, bytes.fromhex(content))
        tally.add(1, [fault], case)
    tally.add(done - len(faults), [], "")
    shutil.rmtree(folder, ignore_errors=True)
    return tally.record(ways=ways)
