"""The data file of a run: its samples in memory, what changed in it, and what was left out.

    Rows      the samples of the file in one block of bytes, which all workers share
    Journal   bad_samples.jsonl, nothing_to_learn.jsonl, and rows.safetensors: what a run that is
              resumed compares the file with

Some samples teach nothing. There are two kinds, and each has a file of its own:

    bad_samples.jsonl         samples that cannot be used; only with --on-bad-sample skip
    nothing_to_learn.jsonl    samples that can be read, but none of their tokens has loss

Both hold a line for each sample, not for each time that it is met: {"step", "sample", "where",
"why"}. `sample` is its number in the file, from 0; `where` its row; `step` is when it was met,
0: before the run began."""

import hashlib
import json
import os
import sys
from array import array

import torch
from safetensors import safe_open, SafetensorError

from formats.checkpoints import save_tensors
from formats.conversations import images_of, read_rows
from formats.errors import BadData, NothingToLearn
from formats.files import atomic_write, fsync_path
from trainer.logs import read_lines

BAD, NOTHING = "bad_samples.jsonl", "nothing_to_learn.jsonl"
LISTS = BAD, NOTHING
DIGESTS = "rows.safetensors"
# the keys of a sample that are kept: where it stands, and what a run is trained on
WHERE_KEYS, TRAINED_KEYS = ("id", "where", "field"), ("image", "system", "conversations")
AGAIN = "put the old one back, or --overwrite to start anew"
SHOWN = 3                               # samples that a line on stderr names
to_json = json.JSONEncoder(ensure_ascii=False).encode


class Rows:
    """The samples of a data file. rows[i] is a dict {id, where, field, image, conversations}.

    Python objects would be copied into every worker, little by little: whoever looks at an object
    changes its reference count, and so writes to the page of memory that it lies in. One block of
    bytes has one reference count. A sample is parsed when it is asked for, in 10 µs.

    check(sample): raises BadData if the sample cannot be trained on; it must be quick.
    words: of each sample its words, negative without a picture, as data.modality_order wants them.
    bad: {number: what is wrong}. Such a row keeps its place, so that all others keep theirs."""

    def __init__(self, path, check):
        self.path, self.bad = path, {}
        self.block, self.ends = bytearray(), array("q", [0])
        self.words, self.digests = array("i"), array("q")
        for _, where, found in read_rows(path):
            if isinstance(found, BadData):
                if str(found).endswith("what follows was not read"):
                    raise BadData(f"{where}: {found}")      # nobody can say what is left out
                self.bad[len(self)] = f"{where}: {found}"
                found = [{"id": where, "where": where, "conversations": []}]
            for sample in found:
                self.append(sample, check)
        if not len(self):
            raise BadData(f"{path}: holds no samples: expected a list of conversations")

    def append(self, sample, check):
        number, words = len(self), 0
        if number not in self.bad:
            try:
                check(sample)
            except NothingToLearn:
                pass                                        # is counted when its turn comes
            except BadData as error:
                self.bad[number] = f"sample {sample['id']}: {error}"
        for turn in sample["conversations"]:
            words += len(turn["value"].split())
        words = max(1, words)           # of an empty row, too: data.modality_order takes no 0
        self.words.append(words if images_of(sample) else -words)
        where = to_json(select(sample, WHERE_KEYS)).encode()
        trained = to_json(select(sample, TRAINED_KEYS)).encode()
        digest = hashlib.blake2b(trained, digest_size=8).digest()
        self.digests.append(int.from_bytes(digest, "little", signed=True))
        self.block += b"[%b,%b]" % (where, trained)
        self.ends.append(len(self.block))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        where, trained = json.loads(self.block[self.ends[i]:self.ends[i + 1]])
        return {**where, **trained}

    def refuse(self, mend="correct them, or leave them out with --on-bad-sample skip"):
        """Raises BadData, if there are bad samples, that names the first of them. mend: what to do
        about them."""
        if not self.bad:
            return
        first = []
        for number in list(self.bad)[:SHOWN]:
            why, where = self.bad[number], self[number]["where"]
            first.append(why if why.startswith(where) else f"{where}, {why}")
        raise BadData(f"{len(self.bad):,} of {len(self):,} samples cannot be trained on: "
                      f"{'; '.join(first)}{and_more(self.bad)}: {mend}")


def select(sample, keys):
    return {key: sample[key] for key in keys if key in sample}


def and_more(items):
    """What a line says of those that it does not name."""
    if len(items) <= SHOWN:
        return ""
    return f"; and {len(items) - SHOWN:,} more"


