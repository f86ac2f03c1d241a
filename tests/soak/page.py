"""docs/reliability.md, from the soak's own records: what was done how often, and what held."""

import json
import textwrap
from collections import defaultdict

from soak import records

PAGE = records.ROOT / "docs/reliability.md"
FOUND = records.ROOT / "tests/soak/found.jsonl"
GOLDEN = records.ROOT / "tests/golden_losses.json"
# columns of the first table: what the soak calls it, and the head of the column
STAGE_TRIALS = {
    "SIGKILL at a random moment": "SIGKILL at random", "SIGKILL in a save": "in a save",
    "SIGKILL in a resume": "in a resume", "SIGTERM": "SIGTERM", "Ctrl-C": "Ctrl-C",
    "flipped bit": "flipped bit", "read-only folder": "read-only",
    "clock set back": "clock back"}
HEAD = """# Reliability, in figures

Made by `python tests/soak --page` from `tests/soak/records.jsonl`. A line there is a piece of work:
what was done, on which commit, with which seed, how often, how often everything held, and how it
failed where it did not. A piece is repeated with `--only` and `--kind`; the seed decides all but
the moments of the machine.

```
make soak MINUTES=60                                      # goes on where the last soak stopped
python tests/soak --list                                  # what is done, and what is left
python tests/soak --only "SIGKILL in a save" --kind "LoRA" --records again.jsonl
```

A figure that is not 100 % stands as it is: `198 of 200` means that two did not hold. They stand
below under "What did not hold" with the commit on which they were found. An empty cell was not run
yet.

The runs are of very small models (width 32, two layers, eight steps of two samples, a checkpoint
every second step), because hundreds of kills must cost minutes; they go through the same code as
any other run. All on a CPU, one thread, one machine. **Held** means: after the fault the run was
resumed to its end, and `model/` has the same bytes in every file as the undisturbed run's,
`metrics.jsonl` the same lines but for speed and memory, `samples.jsonl`, `bad_samples.jsonl` and
`nothing_to_learn.jsonl` the same bytes, no half file is left, and the faulty run itself ended with
the right exit code, without a traceback, and with one line where it ended by itself.
"""
KILLS = """
## Runs that are disturbed

SIGKILL *in a save* comes before each file operation in turn, from the second save to the end of the
run: every mkdir, open, write, fsync, rename and delete, and with each weight file half written. *In
a resume*: the same from the start of a resumed run to its first step. Two ranks are killed
together; a signal goes to both. *Flipped bit*: of each file in an interrupted run's folder; held is
also a refusal with one line and exit code 3, and of a log's own line a wrong digit that nobody can
see; the model card gives the mean of the losses that the log holds.
"""
REST = """
## Disks, ranks, memory

*Full disk*: a tmpfs of every size in pages of 4 KiB, from one page to what the run needs, so that
it is full at every page that is written. *A rank dies*: one of two is SIGKILLed, the other ends
with 1 and one line. *2, 1, 2 ranks*: the same run goes on with another number of ranks twice, and
ends within 1e-6 of the run that had two all the time, with AdamW in fp32. Other ranks add up in
another order, and Muon, which multiplies in bf16, and moments in 8 bits make more of a last digit:
of five runs each three with Muon and five with 8 bits ended further apart, up to 5e-3 and 1e-2 of a
tensor's largest weight. *Memory*: resident bytes and open files; flat is less than 1 % between the
second tenth and the last. *The model it starts from*: files of other people have no checksum, so a
flipped bit that leaves something valid is used without a word.
"""
HOSTILE = """
## Hostile inputs

Files changed at random, by their structure (JSON, headers) or as bytes; what makes a reader say
something new is kept and changed further. Each must end in a result or in one printable line with
exit code 3 (4 where something would have to be downloaded), in 2 seconds of computing and 500 MB
above the start. *Endings*: how many different things were said in the last piece, without names and
numbers.
"""
GOLDEN_TEXT = """
## Golden losses

The first 20 losses of every recipe's toy stages stand in `tests/golden_losses.json`. On the
processor and with the torch of that file they must be equal to the bit; on others each step may
differ by four times what was measured up to it between the instruction sets of that processor. That
is little at first, and much where a stage learns fast: what began as rounding grows. A change of
arithmetic is seen by the commit that makes it: it is a fault, or it is meant, and then the file
changes with it.

```
python train.py --compare-golden
python train.py --write-golden
```
"""
CONTROLS = """
## Controls

Faults planted into the program (`tests/soak/planted.py`), which the trial that is there for them
must find.
"""


def sums(done):
    """{(what, kind): {done, held, seeds, commits, note, ways}} of records."""
    table = defaultdict(lambda: {"done": 0, "held": 0, "seeds": [], "commits": []})
    for record in done:
        row = table[record["what"], record["kind"]]
        row["done"] += record["done"]
        row["held"] += record["held"]
        row["seeds"].append(record["seed"])
        if record["commit"] not in row["commits"]:
            row["commits"].append(record["commit"])
        for name in ("note", "ways"):
            if name in record:
                row[name] = record[name]
    return table


