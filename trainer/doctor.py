"""The dataset doctor: python data.py check FILE --images DIR, and show FILE --sample N.

    check_rows       every row is read and judged as training judges it; a line for each fault
    check_pictures   every picture is decoded once, on all cores
    print_report     what the file holds: faults by kind, a histogram of lengths, speed

    x.json: row 3: conversations[1].from: must be human or gpt (user or assistant) ...
    row 3 is the third row of the file; what follows is the field, and what is wrong with it

One pass over the rows, so that a file of any size is read; nothing but the named files is opened.
Exit status 0: no fault; 3: faults."""
import sys

if __name__ == "__main__":
    from trainer.doctor_flags import parse
    ARGS = parse()              # before torch is imported: --help answers at once

import itertools
import json
import math
import os
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data import encode, show_batch, tokenize_segments, Tokenizer
from formats.checkpoints import resolve
from formats.conversations import IMAGE_TOKEN, images_of, read_rows
from formats.errors import BadData, BadImage, exit_status, note, printable, progress, UsageError
from formats.pictures import check_pixels, load_image, picture_path
from formats.strict_json import read_config
from formats.words import cut_before_spaces, word_cutter
from trainer.doctor_flags import parse
from trainer.samples import check_size, encode_sample, joined, lesson, sample_pieces
from trainer.start import template_of_files, UNKNOWN

OFFICIAL_LENGTH = 2048          # where the official runs cut a sample
NAMED = 20                      # rows that a note names


# ---------------------------------------------------------------- how long is a sample?

class TokenCounter(dict):
    """word -> how many tokens it is; `of` adds up a sample, to the length that `encode` gives it.

    A word looked up once is ten times faster than the library, to which LLaMA's texts are one long
    word. `cut` takes a text apart where no token can reach across (formats/words.py). Vocabularies
    for which we know no such place (apart: False) are tokenized in full."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        cut = word_cutter(json.loads(tokenizer._lib.to_str()))
        self.apart, self.cut = cut is not None, cut or cut_before_spaces

    def __missing__(self, word):
        if len(self) > 500_000:             # the memory is bounded
            self.clear()
        self[word] = n = len(self.tokenizer.library_pairs(word))
        return n

    def of(self, segments, pictures: int) -> int:
        """Tokens of the segments; pictures: -1: each <image> is one, 0: none is."""
        tokenizer, n, texts = self.tokenizer, 0, [""]
        if not self.apart or any("▁" in segment.text for segment in segments):
            return len(tokenize_segments(segments, tokenizer, pictures)[0])
        for segment in segments:
            if segment.start:               # a text of its own begins here
                texts.append("")
            if segment.start == "bos" and tokenizer.add_bos:
                n += 1
            texts[-1] += segment.text
        if pictures:                        # a picture is one token, and cuts the text
            n += sum(text.count(IMAGE_TOKEN) for text in texts)
            texts = [part for text in texts for part in text.split(IMAGE_TOKEN)]
        for text in texts:
            for i, part in enumerate(tokenizer.special_pattern.split(text)):
                if i > 0:
                    n += 1                  # the special token before it
                if part:
                    pad = tokenizer.prefix == "every" or tokenizer.prefix == "first" and i == 0
                    n += sum(map(self.__getitem__, self.cut(" " * pad + part)))
        return n


def sample_tokens(sample, args, counter) -> int:
    """Tokens of a sample, its pictures included; without a tokenizer, 4 for 3 words.

    Raises BadData for what training would refuse or leave out."""
    _, segments, pictures = sample_pieces(sample, args.template)
    about = ""
    if counter is None:
        tokens = len(joined(segments).split()) * 4 // 3
        about = "about (4 for 3 words; --llm counts them) "
    else:
        tokens = counter.of(segments, -1 if pictures else 0)
    size = tokens + (args.places - 1) * pictures
    if args.max_length and size > args.max_length:
        if counter is not None:             # what the cut leaves is for the tokenizer to say
            ids, _ = encode_sample(sample, args.template, counter.tokenizer, args.places,
                                   args.pack, args.max_length)
            return len(ids) + (args.places - 1) * pictures
        size = args.max_length
    check_size(size, args.pack, about)
    return size


# ---------------------------------------------------------------- the report

@dataclass
class Report:
    """What was found in a file so far."""
    kinds: Counter = field(default_factory=Counter)     # kind of fault -> how often
    joined_marks: list = field(default_factory=list)    # rows in which several marks become one
    sizes: list = field(default_factory=list)           # tokens of each good sample
    pictures: dict = field(default_factory=dict)        # path -> (where it is named, its name)
    rows: int = 0
    samples: int = 0

    def fault(self, where, field_name, why):
        """Print a fault, and count it under its kind: without names and numbers."""
        print(printable(f"{where}: {field_name}{why}"))
        field_name = re.sub(r" (['\"]).*\1", "", field_name)
        field_name = re.sub(r"\[\d+\]", "[]", field_name)
        why = re.sub(r" \(.*|'.*?'", "", str(why)).split(": ")[0]
        why = re.sub(r"(?<![\w/.-])\d[\d,.×]*", "n", why)
        self.kinds[printable(field_name + why)] += 1


def has_joined_marks(sample):
    """Is a turn with several marks about one picture? Officially they become one, in front. It is
    no fault, because LLaVA's own data may hold such rows, but a picture may have been forgotten."""
    marks = [turn["value"].count(IMAGE_TOKEN) for turn in sample["conversations"]]
    return len(images_of(sample)) == 1 and max(marks, default=0) > 1


