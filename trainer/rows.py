"""The data file of a run: its samples in memory, what changed in it, and what was left out.

    Rows      the samples of the file in one block of bytes, which all workers share
    Journal   bad_samples.jsonl, nothing_to_learn.jsonl, and rows.safetensors: what a run that is
              resumed compares the file with

Some samples teach nothing. There are two kinds, and each has a file of its own:

    bad_samples.jsonl         samples that cannot be used; only with --on-bad-sample skip
    nothing_to_learn.jsonl    samples that can be read, but no answer of theirs is learned

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
from safetensors.torch import save_file

from formats.conversations import images_of, read_rows
from formats.errors import BadData, NothingToLearn

BAD, NOTHING = "bad_samples.jsonl", "nothing_to_learn.jsonl"
LISTS = BAD, NOTHING
ABOUT = "id", "where", "field"          # keys of a sample that say where it stands
TAUGHT = "image", "system", "conversations"         # what is learned; other keys are let go
_written = json.JSONEncoder(ensure_ascii=False).encode
SHOWN = 3                               # samples that a line on stderr names


class Rows:
    """The samples of a data file. rows[i] is a dict {id, image, conversations, where}.

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
        for _, where, got in read_rows(path):
            if isinstance(got, BadData):
                if str(got).endswith("what follows was not read"):
                    raise BadData(f"{where}: {got}")        # nobody can say what is left out
                self.bad[len(self)] = f"{where}: {got}"
                got = [{"id": where, "where": where, "conversations": []}]
            for sample in got:
                self._add(sample, check)
        if not len(self):
            raise BadData(f"{path}: holds no samples: expected a list of conversations")

    def _add(self, sample, check):
        number, talk, images = len(self), sample["conversations"], images_of(sample)
        if number not in self.bad:
            try:
                check(sample)
            except NothingToLearn:
                pass                                        # is counted when its turn comes
            except BadData as error:
                self.bad[number] = f"sample {sample['id']}: {error}"
        # an empty row counts as one word: data.modality_order takes no 0
        count = max(1, sum([len(turn["value"].split()) for turn in talk]))
        self.words.append(count if images else -count)
        about, taught = (_written({key: sample[key] for key in keys if key in sample}).encode()
                         for keys in (ABOUT, TAUGHT))
        digest = hashlib.blake2b(taught, digest_size=8).digest()
        self.digests.append(int.from_bytes(digest, "little", signed=True))
        self.block += b"[%b,%b]" % (about, taught)
        self.ends.append(len(self.block))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        about, taught = json.loads(self.block[self.ends[i]:self.ends[i + 1]])
        return {**about, **taught}

    def _told(self, number):
        why, where = self.bad[number], self[number]["where"]
        return why if why.startswith(where) else f"{where}, {why}"

    def refuse(self):
        """Raises BadData, if there are bad samples, that names the first of them."""
        if self.bad:
            first = "; ".join(self._told(number) for number in list(self.bad)[:SHOWN])
            more = f"; and {len(self.bad) - SHOWN:,} more" if len(self.bad) > SHOWN else ""
            raise BadData(f"{len(self.bad):,} of {len(self):,} samples cannot be trained on: "
                          f"{first}{more}: correct them, or leave them out with --on-bad-sample "
                          "skip")


