"""TODO"""

import random
from collections import Counter

import torch
import torch.nn.functional as F

import data
import generate
from clip import ViT
from formats.errors import UsageError
from generate import generate_batch
from llama import Llama
from projector import VLM
from toy import texts as toy_texts
from toy.texts import KINDS, things_in, value_of
from toy.world import COLOURS, draw, make_scene, SHAPES, SIZES

QUESTIONS_PER_SCENE = 3                       # questions asked about each scene, kinds in turn


def scene_pixels(scenes, size, aspect):
    """(n, 3, size, size)."""
    return torch.cat([data.preprocess(draw(s), size, aspect) for s in scenes])


def object_patch_features(vit, scenes):
    """Second-last layer's vector of the patch at each object's centre (N, C), and its truth."""
    side = vit.config.image_size // vit.config.patch_size
    vectors, truth = [], []
    for start in range(0, len(scenes), 200):
        some = scenes[start:start + 200]
        with torch.inference_mode():
            seen = vit(scene_pixels(some, vit.config.image_size, "square"))[:, 1:]
        for scene, row in zip(some, seen):
            for t in scene.things:
                x, y = (min(side - 1, int(v * side)) for v in t.centre)
                vectors.append(row[y * side + x])
                truth.append((list(COLOURS).index(t.colour), SHAPES.index(t.shape),
                              SIZES.index(t.size), t.place))
    return torch.stack(vectors).clone(), torch.tensor(truth)


def linear_probe(vit, scenes=1000):
    """Accuracy of linear probes trained on training scenes, on `scenes` held-out scenes."""
    x, y = object_patch_features(vit, [make_scene(f"probe-{i}") for i in range(4 * scenes)])
    held, truth = object_patch_features(vit, [make_scene(i, "test", 1 + i % 4)
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


def text_only_accuracy(llm, words, scenes=1000, n=None):
    """{kind: accuracy} of the language model alone, the scene told in shuffled words."""
    n, scores = n or scenes * QUESTIONS_PER_SCENE // len(KINDS), {}
    for kind in KINDS:
        rows, values, i = [], [], 0
        while len(rows) < n:
            scene, dice = make_scene(i, "test", 1 + i % 4), random.Random(f"{kind}:{i}")
            asked, i = toy_texts.question(scene, kind, dice), i + 1
            if asked:
                told = toy_texts.notes(scene, dice)
                turn = {"from": "human", "value": f"{told}\n{asked[0]}"}
                rows.append(data.prompt_tokens([turn], "v1", words))
                values.append(asked[2])
        said = [words.decode(x) for x in generate_batch(llm, rows, max_new_tokens=60,
                                                        eos=words.eos)]
        scores[kind] = sum(value_of(kind, s) == v for s, v in zip(said, values)) / n
    return scores


def eval_parts(args):
    """Print the gates: what CLIP's patches know, and what LLaMA reads out of a text."""
    eye = linear_probe(ViT.from_pretrained(args.vision), args.scenes)
    tongue = text_only_accuracy(Llama.from_pretrained(args.llm), data.Tokenizer(args.llm), args.scenes)
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


def questions(split, count):
    """[(scene index, kind, question, value)]: PER_SCENE kinds in turn for every scene."""
    asked = []
    for i in range(count):
        scene, dice = make_scene(i, split, 1 + i % 4), random.Random(f"ask:{split}:{i}")
        for j in range(QUESTIONS_PER_SCENE):
            kind = KINDS[(QUESTIONS_PER_SCENE * i + j) % len(KINDS)]
            made = toy_texts.question(scene, kind, dice)
            if made:
                asked.append((i, kind, made[0], made[2]))
    return asked


def answers(model, texts, pixels, max_new_tokens, batch=200, template=None, temperature=0.0):
    """The model's words for each text about each picture (n, 3, S, S)."""
    if model.aspect == "anyres":
        raise UsageError("the toy world's pictures are not cut in tiles: take a LLaVA-1.5")
    said = []
    # a model of stage 1 is asked in the words of stage 2, where nothing else is said
    template = template or ("v1" if model.template == "plain" else model.template)
    for start in range(0, len(texts), batch):
        rows = [generate.build_prompt([t], template, model.tokenizer) for t in texts[start:start + batch]]
        out = generate_batch(model, rows, [p[None] for p in pixels[start:start + batch]],
                             max_new_tokens=max_new_tokens, temperature=temperature, seed=start)
        said += [model.tokenizer.decode(x).strip() for x in out]
    return said


def description_scores(model, scenes, pixels, **how):
    """Object scores of the descriptions of scenes; see the docstring on top."""
    said = answers(model, ["Describe this image"] * len(scenes), pixels, 90, **how)
    named = right = there = found = invented = twice = 0
    for scene, text in zip(scenes, said):
        truth = {(t.colour, t.shape) for t in scene.things}
        told = things_in(text)
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
    scenes = [make_scene(i, split, 1 + i % 4) for i in range(count)]
    pixels = scene_pixels(scenes, model.image_size, model.aspect)
    if picture == "other":
        pixels = pixels.roll(count // 2 | 1, 0)         # an odd step: another number of objects too
    if picture == "grey":
        pixels = torch.zeros_like(pixels)               # zero after normalising is CLIP's mean
    asked = questions(split, count)
    said = answers(model, [q for _, _, q, _ in asked], pixels[[i for i, *_ in asked]], 60)
    hits, total = Counter(), Counter()
    for (_, kind, _, value), text in zip(asked, said):
        total[kind] += 1
        hits[kind] += value_of(kind, text) == value
    made = {kind: hits[kind] / total[kind] for kind in KINDS}
    made["mean"] = sum(made.values()) / len(KINDS)
    return made | description_scores(model, scenes, pixels)


def majority_baseline(split, count):
    """{kind: rate of the most frequent value}."""
    values = {kind: Counter() for kind in KINDS}
    for _, kind, _, value in questions(split, count):
        values[kind][value] += 1
    made = {k: max(c.values()) / sum(c.values()) for k, c in values.items()}
    return made | {"mean": sum(made.values()) / len(made)}


def eval_toy(args):
    """Print the table: one row a kind, one column a picture; several models are averaged."""
    runs = []
    for folder in args.model:
        model = VLM.from_pretrained(folder)
        if model.template != "plain" and data.template_of(model.template).style == "plain":
            raise UsageError(f"{folder}: writes captions and would not read the questions: take "
                             "MiniGPT-4's second stage, or evaluate.py claims")
        columns = {"right": score(model, "test", args.scenes, "right")}
        if args.controls:
            columns |= {p: score(model, "test", args.scenes, p) for p in ("other", "grey")}
            columns["kept out"] = score(model, "novel", args.scenes, "right")
        runs.append(columns)
    best = majority_baseline("test", args.scenes)
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
