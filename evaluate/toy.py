"""evaluate.toy: scores in the toy world, where the truth is known.

    eval_parts   linear probes on CLIP's patches; LLaMA alone, with the scene given in words
    eval_toy     a VLM: questions of ten kinds and descriptions, beside their controls

Scene i of a split has 1 + i % 4 objects. Questions go through KINDS in turn, so each kind is asked
about every number of objects.
"""
import random
from collections import Counter

import torch
import torch.nn.functional as F

import data
from clip import ViT
from decoding.prompt import build_prompt
from formats.errors import UsageError
from generate import generate_batch
from llama import Llama
from projector import VLM
from toy.phrases import notes
from toy.texts import KINDS, question, things_in, value_of
from toy.world import COLOURS, draw, make_scene, SHAPES, SIZES

QUESTIONS_PER_SCENE = 3


def held_out_scenes(count, split="test"):
    """Scenes that training never draws, with 1, 2, 3, 4, 1, 2 ... objects."""
    return [make_scene(i, split, 1 + i % 4) for i in range(count)]


def scene_pixels(scenes, size, aspect):
    """(n, 3, size, size)."""
    return torch.cat([data.preprocess(draw(s), size, aspect) for s in scenes])


# ------------------------------------------------------------------------------ the parts

def object_patch_features(vit, scenes):
    """Second-last layer's vector of the patch at each object's centre (N, C), and its truth (N, 4):
    indices of colour, shape, size and place."""
    side = vit.config.image_size // vit.config.patch_size
    vectors, truth = [], []
    for start in range(0, len(scenes), 200):
        some = scenes[start:start + 200]
        with torch.inference_mode():
            features = vit(scene_pixels(some, vit.config.image_size, "square"))
        for scene, patches in zip(some, features[:, 1:]):       # without the class token
            for t in scene.things:
                x, y = (min(side - 1, int(v * side)) for v in t.centre)
                vectors.append(patches[y * side + x])
                truth.append((list(COLOURS).index(t.colour), SHAPES.index(t.shape),
                              SIZES.index(t.size), t.place))
    return torch.stack(vectors).clone(), torch.tensor(truth)


def linear_probe(vit, scenes=1000):
    """{attribute: accuracy} of linear probes: trained on training scenes, scored on `scenes` that
    are held out."""
    x, y = object_patch_features(vit, [make_scene(f"probe-{i}") for i in range(4 * scenes)])
    test_x, test_y = object_patch_features(vit, held_out_scenes(scenes))
    mean, spread = x.mean(0), x.std(0)
    x, test_x, scores = (x - mean) / spread, (test_x - mean) / spread, {}
    for k, name in enumerate(("colour", "shape", "size", "place")):
        torch.manual_seed(0)
        probe = torch.nn.Linear(x.shape[1], int(y[:, k].max()) + 1)
        adam = torch.optim.AdamW(probe.parameters(), .01, weight_decay=.01)
        for _ in range(400):
            pick = torch.randint(len(x), (1024,))
            adam.zero_grad()
            F.cross_entropy(probe(x[pick]), y[pick, k]).backward()
            adam.step()
        scores[name] = float((probe(test_x).argmax(1) == test_y[:, k]).float().mean())
    return scores


def text_only_accuracy(llm, tokenizer, scenes=1000, n=None):
    """{kind: accuracy} of the language model alone; it reads the scene as notes in words.

    n: questions of each kind; default: as many as `scenes` scenes get."""
    n, scores = n or scenes * QUESTIONS_PER_SCENE // len(KINDS), {}
    for kind in KINDS:
        prompts, values, i = [], [], 0
        while len(prompts) < n:
            scene, rng = make_scene(i, "test", 1 + i % 4), random.Random(f"{kind}:{i}")
            i += 1
            asked = question(scene, kind, rng)
            if asked:                               # None: this scene has nothing to ask
                text = f"{notes(scene, rng)}\n{asked[0]}"
                turns = [{"from": "human", "value": text}]
                prompts.append(data.prompt_tokens(turns, "v1", tokenizer))
                values.append(asked[2])
        answers = generate_batch(llm, prompts, max_new_tokens=60, eos=tokenizer.eos)
        hits = sum(value_of(kind, tokenizer.decode(ids)) == value
                   for ids, value in zip(answers, values))
        scores[kind] = hits / n
    return scores


def print_gates(title, scores, least):
    """Scores, and beside each what is required of it."""
    print(title)
    for name, score in scores.items():
        required = f"   at least {least[name]}" if name in least else ""
        print(f"  {name:<12}{score:.3f}{required}")


def eval_parts(args):
    """Print the gates: what CLIP's patches know, and what LLaMA reads out of a text."""
    clip = linear_probe(ViT.from_pretrained(args.vision), args.scenes)
    llama = text_only_accuracy(Llama.from_pretrained(args.llm), data.Tokenizer(args.llm),
                               args.scenes)
    print_gates("CLIP, linear probes at an object's patch, second-last layer", clip,
                {"colour": .97, "shape": .95, "size": .90})
    print_gates("LLaMA alone, the scene told in words", llama,
                {"colour": .95, "shape": .95, "where": .95, "size": .95,
                 "exist": .90, "count": .90, "count of": .90, "relation": .85})
    return {"clip": clip, "llama": llama}


