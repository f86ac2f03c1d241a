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
from evaluate.binding import description_errors, told_in_words
from formats.errors import UsageError
from generate import generate_batch
from llama import Llama
from projector import VLM
from toy.phrases import notes
from toy.texts import KINDS, question, things_in, value_of
from toy.world import COLOURS, draw, HELD_OUT_PAIRS, make_scene, SHAPES, SIZES

QUESTIONS_PER_SCENE = 3


def held_out_scenes(count, split="test"):
    """Scenes that training never draws, with 1, 2, 3, 4, 1, 2 ... objects."""
    return [make_scene(i, split, 1 + i % 4) for i in range(count)]


def scene_pixels(scenes, size, aspect):
    """(n, 3, size, size)."""
    return torch.cat([data.preprocess(draw(s), size, aspect) for s in scenes])


# ------------------------------------------------------------------------------ the parts

def object_patch_features(vit, scenes, only=None):
    """Second-last layer's vector of the patch at each object's centre (N, C), and its truth (N, 4):
    indices of colour, shape, size and place. only: (colour, shape) pairs; None: all objects."""
    side = vit.config.image_size // vit.config.patch_size
    vectors, truth = [], []
    for start in range(0, len(scenes), 200):
        some = scenes[start:start + 200]
        with torch.inference_mode():
            features = vit(scene_pixels(some, vit.config.image_size, "square"))
        for scene, patches in zip(some, features[:, 1:]):       # without the class token
            for t in scene.things:
                if only and (t.colour, t.shape) not in only:
                    continue
                x, y = (min(side - 1, int(v * side)) for v in t.centre)
                vectors.append(patches[y * side + x])
                truth.append((list(COLOURS).index(t.colour), SHAPES.index(t.shape),
                              SIZES.index(t.size), t.place))
    return torch.stack(vectors).clone(), torch.tensor(truth)


def train_probes(vit, scenes):
    """{attribute: a linear layer}, trained on the patches of so many training scenes."""
    x, y = object_patch_features(vit, [make_scene(f"probe-{i}") for i in range(scenes)])
    probes = {}
    for k, name in enumerate(("colour", "shape", "size", "place")):
        torch.manual_seed(0)
        norm = torch.nn.BatchNorm1d(x.shape[1], affine=False, momentum=None)
        norm(x)                                     # mean and spread of all, from here on fixed
        probe = torch.nn.Linear(x.shape[1], int(y[:, k].max()) + 1)
        adam, normed = torch.optim.AdamW(probe.parameters(), .01, weight_decay=.01), norm.eval()(x)
        for _ in range(400):
            pick = torch.randint(len(x), (1024,))
            adam.zero_grad()
            F.cross_entropy(probe(normed[pick]), y[pick, k]).backward()
            adam.step()
        probes[name] = torch.nn.Sequential(norm, probe)
    return probes


def probe_accuracy(probes, vit, scenes, only=None):
    """{attribute: accuracy} of `train_probes`; only: as in `object_patch_features`."""
    x, y = object_patch_features(vit, scenes, only)
    return {name: float((probe(x).argmax(1) == y[:, k]).float().mean())
            for k, (name, probe) in enumerate(probes.items())}


def linear_probe(vit, scenes=1000):
    """{attribute: accuracy} of linear probes: trained on training scenes, scored on `scenes` that
    are held out."""
    return probe_accuracy(train_probes(vit, 4 * scenes), vit, held_out_scenes(scenes))


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
    """Scores, and beside each what is required of it. least: {name: (">=" or "<=", limit)}."""
    print(title)
    for name, score in scores.items():
        required = "   {} {}".format(*least[name]) if name in least else ""
        print(f"  {name:<24}{score:.3f}{required}")


CLIP_GATES = {"colour": (">=", .97), "shape": (">=", .95), "size": (">=", .90)}
LLAMA_GATES = {kind: (">=", .97) for kind in KINDS if kind not in ("background", "count of")}
LLAMA_GATES |= {"count of": (">=", .95), "errors, nothing shared": ("<=", .01),
                "errors, colour shared": ("<=", .03), "errors, shape shared": ("<=", .03)}


