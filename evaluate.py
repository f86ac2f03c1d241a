"""evaluate.py: score a model, with the figures beside it that say what the score is worth.

    python evaluate.py parts                        the gates of the shipped CLIP and LLaMA
    python evaluate.py toy --model FOLDER [...]     questions and descriptions of unseen scenes

Truth is known exactly, so no judge is needed. Three columns stand beside every accuracy:

    majority   always the most frequent answer: a yes/no question is worth .5 before it is read
    other      the same model asked the same questions with another scene's picture
    grey       with a grey picture: answering blind

A model that looks falls to blind with the wrong picture. One that guesses well does not fall.

Several models (seeds) give the mean ± half the spread between them. Descriptions are scored by
objects, a colour-shape pair each:

    precision     named objects that are there        recall      objects there that are named
    invented      named objects whose shape is nowhere in the scene, [CHAIR] 1809.02156
    twice         descriptions that name an object twice

Next: README.md, the tables.
"""

import argparse
import os


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Score a model.", allow_abbrev=False)
    sub = p.add_subparsers(dest="what", required=True)
    parts = sub.add_parser("parts", help="the gates of the shipped parts", allow_abbrev=False)
    parts.add_argument("--vision", default="weights/toy/clip")
    parts.add_argument("--llm", default="weights/toy/llama")
    toy = sub.add_parser("toy", help="questions about the toy world", allow_abbrev=False)
    toy.add_argument("--model", nargs="+", default=["runs/toy/llava-1.5/stage2/model"])
    toy.add_argument("--no-controls", dest="controls", action="store_false",
                     help="the model with the right pictures only")
    for q in (parts, toy):
        q.add_argument("--scenes", type=int, default=1000, help="held-out scenes")
        q.add_argument("--out", help="write the figures to this JSON file too")
        q.add_argument("--debug", action="store_true", help="tracebacks")
    a = p.parse_args(argv)
    if a.scenes < 20:
        p.error("--scenes must be at least 20")
    return a


if __name__ == "__main__":
    ARGS = arguments()              # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import world
from clip import ViT
from generate import generate_batch
from llama import Llama
from projector import VLM

PER_SCENE = 3                       # questions asked about each scene, kinds in turn


def pictures(scenes, size, aspect):
    """(n, 3, size, size)."""
    return torch.cat([data.preprocess(world.draw(s), size, aspect) for s in scenes])


# ------------------------------------------------------------------------------------- the parts

def patches_at_things(vit, scenes):
    """Second-last layer's vector of the patch at each object's centre (N, C), and its truth."""
    side = vit.config.image // vit.config.patch
    vectors, truth = [], []
    for start in range(0, len(scenes), 200):
        some = scenes[start:start + 200]
        with torch.inference_mode():
            seen = vit(pictures(some, vit.config.image, "square"))[:, 1:]
        for scene, row in zip(some, seen):
            for t in scene.things:
                x, y = (min(side - 1, int(v * side)) for v in t.centre)
                vectors.append(row[y * side + x])
                truth.append((list(world.COLOURS).index(t.colour), world.SHAPES.index(t.shape),
                              world.SIZES.index(t.size), t.place))
    return torch.stack(vectors).clone(), torch.tensor(truth)


def probe(vit, scenes=1000):
    """Accuracy of linear probes trained on training scenes, on `scenes` held-out scenes."""
    x, y = patches_at_things(vit, [world.scene(f"probe-{i}") for i in range(4 * scenes)])
    held, truth = patches_at_things(vit, [world.scene(i, "test", 1 + i % 4)
                                          for i in range(scenes)])
    mean, spread = x.mean(0), x.std(0)
    x, held, scores = (x - mean) / spread, (held - mean) / spread, {}
    for k, name in enumerate(("colour", "shape", "size", "place")):
        torch.manual_seed(0)
        line = torch.nn.Linear(x.shape[1], int(y[:, k].max()) + 1)
        adam = torch.optim.AdamW(line.parameters(), .01, weight_decay=.01)
        for _ in range(400):
            pick = torch.randint(len(x), (1024,))
            adam.zero_grad()
            F.cross_entropy(line(x[pick]), y[pick, k]).backward()
            adam.step()
        scores[name] = float((line(held).argmax(1) == truth[:, k]).float().mean())
    return scores


def ask_text(llm, words, scenes=1000, n=None):
    """{kind: accuracy} of the language model alone, the scene told in shuffled words."""
    n, scores = n or scenes * PER_SCENE // len(world.KINDS), {}
    for kind in world.KINDS:
        rows, values, i = [], [], 0
        while len(rows) < n:
            scene, dice = world.scene(i, "test", 1 + i % 4), random.Random(f"{kind}:{i}")
            asked, i = world.question(scene, kind, dice), i + 1
            if asked:
                told = world.notes(scene, dice)
                turn = {"from": "human", "value": f"{told}\n{asked[0]}"}
                rows.append(data.chat_ids([turn], "v1", words))
                values.append(asked[2])
        said = [words.decode(x) for x in generate_batch(llm, rows, max_new_tokens=60,
                                                        eos=words.eos)]
        scores[kind] = sum(world.value_of(kind, s) == v for s, v in zip(said, values)) / n
    return scores