class Journal:
    """What a run writes down about its samples. All ranks keep it, the first one writes.

    samples: trainer.loader.Samples; out: the run's folder; most_bad: more bad samples end the
    run. met: {file: {number of the sample: why}}."""

    def __init__(self, samples, out, most_bad):
        self.samples, self.rows, self.out, self.most_bad = samples, samples.rows, out, most_bad
        self.met = {name: {} for name in LISTS}
        self.writes = False

    def begin(self, step, writes):
        """A run begins, or goes on after `step` steps. Raises BadData if the file has changed."""
        self.writes = writes
        for name in LISTS:
            for line in self.read(name, step):
                self.met[name][line["sample"]] = line["why"]
        if not self.rows:
            return
        self.compare(step)
        # what the file itself says now, and what was met since the run began; a row that has been
        # corrected is bad no more
        lines = [self.line(0, number, why) for number, why in self.rows.bad.items()]
        lines += [line for line in self.read(BAD, step) if line["step"] > 0]
        if writes:
            save_numbers(self.out / DIGESTS, digest=self.rows.digests, words=self.rows.words)
            if lines or (self.out / BAD).exists():
                text = [json.dumps(line) + "\n" for line in lines]
                atomic_write(self.out / BAD, "".join(text))
        self.met[BAD] = {line["sample"]: line["why"] for line in lines}
        self.judge()

    def line(self, step, number, why):
        where = self.rows[number]["where"] if self.rows else "the toy world"
        return {"step": step, "sample": number, "where": where, "why": why}

    def read(self, name, step):
        """The lines of a file up to a step; one that was cut short or damaged is left out."""
        path = self.out / name
        if not path.exists():
            return []
        return [line for _, line in read_lines(path, step, sample=int, where=str, why=str)]

    def compare(self, step):
        """Refuses a file in which a sample has changed that the first `step` steps trained on."""
        rows = self.rows
        if not step:
            return
        if not (self.out / DIGESTS).exists():       # of a run that an older version began
            print(f"{self.out / DIGESTS} is missing: nobody can tell whether --data is still the "
                  "file that the run began with", file=sys.stderr)
            return
        digests, words = self.load_digests()
        refused = f"{self.out}: --resume with another --data file"
        if len(digests) != len(rows):
            raise BadData(f"{refused}: {rows.path} has {len(rows):,} samples now, and had "
                          f"{len(digests):,}; {AGAIN}")
        # the order of the samples depends on these: it goes on as it began
        rows.words, self.samples.epoch = array("i", words.tolist()), -1
        is_other = digests != torch.frombuffer(rows.digests, dtype=torch.int64)
        changed = is_other.nonzero().flatten().tolist()
        if not changed:
            return
        used = self.samples.used(step)
        for name in LISTS:
            used -= {line["sample"] for line in self.read(name, step)}
        for number in changed:
            if number in used:
                row = rows[number]
                raise BadData(f"{refused}: {row['where']}, sample {row['id']}, has changed, and "
                              f"the run has learned from it; {AGAIN}")

    def load_digests(self):
        """(digests, words) of the samples that the run began with."""
        return load_digests(self.out / DIGESTS)

    def add(self, step, found):
        """found: [(file, number of the sample, why)] of all ranks, met in this step (from 1).

        Raises BadData when too much is bad, or all of it."""
        for name, number, why in found:
            if number in self.met[name]:
                continue
            self.met[name][number] = why
            if self.writes:
                with open(self.out / name, "a") as f:
                    f.write(json.dumps(self.line(step, number, why)) + "\n")
        if found:
            self.judge()

    def judge(self):
        bad, path = self.met[BAD], self.out / BAD
        if len(bad) > self.most_bad:
            raise BadData(f"{path}: {len(bad)} samples left out, more than --most-bad "
                          f"{self.most_bad}; the last: {list(bad.values())[-1]}")
        useless = {**self.met[NOTHING], **bad}
        if self.rows and len(useless) == len(self.rows):
            raise BadData(f"{self.rows.path}: not one of its {len(useless):,} samples can be "
                          f"learned from; the first: {useless[min(useless)]}")

    def report(self):
        """Lines for the end of the run."""
        for name, what in ((BAD, "left out as bad"), (NOTHING, "that taught nothing")):
            whys = list(self.met[name].values())
            if whys:
                first = "; ".join(whys[:SHOWN]) + and_more(whys)
                yield f"samples {what}: {len(whys):,} ({first}), listed in {self.out / name}"


def load_digests(path):
    """(digests, words) of a file's samples, as `save_numbers` wrote them. Raises BadData."""
    try:
        with safe_open(path, "pt") as file:
            digests, words = file.get_tensor("digest"), file.get_tensor("words")
            wanted = (file.metadata() or {}).get("sha256")      # None: of an older version
        if wanted and wanted != checksum(digest=digests, words=words):
            raise ValueError("its checksum differs")
        return digests, words
    except (SafetensorError, ValueError) as error:
        raise BadData(f"{path}: damaged ({error}): delete it to go on without a comparison of the "
                      "data, or --overwrite to start anew") from None


def checksum(**tensors):
    """SHA-256 of tensors, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()


def save_numbers(path, **arrays):
    """Arrays of integers as a .safetensors file, whole or not at all."""
    dtypes, tensors = {"i": torch.int32, "q": torch.int64}, {}
    for name, numbers in arrays.items():
        tensors[name] = torch.frombuffer(numbers, dtype=dtypes[numbers.typecode])
    tmp = path.with_name(path.name + ".tmp")
    save_tensors(tensors, tmp, {"sha256": checksum(**tensors)})
    fsync_path(tmp)
    os.replace(tmp, path)