def eval_parts(args):
    """Print the gates: what CLIP's patches know, and what LLaMA reads out of a text."""
    vit, llm = ViT.from_pretrained(args.vision), Llama.from_pretrained(args.llm)
    tokenizer, scenes = data.Tokenizer(args.llm), held_out_scenes(args.scenes)
    probes = train_probes(vit, 4 * args.scenes)
    clip = probe_accuracy(probes, vit, scenes)
    pairs = probe_accuracy(probes, vit, held_out_scenes(args.scenes, "novel"), HELD_OUT_PAIRS)
    llama = text_only_accuracy(llm, tokenizer, args.scenes)
    llama |= description_errors(scenes, told_in_words(llm, tokenizer, scenes))
    print_gates("CLIP, linear probes at an object's patch, second-last layer", clip, CLIP_GATES)
    print_gates("the same, objects of colour-shape pairs that training never draws", pairs, {})
    print_gates("LLaMA alone, the scene told in words", llama, LLAMA_GATES)
    return {"clip": clip, "held-out pairs": pairs, "llama": llama}


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
    after_captions = getattr(model, "llm_template", None) or "v1"
    template = template or (after_captions if model.template == "plain" else model.template)
    for start in range(0, len(texts), batch):
        prompts = [build_prompt([text], template, model.tokenizer)
                   for text in texts[start:start + batch]]
        rows = generate_batch(model, prompts, [p[None] for p in pixels[start:start + batch]],
                              max_new_tokens=max_new_tokens, temperature=temperature, seed=start)
        found += [model.tokenizer.decode(ids).strip() for ids in rows]
    return found


def object_scores(scenes, texts):
    """Scores of the objects that descriptions name; the docstring of evaluate says which."""
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


def descriptions(model, scenes, pixels, **settings):
    """The model's description of each scene. settings: of `answers`."""
    return answers(model, ["Describe this image"] * len(scenes), pixels, 90, **settings)


def description_scores(model, scenes, pixels, **settings):
    """Object scores of the descriptions of scenes. settings: of `answers`."""
    return object_scores(scenes, descriptions(model, scenes, pixels, **settings))


def shown(model, split, count, picture):
    """(scenes, pixels of the pictures that the model is shown); picture: see `score`."""
    scenes = held_out_scenes(count, split)
    pixels = scene_pixels(scenes, model.image_size, model.aspect)
    if picture == "other":
        pixels = pixels.roll(count // 2 | 1, 0)         # an odd step: another number of objects too
    if picture == "grey":
        pixels = torch.zeros_like(pixels)               # zero after normalising is CLIP's mean
    return scenes, pixels


def score_descriptions(model, split, count, picture):
    """Description scores; "breaks off": the share of texts without a full stop at their end."""
    scenes, pixels = shown(model, split, count, picture)
    texts = descriptions(model, scenes, pixels)
    broken = sum(not text.split("###")[0].strip().endswith(".") for text in texts) / count
    return (object_scores(scenes, texts) | {"breaks off": broken}
            | description_errors(scenes, texts))


def score(model, split, count, picture):
    """{kind: accuracy} and description scores; picture: "right", "other" scene's, or "grey"."""
    scenes, pixels = shown(model, split, count, picture)
    asked = questions(split, count)
    texts = answers(model, [text for _, _, text, _ in asked], pixels[[i for i, *_ in asked]], 60)
    hits, total = Counter(), Counter()
    for (_, kind, _, value), text in zip(asked, texts):
        total[kind] += 1
        hits[kind] += value_of(kind, text) == value
    scores = {kind: hits[kind] / total[kind] for kind in KINDS}
    scores["mean"] = sum(scores.values()) / len(KINDS)
    texts = descriptions(model, scenes, pixels)
    return scores | object_scores(scenes, texts) | description_errors(scenes, texts)


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
    print(f"{'':<24}" + "".join(f"{c:>16}" for c in columns) + f"{'majority':>16}")
    for name in runs[0]["right"]:
        line = f"{name:<24}"
        for column in columns:
            values = [run[column][name] for run in runs]
            cell = f"{sum(values) / len(values):.3f}"
            if len(runs) > 1:
                cell += f" ±{(max(values) - min(values)) / 2:.3f}"
            line += cell.rjust(16)
        if name in majority:
            line += f"{majority[name]:.3f}".rjust(16)
        print(line)


def is_captioner(model):
    """Was it trained on captions alone, by a template that throws a question away?"""
    style = data.template_of(model.template).style
    return model.template != "plain" and style == "plain"


def eval_toy(args):
    """Print the table: one row a kind, one column a picture; several models are averaged."""
    runs, measure, only_descriptions = [], score, getattr(args, "descriptions", False)
    if only_descriptions:
        measure = score_descriptions
    for folder in args.model:
        model = VLM.from_pretrained(folder)
        if not only_descriptions and is_captioner(model):
            raise UsageError(f"{folder}: writes captions and would not read the questions: take "
                             "MiniGPT-4's second stage, or give --descriptions")
        columns = {"right": measure(model, "test", args.scenes, "right")}
        if args.controls:
            for picture in ("other", "grey"):
                columns[picture] = measure(model, "test", args.scenes, picture)
            columns["held-out pairs"] = measure(model, "novel", args.scenes, "right")
        runs.append(columns)
    majority = {} if only_descriptions else majority_baseline("test", args.scenes)
    print(f"{args.scenes} held-out scenes, {len(runs)} model(s)")
    print_table(runs, majority)
    return {"models": args.model, "scenes": args.scenes, "runs": runs, "majority": majority}
