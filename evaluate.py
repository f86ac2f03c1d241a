"""evaluate.py: score a model, with the figures beside it that say what the score is worth.

    python evaluate.py parts                        the gates of the shipped CLIP and LLaMA
    python evaluate.py toy --model FOLDER [...]     questions and descriptions of unseen scenes
    python evaluate.py retrieval --model FOLDER     pictures for texts and texts for pictures
    python evaluate.py claims --only blip2,minigpt4 what the papers claim, in the toy world

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

`claims` trains what it needs (train.py, in runs/claims) with several seeds, and prints what came out,
whether or not it agrees with the paper. Retrieval is by the published score: the best few by
ITC's cosine, ordered anew by match logit + cosine.

Next: README.md, the tables.
"""

import argparse
import os

CLAIMS = "blip2", "minigpt4"


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
    find = sub.add_parser("retrieval", help="texts for pictures, and back", allow_abbrev=False)
    find.add_argument("--model", default="runs/toy/blip2/stage1/model")
    claims = sub.add_parser("claims", help="the papers' claims", allow_abbrev=False)
    claims.add_argument("--only", default=",".join(CLAIMS), help="papers, with commas")
    claims.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    claims.add_argument("--runs", default="runs/claims", help="where they lie, or will lie")
    for q in (parts, toy, find, claims):
        q.add_argument("--scenes", type=int, default=1000 if q in (parts, toy) else 500,
                       help="held-out scenes")
        q.add_argument("--out", help="write the figures to this JSON file too")
        q.add_argument("--debug", action="store_true", help="tracebacks")
    a = p.parse_args(argv)
    if a.scenes < 20:
        p.error("--scenes must be at least 20")
    if a.what == "claims":
        a.only = a.only.split(",")
        if set(a.only) - set(CLAIMS) or not 1 <= a.seeds <= 100:
            p.error(f"--only takes {', '.join(CLAIMS)}; --seeds 1 to 100")
    return a


if __name__ == "__main__":
    ARGS = arguments()              # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import world
from clip import ViT
import generate
from generate import generate_batch
from llama import Llama
from projector import VLM
from qformer import Retriever, best_query

