"""trainer/held_out.py: the loss on samples that the run does not train on.

    --eval-data FILE --eval-every N    "eval_loss" in metrics.jsonl after every N steps and the last
    --keep-best                        the trained weights of the lowest one: best-000040/; the run
                                       ends with them, so that model/ is that of step 40

eval_loss is the mean over all tokens of the file that have loss; a step's own loss is officially a
mean of means (trainer/loader.py), so the two differ a little on the same samples. Nothing random is
drawn and nothing is changed: a run with --eval-data trains to the same bits as one without.

Losses on two files cannot be compared: held_out.safetensors holds a digest of each sample, and a
run that is resumed with another file is refused.
"""

import argparse
import json
import math
import shutil
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import data
from formats.checkpoints import LazyWeights
from formats.conversations import images_of
from formats.errors import NothingToLearn, progress, TrainingFailed, UserError
from formats.files import rename_into_place
from formats.pictures import picture_path
from trainer.checkpoint import gather_weights, restore, sha256_file
from trainer.distributed import all_reduce_sum, rank, world_size
from trainer.loader import count_learned, MicroBatches, Planned, Samples, to_device
from trainer.logs import read_lines
from trainer.rows import AGAIN, load_digests, save_numbers

DIGESTS = "held_out.safetensors"


class HeldOutSamples(Samples):
    """The samples of --eval-data, each once, in the file's order. Raises BadData for a bad one, and
    for a picture that is not there."""

    def __init__(self, args):
        super().__init__(argparse.Namespace(**{
            **vars(args), "data": args.eval_data, "on_bad_sample": "skip"}))
        self.args.on_bad_sample = "error"           # none is left out, so the line says otherwise
        self.rows.refuse("correct them, or take them out of --eval-data")
        self.epoch, self.order = 0, array("q", range(len(self.rows)))       # never shuffled
        for index in range(len(self.rows)):
            for name in images_of(self.sample(index)):
                try:
                    picture_path(args.images, name, args.follow_links)
                except data.BadData as error:
                    raise data.BadData(f"{self.place(index)}, {self.name(index)}: {error}"
                                       ) from None

    def place(self, index):
        """Where a sample stands, as a line on stderr names it: the flag, the file, the row."""
        return f"--eval-data {self.rows[index]['where']}"

    def check_unchanged(self, out, step):
        """Refuses another file than the one that the first `step` steps of a run were judged by."""
        path = out / DIGESTS
        if not step:
            return
        if not path.exists():                       # of a run that an older version began
            print(f"{path} is missing: nobody can tell whether --eval-data is still the file that "
                  "the run began with", file=sys.stderr)
            return
        digests, _ = load_digests(path)
        refused = f"{out}: --resume with another --eval-data file"
        if len(digests) != len(self.rows):
            raise data.BadData(f"{refused}: {self.rows.path} has {len(self.rows):,} samples now, "
                               f"and had {len(digests):,}; {AGAIN}")
        is_other = digests != torch.frombuffer(self.rows.digests, dtype=torch.int64)
        if is_other.any():
            row = self.rows[int(is_other.nonzero()[0])]
            raise data.BadData(f"{refused}: {row['where']}, sample {row['id']}, has changed, and "
                               f"losses on two files cannot be compared; {AGAIN}")


