"""docs.drawing.way: a photo's way to an answer, with a shape on every arrow.

The toy's shapes are those of a run of it; LLaVA-1.5's at 7B are worked out from its sizes by
`shapes`, which must give the toy's, too."""
from pathlib import Path

import torch

import data
from clip import Config as TowerConfig
from docs.drawing.svg import MARGIN, Sheet, WIDTH, width_of
from generate import build_prompt
from llama import Config as LlamaConfig
from toy.world import draw, make_scene
from trainer.build import new_vlm

ROOT = Path(__file__).parents[2]
QUESTION = "Describe this image"


def toy_model():
    """The shipped parts; the projector is new: shapes do not depend on what it has learned."""
    return new_vlm(ROOT / "toy/weights/clip", ROOT / "toy/weights/llama")


def shapes(vision, llm, T):
    """{arrow: shape} for one picture and T ids, from the sizes of the parts."""
    S, P = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    row = T - 1 + P
    return {"pixels": (1, 3, S, S), "ids": (1, T), "vision": (1, 1 + P, vision.width),
            "patches": (1, P, vision.width), "image_embeds": (1, P, llm.width),
            "text_embeds": (1, T, llm.width), "row": (1, row, llm.width),
            "logits": (1, row, llm.vocab)}


@torch.inference_mode()
def measured_shapes(model, image):
    """The same of a run of the model, and the ids."""
    pixels = model.pixels(image)
    ids = torch.tensor([build_prompt([QUESTION], model.template, model.tokenizer)])
    text_embeds = model.llm.embed(ids.clamp(min=0))
    vision = model.encode_vision(pixels)
    patches = vision[:, 1:]
    image_embeds = model.projector(patches)
    row = model.embed(ids, pixels)[0]
    tensors = {"pixels": pixels, "ids": ids, "vision": vision, "patches": patches,
               "image_embeds": image_embeds, "text_embeds": text_embeds, "row": row,
               "logits": model.llm(row)}
    return {name: tuple(x.shape) for name, x in tensors.items()}


def written(shape):
    return " x ".join(f"{size:,}" for size in shape)


def step(sheet, x, y, width, words, under, pairs, end=None):
    """A box, and under it an arrow with the shapes of the toy and of 7B. Returns where it ends;
    end: where it has to."""
    sheet.box(x, y, width, 46, "blue")
    sheet.text(x + width / 2, y + 20, words, 15, anchor="middle", bold=True, room=width - 8)
    sheet.text(x + width / 2, y + 38, under, 14, anchor="middle", room=width - 4)
    top, (toy, large) = y + 46, pairs
    sheet.arrow(x + 14, top, x + 14, (end or top + 50) - 2)
    sheet.text(x + 26, top + 20, written(toy), 14)
    sheet.text(x + 26, top + 38, written(large), 14, "blue-ink")
    return top + 50


def draw_way(path):
    """Two ways that meet at `splice`, and the loop that writes the answer."""
    scene = make_scene(111, "test", 3)
    model, image = toy_model(), draw(scene, 256)
    toy = measured_shapes(model, image)
    T = toy["ids"][1]
    large = shapes(TowerConfig(image_size=336), LlamaConfig(vocab=32064), T)
    pair = {name: (toy[name], large[name]) for name in toy}
    sheet = Sheet("A photo's way to an answer")
    y = sheet.note(sheet.bottom + 20, f"On each arrow the shape: in black the toy's, in blue that "
                   f"of LLaVA-1.5 7B, for the {T} ids of the toy's prompt.")
    left, right, half = MARGIN, WIDTH / 2 + 6, WIDTH / 2 - 6 - MARGIN
    sheet.image(left, y, 96, image.resize((96, 96)))
    sheet.text(right, y + 18, f'"{QUESTION}"', 15)
    a = step(sheet, left, y + 106, half, "preprocess", "pad, resize, normalize", pair["pixels"])
    b = step(sheet, right, y + 30, half, "prompt_ids", "template, tokenizer", pair["ids"])
    a = step(sheet, left, a, half, "clip.ViT", "all blocks but the last", pair["vision"])
    a = step(sheet, left, a, half, "[:, 1:]", "drop the class token", pair["patches"])
    a = step(sheet, left, a, half, "projector", "a linear layer, or an MLP", pair["image_embeds"])
    # the text waits until the picture's vectors are there
    step(sheet, right, b, half, "llm.embed", "one row of a table an id", pair["text_embeds"], a)
    whole = WIDTH - 2 * MARGIN
    a = step(sheet, left, a, whole, "projector.splice",
             "P vectors stand where the one id IMAGE stood", pair["row"])
    a = step(sheet, left, a, whole, "llama.Llama", "causal attention; keys and values are kept",
             pair["logits"])
    sheet.box(left, a, whole, 46, "green")
    sheet.text(WIDTH / 2, a + 20, "generate.sample", 15, anchor="middle", bold=True)
    sheet.text(WIDTH / 2, a + 38, "one id from the last row; it comes back as the next token", 14,
               anchor="middle")
    # the loop back to the decoder, at the right edge
    edge = WIDTH - MARGIN / 2
    sheet.line([(WIDTH - MARGIN, a + 23), (edge, a + 23), (edge, a - 73), (WIDTH - MARGIN, a - 73)],
               "green-ink", 2)
    sheet.add(f'<polygon class="f-green-ink" points="{WIDTH - MARGIN},{a - 73} {edge - 1},{a - 78} '
              f'{edge - 1},{a - 68}"/>', a)
    sheet.text(edge - 12, a - 22, "1 x 1: one id a step", 14, "green-ink", "end")
    sheet.arrow(left + 14, a + 46, left + 14, a + 80, "line")
    sheet.text(left + 26, a + 72, "decode, until </s>: \"This picture has ...\"", 15)
    sheet.save(path)