class Journal:
    """What a run writes down about its samples. All ranks keep the books, the first one writes.

    samples: train.Samples; out: the run's folder; most_bad: more bad samples end the run."""

    def __init__(self, samples, out, most_bad):
        self.samples, self.rows, self.out, self.most_bad = samples, samples.rows, out, most_bad
        self.met = {name: {} for name in LISTS}             # number -> why
        self.writes = False

    def begin(self, step, writes):
        """A run begins, or goes on after `step` steps. Raises BadData if the file has changed."""
        self.writes = writes
        for name in LISTS:
            self.met[name] = {x["sample"]: x["why"] for x in self._lines(name) if x["step"] <= step}
        if not self.rows:
            return
        self.compare(step)
        if writes:
            save_numbers(self.out / "rows.safetensors", digest=self.rows.digests,
                         words=self.rows.words)
            # a row that has been corrected is bad no more
            later = [x for x in self._lines(BAD) if 0 < x["step"] <= step]
            now = [self._line(0, number, why) for number, why in self.rows.bad.items()]
            if now or later or (self.out / BAD).exists():
                text = "".join(json.dumps(x) + "\n" for x in now + later)
                replace_file(self.out / BAD, lambda path: path.write_text(text))
        self.met[BAD] = {**self.rows.bad, **{
            x["sample"]: x["why"] for x in self._lines(BAD) if 0 < x["step"] <= step}}
        self._judge()

    def _line(self, step, number, why):
        where = self.rows[number]["where"] if self.rows else "the toy world"
        return {"step": step, "sample": number, "where": where, "why": why}

    def _lines(self, name):
        path = self.out / name
        texts = path.read_text().splitlines(True) if path.exists() else ()
        return [json.loads(x) for x in texts if x.endswith("}\n")]

    def compare(self, step):
        """Refuses a file in which a sample has changed that the first `step` steps have learned
        from."""
        path, rows = self.out / "rows.safetensors", self.rows
        if not step:
            return
        if not path.exists():                   # of a run that an older version began
            print(f"{path} is missing: nobody can tell whether --data is still the file that the "
                  "run began with", file=sys.stderr)
            return
        try:
            with safe_open(path, "pt") as file:
                digests, words = file.get_tensor("digest"), file.get_tensor("words")
        except SafetensorError as error:
            raise BadData(f"{path}: damaged ({error}): delete it to go on without a comparison of "
                          "the data, or --overwrite to start anew") from None
        again = "put the old one back, or --overwrite to start anew"
        refused = f"{self.out}: --resume with another --data file"
        if len(digests) != len(rows):
            raise BadData(f"{refused}: {rows.path} has {len(rows):,} samples now, and had "
                          f"{len(digests):,}; {again}")
        # the order of the samples is a function of these: it goes on as it began
        rows.words, self.samples.epoch = array("i", words.tolist()), -1
        same = digests == torch.frombuffer(rows.digests, dtype=torch.int64)
        changed = (~same).nonzero().flatten().tolist()
        left_out = {x["sample"] for name in LISTS for x in self._lines(name) if x["step"] <= step}
        used = self.samples.used(step) - left_out if changed else ()
        for number in changed:
            if number in used:
                row = rows[number]
                raise BadData(f"{refused}: {row['where']}, sample {row['id']}, has changed, and "
                              f"the run has learned from it; {again}")

    def add(self, step, found):
        """found: [(file, number of the sample, why)] of all ranks, met in this step (from 1).

        Raises BadData when too much is bad, or all of it."""
        for name, number, why in found:
            if number in self.met[name]:
                continue
            self.met[name][number] = why
            if self.writes:
                with open(self.out / name, "a") as f:
                    f.write(json.dumps(self._line(step, number, why)) + "\n")
        if found:
            self._judge()

    def _judge(self):
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
                more = f"; and {len(whys) - SHOWN:,} more" if len(whys) > SHOWN else ""
                yield (f"samples {what}: {len(whys):,} ({'; '.join(whys[:SHOWN])}{more}), listed "
                       f"in {self.out / name}")


def replace_file(path, write):
    """Write a file whole or not at all: aside, to the disk, then under its name."""
    tmp = path.with_name(path.name + ".tmp")
    write(tmp)
    with open(tmp, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(tmp, path)


def save_numbers(path, **arrays):
    """Arrays of integers as a .safetensors file."""
    kinds = {"i": torch.int32, "q": torch.int64}
    tensors = {name: torch.frombuffer(numbers, dtype=kinds[numbers.typecode])
               for name, numbers in arrays.items()}
    replace_file(path, lambda tmp: save_file(tensors, tmp))
