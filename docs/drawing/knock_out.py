"""docs.drawing.knock_out: what is lost when an object's patches are taken out before a layer.

The vectors at the object's patches are replaced by the mean of those without an object, before
block l, and the question about it is answered from there on. What the later tokens still know has
left the patches before block l. The control takes out as many patches that show no object.

The answer is given but for its value, "The star is [red]": scored is whether the likeliest next
token is the value's, both tokens of a place."""
import random

import torch

import data
from docs.drawing.lens import layer_states
from docs.drawing.scenes import measured_scenes, object_patches, pixels_of
from docs.drawing.svg import MARGIN, Sheet, WIDTH, width_of
from kernels import rope_table
from projector import VLM
from toy.texts import article, talk_of, unique

COLOURS = {"colour": ("red-ink", None), "shape": ("blue-ink", "7 4"),
           "size": ("green-ink", "2 4"), "place": ("purple-ink", "10 3 2 3")}


def ask(scene, kind, rng):
    """(the object, question, answer that ends in the value and a full stop); None: not askable."""
    things = {"colour": unique(scene, "shape"), "shape": unique(scene, "colour")}
    candidates = things.get(kind, list(scene.things))
    if not candidates:
        return None
    t = rng.choice(candidates)
    talk = {"colour": (f"What colour is the {t.shape}?", f"The {t.shape} is {t.colour}."),
            "shape": (f"What is the {t.colour} object?",
                      f"The {t.colour} object is {article(t.shape)}."),
            "size": (f"What size is the {t.name}?", f"The {t.name} is {t.size}."),
            "place": (f"Where is the {t.name}?", f"The {t.name} is {t.where}.")}
    return t, *talk[kind]


def row_of(asked, tokenizer, kind):
    """(ids, labels) of a question and its answer; only the value's tokens have a label."""
    ids, labels = data.encode(talk_of([asked[1:]]), "v1", tokenizer)
    words = 2 if kind == "place" else 1
    last = len(ids) - 2                                 # the full stop; then comes </s>
    return ids, [label if last - words <= i < last else data.IGNORE
                 for i, label in enumerate(labels)]


def hit_rate(model, x, labels):
    """Share of rows in which every labelled token is predicted."""
    guess = model.llm.head(model.llm.norm(x)).argmax(-1)[:, :-1]
    wrong = (guess != labels[:, 1:]) & (labels[:, 1:] != data.IGNORE)
    return float((~wrong.any(1)).float().mean())


def run_from(model, x, layer):
    """x (n, T, C) through the blocks from `layer` on."""
    c = model.llm.config
    cos, sin = rope_table(torch.arange(x.shape[1])[None], c.head_dim, c.rope_theta, c.rope_scaling)
    for block in model.llm.blocks[layer:]:
        x = block(x, cos, sin)
    return x


def without(x, start, chosen, empty):
    """x with the vectors of the chosen patches replaced by the mean of the empty ones, a row each.

    chosen, empty (n, P) bool; the patches begin at `start`."""
    x, P = x.clone(), chosen.shape[1]
    patches = x[:, start:start + P]
    mean = (patches * empty[..., None]).sum(1) / empty.sum(1, keepdim=True)     # (n, C)
    x[:, start:start + P] = torch.where(chosen[..., None], mean[:, None], patches)
    return x


def as_many(chosen, empty, rng):
    """(n, P) bool: at random, as many of the empty patches as are chosen."""
    out = torch.zeros_like(chosen)
    for row, count in enumerate(chosen.sum(1).tolist()):
        free = empty[row].nonzero().flatten().tolist()
        out[row, rng.sample(free, min(count, len(free)))] = True
    return out