def check_rows(args, report):
    """Read and judge every row; collect the pictures that they name."""
    counter = TokenCounter(Tokenizer(resolve(args.llm))) if args.llm else None
    find = picture_path
    if args.follow_links:
        find = partial(picture_path, follow_links=True)
    for report.rows, where, got in progress(read_rows(args.file), "rows"):
        if isinstance(got, BadData):
            name, colon, why = str(got).partition(": ")
            report.fault(where, name + colon, why)
            continue
        for sample in got:
            report.samples += 1
            try:
                report.sizes.append(sample_tokens(sample, args, counter))
                if has_joined_marks(sample):
                    report.joined_marks.append(report.rows)
            except BadData as error:
                report.fault(where, f"{sample['field']}: ", error)
        for name in images_of(got[0]):
            if not args.images:
                raise UsageError(f"{where} has a picture: give --images, the folder of the "
                                 "pictures")
            try:
                report.pictures.setdefault(find(args.images, name), (where, name))
            except BadData as error:
                why = str(error).removeprefix(f"image {name!r}: ")
                report.fault(where, f"image {name!r}: ", why)
    if not report.rows:
        raise BadData(f"{args.file}: holds no samples: expected a list of conversations")


def check_picture(path, template):
    """What is wrong with a picture for the stages that have this template, or None."""
    try:
        short, long = sorted(load_image(path).size)
        if template == "plain":
            check_pixels(336, 336 * long // short)      # cropped to a square, its short side first
        elif not template.startswith(("blip2", "instructblip", "minigpt4")):
            check_pixels(long, long)                    # padded to a square; those are squashed
    except BadImage as error:
        return str(error).removeprefix(f"{path}: ")


def check_pictures(args, report, paths):
    """Decode every picture once, on all cores."""
    look = partial(check_picture, template=args.template)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # 256 at a time: a queue of all would fill the memory
        batches = (pool.map(look, paths[i:i + 256]) for i in range(0, len(paths), 256))
        results = progress(itertools.chain.from_iterable(batches), "pictures")
        for path, why in zip(paths, results):
            if why:
                where, name = report.pictures[path]
                report.fault(where, f"image {name!r}: ", why)


def print_report(args, report, seconds, picture_seconds, opened):
    """What the file holds. opened: pictures that were decoded, in so many seconds."""
    rows = report.rows
    print(f"\n{args.file}: {rows:,} rows, {report.samples:,} samples, "
          f"{len(report.pictures):,} pictures; {report.kinds.total():,} faults")
    for kind, n in report.kinds.most_common():
        print(f"{n:9,}  {kind}")
    joined = report.joined_marks
    if joined:
        shown = ", ".join(map(str, joined[:NAMED])) + (", ..." if len(joined) > NAMED else "")
        print(f"{len(joined):9,}  note: several {IMAGE_TOKEN} in a turn and one picture, which is "
              f"shown once, in front, as officially; is a picture missing? Rows: {shown}")
    how = f"of {args.llm}" if args.llm else "estimated, 4 for 3 words: --llm counts them"
    print(f"tokens ({how}; template {args.template}; {args.places} for a picture):")
    bins = Counter(size.bit_length() for size in report.sizes)      # 256 to 511, 512 to 1,023 ...
    for bits in range(min(bins, default=0), max(bins, default=-1) + 1):
        bar = "█" * math.ceil(40 * bins[bits] / max(bins.values()))
        print(f"{1 << bits >> 1:7,} to {(1 << bits) - 1:7,} {bins[bits]:9,}  {bar}")
    longer = sum(size > OFFICIAL_LENGTH for size in report.sizes)
    if longer:
        print(f"{longer:,} are over 2,048, where the official runs cut: train.py --max-length 2048")
    print(f"without opening pictures: {seconds:.1f} s, {rows / seconds:,.0f} rows a second")
    if opened:
        print(f"opening {opened:,} pictures: {picture_seconds:.1f} s more, "
              f"{opened / picture_seconds:,.0f} pictures a second; "
              f"{rows / (seconds + picture_seconds):,.0f} rows a second in all")


def check(args) -> int:
    """A line for each fault, then what the file holds. 0: clean, 3: faults."""
    if args.images and not os.path.isdir(args.images):
        raise UsageError(f"--images {args.images}: no such folder: give the one that names start "
                         "from")
    warnings.simplefilter("ignore")                 # Pillow's; its errors are what counts
    report, start = Report(), time.monotonic()
    check_rows(args, report)
    middle = time.monotonic()
    paths = list(report.pictures) if args.open else []
    check_pictures(args, report, paths)
    print_report(args, report, middle - start, time.monotonic() - middle, len(paths))
    return 3 if report.kinds else 0


# ---------------------------------------------------------------- one row, main

def show_row(args) -> int:
    """Print one row of a file as the model meets it."""
    toy = Path(__file__).parents[1] / "toy/weights/llama"
    tokenizer, row = Tokenizer(resolve(args.llm or toy)), 0
    for row, where, got in read_rows(args.file):
        if row < args.sample:
            continue
        if isinstance(got, BadData):
            raise BadData(f"{where}: {got}")
        for sample in got:
            images = images_of(sample)
            pair = encode(lesson(sample, args.template), args.template, tokenizer, len(images))
            names = [f"<{name}: {args.places} places>" for name in images]
            print(printable(f"{where}, id {sample['id']}, template {args.template}"))
            show_batch([pair], tokenizer, args.places, *names)
        return 0
    raise UsageError(f"--sample {args.sample}: {args.file} has {row:,} rows")


def set_template(args):
    """Set args.template, where no flag does, to what training lays the rows out in: the format
    that the language model of --llm has learned, else v1."""
    if args.template:
        return
    args.template = "v1"
    if args.llm:
        folder = resolve(args.llm)          # a tokenizer alone will do
        found = template_of_files(folder, read_config(folder, missing_ok=True))
        if found == UNKNOWN:
            note(f"note: {args.llm}: its chat template is none of ours; the rows are laid out in "
                 "v1, --template takes another")
        else:
            args.template = found


def run(args) -> int:
    set_template(args)
    if args.what == "show":
        return show_row(args)
    return check(args)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(ARGS), ARGS.debug))
