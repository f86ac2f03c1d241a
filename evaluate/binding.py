"""evaluate.binding: whose shape is it? Errors of descriptions, by what the objects share.

    description_errors          shares of descriptions with an error: nothing shared; colour; shape
    attention_before_shape      which object the language model reads when its next word is a shape
    draw                        both as one picture, of several language models

"At top left is a small orange square. At top centre is a small orange ___": to go on, a model has
to combine the place with the colour. One that looks up the colour alone is right as long as no two
objects share it, so the fault hides in a mean over all scenes: here it has columns of its own.

    python -m evaluate.binding FOLDER ... [--out binding.png]       folders of LLaMAs
    python -m evaluate.binding FOLDER --before tests/binding_before.json --out tests/binding.png
"""
import argparse
import json
import os
import random
import statistics
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import data
from decoding.attention_map import attention_weights
from generate import generate_batch
from kernels import mask_rule, rope_table
from kernels.attention import visible
from llama import Llama
from toy.phrases import notes
from toy.texts import description
from toy.world import COLOURS, make_scene, PLACES, SHAPES, SIZES

GROUPS = ("nothing shared", "colour shared", "shape shared")


def shares(scene, attribute):
    """Do two objects have the same value of an attribute?"""
    values = [getattr(t, attribute) for t in scene.things]
    return len(set(values)) < len(values)


def groups_of(scene):
    """The GROUPS of a scene: nothing (neither colour nor shape), or one of the two, or both."""
    shared = [f"{name} shared" for name in ("colour", "shape") if shares(scene, name)]
    return shared or ["nothing shared"]


def objects_told(text):
    """The (place, size, colour, shape) of the sentences "At PLACE is a SIZE COLOUR SHAPE.", in
    reading order. A sentence of another form gives nothing."""
    found = []
    for sentence in text.split("."):
        words = sentence.split()
        if len(words) != 8 or words[0] != "At" or words[3] != "is":
            continue
        place, (size, colour, shape) = " ".join(words[1:3]), words[5:]
        if place in PLACES and size in SIZES and colour in COLOURS and shape in SHAPES:
            found.append((PLACES.index(place), size, colour, shape))
    return sorted(found)


def has_error(scene, text):
    """Is any object of a description missing, added or different in any attribute?"""
    truth = sorted((t.place, t.size, t.colour, t.shape) for t in scene.things)
    return objects_told(text) != truth


def description_errors(scenes, texts):
    """{"errors, GROUP": share of its descriptions with an error}; a group without scenes: 0."""
    wrong = {group: [] for group in GROUPS}
    for scene, text in zip(scenes, texts):
        for group in groups_of(scene):
            wrong[group].append(has_error(scene, text))
    return {f"errors, {group}": sum(found) / max(1, len(found)) for group, found in wrong.items()}


# -------------------------------------------------------------------------------------- attention

@torch.inference_mode()
def attention_to_all(llm, ids):
    """(layers, T, T): each position's attention, the mean over the heads of a layer."""
    c, T, x = llm.config, len(ids), llm.embed(torch.tensor([ids]))
    cos, sin = rope_table(torch.arange(T)[None], c.head_dim, c.rope_theta, c.rope_scaling)
    rule, window = mask_rule(c.window, T)
    hidden, found = ~visible(rule, T, T, window), []
    for block in llm.blocks:
        found.append(attention_weights(c, block, x, cos, sin, hidden))
        x = block(x, cos, sin)
    return torch.stack(found)


def notes_prompt(scene, number, tokenizer):
    """Token ids: a scene as notes, and the request to describe it."""
    text = f"{notes(scene, random.Random(number))}\nDescribe this image."
    return list(data.prompt_tokens([{"from": "human", "value": text}], "v1", tokenizer))


def positions(ids, word, tokenizer, first, last):
    """Where a word stands among ids[first:last]."""
    token, = tokenizer.encode(word, bos=False)
    return [i for i in range(first, last) if ids[i] == token]