class HeldOut:
    """Called, it computes the loss; every rank must call it.

    The texts are encoded once and kept; pictures are read each time, and once before the first
    step: one that cannot be read would end the run at its first look. Raises UserError."""

    def __init__(self, model, args):
        self.samples = samples = HeldOutSamples(args)
        self.model, self.batches = model, MicroBatches(samples, model, samples.args)
        planned = []
        for index in range(len(samples.rows)):
            try:
                planned.append(Planned(index, *self.located(self.batches.text, index), 1.0))
            except NothingToLearn:
                continue
        if not planned:
            raise data.BadData(f"{args.eval_data}: no token of it has loss: give another file")
        self.tokens = sum(count_learned(sample.labels) for sample in planned)
        self.micros = list(self.micro_batches(planned, args))
        self.check_pictures([sample.index for sample in planned])

    def begin(self, out, step, writes):
        """A run begins, or goes on after `step` steps. Raises BadData if the file has changed."""
        self.samples.check_unchanged(out, step)
        if writes:
            rows = self.samples.rows
            save_numbers(out / DIGESTS, digest=rows.digests, words=rows.words)

    def located(self, read, index):
        """read(index); what is wrong with the sample is told with the flag, the file and the row.
        """
        try:
            return read(index)
        except UserError as error:
            raise type(error)(f"{self.samples.place(index)}, {error}") from None

    def check_pictures(self, indexes):
        """Read every picture once, as a look does; each rank its share of them."""
        first = {}                                  # names of pictures -> a sample that has them
        for index in indexes:
            first.setdefault(tuple(images_of(self.samples.sample(index))), index)
        mine = list(first.values())[rank()::world_size()]

        def check(index):                           # without a result: pixels would pile up
            self.located(self.batches.pixels, index)
        with ThreadPoolExecutor() as pool:
            for _ in progress(pool.map(check, mine), "held-out pictures", len(mine)):
                pass

    def micro_batches(self, planned, args):
        """Lists of samples, as large as those of training."""
        if args.pack:
            for row in data.pack([self.batches.size(sample.ids) for sample in planned], args.pack):
                yield [planned[i] for i in row]
            return
        size = args.row.batch // args.accum
        for first in range(0, len(planned), size):
            yield planned[first:first + size]

    def load(self, chosen):
        """A MicroBatch on the model's device; without samples a blank one."""
        pixels = []
        for sample in chosen:
            pixels += self.located(self.batches.pixels, sample.index)
        if not chosen:
            return to_device(self.batches.blank([]), self.batches.device)
        micro = self.batches.assemble(chosen, pixels, False, [])
        return to_device(micro, self.batches.device)

    @torch.no_grad()
    def __call__(self):
        total, ranks = 0.0, world_size()
        for first in range(0, len(self.micros), ranks):         # a micro-batch for each rank
            mine = self.micros[first:first + ranks][rank():rank() + 1]
            batch = self.load(mine[0] if mine else [])
            total += float(self.model.loss(
                batch.ids, batch.labels, batch.pixels, batch.attention_mask, batch.weights,
                batch.lengths, batch.questions))
        (total,) = all_reduce_sum(total)
        return total / self.tokens


def held_out(model, args):
    """The HeldOut of a run, or None without --eval-data."""
    return HeldOut(model, args) if args.eval_data else None


# --------------------------------------------------------------------------------- the best weights

def best_so_far(log, step):
    """(step, loss) of the lowest eval_loss in metrics.jsonl up to a step, the first of equals;
    (0, inf) if there is none."""
    best = 0, math.inf
    for _, line in read_lines(log, step) if log.exists() else ():
        loss = line.get("eval_loss")
        if type(loss) is float and loss < best[1]:
            best = line["step"], loss
    return best


def save_best(job, out, step, loss):
    """Write best-N/, then delete the one before. Every rank must come here."""
    weights = gather_weights(job)
    if rank():
        return
    final, tmp = out / f"best-{step:06d}", out / f"best-{step:06d}.tmp"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        save_file(weights, tmp / "trained.safetensors")
        (tmp / "best.json").write_text(json.dumps({
            "step": step, "eval_loss": loss,
            "sha256": sha256_file(tmp / "trained.safetensors")}) + "\n")
        if final.exists():                          # of a run that was resumed from before it
            shutil.rmtree(final)
        rename_into_place(tmp, final)
    except (OSError, SafetensorError) as error:     # a full disk arrives as either
        shutil.rmtree(tmp, ignore_errors=True)
        raise TrainingFailed(f"{tmp}: {error}: free space and go on with --resume auto") from None
    for other in out.glob("best-??????"):
        if other != final:
            shutil.rmtree(other)


def load_best(job, out, step):
    """Bring the trained weights of best-N/ back, at the end of a run. Raises BadModel."""
    folder = out / f"best-{step:06d}"
    again = "train again with --overwrite, or go on without --keep-best in another folder"
    try:
        said = json.loads((folder / "best.json").read_text())
        if sha256_file(folder / "trained.safetensors") != said["sha256"]:
            raise ValueError("its checksum differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise data.BadModel(f"{folder}: the weights of the lowest held-out loss cannot be read "
                            f"({error}): {again}") from None
    restore(job, LazyWeights([folder / "trained.safetensors"]), {})