def cell(row):
    if row is None or not row["done"]:
        return ""
    if row["done"] == row["held"]:
        return f"{row['done']:,}"
    return f"**{row['held']:,} of {row['done']:,}**"


def lines_of(head, rows):
    """A table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(str(value) for value in row)} |"


def seeds(row):
    return f"{min(row['seeds'])} to {max(row['seeds'])}" if len(row["seeds"]) > 1 else "0"


def commits(row):
    return row["commits"][0] if len(row["commits"]) == 1 else f"{len(row['commits'])}, see below"


def item(text):
    """A point of a list, in lines that fit."""
    text = " ".join(text.replace("<", "\\<").split())
    return textwrap.wrap(text, 106, initial_indent="- ", subsequent_indent="  ")


def stage_table(table):
    kinds = [kind for what, kind in table if what in STAGE_TRIALS]
    rows = []
    for kind in dict.fromkeys(kinds):
        rows.append([kind, *(cell(table.get((what, kind))) for what in STAGE_TRIALS)])
    return lines_of(["", *STAGE_TRIALS.values()], rows)


def rest_table(table, wanted):
    """A row for each trial, and below it the last note of those that have one."""
    rows, notes = [], []
    for (what, kind), row in table.items():
        if wanted(what):
            rows.append([what, kind, cell(row), seeds(row), commits(row)])
            if "note" in row:
                notes += item(f"{what}, {kind}: {row['note']}")
    yield from lines_of(["what", "of", "done, all held", "seeds", "commit"], rows)
    if notes:
        yield ""
        yield from notes


def hostile_table(table):
    rows, total, held = [], 0, 0
    for (what, kind), row in table.items():
        if what == "hostile input":
            total, held = total + row["done"], held + row["held"]
            rows.append([kind, cell(row), seeds(row), row.get("ways", ""), commits(row)])
    rows.append(["all", cell({"done": total, "held": held}), "", "", ""])
    return lines_of(["reader of", "inputs, all held", "seeds", "endings", "commit"], rows)


def golden_table():
    """Two losses of each stage, and the largest difference between instruction sets so far."""
    if not GOLDEN.exists():
        return ["`tests/golden_losses.json` was not measured yet."]
    golden = json.loads(GOLDEN.read_text())
    rows = []
    for name, losses in golden["losses"].items():
        rows.append([name, f"{losses[0]:.5f}", f"{losses[-1]:.5f}",
                     *(f"{golden['measured'][name][i]:.1e}" for i in (0, 4, -1))])
    return lines_of(["stage", "first loss", "20th loss", "between instruction sets: step 1",
                     "to step 5", "to step 20"], rows)


def commits_table(done):
    """Which commit was how long in the soak."""
    pieces, seconds = defaultdict(int), defaultdict(float)
    for record in done:
        pieces[record["commit"]] += 1
        seconds[record["commit"]] += record["seconds"]
    rows = [[name, pieces[name], f"{seconds[name] / 60:.0f}"] for name in pieces]
    return lines_of(["commit (+: with changes not committed)", "pieces", "minutes"], rows)


def failures(done):
    """What did not hold, the same kind of fault once."""
    times, first = defaultdict(int), {}
    for record in done:
        if record["what"] == "control":         # there a failure is what is wanted
            continue
        for failure in record["failures"]:
            key = record["what"], record["kind"], failure.partition(": ")[2][:60]
            times[key] += 1
            first.setdefault(key, f"commit {record['commit']}, the first: {failure[:300]}")
    for key, text in first.items():
        what, kind, _ = key
        yield from item(f"{what}, {kind}, {times[key]} times; {text}")
    if not first:
        yield "Nothing."


def write(done):
    """docs/reliability.md."""
    table = sums(done)
    parts = [HEAD, KILLS, "\n", *(line + "\n" for line in stage_table(table)), REST, "\n"]
    others = {what for what, _ in table} - set(STAGE_TRIALS) - {"hostile input", "control"}
    parts += [line + "\n" for line in rest_table(table, others.__contains__)]
    parts += [HOSTILE, "\n", *(line + "\n" for line in hostile_table(table))]
    parts += [CONTROLS, "\n", *(line + "\n" for line in rest_table(table, "control".__eq__))]
    parts += [GOLDEN_TEXT, "\n", *(line + "\n" for line in golden_table())]
    parts += ["\n## What did not hold\n\n", *(line + "\n" for line in failures(done))]
    parts += ["\n## What was found, and how it was mended\n\n"]
    for found in records.read(FOUND):
        text = f"{found['what']} Found by: {found['by']}. Mended: {found['mended']}"
        parts += [line + "\n" for line in item(text)]
    parts += ["\n## On which commits\n\n", *(line + "\n" for line in commits_table(done))]
    PAGE.write_text("".join(parts))
