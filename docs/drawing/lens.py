"""docs.drawing.lens: the word that each patch says at each layer.

The logit lens: what stands at a patch after some blocks goes through the language model's last norm
and its head, as if it were the last block, and the likeliest word is read. [nostalgebraist, 2020]
The model was never trained to say a word there. A patch that says "red" has become something that
later tokens can read like the word red."""
import torch

from decoding.attention_map import image_starts
from docs.drawing.scenes import measured_scenes, object_patches, pixels_of
from docs.drawing.svg import legend, MARGIN, Sheet, WIDTH, width_of
from generate import build_prompt
from kernels import rope_table
from projector import VLM
from toy.world import draw, make_scene

KINDS = ("colour", "shape", "size", "place")


def words_of(thing):
    """{kind: the words that are true of it}."""
    return {"colour": {thing.colour}, "shape": {thing.shape}, "size": {thing.size},
            "place": set(thing.where.split())}


def layer_states(model, x):
    """x (n, T, C), then the same after each block."""
    c = model.llm.config
    cos, sin = rope_table(torch.arange(x.shape[1])[None], c.head_dim, c.rope_theta, c.rope_scaling)
    yield x
    for block in model.llm.blocks:
        x = block(x, cos, sin)
        yield x


@torch.inference_mode()
def patch_words(model, pixels):
    """[[the word of each patch of each picture] of each layer], (depth + 1, n, P) words."""
    prompt = build_prompt(["Describe this image"], model.template, model.tokenizer)
    start, P, layers = image_starts(prompt, model.patches)[0], model.patches, []
    x = model.embed(torch.tensor([prompt]).expand(len(pixels), -1), pixels)[0]
    for x in layer_states(model, x[:, :start + P]):     # what comes later is not seen
        logits = model.llm.head(model.llm.norm(x[:, start:]))
        ids = logits[..., :len(model.tokenizer)].argmax(-1)     # (n, P); the head has spare rows
        layers.append([[model.tokenizer.token(i).replace("▁", "") for i in row]
                       for row in ids.tolist()])
    return layers


def shares(words, scenes, side):
    """Of the patches with an object, the share whose word is true of it: {kind: share}; "any" of
    the four; "control": true of an object of the next scene."""
    hits, total = dict.fromkeys((*KINDS, "any", "control"), 0), 0
    for n, scene in enumerate(scenes):
        other = scenes[(n + 1) % len(scenes)].things[0]
        for thing in scene.things:
            true, wrong = words_of(thing), set().union(*words_of(other).values())
            for p in object_patches(scene, thing, side).nonzero().flatten().tolist():
                total += 1
                word = words[n][p].lower()              # "Top left red, so ..." begins a text
                for kind in KINDS:
                    hits[kind] += word in true[kind]
                hits["any"] += word in set().union(*true.values())
                hits["control"] += word in wrong
    return {kind: count / total for kind, count in hits.items()}


def table_of(rows):
    """Markdown: a row a layer."""
    names = list(rows[0])
    lines = [f"| after block | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for layer, row in enumerate(rows):
        cells = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {layer or 'none'} | {cells} |")
    return "\n".join(lines)


def fitted(word, width):
    """The word, cut to a width; a dot for what is no word: a byte, a sign, the end of a text."""
    if not word.isalpha():
        return "·"
    cut = word
    while width_of(cut, 13) > width:
        cut = cut.rstrip(".")[:-1] + "."
    return cut


def draw_grid(sheet, y, words, owner, side):
    """One layer: side x side words; green where the word is true of the object there."""
    wide, high = (WIDTH - 2 * MARGIN) / side, 26
    for p, word in enumerate(words):
        x, top = MARGIN + p % side * wide, y + p // side * high
        thing = owner[p]
        is_true = thing is not None and word.lower() in set().union(*words_of(thing).values())
        sheet.box(x, top, wide, high, "green" if is_true else "paper", "line", 0)
        sheet.text(x + wide / 2, top + 17, fitted(word, wide - 3), 13, "ink" if thing else "pale",
                   "middle")
    for p, thing in enumerate(owner):
        if thing is not None:
            x, top = MARGIN + p % side * wide, y + p // side * high
            sheet.box(x, top, wide, high, None, "orange-ink", 0, 2)
    return y + side * high


def draw_lens(path, folder, count):
    """The picture for one scene; returns the table for `count` scenes."""
    model, scenes = VLM.from_pretrained(folder), measured_scenes(count)
    side = int(model.patches ** .5)
    scene = make_scene(111, "test", 3)
    words = patch_words(model, pixels_of(model, [scene]))
    owner = [None] * model.patches
    for thing in scene.things:
        for p in object_patches(scene, thing, side).nonzero().flatten().tolist():
            owner[p] = thing
    layers = patch_words(model, pixels_of(model, scenes))
    rows = [shares(layer, scenes, side) for layer in layers]
    sheet = Sheet("The word that each patch says at each layer")
    y = sheet.bottom + 12
    sheet.image(MARGIN, y, 120, draw(scene, 240))
    sheet.note(y + 16, "Every patch goes through the language model's head, as if its layer were "
               "the last. Nobody has taught the patches to say a word.", 14, "ink", MARGIN + 136)
    y = legend(sheet, y + 144, (("green", "true of the object at that patch"),))
    sheet.box(MARGIN, y - 11, 13, 13, None, "orange-ink", 3, 2)
    sheet.text(MARGIN + 20, y, "patches that an object covers", 14)
    y += 12
    for layer, grid in enumerate(words):
        title = f"After block {layer}" if layer else "From the projector, before block 1"
        share = rows[layer]["any"]
        sheet.text(MARGIN, y + 20, title, 15, bold=True)
        sheet.text(WIDTH - MARGIN, y + 20, f"true: {share:.0%}", 15, anchor="end")
        y = draw_grid(sheet, y + 28, grid[0], owner, side) + 8
    sheet.note(y + 16, f"true: of the patches with an object, the share that says its colour, "
               f"shape, size or place, over {count} held-out scenes. Another scene's object: "
               f"{max(row['control'] for row in rows):.0%} at most. A dot is no word: a sign, or "
               "the end of a text.")
    sheet.save(path)
    return table_of(rows)
