"""TODO"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data import (
    BOS,
    colour_labels,
    encode,
    IGNORE,
    IMAGE,
    SEAM,
    TEMPLATES,
    tokenize_segments,
    Tokenizer,
)
from formats.checkpoints import resolve
from formats.conversations import IMAGE_TOKEN, images_of, read_rows
from formats.errors import BadData, BadImage, exit_status, printable, progress, UsageError
from formats.pictures import check_pixels, load_image, picture_path
from trainer.samples import check_size, encode_sample, lesson, sample_pieces


class TokenCounter(dict):
    """word → how many tokens it is; `of` adds up a sample, as long as `_tokenise` makes it.

    A word looked up once is ten times faster than the library, to which LLaMA's texts are one long
    word. Exact where no token has a ▁, which is a space, behind another letter: then no pair of
    bytes is merged across two words. Other vocabularies are tokenised in full."""

    def __init__(self, words):
        self.words, spec = words, json.loads(words._lib.to_str())
        model, cut = spec["model"], spec["pre_tokenizer"] or {"type": "Metaspace"}
        self.apart = (model["type"] == "BPE" and not model["dropout"] and "▁" in model["vocab"]
                      and not any("▁" in token.lstrip("▁") for token in model["vocab"])
                      and cut["type"] == "Metaspace" and set(re.findall(
                          r'"type": "(\w+)"', json.dumps(spec["normalizer"]))) <= {
                              "Sequence", "Replace"})

    def __missing__(self, word):
        if len(self) > 500_000:
            self.clear()
        self[word] = n = len(self.words._lib.encode(word, add_special_tokens=False).ids)
        return n

    def of(self, pieces, pictures: int) -> int:
        words, n, texts = self.words, 0, [""]
        if not self.apart or any("▁" in piece for piece, _, _ in pieces):
            return len(tokenize_segments(pieces, words, pictures)[0])
        for piece, _, _ in pieces:
            if piece is BOS or piece is SEAM:
                n += piece is BOS and words.add_bos
                texts.append("")
            else:
                texts[-1] += piece
        if pictures:
            n += sum(text.count(IMAGE_TOKEN) for text in texts)
            texts = [part for text in texts for part in text.split(IMAGE_TOKEN)]
        for text in texts:
            for i, part in enumerate(words._special.split(text)):
                pad = words.prefix == "every" or words.prefix == "first" and i == 0
                n += i > 0              # the special token before it
                n += sum(map(self.__getitem__, re.findall(" *[^ ]+| +", " " * pad + part))
                         ) if part else 0
        return n


def sample_tokens(sample, args, lengths) -> int:
    """Tokens of a sample, its pictures included; without a tokeniser, 4 for 3 words.

    Raises BadData for what training would refuse or leave out."""
    _, pieces, pictures = sample_pieces(sample, args.template)
    text = "".join(piece for piece, _, _ in pieces)
    words = (lengths.of(pieces, -1 if pictures else 0) if lengths is not None
             else len(text.split()) * 4 // 3)
    size, most = words + (args.places - 1) * pictures, args.max_length
    if most and size > most:
        if lengths is not None:                 # what the cut leaves is for the tokeniser to say
            ids, _ = encode_sample(sample, args.template, lengths.words, args.places, args.pack,
                                   most)
            return len(ids) + (args.places - 1) * pictures
        size = most
    check_size(size, args.pack, "" if lengths is not None else
               "about (4 for 3 words; --llm counts them) ")
    return size


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


def check(args) -> int:
    """The dataset doctor: a line for each fault, then what the file holds. 0: clean, 3: faults."""
    if args.images and not os.path.isdir(args.images):
        raise UsageError(f"--images {args.images}: no such folder: give the one that names start from")
    lengths = TokenCounter(Tokenizer(resolve(args.llm))) if args.llm else None
    kinds, sizes, pictures, rows, samples = Counter(), [], {}, 0, 0
    find = partial(picture_path, follow_links=True) if args.follow_links else picture_path
    warnings.simplefilter("ignore")                 # Pillow's; its errors are what counts

    def fault(where, field, why):
        print(printable(f"{where}: {field}{why}"))
        field = re.sub(r"\[\d+\]", "[]", re.sub(r" (['\"]).*\1", "", field))
        why = re.sub(r" \(.*|'.*?'", "", str(why)).split(": ")[0]
        kinds[printable(field + re.sub(r"(?<![\w/.-])\d[\d,.×]*", "n", why))] += 1

    start = time.monotonic()
    for rows, where, got in progress(read_rows(args.file), "rows"):
        if isinstance(got, BadData):
            field, colon, why = str(got).partition(": ")
            fault(where, field + colon, why)
            continue
        for sample in got:
            samples += 1
            try:
                sizes.append(sample_tokens(sample, args, lengths))
            except BadData as error:
                fault(where, f"{sample['field']}: ", error)
        for name in images_of(got[0]):
            if not args.images:
                raise UsageError(f"{where} has a picture: give --images, the folder of the pictures")
            try:
                pictures.setdefault(find(args.images, name), (where, name))
            except BadData as error:
                fault(where, f"image {name!r}: ", str(error).removeprefix(f"image {name!r}: "))
    read, start = time.monotonic() - start, time.monotonic()
    if not rows:
        raise BadData(f"{args.file}: holds no samples: expected a list of conversations")

    paths = list(pictures) if args.open else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # a queue of all would fill the memory
        look = partial(check_picture, template=args.template)
        looked = (pool.map(look, paths[i:i + 256]) for i in range(0, len(paths), 256))
        for path, why in zip(paths, progress(itertools.chain.from_iterable(looked), "pictures")):
            if why:
                fault(pictures[path][0], f"image {pictures[path][1]!r}: ", why)
    opened = time.monotonic() - start

    print(f"\n{args.file}: {rows:,} rows, {samples:,} samples, {len(pictures):,} pictures; "
          f"{kinds.total():,} faults")
    for kind, n in kinds.most_common():
        print(f"{n:9,}  {kind}")
    how = f"of {args.llm}" if args.llm else "estimated, 4 for 3 words: --llm counts them"
    print(f"tokens ({how}; template {args.template}; {args.places} for a picture):")
    bins = Counter(size.bit_length() for size in sizes)
    for bits in range(min(bins, default=0), max(bins, default=-1) + 1):
        bar = "█" * math.ceil(40 * bins[bits] / max(bins.values()))
        print(f"{1 << bits >> 1:7,} to {(1 << bits) - 1:7,} {bins[bits]:9,}  {bar}")
    if longer := sum(size > 2048 for size in sizes):
        print(f"{longer:,} are over 2,048, where the official runs cut: train.py --max-length 2048")
    print(f"without opening pictures: {read:.1f} s, {rows / read:,.0f} rows a second")
    if paths:
        print(f"opening {len(paths):,} pictures: {opened:.1f} s more, {len(paths) / opened:,.0f} "
              f"pictures a second; {rows / (read + opened):,.0f} rows a second in all")
    return 3 if kinds else 0


def show_row(args) -> int:
    """Print one row of a file as the model meets it."""
    words, row = Tokenizer(resolve(args.llm or Path(__file__).parents[1] / "toy/weights/llama")), 0
    for row, where, got in read_rows(args.file):
        if row < args.sample:
            continue
        if isinstance(got, BadData):
            raise BadData(f"{where}: {got}")
        for sample in got:
            ids, labels = encode(lesson(sample, args.template), args.template, words,
                                 len(images_of(sample)))
            pictures = [f"<{name}: {args.places} places>" for name in images_of(sample)]
            print(printable(f"{where}, id {sample['id']}, template {args.template}"))
            print(colour_labels(ids, labels, words, *pictures))
            n = len(ids) + (args.places - 1) * ids.count(IMAGE)
            print(f"\n{n} tokens, {sum(x != IGNORE for x in labels)} of them learned (marked).")
        return 0
    raise UsageError(f"--sample {args.sample}: {args.file} has {row:,} rows")


def parse(argv=None):
    p = argparse.ArgumentParser(description="Look at training data.", allow_abbrev=False)
    sub = p.add_subparsers(dest="what", help="nothing: one conversation, as the model meets it")
    for name, told in (("check", "the dataset doctor: exit status 0 clean, 3 faults"),
                       ("show", "one row: its tokens, the learned ones marked")):
        q = sub.add_parser(name, help=told, allow_abbrev=False)
        q.add_argument("file", help="JSON or JSON lines of LLaVA, LLaMA-Factory, "
                       "OpenAI, ShareGPT4V, MiniGPT-4 or LAVIS")
        q.add_argument("--llm", help="folder or hub id of the LLaMA whose tokens are counted")
        q.add_argument("--template", choices=sorted(TEMPLATES), default="v1", metavar="NAME",
                       help="how the words are laid out (default: v1): " + ", ".join(TEMPLATES))
        q.add_argument("--places", type=int, default=576, metavar="N", help="tokens of a picture "
                       "(default: LLaVA's 576; with a Q-Former 32)")
        q.add_argument("--debug", action="store_true", help="tracebacks")
        if name == "show":
            q.add_argument("--sample", type=int, default=1, metavar="N", help="row, from 1")
            continue
        q.add_argument("--images", metavar="DIR", help="folder that the pictures' names start from")
        q.add_argument("--follow-links", action="store_true", help="links in that folder may lead "
                       "out of it")
        q.add_argument("--open", action=argparse.BooleanOptionalAction, default=True,
                       help="decode the pictures too, each once (default: yes)")
        q.add_argument("--pack", type=int, default=6144, metavar="N",
                       help="tokens of the longest sample that is no fault (default: 6144)")
        q.add_argument("--max-length", type=int, default=0, metavar="N", help="tokens behind which "
                       "training cuts a sample, as in train.py (default: 0, it is not cut)")
    a = p.parse_args(argv)
    for flag in ("places", "sample", "pack"):
        if getattr(a, flag, 1) < 1:
            p.error(f"--{flag}: a number from 1")
    if getattr(a, "max_length", 0) < 0:
        p.error("--max-length: a number from 1, or 0 to cut nothing")
    return a


def run(args) -> int:
    return {"check": check, "show": show_row}[args.what](args)


def main(argv=None) -> int:
    args = parse(argv)
    return exit_status(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
