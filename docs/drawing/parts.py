"""docs.drawing.parts: what trains and what is frozen; where the memory of a 7B step goes.

Both are read off models on the meta device, which have the shapes of the papers' and no memory."""
import torch

import train
from clip import ViT
from docs.drawing.svg import MARGIN, Sheet, WIDTH
from qformer import Blip2Stage1
from qformer import Config as QFormerConfig
from trainer.flags import EVA
from trainer.forecast import (
    choose_row_and_policy,
    KNOWN_SIZES,
    memory_forecast,
    meta_model,
    usable_bytes,
)
from trainer.lengths import sample_lengths

COLUMNS = ("vision tower", "Q-Former", "projector", "LLaMA 7B")


def args_of(recipe, stage):
    """The command line of a stage at 7B, of which only a plan is asked."""
    return train.parse_args(["--stage", str(stage), "--recipe", recipe, "--base", "7b",
                             *([] if (recipe, stage) == ("blip2", 1) else ["--plan"])])


def stage_model(args):
    """The model of a stage on the meta device, with what trains marked."""
    if not args.row.losses:
        return meta_model(args, train.set_trainable)
    with torch.device("meta"):
        tower = ViT(KNOWN_SIZES[EVA]).without_final_block()
        model = Blip2Stage1(tower.config, QFormerConfig())
    train.set_trainable(model, args.row.train)
    return model


def column_of(name):
    """Which of COLUMNS a parameter belongs to."""
    top, *rest = name.split(".")
    if top == "vision":
        return COLUMNS[0]
    if top == "llm":
        return COLUMNS[3]
    # BLIP-2: ln_vision, the queries, and in stage 1 the heads of the three losses
    if top == "projector" and "qformer" not in rest and "norm" not in rest:
        return COLUMNS[2]
    return COLUMNS[1]


def counts(model):
    """{column: (weights that train, all weights)}; a column that the model lacks is missing."""
    found = {}
    for name, p in model.named_parameters():
        trained, total = found.get(column_of(name), (0, 0))
        found[column_of(name)] = trained + p.numel() * p.requires_grad, total + p.numel()
    return found


def short(number):
    """21,000,000 -> "21 M"."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def cell(sheet, x, y, width, found):
    """One part of one stage: its share that trains is orange."""
    if found is None:
        sheet.text(x + width / 2, y + 28, "none", 14, "pale", "middle")
        return
    trained, total = found
    sheet.box(x, y, width, 42, "grey")
    if trained:
        sheet.box(x, y, width * trained / total, 42, "orange")
    words = "trains" if trained else "frozen"
    sheet.text(x + width / 2, y + 18, words, 14, anchor="middle", bold=bool(trained))
    size = short(total)
    if 0 < trained < total:
        size = f"{short(trained).split()[0]} of {size}"
    sheet.text(x + width / 2, y + 35, size, 13, "ink" if trained else "pale", "middle", room=width)


def draw_frozen(path):
    """A row a recipe's stage, a column a part."""
    sheet = Sheet("What is frozen and what trains")
    first, gap = 72, 4
    width = (WIDTH - MARGIN - first - MARGIN) / 4 - gap
    y = sheet.bottom + 20
    for i, name in enumerate(COLUMNS):
        sheet.text(MARGIN + first + i * (width + gap) + width / 2, y, name, 13, "pale", "middle")
    y += 8
    for recipe in train.RECIPES:
        sheet.text(MARGIN, y + 17, recipe, 15, bold=True)
        y += 24
        for stage in (1, 2):
            found = counts(stage_model(args_of(recipe, stage)))
            sheet.text(MARGIN, y + 26, f"stage {stage}", 14, "pale")
            for i, name in enumerate(COLUMNS):
                cell(sheet, MARGIN + first + i * (width + gap), y, width, found.get(name))
            y += 46
        y += 6
    sheet.note(y + 16, "Numbers of weights at the papers' size, counted from the shapes. "
               "Projector: LLaVA's linear layer or MLP, or the layer behind a Q-Former. BLIP-2's "
               "published stage 2 has an OPT or a FlanT5 in the LLaMA's place, as frozen.")
    sheet.save(path)


# ------------------------------------------------------------------------------ memory

WHAT = {"weights": "bf16, 2 bytes a weight, all of the model",
        "gradients": "bf16, 2 bytes a trained weight",
        "masters": "what bf16 cuts off an fp32 weight: 2 bytes",
        "moments": "Adam's two averages, 8 bits each, and scales",
        "activations": "what backward needs of one row of {:,} tokens",
        "workspace": "what the backward of one layer needs besides"}


def forecast():
    """({what: bytes}, tokens of a row, policy, bytes that a card of 80 GB leaves)."""
    args = args_of("llava-1.5", 2)
    model, kinds = meta_model(args, train.set_trainable), sample_lengths(args)[1]
    space = usable_bytes(80)
    pack, policy = choose_row_and_policy(model, args, kinds, space)
    return memory_forecast(model, args, kinds, pack, policy), pack, policy, space


def draw_memory(path):
    """Bars of the forecast, as `train.py --stage 2 --base 7b --plan` prints it."""
    sizes, pack, policy, space = forecast()
    total = sum(sizes.values())
    sheet = Sheet(f"Where the {total / 1e9:.1f} GB of a 7B step go")
    y = sheet.note(sheet.bottom + 20, "Stage 2 of LLaVA-1.5, projector and LLaMA train, on one "
                   f"GPU: rows of {pack:,} tokens, --checkpoint {policy}, 8-bit AdamW.")
    most, full = max(sizes.values()), WIDTH - 2 * MARGIN - 76
    fills = dict(zip(sizes, ("blue", "orange", "green", "grey", "red", "line")))
    for name, size in sizes.items():
        sheet.text(MARGIN, y + 18, name, 15, bold=True)
        sheet.box(MARGIN, y + 25, max(1, full * size / most), 20, fills[name])
        sheet.text(WIDTH - MARGIN, y + 41, f"{size / 1e9:.1f} GB", 15, anchor="end", bold=True)
        sheet.text(MARGIN, y + 62, WHAT[name].format(pack), 14, "pale")
        y += 72
    y += 8
    whole = WIDTH - 2 * MARGIN
    x = MARGIN
    for name, size in sizes.items():
        width = whole * size / space
        sheet.box(x, y, width, 26, fills[name])
        x += width
    sheet.box(MARGIN, y, whole, 26, None, "ink")
    sheet.note(y + 46, f"All of it in the {space / 1e9:.1f} GB that a card of 80 GB leaves. "
               "Forecast, not run by us on a GPU: train.py --stage 2 --plan --base 7b.")
    sheet.save(path)
