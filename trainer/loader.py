"""TODO"""

import math
import os
import random
import signal
import time
from array import array
from collections import Counter
from typing import NamedTuple

import torch

import data
from formats.conversations import blip_caption, images_of, MINIGPT4_INSTRUCTIONS
from formats.errors import NothingToLearn, UsageError, UserError
from formats.pictures import picture_path
from toy.texts import DESCRIBE, training_sample
from trainer.distributed import gathered
from trainer.rows import BAD, NOTHING, Rows
from trainer.samples import encode_sample, lesson, sample_pieces


def with_last(batches, step):
    """(micro-batch, is it the step's last?, seconds that it was waited for)."""
    began, held = time.perf_counter(), None
    following = iter(batches(step))
    while True:
        micro = next(following, None)
        waited = time.perf_counter() - began
        if held:
            yield held[0], micro is None, held[1]
        if micro is None:
            return
        held, began = (micro, waited), time.perf_counter()


class Samples:
    """Where samples come from: the toy world, without end, or a file in LLaVA's format.

    Without --on-bad-sample skip a file with bad samples is refused here, before anything loads."""

    def __init__(self, args):
        self.args = args
        self.rows = Rows(args.data, self.check) if args.data else None
        self.epoch, self.order, self.drawn = -1, (), {}
        self.ahead = self.journal = None        # micro-batches that workers make ahead
        if self.rows and args.on_bad_sample == "error":
            self.rows.refuse()

    def steps(self):
        row = self.args.row
        if row.steps:
            return row.steps
        if not self.rows:
            raise UsageError("the toy world has no end: give --steps")
        steps = math.ceil(len(self.rows) * row.epochs / row.batch)
        if steps >= 10 ** 6:
            raise UsageError(f"{steps:,} steps, a million or more: give a larger --batch, or fewer "
                             "--epochs")
        if steps == 1 and row.schedule == "llava" and row.warmup:
            raise UsageError(f"{len(self.rows)} samples are one step, and the rate of the first "
                             "step is 0: give more --epochs or a smaller --batch")
        return steps

    def number(self, index):
        """Where the run's sample number `index` is in the file; every epoch has an order of its
        own. Of the toy world: the index."""
        if not self.rows:
            return index
        epoch, at = divmod(index, len(self.rows))
        if epoch != self.epoch:
            dice, row = torch.Generator().manual_seed(self.args.seed * 1000 + epoch), self.args.row
            if row.order == "modality":
                order = data.modality_order(self.rows.words, row.batch // row.groups, row.groups,
                                            dice)
            else:
                order = torch.randperm(len(self.rows), generator=dice).tolist()
            self.epoch, self.order = epoch, array("q", order)
        return self.order[at]

    def close(self):
        """The workers go."""
        self.ahead = None

    def used(self, step):
        """Numbers of the samples that the first `step` steps have drawn."""
        return {self.number(i) for i in range(min(step * self.args.row.batch, len(self.rows)))}

    def fault(self, index):
        """What was found wrong with the sample when the file was read, or None."""
        return self.rows.bad.get(self.number(index)) if self.rows else None

    def id(self, index):
        return self.rows[self.number(index)]["id"] if self.rows else index

    def name(self, index):
        return f"sample {self.id(index)}" if self.rows else f"toy sample {index}"

    def sample(self, index):
        """Number `index` of the run, whatever the epoch: a row of the file, or of the toy world
        {image: the picture itself, conversations}."""
        if self.rows is not None:
            return self.rows[self.number(index)]
        if index not in self.drawn:             # asked for its words, then for its picture
            if len(self.drawn) > 2 * self.args.row.batch:
                self.drawn.clear()
            self.drawn[index] = training_sample(self.args.seed, self.args.stage, index,
                                           self.args.row.told)
        picture, talk = self.drawn[index]
        return {"image": picture, "conversations": talk}

    def asked(self, index):
        """MiniGPT-4's instruction. quirk: one for a batch, not for a sample."""
        if self.args.row.template != "minigpt4":
            return ""
        dice = random.Random(f"{self.args.seed}-{index // self.args.row.batch}")
        # the toy LLaMA knows the words of its own
        return dice.choice(DESCRIBE if self.rows is None else MINIGPT4_INSTRUCTIONS)

    def check(self, sample):
        """Raises data.BadData for a row that cannot be trained on, without counting its tokens."""
        row = self.args.row
        if row.template:
            sample_pieces(sample, row.template)
        elif len(images_of(sample)) != 1:
            many = len(images_of(sample)) or "no"
            raise data.BadData(f"{many} pictures; BLIP-2 learns from one and its caption: correct "
                               "the row")
        elif not blip_caption(sample["conversations"][-1]["value"]):
            raise data.BadData("its caption has no words: correct the row, or take it out")

    def read(self, index):
        """(picture, conversation) as its template learns it; of a file the picture's name. Text
        alone has None, and a sample of several pictures their list."""
        sample, template = self.sample(index), self.args.row.template
        talk = lesson(sample, template, self.asked(index)) if template else (
            sample["conversations"])
        return sample.get("image"), talk

    def pictures(self, sample):
        """The pictures themselves, in order. Raises data.Failure."""
        if self.rows is None:
            return images_of(sample)
        links = getattr(self.args, "follow_links", False)
        return [data.load_image(picture_path(self.args.images, name, links))
                for name in images_of(sample)]

    def __getitem__(self, index):
        """`read`, with the picture itself in place of its name."""
        pictures = self.pictures(self.sample(index)) or [None]
        return pictures[0] if len(pictures) == 1 else pictures, self.read(index)[1]