def attention_before_shape(llm, tokenizer, scenes):
    """(layers, 2): the attention from the colour in the true description, whose next word is the
    shape, to the note of the right object, and to the note of the other object of that colour: the
    sum over a note's five words, the mean over heads and over all pairs of objects of a colour."""
    found = []
    for number, scene in enumerate(scenes):
        prompt = notes_prompt(scene, number, tokenizer)
        ids = prompt + tokenizer.encode(description(scene), bos=False)
        colours = [t.colour for t in scene.things]
        for colour in sorted({c for c in colours if colours.count(c) == 2}):
            weights = attention_to_all(llm, ids)
            asked = positions(ids, colour, tokenizer, len(prompt), len(ids))
            # "top left small red star": the note begins three words before its colour
            notes_at = [i - 3 for i in positions(ids, colour, tokenizer, 0, len(prompt))]
            for at, right, other in zip(asked, notes_at, reversed(notes_at)):
                found.append(torch.stack([weights[:, at, start:start + 5].sum(1)
                                          for start in (right, other)], 1))
    return torch.stack(found).mean(0)


# -------------------------------------------------------------------------------------- the report

def told_in_words(llm, tokenizer, scenes):
    """The language model's description of each scene, which it reads as notes."""
    prompts = [notes_prompt(scene, number, tokenizer) for number, scene in enumerate(scenes)]
    rows = generate_batch(llm, prompts, max_new_tokens=90, eos=tokenizer.eos)
    return [tokenizer.decode(ids).strip() for ids in rows]


def measure(folder, count=400):
    """{"errors, GROUP": share, "attention": [[right, other] of each layer]} of a LLaMA alone, which
    is told `count` held-out scenes as notes in words."""
    llm, tokenizer = Llama.from_pretrained(folder), data.Tokenizer(folder)
    scenes = [make_scene(i, "test", 1 + i % 4) for i in range(count)]
    texts = told_in_words(llm, tokenizer, scenes)
    weights = attention_before_shape(llm, tokenizer, scenes)
    return description_errors(scenes, texts) | {"attention": weights.tolist()}


def draw(path, measured):
    """A PNG: errors of each group, and the attention before a shape. measured: {name: figures}."""
    import matplotlib               # here: it takes a second
    matplotlib.use("Agg")
    from matplotlib import pyplot
    chart, axes = pyplot.subplots(1, 1 + len(measured), figsize=(4 + 3.2 * len(measured), 3.2),
                                  layout="constrained", sharey=True)
    names, width = [group.replace(" ", "\n") for group in GROUPS], .8 / len(measured)
    for i, (name, figures) in enumerate(measured.items()):
        x = [place + i * width - .4 + width / 2 for place in range(len(GROUPS))]
        bars = axes[0].bar(x, [figures[f"errors, {group}"] for group in GROUPS], width, label=name)
        axes[0].bar_label(bars, fmt="%.3f", fontsize=7)
        layers = range(len(figures["attention"]))
        for k, whose in enumerate(("the right object", "the other")):
            axes[1 + i].plot(layers, [pair[k] for pair in figures["attention"]], "o-", label=whose)
        axes[1 + i].set(title=f"{name}: attention\nfrom the colour to the note of", xlabel="layer",
                        ylim=(0, 1))
        axes[1 + i].set_xticks(layers)
        axes[1 + i].legend(fontsize=7)
    axes[0].set_xticks(range(len(GROUPS)), names, fontsize=8)
    axes[0].set(title="descriptions with an error")
    axes[0].legend(fontsize=7)
    chart.savefig(path, dpi=90)
    pyplot.close(chart)


def main():
    """Print, and draw, what several language models do."""
    parser = argparse.ArgumentParser(description="Whose shape is it? Errors of LLaMAs alone.",
                                     allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="of language models")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--before", help="JSON of figures measured earlier: {name: figures}")
    parser.add_argument("--out", help="a PNG to draw")
    args = parser.parse_args()
    measured = json.loads(Path(args.before).read_text()) if args.before else {}
    for folder in args.folders:
        measured[Path(folder).name] = figures = measure(folder, args.scenes)
        print(folder)
        for group in GROUPS:
            print(f"  errors, {group:<16}{figures[f'errors, {group}']:.3f}")
        for layer, (right, other) in enumerate(figures["attention"]):
            print(f"  layer {layer}: attention to the right object's note {right:.3f}, "
                  f"to the other's {other:.3f}")
    if args.out:
        draw(args.out, measured)


if __name__ == "__main__":
    main()
