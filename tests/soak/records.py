"""records.jsonl: what the soak did, a line a piece of work.

    {"what": "kill at a random moment", "kind": "stage 1", "seed": 3, "commit": "1a2b3c4",
     "done": 25, "held": 25, "failures": [], "seconds": 21.5}

done: how often the fault did happen (a kill that came too late is none). held: after how many of
them everything was as promised. A commit that ends in + had changes that were not committed."""

import json
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "tests/soak/records.jsonl"
UNRELATED = ("tests/soak/records.jsonl", "docs/")       # no change of these changes a result


def commit():
    """The commit of this program's folder, with a + if files that it knows have changed."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, text=True, capture_output=True).stdout

    changed = [line[3:] for line in git("status", "--porcelain", "-uno").splitlines()]
    dirty = any(not path.startswith(UNRELATED) for path in changed)
    return git("rev-parse", "--short=7", "HEAD").strip() + "+" * dirty


def read(path=RECORDS):
    """The records; a line that was cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("}\n")]


def append(record, path=RECORDS):
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def done_of(records):
    """{(what, kind): how often it was done}"""
    total = Counter()
    for record in records:
        total[record["what"], record["kind"]] += record["done"]
    return total


def next_seed(records, what, kind):
    """The first seed that no record has: work that is done is not done again."""
    used = [r["seed"] for r in records if (r["what"], r["kind"]) == (what, kind)]
    return max(used, default=-1) + 1