HERE = Path(__file__).parent
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
    # a model of stage 1 is asked in the words of stage 2
    template = "v1" if model.template == "plain" else model.template
    for start in range(0, len(texts), batch):
        rows = [data.chat_ids([{"from": "human", "value": f"<image>\n{t}"}], template, model.words)
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


# --------------------------------------------------------------------------------------- retrieval

def where_texts(scenes):
    """The short caption that says what is where: hardly two scenes share it."""
    return [world.captions(scene)[2] for scene in scenes]


def features(model, scenes):
    """(n, P, Cv): what a Retriever's queries look at."""
    pixels = pictures(scenes, model.image_size, "squash")
    return torch.cat([model.ln_vision(model.see(x)) for x in pixels.split(100)])


@torch.inference_mode()
def recall(model, scenes, k=16, itm=True):
    """{"image to text 1", ... 5, "text to image 1", ... 5}: is the right one among the first 1 or 5?

    The first k by ITC's cosine are ordered anew by match logit + cosine, as published (k = 128
    there); itm=False leaves ITC's order. A text that fits two pictures counts for both."""
    texts, seen = where_texts(scenes), features(model, scenes)
    ids, mask = model.words.encode(texts)
    cosine = best_query(model.encode_image(seen), model.encode_text(ids, mask))           # (n, n)
    right = torch.tensor([[a == b for b in texts] for a in texts])
    found = {}
    for name, scores, truth, turned in (("image to text", cosine, right, False),
                                        ("text to image", cosine.T, right.T, True)):
        best = scores.topk(k, dim=1)
        rows = torch.arange(len(scores)).repeat_interleave(k)
        order = best.values.clone()
        if itm:
            columns = best.indices.flatten()
            image, text = (columns, rows) if turned else (rows, columns)
            match = torch.cat([model.matched(seen[i], ids[j], mask[j])[:, 1]
                               for i, j in zip(image.split(400), text.split(400))])
            order += match.view(-1, k)
        ranked = best.indices.gather(1, order.argsort(1, descending=True))
        hits = truth.gather(1, ranked)
        for n in (1, 5):
            found[f"{name} {n}"] = float(hits[:, :n].any(1).float().mean())
    return found


def retrieval(args):
    """Print recall@1 and @5 in both directions, by ITC alone and by the published score."""
    model = Retriever.from_pretrained(args.model)
    scenes = [world.scene(i, "test", 1 + i % 4) for i in range(args.scenes)]
    made = {"itc": recall(model, scenes, itm=False), "itc + itm": recall(model, scenes)}
    print(f"{args.scenes} held-out scenes; chance is {1 / args.scenes:.3f} and "
          f"{5 / args.scenes:.3f}")
    for name, row in made.items():
        print(f"{name:<12}" + "".join(f"  {k} {v:.3f}" for k, v in row.items()))
    return made


# ------------------------------------------------------------------------------------------ claims

def near_misses(scenes):
    """{kind: [(scene index, true text, false text)]}: one attribute changed, or left for right."""
    made = {"attribute": [], "left or right": []}
    for i, scene in enumerate(scenes):
        dice, things = random.Random(f"near:{i}"), list(scene.things)
        texts = [f"{world.article(t.name)} in the {t.where}" for t in things]
        at, part = dice.randrange(len(things)), dice.randrange(3)
        t, present = things[at], {t.name for t in things}
        other = [f"{world.article(f'{c} {s}')} in the {w}"
                 for c in world.COLOURS for s in world.SHAPES for w in world.PLACES
                 if (c != t.colour) + (s != t.shape) + (w != t.where) == 1
                 and (c != t.colour, s != t.shape, w != t.where)[part]
                 and (c, s) not in world.KEPT_OUT and (f"{c} {s}" not in present or part == 2)]
        wrong = texts[:at] + [dice.choice(other)] + texts[at + 1:] if other else None
        if wrong:
            made["attribute"].append((i, world.listed(texts), world.listed(wrong)))
        pairs = [(a, b) for a in things for b in things if a.column < b.column]
        if pairs:
            a, b = (world.article(t.name) for t in dice.choice(pairs))
            made["left or right"].append((i, f"{a} left of {b}", f"{b} left of {a}"))
    return made


@torch.inference_mode()
def told_apart(model, scenes):
    """{kind: (ITC's rate, ITM's rate)} of near misses in which the true text has the higher score.

    The control: ITM with another scene's picture, which must fall to a half."""
    everything, rates = features(model, scenes), {}
    for kind, rows in near_misses(scenes).items():
        ids, mask = model.words.encode([text for _, *two in rows for text in two])
        seen, ids, mask = (everything[[i for i, *_ in rows]], ids.unflatten(0, (-1, 2)),
                           mask.unflatten(0, (-1, 2)))
        wrong = seen.roll(len(rows) // 2, 0)

        def rate(shown, score):
            true, false = (torch.cat([score(x, i, m) for x, i, m in zip(
                shown.split(200), ids[:, j].split(200), mask[:, j].split(200))]) for j in (0, 1))
            return float((true > false).float().mean())
        cosine = lambda x, i, m: best_query(model.encode_image(x),
                                            model.encode_text(i, m)).diagonal()
        match = lambda x, i, m: model.matched(x, i, m)[:, 1]
        rates[kind] = {"itc": rate(seen, cosine), "itm": rate(seen, match),
                       "itm, other picture": rate(wrong, match)}
    return rates


def wreck(text, ended):
    """Does a long description repeat itself or break off? (repeats, breaks off)

    Repeats: a sentence, or a thing, twice. Breaks off: no end within the limit, or no full stop."""
    parts = [s.strip() for s in text.split(".") if s.strip()]
    things = world.things_in(text)
    return (len(set(parts)) < len(parts) or len(set(things)) < len(things),
            not ended or not text.strip().endswith("."))


def ramblings(model, scenes, limit=90):
    """Rates over the descriptions that a model gives when it is asked for detail."""
    pixels = pictures(scenes, model.image_size, model.aspect)
    ask_for = [generate.ask([world.DESCRIBE[2]], "minigpt4", model.words)] * len(scenes)
    repeats = broken = either = words = found = there = 0
    for start in range(0, len(scenes), 100):
        said = generate.generate_batch(model, ask_for[start:start + 100],
                                       [p[None] for p in pixels[start:start + 100]],
                                       max_new_tokens=limit)
        for scene, tokens in zip(scenes[start:start + 100], said):
            text = model.words.decode(tokens).split("###")[0]
            again, off = wreck(text, len(tokens) < limit)
            repeats, broken, either = repeats + again, broken + off, either + (again or off)
            truth = {(t.colour, t.shape) for t in scene.things}
            words, there = words + len(text.split()), there + len(truth)
            found += len(truth & set(world.things_in(text)))
    n = len(scenes)
    return {"fails": either / n, "repeats": repeats / n, "breaks off": broken / n,
            "words": words / n, "recall": found / there}


def trained(args, name, seed, *flags):
    """The folder of a finished training, which is run if it is not there yet."""
    out = Path(args.runs) / f"seed{seed}" / name
    if not (out / "model").exists():
        subprocess.run([sys.executable, str(HERE / "train.py"), "--seed", str(seed), "--output-dir",
                        str(out), "--resume", "auto", *map(str, flags)], check=True)
    return out / "model"


def claims(args):
    """Print, for each claim of the papers, the figures it was made of and those of the toy world."""
    scenes = [world.scene(i, "test", 1 + i % 4) for i in range(args.scenes)]
    table = {paper: [{"blip2": blip2_claims, "minigpt4": minigpt4_claims}[paper](args, seed, scenes)
                     for seed in range(args.seeds)] for paper in args.only}
    print(f"{args.scenes} held-out scenes, {args.seeds} seeds, ± half the spread")
    for paper, runs in table.items():
        for claim in runs[0]:
            print(f"\n{paper}: {claim}")
            for arm in runs[0][claim]:
                cells = []
                for figure in runs[0][claim][arm]:
                    values = [run[claim][arm][figure] for run in runs]
                    cells.append(f"{figure} {sum(values) / len(values):.3f} "
                                 f"±{(max(values) - min(values)) / 2:.3f}")
                print(f"  {arm:<34}" + "   ".join(cells))
    return {"seeds": args.seeds, "scenes": args.scenes, "claims": table}


def blip2_claims(args, seed, scenes):
    """{claim: {arm: {figure: value}}} of one seed."""
    blip2 = lambda stage: ("--recipe", "blip2", "--stage", stage)
    first = trained(args, "blip2/stage1", seed, *blip2(1))
    second = trained(args, "blip2/stage2", seed, *blip2(2), "--from", first)
    steps = sum(json.loads((x.parent / "run.json").read_text())["steps"] for x in (first, second))
    alone = trained(args, "no-stage1/stage2", seed, *blip2(2), "--from", "none", "--steps", steps)
    silent = trained(args, "no-itg/stage1", seed, *blip2(1), "--losses", "itc,itm")
    pixels = pictures(scenes, world.SIDE, "squash")

    def told(folder, shown):
        made = describe(VLM.from_pretrained(folder), scenes, shown)
        return {k: made[k] for k in ("precision", "recall")}
    full, without = (Retriever.from_pretrained(x) for x in (first, silent))
    apart = told_apart(full, scenes)
    return {
        "stage 2 is better after the representation stage (Figure 5), equal steps in all": {
            "stages 1 and 2": told(second, pixels), "stage 2 alone": told(alone, pixels),
            "stages 1 and 2, grey picture": told(second, torch.zeros_like(pixels))},
        "ITG helps retrieval (Table 6: +0.9 and +1.1 recall@1)": {
            "ITC + ITM + ITG": recall(full, scenes), "ITC + ITM": recall(without, scenes),
            "ITC + ITM + ITG, ranked by ITC": recall(full, scenes, itm=False)},
        "ITM tells near misses apart better than ITC": {
            kind: rates for kind, rates in apart.items()}}


def minigpt4_claims(args, seed, scenes):
    """The same; the Q-Former is that of BLIP-2's second stage."""
    gpt = lambda stage: ("--recipe", "minigpt4", "--stage", stage)
    blip2_claims_first = trained(args, "blip2/stage1", seed, "--recipe", "blip2", "--stage", 1)
    eye = trained(args, "blip2/stage2", seed, "--recipe", "blip2", "--stage", 2, "--from",
                  blip2_claims_first)
    first = trained(args, "minigpt4/stage1", seed, *gpt(1), "--qformer", eye)
    second = trained(args, "minigpt4/stage2", seed, *gpt(2), "--from", first)
    noisy = trained(args, "noisy/stage2", seed, *gpt(2), "--from", first, "--told", "web")
    return {"a small curated second stage mends repeated and broken text (Table 3: 35 % to 2 %)": {
        name: ramblings(VLM.from_pretrained(folder), scenes[:200]) for name, folder in (
            ("stage 1, noisy captions", first), ("stage 2, curated descriptions", second),
            ("stage 2, noisy captions again", noisy))}}


def main(args):
    made = {"parts": parts, "toy": toy, "retrieval": retrieval, "claims": claims}[args.what](args)
    if args.out:
        Path(args.out).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(data.guarded(lambda: main(ARGS), ARGS.debug))
