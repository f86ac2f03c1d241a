"""instruct.journal: every answer is on the disk before the next one is asked for.

    Request --cache_key--> OUT.answers.jsonl: one {"key", "id", "text", "reject"} a line

A key is a hash of all that an answer depends on, so a run that was killed, or a longer one, asks
only what is new. evaluate/benchmarks.py keeps a model's answers the same way.
"""
import fcntl
import hashlib
import json
import os
import time
from dataclasses import dataclass

from tqdm import tqdm

import data
from formats.hub import resolve, weight_files
from formats.errors import note, UsageError
from formats.strict_json import loads


@dataclass(frozen=True)
class Request:
    """One thing to be answered. `key`: hash of all that the answer depends on."""
    name: str                               # id of the sample
    image: str | None                       # its picture, relative to the folder
    key: str
    request: tuple = ()                     # (role, text) ...
    scene: object = None                    # of a toy picture: the truth


def cache_key(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def model_fingerprint(model):
    """What tells a model from the one that is trained next into the same folder."""
    return str(model), weight_files(resolve(model))


class Journal:
    """The answers so far, in a file that is locked while a run writes it.

    A line counts once its newline is on the disk; the torn one of a killed run is cut off."""

    def __init__(self, out):
        self.path, self.rows = f"{out}.answers.jsonl", {}
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise UsageError(f"{self.path}: not a file: choose another --out")
        self.file = open(self.path, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.path}: another run is writing it: wait, or choose another "
                             "--out") from None
        self.file.truncate(self._read())

    def _read(self):
        """Read the whole lines; returns their bytes."""
        whole = 0
        self.file.seek(0)
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = loads(line.decode())
                self.rows[row["key"]] = row
                row["text"], row["reject"]              # KeyError if one is missing
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise data.BadData(f"{self.path}: line {number} is damaged ({error!r}): remove "
                                   "that line, and it is asked again") from None
            whole += len(line)
        return whole

    def __contains__(self, job):
        return job.key in self.rows and "again" not in self.rows[job.key]

    def failed(self, job):
        """What an earlier run wrote about a request that nobody answered: "others were answered",
        "nobody was", or None. It is asked again."""
        return self.rows.get(job.key, {}).get("again")

    def put_off(self, failed, why):
        """[(job, reason)] that are dropped for now; `why`: see `failed`."""
        if failed:
            self._write({job.key: {"key": job.key, "id": job.name, "text": "", "reject": reason,
                                   "again": why} for job, reason in failed})

    def add(self, answers):
        """[(job, text, reason of a rejection or "")]; known ones are ignored."""
        new = {}
        for job, text, reason in answers:
            if job not in self:
                new[job.key] = {"key": job.key, "id": job.name, "text": text, "reject": reason}
        self._write(new)

    def _write(self, rows):
        # ASCII: half a surrogate pair in a bad answer must not stop the run
        self.file.write("".join(json.dumps(row) + "\n" for row in rows.values()).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.rows |= rows


def record_all(jobs, answers, journal, what):
    """Write down the answers as they come, with a bar on a terminal and lines elsewhere."""
    left = sum(job not in journal for job in jobs)
    bar = tqdm(total=len(jobs), initial=len(jobs) - left, desc=what, disable=None, mininterval=.5)
    last_line = time.monotonic()
    for some in answers:
        new = sum(job not in journal for job, *_ in some)
        journal.add(some)
        bar.update(new)
        if bar.disable and time.monotonic() - last_line > 5:
            last_line = time.monotonic()
            note(f"{what}: {sum(job in journal for job in jobs)}/{len(jobs)}")
    bar.close()


def replies_in_order(jobs, journal):
    """[(job, text, reason of a rejection)] in the order of the jobs."""
    refused = {"text": "", "reject": "refused by the endpoint"}
    rows = [journal.rows.get(job.key, refused) for job in jobs]
    return [(job, row["text"], row["reject"]) for job, row in zip(jobs, rows)]


def unanswered_chunks(jobs, journal, size):
    """Yield (start, jobs[start:start + size]), without the chunks that are answered.

    A half-finished chunk is run again in full: sampling is seeded by the position in the chunk, so
    answers repeat, and the journal ignores those it already has."""
    for start in range(0, len(jobs), size):
        chunk = jobs[start:start + size]
        if any(job not in journal for job in chunk):
            yield start, chunk
