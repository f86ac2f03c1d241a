"""How long the samples of a run are: what --plan and the choice of row length begin with."""

import math
from pathlib import Path

import data
from formats.conversations import images_of
from formats.errors import NothingToLearn, UsageError
from toy.texts import training_sample
from trainer.loader import count_learned, Samples
from trainer.samples import encode_sample
from trainer.start import llm_folder

# samples of the data as released: (stage 1, stage 2). BLIP-2's are what its paper's steps see (250k
# of 1,680 pictures and 80k of 1,920) in each of the script's 10 epochs
SAMPLES = {"llava": (595_375, 157_712), "llava-1.5": (558_128, 665_298),
           "blip2": (42_000_000, 15_360_000), "sharegpt4v": (1_246_000, 665_298)}
# Kinds of samples: (share, text tokens, tokens with loss, pictures). Estimated; 100 tokens more add
# 11 % to stage 2's hours. With --data the file is counted.
CAPTIONS, CONVERSATIONS = ((1., 30, 28, 1),), ((1., 324, 180, 1),)
PREFIXED = ((1., 30, 21, 1),)                   # captions of which a FlanT5 reads a quarter
DESCRIPTIONS = ((1., 208, 206, 1),)             # 826 characters
TEXT_ONLY = 40_688 / 665_298                    # share of LLaVA-1.5's stage 2
MIXED = ((1 - TEXT_ONLY, 324, 180, 1), (TEXT_ONLY, 1200, 800, 0))


def sample_lengths(args):
    """(samples of an epoch, their kinds, where that is from). A kind: see CAPTIONS above."""
    row, llm = args.row, llm_folder(args)
    if not args.data and args.base != "toy":
        return official_lengths(args)
    total, named, source = some_samples(args)
    tokenizer = None
    if Path(llm).is_dir():
        tokenizer = data.Tokenizer(llm)
    else:
        source += ", 4 tokens for 3 words"
    kinds = []
    for name, sample in named:
        pictures, turns = len(images_of(sample)), sample["conversations"]
        if tokenizer:
            try:
                ids, labels = encode_sample(sample, row.template, tokenizer, 1)
            except NothingToLearn:
                continue
            except data.BadData as error:
                if args.on_bad_sample == "skip":
                    continue
                raise data.BadData(f"{name}: {error}") from None
            text, learned = len(ids) - pictures, count_learned(labels)
        else:                           # three words of English are about four tokens
            counts = [len(turn["value"].split()) * 4 / 3 for turn in turns]
            text, learned = 40 + sum(counts), sum(counts[1::2])
        kinds.append((text, learned, pictures))
    if not kinds:
        raise data.BadData(f"{args.data}: not one of {len(named)} samples can be learned from: "
                           "python data.py check lists what is wrong")
    return total, tuple((1 / len(kinds), *kind) for kind in kinds), source


def some_samples(args):
    """(samples of an epoch, [(name, sample)] of up to 200 of them, where they are from)."""
    row = args.row
    if args.data:
        rows = Samples(args).rows
        good = [i for i in range(len(rows)) if i not in rows.bad]
        every = max(1, math.ceil(len(good) / 200))
        named = [(f"{args.data}: sample {rows[i]['id']}", rows[i]) for i in good[::every]]
        return len(rows), named, f"{len(named)} samples of {args.data}"
    named = []
    for i in range(64):
        image, turns = training_sample(args.seed, args.stage, i, row.caption_style)
        named.append(("toy sample", {"image": image, "conversations": turns}))
    return row.steps * row.batch, named, "64 samples of the toy world"


def official_lengths(args):
    """`sample_lengths` of the data that the papers trained on."""
    row, kinds = args.row, CAPTIONS
    if row.template == "blip2_t5":
        kinds = PREFIXED
    elif row.caption_style == "descriptions":
        kinds = DESCRIPTIONS
    elif row.caption_style == "dialogue":
        kinds = CONVERSATIONS if args.recipe == "llava" else MIXED
    total = SAMPLES.get(args.recipe, (0, 0))[args.stage - 1] or row.steps * row.batch
    if not total:
        raise UsageError("--plan: how many samples? give --data or --steps")
    return total, kinds, "estimates of the official data's lengths, no --data"


def mean_lengths(kinds):
    """Text tokens, tokens with loss and pictures of a sample on average."""
    return [sum(kind[0] * kind[i] for kind in kinds) for i in (1, 2, 3)]