def parts(args):
    """Print the gates: what CLIP's patches know, and what LLaMA reads out of a text."""
    eye = probe(ViT.from_pretrained(args.vision), args.scenes)
    tongue = ask_text(Llama.from_pretrained(args.llm), data.Tokenizer(args.llm), args.scenes)
    print("CLIP, linear probes at an object's patch, second-last layer")
    need = {"colour": .97, "shape": .95, "size": .90}
    for name, score in eye.items():
        print(f"  {name:<12}{score:.3f}" + (f"   at least {need[name]}" if name in need else ""))
    print("LLaMA alone, the scene told in words")
    need = dict.fromkeys(("colour", "shape", "where", "size"), .95)
    need |= {"exist": .90, "count": .90, "count of": .90, "relation": .85}
    for name, score in tongue.items():
        print(f"  {name:<12}{score:.3f}" + (f"   at least {need[name]}" if name in need else ""))
    return {"clip": eye, "llama": tongue}


# ------------------------------------------------------------------------------------- the model

def questions(split, count):
    """[(scene index, kind, question, value)]: PER_SCENE kinds in turn for every scene."""
    asked = []
    for i in range(count):
        scene, dice = world.scene(i, split, 1 + i % 4), random.Random(f"ask:{split}:{i}")
        for j in range(PER_SCENE):
            kind = world.KINDS[(PER_SCENE * i + j) % len(world.KINDS)]
            made = world.question(scene, kind, dice)
            if made:
                asked.append((i, kind, made[0], made[2]))
    return asked


def answers(model, texts, pixels, max_new_tokens, batch=200):
    """The model's words for each text about each picture (n, 3, S, S), greedy."""
    said = []
    for start in range(0, len(texts), batch):
        rows = [data.chat_ids([{"from": "human", "value": f"<image>\n{t}"}], "v1", model.words)
                for t in texts[start:start + batch]]
        out = generate_batch(model, rows, [p[None] for p in pixels[start:start + batch]],
                             max_new_tokens=max_new_tokens)
        said += [model.words.decode(x).strip() for x in out]
    return said


def describe(model, scenes, pixels):
    """Object scores of the descriptions of scenes; see the docstring on top."""
    said = answers(model, ["Describe this image"] * len(scenes), pixels, 90)
    named = right = there = found = invented = twice = 0
    for scene, text in zip(scenes, said):
        truth = {(t.colour, t.shape) for t in scene.things}
        told = world.things_in(text)
        named += len(told)
        right += sum(pair in truth for pair in told)
        there += len(truth)
        found += len(truth & set(told))
        invented += sum(shape not in {s for _, s in truth} for _, shape in told)
        twice += len(set(told)) < len(told)
    return {"precision": right / max(1, named), "recall": found / there,
            "invented": invented / max(1, named), "twice": twice / len(scenes)}


def score(model, split, count, picture):
    """{kind: accuracy} and description scores with the right, another's or a grey picture."""
    scenes = [world.scene(i, split, 1 + i % 4) for i in range(count)]
    pixels = pictures(scenes, model.image_size, model.aspect)
    if picture == "other":
        pixels = pixels.roll(count // 2 + 1, 0)         # an odd step: another number of objects too
    if picture == "grey":
        pixels = torch.zeros_like(pixels)               # zero after normalising is CLIP's mean
    asked = questions(split, count)
    said = answers(model, [q for _, _, q, _ in asked], pixels[[i for i, *_ in asked]], 60)
    hits, total = Counter(), Counter()
    for (_, kind, _, value), text in zip(asked, said):
        total[kind] += 1
        hits[kind] += world.value_of(kind, text) == value
    made = {kind: hits[kind] / total[kind] for kind in world.KINDS}
    made["mean"] = sum(made.values()) / len(world.KINDS)
    return made | describe(model, scenes, pixels)


def majority(split, count):
    """{kind: rate of the most frequent value}."""
    values = {kind: Counter() for kind in world.KINDS}
    for _, kind, _, value in questions(split, count):
        values[kind][value] += 1
    made = {k: max(c.values()) / sum(c.values()) for k, c in values.items()}
    return made | {"mean": sum(made.values()) / len(made)}


def toy(args):
    """Print the table: one row a kind, one column a picture; several models are averaged."""
    runs = []
    for folder in args.model:
        model = VLM.from_pretrained(folder)
        columns = {"right": score(model, "test", args.scenes, "right")}
        if args.controls:
            columns |= {p: score(model, "test", args.scenes, p) for p in ("other", "grey")}
            columns["kept out"] = score(model, "novel", args.scenes, "right")
        runs.append(columns)
    best = majority("test", args.scenes)
    print(f"{args.scenes} held-out scenes, {len(runs)} model(s)")
    print(f"{'':<12}" + "".join(f"{c:>16}" for c in runs[0]) + f"{'majority':>16}")
    for name in runs[0]["right"]:
        line = f"{name:<12}"
        for column in runs[0]:
            values = [r[column][name] for r in runs]
            spread = f" ±{(max(values) - min(values)) / 2:.3f}" if len(runs) > 1 else ""
            line += f"{sum(values) / len(values):.3f}{spread}".rjust(16)
        print(line + (f"{best[name]:.3f}".rjust(16) if name in best else ""))
    return {"models": args.model, "scenes": args.scenes, "runs": runs, "majority": best}


def main(args):
    made = {"parts": parts, "toy": toy}[args.what](args)
    if args.out:
        Path(args.out).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(data.guarded(lambda: main(ARGS), ARGS.debug))
