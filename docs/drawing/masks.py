"""docs.drawing.masks: the Q-Former's three masks, and the tiles that flash attention skips."""
import torch

from docs.drawing.svg import legend, MARGIN, Sheet, WIDTH
from kernels.attention import causal, full, sliding_window, visible
from qformer import itc, itg, itm

SERVES = (
    (itc, "itc", "contrast", "Which caption belongs to which picture?",
     "Loss: cross-entropy over the batch, both ways. Read: every query and the text's first token; "
     "the best query counts."),
    (itm, "itm", "matching", "Do this picture and this caption belong together?",
     "Loss: yes or no, for pairs and for hard negatives. Read: the queries, which have seen both "
     "sides; their mean."),
    (itg, "itg", "writing", "What is the caption?",
     "Loss: the next token. Read: the text tokens. They know of the picture only what the queries "
     "have found."))


def draw_masks(path):
    """The three masks for 2 queries and 4 text tokens, and the loss that each serves."""
    sheet = Sheet("The Q-Former's three masks, and the loss that each one serves")
    y = legend(sheet, sheet.bottom + 18, (("blue", "the row's token may see the column's"),
                                          ("paper", "hidden")))
    names, cell = ("q1", "q2", "t1", "t2", "t3", "t4"), 25
    for rule, name, what, asked, loss in SERVES:
        top, left = y + 18, MARGIN + 26
        for i, column in enumerate(names):
            colour = "orange-ink" if column[0] == "q" else "green-ink"
            sheet.text(left + (i + .5) * cell, top - 5, column, 14, colour, "middle")
            sheet.text(left - 6, top + (i + .7) * cell, column, 14, colour, "end")
        for i, row in enumerate(visible(rule, 6, 6, n=2).tolist()):
            for j, seen in enumerate(row):
                sheet.box(left + j * cell, top + i * cell, cell, cell, "blue" if seen else "paper")
        x = left + 6 * cell + 18
        sheet.text(x, top + 12, f"{name}: {what}", 17, bold=True)
        below = sheet.note(top + 34, asked, 15, "ink", x)
        sheet.note(below + 3, loss, 14, "pale", x)
        y = max(top + 6 * cell, sheet.bottom) + 22
    sheet.note(y + 2, "q: a learned query, t: a text token. Drawn by calling the rules of "
               "qformer.py, which the GPU kernel compiles too.")
    sheet.save(path)


# ------------------------------------------------------------------------------ tiles

BLOCK, SIZE = 4, 48                 # positions of a tile's side, and of the row
DOCUMENTS = (20, 11, 17)            # texts packed into one row
SHOWN = (("causal", causal, 0, None, "LLaMA"),
         ("sliding_window", sliding_window, 14, None, "Mistral: the last n keys"),
         ("causal, packed", causal, 0, DOCUMENTS, "three texts in one row"),
         ("itc", itc, 14, None, "queries | text"),
         ("itm, full", full, 0, None, "everything"),
         ("itg", itg, 14, None, "text after its queries"))


def spans(rule, n, documents, lo, hi):
    """first, last, inner, outer of the queries lo .. hi-1, in positions: as `walk` of
    kernels/attention.py asks the rule. documents: lengths of packed texts, or None."""
    if documents is None:
        return rule.keys(lo, hi, n, SIZE)
    ends = torch.tensor(documents).cumsum(0).tolist()
    own = [next(i for i, end in enumerate(ends) if at < end) for at in (lo, hi - 1)]
    (b0, e0), (b1, e1) = ((ends[i] - documents[i], ends[i]) for i in own)
    # the block's first document says where to begin, its last one where to stop
    first, _, inner, _ = rule.keys(lo - b0, min(hi, e0) - b0, n, e0 - b0)
    _, last, _, outer = rule.keys(max(lo, b1) - b1, hi - b1, n, e1 - b1)
    return max(first, 0) + b0, last + b1, inner + b0, outer + b1 if b0 == b1 else 0


def tile_kinds(rule, n=0, documents=None):
    """Rows of "skipped", "whole" (every query sees every key: the rule is not asked) or "edge"."""
    tiles, kinds = SIZE // BLOCK, []
    for row in range(tiles):
        first, last, inner, outer = spans(rule, n, documents, row * BLOCK, (row + 1) * BLOCK)
        first, last = max(first, 0) // BLOCK, -(-min(last, SIZE) // BLOCK)
        inner, outer = -(-max(inner, 0) // BLOCK), min(outer, SIZE) // BLOCK
        line = ["skipped"] * tiles
        for i in range(first, max(last, first)):
            line[i] = "whole" if inner <= i < outer else "edge"
        kinds.append(line)
    return kinds


def share_skipped(kinds):
    return sum(line.count("skipped") for line in kinds) / sum(map(len, kinds))


def draw_tiles(path):
    """The tiles of the score matrix that the kernel visits, under six masks."""
    sheet = Sheet("The tiles that flash attention skips under each mask")
    y = legend(sheet, sheet.bottom + 18, (("paper", "skipped"), ("blue", "whole: no mask is asked"),
                                          ("orange", "edge: the mask is asked")))
    fills = {"skipped": "paper", "whole": "blue", "edge": "orange"}
    cell, half = 17, WIDTH / 2
    for place, (name, rule, n, documents, what) in enumerate(SHOWN):
        kinds = tile_kinds(rule, n, documents)
        x, top = MARGIN + place % 2 * (half - 6), y + place // 2 * 280
        sheet.text(x, top + 14, name, 16, bold=True)
        sheet.text(x, top + 33, what, 14, "pale", room=half - MARGIN - 4)
        for i, line in enumerate(kinds):
            for j, kind in enumerate(line):
                sheet.box(x + j * cell, top + 42 + i * cell, cell, cell, fills[kind], round_=0)
        sheet.text(x, top + 42 + 12 * cell + 18, f"{share_skipped(kinds):.0%} skipped", 14)
    sheet.note(sheet.bottom + 20, f"Rows are queries, columns are keys: {SIZE} of each in tiles of "
               f"{BLOCK} x {BLOCK}; on a GPU 128 x 64. Window and queries: n = 14. In a long row "
               "the causal half that is skipped comes close to 50 %.")
    sheet.save(path)