# ------------------------------------------------------------------------------ the model

def questions(split, count):
    """[(scene index, kind, question, value)]: kinds in turn, for every scene."""
    asked = []
    for i, scene in enumerate(held_out_scenes(count, split)):
        rng = random.Random(f"ask:{split}:{i}")
        for j in range(QUESTIONS_PER_SCENE):
            kind = KINDS[(QUESTIONS_PER_SCENE * i + j) % len(KINDS)]
            found = question(scene, kind, rng)
            if found:
                asked.append((i, kind, found[0], found[2]))
    return asked


def answers(model, texts, pixels, max_new_tokens, batch=200, template=None, temperature=0.0):
    """The model's answer to each text about each picture of `pixels` (n, 3, S, S)."""
    if model.aspect == "anyres":
        raise UsageError("the toy world's pictures are not cut in tiles: take a LLaVA-1.5")
    found = []
    # a model of stage 1 is asked in stage 2's template, in which answers are more than captions
    template = template or ("v1" if model.template == "plain" else model.template)
    for start in range(0, len(texts), batch):
        prompts = [build_prompt([text], template, model.tokenizer)
                   for text in texts[start:start + batch]]
        rows = generate_batch(model, prompts, [p[None] for p in pixels[start:start + batch]],
                              max_new_tokens=max_new_tokens, temperature=temperature, seed=start)
        found += [model.tokenizer.decode(ids).strip() for ids in rows]
    return found


def description_scores(model, scenes, pixels, **settings):
    """Object scores of the descriptions of scenes; the docstring of evaluate says which.

    settings: of `answers`."""
    texts = answers(model, ["Describe this image"] * len(scenes), pixels, 90, **settings)
    named = correct = present = found = hallucinated = repeated = 0
    for scene, text in zip(scenes, texts):
        truth = {(t.colour, t.shape) for t in scene.things}
        shapes = {shape for _, shape in truth}
        pairs = things_in(text)
        named += len(pairs)
        correct += sum(pair in truth for pair in pairs)
        present += len(truth)
        found += len(truth & set(pairs))
        hallucinated += sum(shape not in shapes for _, shape in pairs)
        repeated += len(set(pairs)) < len(pairs)
    return {"precision": correct / max(1, named), "recall": found / present,
            "hallucinated": hallucinated / max(1, named), "repeated": repeated / len(scenes)}


def score(model, split, count, picture):
    """{kind: accuracy} and description scores; picture: "right", "other" scene's, or "grey"."""
    scenes = held_out_scenes(count, split)
    pixels = scene_pixels(scenes, model.image_size, model.aspect)
    if picture == "other":
        pixels = pixels.roll(count // 2 | 1, 0)         # an odd step: another number of objects too
    if picture == "grey":
        pixels = torch.zeros_like(pixels)               # zero after normalising is CLIP's mean
    asked = questions(split, count)
    texts = answers(model, [text for _, _, text, _ in asked], pixels[[i for i, *_ in asked]], 60)
    hits, total = Counter(), Counter()
    for (_, kind, _, value), text in zip(asked, texts):
        total[kind] += 1
        hits[kind] += value_of(kind, text) == value
    scores = {kind: hits[kind] / total[kind] for kind in KINDS}
    scores["mean"] = sum(scores.values()) / len(KINDS)
    return scores | description_scores(model, scenes, pixels)


def majority_baseline(split, count):
    """{kind: rate of the most frequent value}."""
    values = {kind: Counter() for kind in KINDS}
    for _, kind, _, value in questions(split, count):
        values[kind][value] += 1
    rates = {kind: max(c.values()) / c.total() for kind, c in values.items()}
    return rates | {"mean": sum(rates.values()) / len(rates)}


def print_table(runs, majority):
    """A row for each figure, a column for each picture; several models: mean and half spread."""
    columns = list(runs[0])
    print(f"{'':<12}" + "".join(f"{c:>16}" for c in columns) + f"{'majority':>16}")
    for name in runs[0]["right"]:
        line = f"{name:<12}"
        for column in columns:
            values = [run[column][name] for run in runs]
            cell = f"{sum(values) / len(values):.3f}"
            if len(runs) > 1:
                cell += f" ±{(max(values) - min(values)) / 2:.3f}"
            line += cell.rjust(16)
        if name in majority:
            line += f"{majority[name]:.3f}".rjust(16)
        print(line)


def eval_toy(args):
    """Print the table: one row a kind, one column a picture; several models are averaged."""
    runs = []
    for folder in args.model:
        model = VLM.from_pretrained(folder)
        if model.template != "plain" and data.template_of(model.template).style == "plain":
            raise UsageError(f"{folder}: writes captions and would not read the questions: take "
                             "MiniGPT-4's second stage, or python -m evaluate claims")
        columns = {"right": score(model, "test", args.scenes, "right")}
        if args.controls:
            for picture in ("other", "grey"):
                columns[picture] = score(model, "test", args.scenes, picture)
            columns["held-out pairs"] = score(model, "novel", args.scenes, "right")
        runs.append(columns)
    majority = majority_baseline("test", args.scenes)
    print(f"{args.scenes} held-out scenes, {len(runs)} model(s)")
    print_table(runs, majority)
    return {"models": args.model, "scenes": args.scenes, "runs": runs, "majority": majority}