class MicroBatch(NamedTuple):
    """A micro-batch: what VLM.loss takes, and the sizes of its texts after splicing."""
    ids: torch.Tensor               # (B, T); packed, (1, T): all texts in one row
    labels: torch.Tensor            # (B, T)
    pixels: torch.Tensor | None     # (n, 3, S, S)
    attention_mask: torch.Tensor | None       # (B, T); packed, None
    weights: torch.Tensor | None    # (B, T); None: the mean over what is learned
    lengths: list | None            # packed: ids of each text
    counts: list                    # of each text: its tokens, learned ones, pictures
    questions: list | None          # of each picture, for a Q-Former that reads; None: reads not
    left_out: list                  # (BAD or NOTHING, number in the file, why) of samples


class MicroBatches(torch.utils.data.Dataset):
    """step -> this rank's micro-batches, one after the other.

    A step is planned from its texts alone: which samples stand in which micro-batch, and what each
    learned token of theirs weighs. Officially the loss is the mean over the learned tokens of one
    rank's 16 samples (stage 1: 32), then the mean over 8 ranks. So

        weight of a token = 1 / (groups · learned tokens of its group)      group: 16 in a row

    and a step's loss is a plain sum, however it is cut into rows, micro-batches or ranks. Pictures
    are read when a micro-batch is made, by workers ahead of time if there are any: it is a function
    of (step, its number) alone, whoever makes it.

    A sample that cannot be used, or teaches nothing, has no place in a micro-batch. One micro-batch
    in which nobody is left is passed over; among several ranks it becomes a `blank` one, so that
    all come to the same places."""

    def __init__(self, samples, model, args, rank=0, ranks=1):
        self.samples, self.args, self.rank, self.ranks = samples, args, rank, ranks
        self.left_out = []
        self.tokenizer, self.side, self.places = model.tokenizer, model.image_size, model.num_image_tokens()
        self.reads = model.qformer_tokenizer is not None
        self.device, self.planned = model.llm.embed.weight.device, (None, None)
        if not args.pack and args.row.batch % (args.accum * ranks):
            raise UsageError(f"--batch {args.row.batch} does not divide into --accum {args.accum} "
                             f"micro-batches on each of {ranks} ranks; give another, or --pack")

    def text(self, index):
        """(ids, labels) of a sample. Raises data.Failure with its name; data.NothingToLearn, which
        says why, where no token of it is learned."""
        args, samples = self.args, self.samples
        try:
            return encode_sample(
                samples.sample(index), args.row.template, self.tokenizer, self.places, args.pack,
                args.max_length, args.official_quirks, asked=samples.asked(index))
        except UserError as error:
            raise type(error)(f"{samples.name(index)}: {error}") from None

    def size(self, ids):
        return len(ids) + (self.places - 1) * ids.count(data.IMAGE)

    def plan(self, step):
        """[[(index, ids, labels, weight)]]: the samples of each micro-batch of all ranks.

        Samples with nothing to learn are left out."""
        if self.planned[0] == step:
            return self.planned[1]
        row, first = self.args.row, step * self.args.row.batch
        texts, left_out, causes = [], [], Counter()
        for index in range(first, first + row.batch):
            text = [], []
            try:
                if self.samples.fault(index) is None:       # else it was listed at the start
                    text = self.text(index)
            except NothingToLearn as error:
                left_out.append((NOTHING, self.samples.number(index), str(error)))
                causes[str(error).removeprefix(f"{self.samples.name(index)}: ")] += 1
            except UserError as error:
                if self.args.on_bad_sample == "error":
                    raise
                left_out.append((BAD, self.samples.number(index), str(error)))
            texts.append(text)
        learned = [sum(x != data.IGNORE for x in labels) for _, labels in texts]
        if not any(learned) and self.args.on_bad_sample == "error":
            why = "; ".join(f"{n} of them: {cause}" for cause, n in causes.most_common())
            raise data.BadData(f"{self.samples.name(first)} and the {row.batch - 1} after it have "
                               f"nothing to train on: {why}")
        group = row.batch // row.groups
        sums = [sum(learned[i:i + group]) for i in range(0, row.batch, group)]
        taught = [(first + i, *text, 1 / (row.groups * sums[i // group]))
                  for i, text in enumerate(texts) if learned[i]]
        if self.args.pack:
            rows = data.pack([self.size(t[1]) for t in taught], self.args.pack)
            micros = [[taught[i] for i in row] for row in rows]
        else:
            size = row.batch // (self.args.accum * self.ranks)
            micros = [[t for t in taught if (t[0] - first) // size == m]
                      for m in range(row.batch // size)]
        self.planned, self.left_out = (step, [m for m in micros if m]), left_out
        return self.planned[1]

    def __getitem__(self, at):
        """Micro-batch (step, number), or the data.Failure that it met: a worker must not raise."""
        step, number = at
        try:
            planned = self.plan(step)
            left_out = list(self.left_out) if number == 0 else []
            # a rank that is dealt one less, or nobody who can be used, gets a blank one
            dealt = planned[number] if number < len(planned) else []
            chosen, pixels = [], []
            for sample in dealt:
                try:
                    pictures = self.pictures(sample)
                except UserError as error:       # what it weighs is lost: the others are planned
                    if self.args.on_bad_sample == "error":
                        raise
                    left_out.append((BAD, self.samples.number(sample[0]), str(error)))
                    continue
                chosen.append(sample)
                pixels += pictures
        except UserError as error:
            return error
        if not chosen:
            return self.blank(left_out)
        texts = [(ids, labels) for _, ids, labels, _ in chosen]
        lengths = [len(ids) for ids, _ in texts]
        weights = torch.tensor([t[-1] for t in chosen])
        if self.args.pack:
            ids, labels = (torch.tensor([[x for t in texts for x in t[i]]]) for i in (0, 1))
            weights, attention_mask = weights.repeat_interleave(torch.tensor(lengths))[None], None
        else:
            ids, labels = data.collate(texts, self.tokenizer.pad)
            attention_mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
            weights = weights[:, None].expand(ids.shape)
            if len(planned) == self.args.row.groups == self.ranks == 1 and chosen == dealt:
                weights = None              # one group in one micro-batch: the plain mean
        counts = [(sum(x != data.IMAGE for x in ids), sum(x != data.IGNORE for x in labels),
                   ids.count(data.IMAGE)) for ids, labels in texts]
        return MicroBatch(ids, labels, torch.cat(pixels) if pixels else None, attention_mask, weights,
                     lengths if self.args.pack else None, counts,
                     [data.question(self.samples.read(i)[1]) for i, ids, _, _ in chosen
                      if data.IMAGE in ids] if self.reads else None, left_out)

    def blank(self, left_out):
        """A micro-batch without a sample: two tokens that weigh nothing."""
        ids = torch.full((1, 2), self.tokenizer.pad)
        labels = torch.tensor([[data.IGNORE, self.tokenizer.pad]])
        packed = bool(self.args.pack)
        return MicroBatch(ids, labels, None, None if packed else torch.ones(1, 2, dtype=torch.bool),
                     torch.zeros(1, 2), [2] if packed else None, [], None, left_out)

    def pictures(self, planned):
        """[pixels (1, 3, S, S)] of a planned sample. Raises data.Failure with its name."""
        try:
            return [data.preprocess(picture, self.side, self.args.row.aspect)
                    for picture in self.samples.pictures(self.samples.sample(planned[0]))]
        except UserError as error:
            raise type(error)(f"{self.samples.name(planned[0])}: {error}") from None

    def numbers(self, first, last):
        """Of this rank's micro-batches in steps first .. last-1, all ranks having as many."""
        for step in range(first, last):
            try:
                many = -(-max(1, len(self.plan(step))) // self.ranks) * self.ranks
            except UserError:
                many = self.ranks           # __getitem__ will meet it and hand it over
            yield from ((step, number) for number in range(self.rank, many, self.ranks))

    def __call__(self, step):
        if self.args.workers and self.samples.ahead is None:
            self.samples.ahead = iter(torch.utils.data.DataLoader(
                self, batch_size=None, sampler=self.numbers(step, self.samples.steps()),
                num_workers=self.args.workers, worker_init_fn=worker_init, generator=torch.Generator(),
                multiprocessing_context="fork",     # they share the block of `Rows`
                pin_memory=self.device.type == "cuda"))
        left_out = []
        for at in self.numbers(step, step + 1):
            micro = next(self.samples.ahead) if self.args.workers else self[at]
            if isinstance(micro, UserError):
                raise micro
            left_out += micro.left_out
            if not micro.counts and self.ranks == 1:
                continue
            yield micro._replace(**{name: t.to(self.device, non_blocking=True)
                                    for name, t in micro._asdict().items() if torch.is_tensor(t)})
        if self.samples.journal:
            self.samples.journal.add(step + 1, gathered(left_out))


def worker_init(worker):
    """A worker's first act. Ctrl-C, and what a scheduler sends to the whole group, is for the
    process that trains: it saves, and ends its workers."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
