"""From samples to micro-batches: which samples stand in a step, what their tokens weigh, workers.

    Samples         the toy world, or the file of --data, in the order of the epochs
    MicroBatches    step -> this rank's micro-batches, for a model with a LLaMA"""

import math
import random
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
from trainer.rows import BAD, Journal, NOTHING, Rows
from trainer.samples import encode_sample, lesson, sample_pieces
from trainer.workers import worker_init

# -------------------------------------------------------------------------------------- the samples

class Samples:
    """Where samples come from: the toy world, without end, or a file in LLaVA's format.

    index: the sample's number in the run, from 0, all epochs counted.
    number: its place in the file; of the toy world the index itself.
    out: the run's folder, for the journal; None where nothing is written (--plan, --show-batch).
    Without --on-bad-sample skip a file with bad samples is refused here, before anything loads."""

    def __init__(self, args, out=None):
        self.args, self.rows = args, None
        if args.data:
            self.rows = Rows(args.data, self.check)
        self.epoch, self.order, self.cache = -1, (), {}
        self.prefetched = None                  # micro-batches that workers make ahead of time
        if self.rows and args.on_bad_sample == "error":
            self.rows.refuse()
        self.journal = None
        if out is not None:
            self.journal = Journal(self, out, args.most_bad)

    def steps(self):
        """The number of steps of the run."""
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
        """Where sample `index` of the run is in the file; every epoch has an order of its own."""
        if not self.rows:
            return index
        epoch, place = divmod(index, len(self.rows))
        if epoch != self.epoch:
            row, rng = self.args.row, torch.Generator().manual_seed(self.args.seed * 1000 + epoch)
            if row.order == "modality":
                group = row.batch // row.loss_groups
                order = data.modality_order(self.rows.words, group, row.loss_groups, rng)
            else:
                order = torch.randperm(len(self.rows), generator=rng).tolist()
            self.epoch, self.order = epoch, array("q", order)
        return self.order[place]

    def close(self):
        """End the workers."""
        self.prefetched = None

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
        """A row of the file; of the toy world {image: the picture itself, conversations}."""
        if self.rows is not None:
            return self.rows[self.number(index)]
        if index not in self.cache:             # a sample is asked for its text, then its picture
            if len(self.cache) > 2 * self.args.row.batch:
                self.cache.clear()
            self.cache[index] = training_sample(self.args.seed, self.args.stage, index,
                                                self.args.row.caption_style)
        picture, conversation = self.cache[index]
        return {"image": picture, "conversations": conversation}

    def instruction(self, index):
        """What trainer.samples.lesson draws from: MiniGPT-4's instruction (quirk: one for a batch,
        not for a sample), or what decides where a FlanT5's caption is cut."""
        if self.args.row.template == "blip2_t5":
            return f"{self.args.seed}-{index}"
        if self.args.row.template != "minigpt4":
            return ""
        rng = random.Random(f"{self.args.seed}-{index // self.args.row.batch}")
        # the toy LLaMA knows only the toy world's instructions
        return rng.choice(DESCRIBE if self.rows is None else MINIGPT4_INSTRUCTIONS)

    def check(self, sample):
        """Raises data.BadData for a row that cannot be trained on, without counting its tokens."""
        row = self.args.row
        if row.template:
            sample_pieces(sample, row.template)
        elif len(images_of(sample)) != 1:
            count = len(images_of(sample)) or "no"
            raise data.BadData(f"{count} pictures; BLIP-2 learns from one and its caption: correct "
                               "the row")
        elif not blip_caption(sample["conversations"][-1]["value"]):
            raise data.BadData("its caption has no words: correct the row, or take it out")

    def read(self, index):
        """(image, conversation as the template has it). image: of a file its name; of the toy
        world the picture; None for text alone; a list if there are several."""
        sample, template = self.sample(index), self.args.row.template
        conversation = sample["conversations"]
        if template:
            conversation = lesson(sample, template, self.instruction(index))
        return sample.get("image"), conversation

    def pictures(self, sample):
        """The pictures themselves, in order. Raises formats.errors.UserError."""
        if self.rows is None:
            return images_of(sample)
        follow_links = getattr(self.args, "follow_links", False)
        return [data.load_image(picture_path(self.args.images, name, follow_links))
                for name in images_of(sample)]

    def __getitem__(self, index):
        """`read`, with the picture itself in place of its name."""
        pictures = self.pictures(self.sample(index)) or [None]
        return pictures[0] if len(pictures) == 1 else pictures, self.read(index)[1]


# -------------------------------------------------------------------------------- the micro-batches

class MicroBatch(NamedTuple):
    """A micro-batch: what VLM.loss takes, and the sizes of its texts after splicing."""
    ids: torch.Tensor               # (B, T); packed, (1, T): all texts in one row
    labels: torch.Tensor            # (B, T)
    pixels: torch.Tensor | None     # (n, 3, S, S)
    attention_mask: torch.Tensor | None     # (B, T); packed, None
    weights: torch.Tensor | None    # (B, T); None: the mean over tokens with loss
    lengths: list | None            # packed: ids of each text
    counts: list                    # of each text: tokens of text, tokens with loss, pictures
    questions: list | None          # of each picture, for a Q-Former that reads; None: reads not
    left_out: list                  # (BAD or NOTHING, number in the file, why) of samples