# ------------------------------------------------------------------------------ splice

TALK = [{"from": "human", "value": f"{data.IMAGE_TOKEN}\nWhat colour is the star?"},
        {"from": "gpt", "value": "The star is red."}]


def tokens_of(ids, labels, tokenizer):
    """[(word, has it loss?)]; the middle of the system text is left out."""
    rows = []
    for i, label in zip(ids, labels):
        word = "IMAGE" if i == data.IMAGE else tokenizer.token(i).replace("▁", "")
        word = {"<0x0A>": "\\n", "\n": "\\n", "": "▁"}.get(word, word)
        rows.append((word, label != data.IGNORE))
    start = [word for word, _ in rows].index("USER")
    return rows[:4] + [("…", False)] + rows[start:]


def flow_row(sheet, y, cells, high):
    """Boxes [(word, fill, word below, its colour)] in as many lines of this height as they need."""
    x = MARGIN
    for word, fill, below, colour in cells:
        width = max(width_of(word, 14), width_of(below, 14)) + 10
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + high
        sheet.box(x, y, width, 25, fill)
        sheet.text(x + width / 2, y + 18, word, 14, anchor="middle")
        if below:
            sheet.text(x + width / 2, y + 42, below, 14, colour, "middle")
        x += width + 3
    return y + high


def draw_splice(path):
    """The row of one sample before and after `splice`, with the row of its labels."""
    model = toy_model()
    ids, labels = data.encode(TALK, "v1", model.tokenizer)
    tokens, P = tokens_of(ids, labels, model.tokenizer), model.patches
    sheet = Sheet("The spliced row, and the row of its labels")
    y = sheet.note(sheet.bottom + 20, f"Before: {len(ids)} ids. A picture is one of them, "
                   f"IMAGE = {data.IMAGE}.", colour="ink") + 4
    cells = [(word, "orange" if word == "IMAGE" else "grey", "", "pale") for word, _ in tokens]
    y = flow_row(sheet, y, cells, 32) + 22
    patches = ["p1", "p2", "p3", "…", f"p{P}"]
    y = sheet.note(y, f"After: {len(ids) - 1 + P} vectors, {len(ids)} - 1 + {P}. Below each stands "
                   "its label: the token itself where it has loss, a dot (IGNORE = -100) where it "
                   "is only read.", colour="ink") + 4
    cells = []
    for word, has_loss in tokens:
        if word == "IMAGE":
            cells += [(patch, "orange", "·", "pale") for patch in patches]
        else:
            cells.append((word, "green" if has_loss else "grey", word if has_loss else "·",
                          "green-ink" if has_loss else "pale"))
    y = flow_row(sheet, y, cells, 56) + 14
    sheet.note(y, f"{sum(label != data.IGNORE for label in labels)} tokens have loss: the answer "
               "and its end. The prediction made at one token is compared with the label of the "
               "next: the colon before the answer learns to say its first word.")
    sheet.save(path)