@torch.inference_mode()
def measure(model, scenes, kind):
    """{"object": [accuracy before each block, and untouched], "control": the same}."""
    rng, side = random.Random(kind), int(model.patches ** .5)
    rows, kept, chosen, empty = [], [], [], []
    for scene in scenes:
        asked = ask(scene, kind, rng)
        covered = [object_patches(scene, t, side) for t in scene.things]
        if asked is None:
            continue
        rows.append(row_of(asked, model.tokenizer, kind))
        kept.append(scene)
        chosen.append(covered[[t is asked[0] for t in scene.things].index(True)])
        empty.append(~torch.stack(covered).any(0))
    chosen, empty = torch.stack(chosen), torch.stack(empty)
    ids, labels = data.collate(rows, model.tokenizer.pad)
    start = rows[0][0].index(data.IMAGE)
    x, labels, _ = model.embed(ids, pixels_of(model, kept), labels)
    found = {"object": [], "control": []}
    other = as_many(chosen, empty, rng)
    for layer, x in enumerate(layer_states(model, x)):
        for name, taken in (("object", chosen), ("control", other)):
            if layer < len(model.llm.blocks):
                out = run_from(model, without(x, start, taken, empty), layer)
            else:
                out = x                                 # nothing is taken out
            found[name].append(hit_rate(model, out, labels))
    return found


def table_of(found):
    """Markdown: a row a place, the object's patches and the control's for each kind."""
    kinds = list(found)
    lines = [f"| taken out | {' | '.join(f'{kind} | control' for kind in kinds)} |",
             "|---" * (1 + 2 * len(kinds)) + "|"]
    depth = len(found[kinds[0]]["object"])
    for layer in range(depth):
        cells = [f"{column[layer]:.3f}" for kind in kinds for column in found[kind].values()]
        where = f"before block {layer + 1}" if layer < depth - 1 else "nothing"
        lines.append(f"| {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_chart(sheet, y, found):
    """Accuracy over the block before which the patches are taken out."""
    left, right, high = MARGIN + 46, WIDTH - MARGIN - 8, 250
    depth = len(next(iter(found.values()))["object"])

    def at(layer, value):
        return left + (right - left) * layer / (depth - 1), y + high * (1 - value)
    for value in (0, .25, .5, .75, 1):
        sheet.line([at(0, value), at(depth - 1, value)], "grey", 1)
        sheet.text(left - 8, at(0, value)[1] + 5, f"{value:.0%}", 14, "pale", "end")
    for layer in range(depth):
        name = str(layer + 1) if layer < depth - 1 else "none"
        sheet.text(at(layer, 0)[0], y + high + 20, name, 14, "pale", "middle")
    mean = [sum(found[kind]["control"][layer] for kind in found) / len(found)
            for layer in range(depth)]
    sheet.line([at(layer, value) for layer, value in enumerate(mean)], "line", 3)
    for kind, (colour, dashes) in COLOURS.items():
        points = [at(layer, value) for layer, value in enumerate(found[kind]["object"])]
        sheet.line(points, colour, 2.5, dashes)
        for x, value in points:
            sheet.dot(x, value, colour)
    sheet.text((left + right) / 2, y + high + 42, "taken out before block", 14, "pale", "middle")
    return y + high + 52


def draw_legend(sheet, y):
    x = MARGIN
    entries = [(kind, *COLOURS[kind]) for kind in COLOURS] + [("control", "line", None)]
    for name, colour, dashes in entries:
        sheet.line([(x, y - 5), (x + 26, y - 5)], colour, 3, dashes)
        sheet.text(x + 31, y, name, 14)
        x += 31 + width_of(name) + 10
    return y + 14


def draw_knock_out(path, folder, count):
    """The picture; returns the table."""
    model, scenes = VLM.from_pretrained(folder), measured_scenes(count)
    found = {kind: measure(model, scenes, kind) for kind in COLOURS}
    sheet = Sheet("What is lost when an object's patches are taken out")
    y = sheet.note(sheet.bottom + 20, f"Right answers about an object, over {count} held-out "
                   "scenes, when its patches are replaced by the mean of the empty ones before "
                   "a block.")
    y = draw_legend(sheet, y + 8)
    y = draw_chart(sheet, y + 10, found)
    sheet.note(y + 18, "Where a line is low, the answer still needed the patches. Where it is "
               "high, other tokens had already read them. Control: as many patches without an "
               "object, mean of the four questions.")
    sheet.save(path)
    return table_of(found)
