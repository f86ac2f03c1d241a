"""docs.drawing.packed: the same samples in padded rows and in packed rows."""
import random
from pathlib import Path

import data
from docs.drawing.svg import legend, MARGIN, Sheet, WIDTH
from toy.standin import stand_in_row

ROOT = Path(__file__).parents[2]
SAMPLES, ROW, PATCHES = 16, 6144, 576       # ROW: the default of --pack at 7B
SEED = 3


def sample_lengths():
    """Tokens of 16 stand-in samples of LLaVA-1.5's stage 2, their pictures counted."""
    tokenizer, lengths = data.Tokenizer(ROOT / "toy/weights/llama"), []
    for i in range(SAMPLES):
        sample = stand_in_row(i, 2, random.Random(f"packed:{SEED}:{i}"))
        ids, _ = data.encode(sample["conversations"], "v1", tokenizer, "image" in sample)
        lengths.append(min(2048, len(ids) + (PATCHES - 1) * ids.count(data.IMAGE)))
    return lengths


def bar_rows(sheet, y, rows, width, scale, height):
    """Rows of [tokens of a text]; what is left of each up to `width` tokens is padding."""
    for row in rows:
        x = MARGIN
        sheet.box(x, y, width * scale, height, "red", None, 0)
        for i, size in enumerate(row):
            sheet.box(x, y, size * scale, height, ("blue", "green")[i % 2], "line", 0)
            x += size * scale
        y += height + 3
    return y


def draw_packed(path):
    """16 samples padded to the longest, and the same 16 in rows of --pack tokens."""
    lengths = sample_lengths()
    rows = [[lengths[i] for i in row] for row in data.pack(lengths, ROW)]
    longest, used = max(lengths), sum(lengths)
    sheet = Sheet("Rows padded against rows packed")
    y = sheet.note(sheet.bottom + 20, f"{SAMPLES} samples of stage 2, {min(lengths):,} to "
                   f"{longest:,} tokens with the picture.")
    y = legend(sheet, y + 6, (("blue", "a sample"), ("red", "padding: computed for nothing")))
    full = WIDTH - 2 * MARGIN
    # one scale for both: as many tokens are as long in each
    scale = full / ROW
    padded = SAMPLES * longest
    y = sheet.note(y + 10, f"Padded: {SAMPLES} rows of {longest:,}, {used / padded:.0%} of "
                   f"{padded:,} tokens are used", 15, "ink")
    y = bar_rows(sheet, y - 8, [[size] for size in lengths], longest, scale, 13)
    total = len(rows) * ROW
    y = sheet.note(y + 22, f"Packed: {len(rows)} rows of {ROW:,}, {used / total:.0%} of {total:,} "
                   "tokens are used", 15, "ink")
    y = bar_rows(sheet, y - 8, rows, ROW, scale, 22)
    sheet.note(y + 22, "In a packed row no sample sees another: each counts its positions from 0, "
               "and attention stops at its borders. Its tokens weigh what they weigh in the padded "
               "batch, so the loss is the same. Lengths: python -m toy.standin, LLaVA-1.5's "
               "shares.")
    sheet.save(path)
