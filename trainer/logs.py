"""trainer/logs.py: the .jsonl files of a run, a line a step."""

import json

from formats.files import atomic_write


def truncate_log(path, step):
    """Drop the lines of a .jsonl that a resumed run will write again, and one cut short."""
    if path.exists():
        lines = path.read_text().splitlines(True)
        kept = [x for x in lines if x.endswith("}\n") and json.loads(x)["step"] <= step]
        atomic_write(path, "".join(kept))


def append_lines(path, lines):
    with open(path, "a") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
