"""The lines that a run writes down, step by step: metrics.jsonl, samples.jsonl.

A line may be cut short, if the process was killed in the middle of writing it: it is left out, the
resumed run writes it again. A line may also be damaged on the disk. It decides nothing about the
weights, so the run goes on without it, and says so."""

import json
import math
import sys

from formats.files import atomic_write
from formats.strict_json import loads


def read_lines(path, last=math.inf, **kinds):
    """[(text, row)] of a .jsonl up to a step; those of no use are left out. kinds: {key: type} that
    a row must have, beside a step."""
    kinds, found = {"step": int, **kinds}, []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            text = line.decode()
            row = loads(text)
            if type(row) is not dict or any(type(row.get(key)) is not kinds[key] for key in kinds):
                raise ValueError(f"no object with {', '.join(kinds)}")
        except (ValueError, RecursionError) as error:       # of which UnicodeDecodeError is one
            print(f"{path}: line {number} is damaged and left out ({error})", file=sys.stderr)
            continue
        if row["step"] <= last:
            found.append((f"{text}\n", row))
    return found


def truncate_log(path, step):
    """Drop the lines of a .jsonl that a resumed run will write again, and one cut short."""
    if path.exists():
        atomic_write(path, "".join(text for text, _ in read_lines(path, step)))


def append_lines(path, lines):
    with open(path, "a") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