class Planned(NamedTuple):
    """A sample that has its place in a micro-batch."""
    index: int
    ids: list
    labels: list
    weight: float                   # of each of its tokens with loss


def count_learned(labels):
    """How many tokens have loss."""
    return sum(label != data.IGNORE for label in labels)


def token_weights(learned, groups):
    """The weight of a token with loss, for each sample of a step; learned: how many it has.

    Officially the loss is the mean over the tokens of one GPU's samples (a group: 16 in a row,
    stage 1: 32), then the mean over 8 GPUs. So a token weighs 1 / (groups x tokens of its group),
    and a step's loss is a plain sum, however it is cut into rows, micro-batches or ranks."""
    size, weights = len(learned) // groups, []
    for first in range(0, len(learned), size):
        group = learned[first:first + size]
        for _ in group:
            weights.append(1 / (groups * sum(group)) if sum(group) else 0.)
    return weights


class MicroBatches(torch.utils.data.Dataset):
    """step -> this rank's micro-batches, one after the other.

    A step is planned from its texts alone: which samples stand in which micro-batch, and what
    their tokens weigh (`token_weights`). Pictures are read when a micro-batch is made. A
    micro-batch depends only on (step, number), so a worker may prepare it ahead of time and the
    result is the same.

    A sample that cannot be used, or has no token with loss, has no place in a micro-batch. A
    micro-batch without a sample is passed over; with several ranks it becomes a `blank` one, so
    that all ranks take part in every collective."""

    def __init__(self, samples, model, args, rank=0, ranks=1):
        self.samples, self.args, self.rank, self.ranks = samples, args, rank, ranks
        self.tokenizer, self.image_size = model.tokenizer, model.image_size
        self.num_image_tokens = model.num_image_tokens()
        # an InstructBLIP's Q-Former reads the question, too
        self.reads = getattr(model, "qformer_tokenizer", None) is not None
        self.device = model.llm.embed.weight.device
        self.planned, self.left_out = (None, None), []          # of the last step planned
        if not args.pack and args.row.batch % (args.accum * ranks):
            raise UsageError(f"--batch {args.row.batch} does not divide into --accum {args.accum} "
                             f"micro-batches on each of {ranks} ranks; give another, or --pack")

    def text(self, index):
        """(ids, labels) of a sample. Raises UserError with its name, or NothingToLearn with the
        reason where no token has loss."""
        args, samples = self.args, self.samples
        try:
            return encode_sample(
                samples.sample(index), args.row.template, self.tokenizer, self.num_image_tokens,
                args.pack, args.max_length, args.official_quirks, asked=samples.instruction(index))
        except UserError as error:
            raise type(error)(f"{samples.name(index)}: {error}") from None

    def size(self, ids):
        """Tokens after splicing."""
        return len(ids) + (self.num_image_tokens - 1) * ids.count(data.IMAGE)

    def texts(self, step):
        """[(ids, labels)] of a step's samples, in their order; ([], []) for one that is left out.
        Fills self.left_out."""
        row, skip = self.args.row, self.args.on_bad_sample == "skip"
        first, texts, causes = step * row.batch, [], Counter()
        self.left_out = []
        for index in range(first, first + row.batch):
            text = [], []
            try:
                if self.samples.fault(index) is None:       # else it was listed at the start
                    text = self.text(index)
            except NothingToLearn as error:
                self.left_out.append((NOTHING, self.samples.number(index), str(error)))
                causes[str(error).removeprefix(f"{self.samples.name(index)}: ")] += 1
            except UserError as error:
                if not skip:
                    raise
                self.left_out.append((BAD, self.samples.number(index), str(error)))
            texts.append(text)
        if not skip and not any(count_learned(labels) for _, labels in texts):
            why = "; ".join(f"{n} of them: {cause}" for cause, n in causes.most_common())
            raise data.BadData(f"{self.samples.name(first)} and the {row.batch - 1} after it have "
                               f"nothing to train on: {why}")
        return texts

    def plan(self, step):
        """[[Planned]]: the samples of each micro-batch, of all ranks."""
        if self.planned[0] == step:
            return self.planned[1]
        row, first = self.args.row, step * self.args.row.batch
        texts = self.texts(step)
        learned = [count_learned(labels) for _, labels in texts]
        samples = []
        for i, weight in enumerate(token_weights(learned, row.loss_groups)):
            if learned[i]:
                samples.append(Planned(first + i, *texts[i], weight))
        if self.args.pack:
            rows = data.pack([self.size(sample.ids) for sample in samples], self.args.pack)
            micros = [[samples[i] for i in places] for places in rows]
        else:
            size = row.batch // (self.args.accum * self.ranks)
            micros = [[] for _ in range(row.batch // size)]
            for sample in samples:
                micros[(sample.index - first) // size].append(sample)
        self.planned = step, [micro for micro in micros if micro]
        return self.planned[1]

    def __getitem__(self, at):
        """Micro-batch (step, number), or the UserError that it met: a worker must not raise."""
        step, number = at
        try:
            micros = self.plan(step)
            left_out = list(self.left_out) if number == 0 else []
            # a rank with one micro-batch fewer gets a blank one
            wanted = micros[number] if number < len(micros) else []
            chosen, pixels = [], []
            for sample in wanted:
                try:
                    images = self.pixels(sample.index)
                except UserError as error:      # its share of the loss is dropped: the others
                    if self.args.on_bad_sample == "error":      # keep their weights
                        raise
                    left_out.append((BAD, self.samples.number(sample.index), str(error)))
                    continue
                chosen.append(sample)
                pixels += images
        except UserError as error:
            return error
        if not chosen:
            return self.blank(left_out)
        is_whole_step = len(micros) == 1 and chosen == wanted
        return self.assemble(chosen, pixels, is_whole_step, left_out)

    def assemble(self, chosen, pixels, is_whole_step, left_out):
        """A MicroBatch of planned samples and their pictures."""
        lengths = [len(sample.ids) for sample in chosen]
        weights = torch.tensor([sample.weight for sample in chosen])
        if self.args.pack:
            row, targets = [], []
            for sample in chosen:
                row += sample.ids
                targets += sample.labels
            ids, labels, attention_mask = torch.tensor([row]), torch.tensor([targets]), None
            weights = weights.repeat_interleave(torch.tensor(lengths))[None]        # (1, T)
        else:
            ids, labels = data.collate([(sample.ids, sample.labels) for sample in chosen],
                                       self.tokenizer.pad)
            attention_mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
            weights = weights[:, None].expand(ids.shape)                            # (B, T)
            if is_whole_step and self.args.row.loss_groups == self.ranks == 1:
                weights = None              # one group in one micro-batch: the plain mean
        counts, questions = [], []
        for sample in chosen:
            images = sample.ids.count(data.IMAGE)
            counts.append((len(sample.ids) - images, count_learned(sample.labels), images))
            if self.reads and images:
                questions.append(data.question(self.samples.read(sample.index)[1]))
        return MicroBatch(ids, labels, torch.cat(pixels) if pixels else None, attention_mask,
                          weights, lengths if self.args.pack else None, counts,
                          questions if self.reads else None, left_out)

    def blank(self, left_out):
        """A micro-batch without a sample: two tokens that weigh nothing."""
        ids = torch.full((1, 2), self.tokenizer.pad)
        labels = torch.tensor([[data.IGNORE, self.tokenizer.pad]])
        mask, lengths = torch.ones(1, 2, dtype=torch.bool), None
        if self.args.pack:
            mask, lengths = None, [2]
        return MicroBatch(ids, labels, None, mask, torch.zeros(1, 2), lengths, [], None, left_out)

    def pixels(self, index):
        """[pixels (1, 3, S, S)] of a sample. Raises UserError with its name."""
        try:
            pictures = self.samples.pictures(self.samples.sample(index))
            return [data.preprocess(picture, self.image_size, self.args.row.image_aspect)
                    for picture in pictures]
        except UserError as error:
            raise type(error)(f"{self.samples.name(index)}: {error}") from None

    def places(self, first, last):
        """(step, number) of this rank's micro-batches in steps first .. last-1. All ranks have as
        many."""
        for step in range(first, last):
            try:
                count = max(1, len(self.plan(step)))
            except UserError:
                count = 1                   # __getitem__ will meet it and hand it over
            whole = math.ceil(count / self.ranks) * self.ranks
            for number in range(self.rank, whole, self.ranks):
                yield step, number

    def start_workers(self, step):
        """An iterator over the micro-batches from `step` to the end of the run."""
        return iter(torch.utils.data.DataLoader(
            self, batch_size=None, sampler=self.places(step, self.samples.steps()),
            num_workers=self.args.workers, worker_init_fn=worker_init, generator=torch.Generator(),
            multiprocessing_context="fork",     # they share the block of `Rows`
            pin_memory=self.device.type == "cuda"))

    def __call__(self, step):
        if self.args.workers and self.samples.prefetched is None:
            self.samples.prefetched = self.start_workers(step)
        left_out = []
        for at in self.places(step, step + 1):
            micro = next(self.samples.prefetched) if self.args.workers else self[at]
            if isinstance(micro, UserError):
                raise micro
            left_out += micro.left_out
            if micro.counts or self.ranks > 1:
                yield to_device(micro, self.device)
        if self.samples.journal:
            self.samples.journal.add(step + 1, gathered(left_out))


def to_device(micro, device):
    tensors = {name: value.to(device, non_blocking=True)
               for name, value in micro._asdict().items() if torch.is_tensor(value)}
    return micro._replace(**tensors)
