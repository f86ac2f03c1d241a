"""evaluate.py: score a model, with the figures beside it that say what the score is worth.

    python evaluate.py parts                        the gates of the shipped CLIP and LLaMA
    python evaluate.py toy --model FOLDER [...]     questions and descriptions of unseen scenes
    python evaluate.py retrieval --model FOLDER     pictures for texts and texts for pictures
    python evaluate.py claims --only llava,blip2    what the papers claim, in the toy world
    python evaluate.py scienceqa | pope | llava-bench --model FOLDER --images DIR --out OUT ...

In the toy world truth is known exactly, so no judge is needed. Three columns stand beside every
accuracy:

    majority   always the most frequent answer: a yes/no question is worth .5 before it is read
    other      the same model asked the same questions with another scene's picture
    grey       with a grey picture: answering blind

A model that looks falls to blind with the wrong picture. One that guesses well does not fall.

Several models (seeds) give the mean ± half the spread between them. Descriptions are scored by
objects, a colour-shape pair each:

    precision     named objects that are there        recall      objects there that are named
    invented      named objects whose shape is nowhere in the scene, [CHAIR] 1809.02156
    twice         descriptions that name an object twice

`claims` trains what it needs (train.py, in runs/claims) with several seeds, and prints what came
out, whether or not it agrees with the paper. Retrieval is by the published score: the best few by
ITC's cosine, ordered anew by match logit + cosine.

The last three read the official files. OUT gets the answers in the official form, OUT.scores.json
the scores; a run that was killed goes on from OUT.answers.jsonl.

Next: README.md, the tables.
"""

import argparse
import os

CLAIMS = "llava", "blip2", "minigpt4", "sharegpt4v"
BENCHMARKS = {"scienceqa": "multiple choice, with and without pictures",
              "pope": "is such a thing in the picture? yes or no",
              "llava-bench": "open questions; a judge grades the answers"}


def benchmark_flags(sub):
    """What the three benchmarks take."""
    made = [sub.add_parser(name, help=told, allow_abbrev=False)
            for name, told in BENCHMARKS.items()]
    science, pope, bench = made
    for q in made:
        q.add_argument("--model", required=True, help="folder or hub id")
        q.add_argument("--images", required=True, help="folder of the pictures")
        q.add_argument("--follow-links", action="store_true", help="links in it may lead out of it")
        q.add_argument("--out", required=True, help="JSON lines: the answers")
        q.add_argument("--max-new-tokens", type=int, default=128 if q is pope else 1024)
        q.add_argument("--batch-size", type=int, default=8)
        q.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
        q.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
        q.add_argument("--template", help="how the model is asked, if not as its config says")
        q.add_argument("--debug", action="store_true", help="tracebacks")
    science.add_argument("--problems", required=True, help="problems.json")
    science.add_argument("--splits", required=True, help="pid_splits.json")
    science.add_argument("--split", default="test")
    science.add_argument("--form", choices=("CQM-A", "QCM-LEA"), default="CQM-A",
                         help="LLaVA-1.5's question, or that of LLaVA trained on ScienceQA")
    pope.add_argument("--questions", nargs="+", required=True, help="coco_pope_*.json: a row each")
    bench.add_argument("--questions", required=True, help="qa90_questions.jsonl; questions.jsonl")
    bench.add_argument("--context", required=True,
                       help="caps_boxes_coco2014_val_80.jsonl; context.jsonl")
    bench.add_argument("--references", required=True,
                       help="qa90_gpt4_answer.jsonl; answers_gpt4.jsonl")
    bench.add_argument("--endpoint", required=True, help="of the judge, such as https://host/v1; "
                       "its other flags are those of instruct.py from --key-env on")
    bench.add_argument("--endpoint-model", required=True, help="which model there is the judge")
    bench.add_argument("--temperature", type=lambda t: None if t == "none" else float(t),
                       default=.2, help="of the judge; none: what the endpoint likes")
    bench.add_argument("--max-tokens", type=int, default=1024, help="of one review")


def benchmark_fault(a):
    """What is wrong with a benchmark's command line, or None."""
    names = "problems", "splits", "questions", "context", "references"
    files = [getattr(a, name) for name in names if isinstance(getattr(a, name, None), str)]
    files += a.questions if a.what == "pope" else []
    wrong = {
        f"--out {a.out}: not a file in a folder that exists":
            os.path.exists(a.out) and not os.path.isfile(a.out)
            or not os.path.isdir(os.path.dirname(a.out) or "."),
        "--out would replace one of the benchmark's own files":
            os.path.realpath(a.out) in map(os.path.realpath, files),
        "--max-new-tokens, --batch-size and --max-tokens must be at least 1":
            min(a.max_new_tokens, a.batch_size, getattr(a, "max_tokens", 1)) < 1,
        "--temperature must be none, or 0 to 100":
            not 0 <= (getattr(a, "temperature", None) or 0) <= 100,
        f"unrecognized arguments: {' '.join(a.rest)}": a.rest and a.what != "llava-bench"}
    return next((line for line, true in wrong.items() if true), None)


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
    claims.add_argument("--picture", metavar="PNG", help="draw the figures too")
    for q in (parts, toy, find, claims):
        q.add_argument("--scenes", type=int, default=1000 if q in (parts, toy) else 500,
                       help="held-out scenes")
        q.add_argument("--out", help="write the figures to this JSON file too")
        q.add_argument("--debug", action="store_true", help="tracebacks")
    benchmark_flags(sub)
    a, rest = p.parse_known_args(argv)
    if a.what in BENCHMARKS:
        a.rest = rest                               # a judge's flags, which instruct.py knows
        return p.error(benchmark_fault(a)) if benchmark_fault(a) else a
    if rest:
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    if a.scenes < 20 or a.scenes % 2:
        p.error("--scenes must be even, and at least 20")
    for flag in ("out", "picture"):
        path = getattr(a, flag, None)
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
            p.error(f"--{flag} {path}: not a file in a folder that exists: name another")
    if not (getattr(a, "picture", None) or ".png").endswith(".png"):
        p.error(f"--picture {a.picture}: must end in .png")
    if a.what == "claims":
        a.only = list(dict.fromkeys(a.only.split(",")))
        if set(a.only) - set(CLAIMS) or not 1 <= a.seeds <= 100:
            p.error(f"--only takes {', '.join(CLAIMS)}; --seeds 1 to 100")
    return a


if __name__ == "__main__":
    ARGS = arguments()              # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import random
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import instruct
import world
from formats.replies import without_thinking
from clip import ViT
import generate
from generate import generate_batch
from llama import Llama
from projector import VLM
from qformer import Retriever, best_query
from train import TOY, toy_sample

HERE = Path(__file__).parent
PER_SCENE = 3                       # questions asked about each scene, kinds in turn
READ = 35                           # tokens of a text in retrieval, as officially; training has 32


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


def answers(model, texts, pixels, max_new_tokens, batch=200, template=None, temperature=0.0):
    """The model's words for each text about each picture (n, 3, S, S)."""
    if model.aspect == "anyres":
        raise data.Usage("the toy world's pictures are not cut in tiles: take a LLaVA-1.5")
    said = []
    # a model of stage 1 is asked in the words of stage 2, where nothing else is said
    template = template or ("v1" if model.template == "plain" else model.template)
    for start in range(0, len(texts), batch):
        rows = [generate.ask([t], template, model.words) for t in texts[start:start + batch]]
        out = generate_batch(model, rows, [p[None] for p in pixels[start:start + batch]],
                             max_new_tokens=max_new_tokens, temperature=temperature, seed=start)
        said += [model.words.decode(x).strip() for x in out]
    return said


def describe(model, scenes, pixels, **how):
    """Object scores of the descriptions of scenes; see the docstring on top."""
    said = answers(model, ["Describe this image"] * len(scenes), pixels, 90, **how)
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
        pixels = pixels.roll(count // 2 | 1, 0)         # an odd step: another number of objects too
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
        if model.template != "plain" and data.template_of(model.template).style == "plain":
            raise data.Usage(f"{folder}: writes captions and would not read the questions: take "
                             "MiniGPT-4's second stage, or evaluate.py claims")
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
    """{"image to text 1", ... 5, "text to image 1", ... 5}: is the right one among so many?

    The first k by ITC's cosine are ordered anew by match logit + cosine, as published (k = 128
    there); itm=False leaves ITC's order. A text that fits two pictures counts for both."""
    texts, seen = where_texts(scenes), features(model, scenes)
    ids, mask = model.words.encode(texts, length=READ)
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
        ids, mask = model.words.encode([text for _, *two in rows for text in two], length=READ)
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


def run(script, *flags):
    """Run it; what went wrong its own line has said, and its exit code is ours."""
    if code := subprocess.run([sys.executable, *map(str, (HERE / script, *flags))]).returncode:
        sys.exit(code if code > 0 else 128 - code)


def trained(args, name, seed, *flags):
    """The folder of a finished training, which is run if it is not there yet."""
    out = Path(args.runs) / f"seed{seed}" / name
    if not (out / "model").exists():
        run("train.py", "--seed", seed, "--output-dir", out, "--resume", "auto", *flags)
    return out / "model"


def claims(args):
    """Print, for each claim of the papers, the arms' figures and in how many seeds it holds."""
    scenes = [world.scene(i, "test", 1 + i % 4) for i in range(args.scenes)]
    tests = {"llava": llava_claims, "blip2": blip2_claims, "minigpt4": minigpt4_claims,
             "sharegpt4v": sharegpt4v_claims}
    table = {paper: [tests[paper](args, seed, scenes) for seed in range(args.seeds)]
             for paper in args.only}
    print(f"{args.scenes} held-out scenes (MiniGPT-4's at most 200, tower 300), {args.seeds} "
          "seeds, ± half the spread")
    for paper, runs in table.items():
        for claim, one in runs[0].items():
            held = sum(run[claim]["holds"] for run in runs)
            verdict = "holds" if held == len(runs) else "does not hold"
            print(f"\n{paper}: {claim}\n  {verdict} here: in {held} of {len(runs)} seeds")
            for arm, figures in one["arms"].items():
                cells = []
                for figure in figures:
                    values = [run[claim]["arms"][arm][figure] for run in runs]
                    cells.append(f"{figure} {sum(values) / len(values):.3f} "
                                 f"±{(max(values) - min(values)) / 2:.3f}")
                print(f"  {arm:<32}" + "   ".join(cells))
    if args.picture:
        claims_picture(args.picture, table)
    return {"seeds": args.seeds, "scenes": args.scenes, "claims": table}


def claims_picture(path, table):
    """A panel a claim, a row an arm, a colour a figure, a dot a seed; figures that are no shares of
    one (words in a text) are left to the table."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = [(f"{paper}: {claim}", [run[claim] for run in runs])
              for paper, runs in table.items() for claim in runs[0]]
    tall = [len(seeds[0]["arms"]) for _, seeds in panels]
    rows = [max(tall[i:i + 2]) for i in range(0, len(tall), 2)]
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(13, sum(rows) * .42 + len(rows) * .9),
                                   squeeze=False, layout="constrained", sharex=True,
                                   gridspec_kw={"height_ratios": [n + 1 for n in rows]})
    for ax, (title, seeds) in zip(axes.flat, panels):
        arms = seeds[0]["arms"]
        names = [name for name in dict.fromkeys(x for arm in arms.values() for x in arm) if all(
            run["arms"][arm].get(name, 0) <= 1 for run in seeds for arm in arms)]
        for i, name in enumerate(names):
            dots = [(run["arms"][arm][name], -at - (i + 1) / (len(names) + 1))
                    for run in seeds for at, arm in enumerate(arms) if name in arms[arm]]
            ax.scatter(*zip(*dots), s=22, label=name)
        held = sum(run["holds"] for run in seeds)
        ax.set_title(f"{textwrap.fill(title, 70)}\nheld in {held} of {len(seeds)} seeds",
                     fontsize=9, loc="left")
        ax.set(xlim=(-.02, 1.02), ylim=(-len(arms), 0))
        ax.set_yticks([-.5 - at for at in range(len(arms))], list(arms), fontsize=8)
        ax.hlines(range(-len(arms) + 1, 0), -.02, 1.02, color="0.85", linewidth=.8)
        ax.legend(fontsize=7, ncols=2)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def above(arms, better, worse, *figures):
    """The arms of a claim, and whether the one is above the other in all of these figures."""
    return {"arms": arms, "holds": all(arms[better][f] > arms[worse][f] for f in figures)}


def three_kinds(folder, args, picture="right"):
    """LLaVA's Table 4 has three columns and their mean; here: accuracy of questions of fact,
    recall of descriptions, accuracy of reasoning."""
    made = score(VLM.from_pretrained(folder), "test", args.scenes, picture)
    facts = [made[kind] for kind in world.KINDS if kind != "reasoning"]
    columns = {"conversation": sum(facts) / len(facts), "detail": made["recall"],
               "reasoning": made["reasoning"]}
    return {"overall": sum(columns.values()) / 3, **columns}


def llava_claims(args, seed, scenes):
    """{claim: {"arms": {arm: {figure: value}}, "holds": bool}} of one seed."""
    llava = lambda stage: ("--recipe", "llava", "--stage", stage)
    first = trained(args, "llava/stage1", seed, *llava(1))
    full = trained(args, "llava/stage2", seed, *llava(2), "--from", first)
    talks = trained(args, "conversation/stage2", seed, *llava(2), "--from", first,
                    "--told", "conversation")
    alone = trained(args, "no-stage1/stage2", seed, *llava(2), "--from", "none")
    arms = {name: three_kinds(folder, args) for name, folder in (
        ("no instruction tuning", first), ("conversation only", talks), ("all three kinds", full),
        ("all three, without stage 1", alone))}
    arms["all three, another's picture"] = three_kinds(full, args, "other")
    none, some, every, skipped, _ = (row["overall"] for row in arms.values())
    return {"instruction tuning, and all three kinds of it (Table 4: 21.5, 73.8, 85.1)":
            {"arms": arms, "holds": none < some < every},
            "skipping stage 1 hurts (Table 8: -5.1)": {
                "arms": {k: arms[k] for k in ("all three kinds", "all three, without stage 1")},
                "holds": skipped < every}}


def recaptioned(args, seed, start):
    """The model that learns from a captioner's captions, and the captioner, [ShareGPT4V].

    The pictures are those that `descriptions/stage1` sees. A captioner learns from the true
    descriptions of a tenth of them, as many steps, and describes the others."""
    place, stage = Path(args.runs).resolve() / f"seed{seed}", TOY["sharegpt4v"][0]
    rows, photos = [], place / "pictures"
    flags = ["--recipe", "sharegpt4v", "--stage", 1, "--from", start, "--images", photos,
             "--train", ",".join(stage["train"]),
             *(x for k in ("lr", "batch", "steps", "clip") for x in (f"--{k}", stage[k]))]
    photos.mkdir(parents=True, exist_ok=True)
    for i in range(stage["steps"] * stage["batch"]):
        picture, talk = toy_sample(seed, 1, i, "descriptions")
        rows.append({"id": str(i), "image": f"{i:05}.png", "conversations": talk})
        if not (photos / rows[i]["image"]).exists():
            picture.save(photos / rows[i]["image"])
    tenth, rest = rows[:len(rows) // 10], place / "rest"
    (place / "tenth.json").write_text(json.dumps(tenth))
    writer = trained(args, "captioner/stage1", seed, *flags, "--data", place / "tenth.json")
    rest.mkdir(exist_ok=True)
    for row in rows[len(tenth):]:
        if not (rest / row["image"]).exists():
            os.link(photos / row["image"], rest / row["image"])
    told = place / "told.json"
    if not told.exists():
        run("instruct.py", "caption", rest, "--model", writer, "--out", told, "--batch-size", 64)
    (place / "all.json").write_text(json.dumps(tenth + json.loads(told.read_text())))
    return trained(args, "recaptioned/stage1", seed, *flags, "--data", place / "all.json"), writer


def sharegpt4v_claims(args, seed, scenes):
    """The same. All start from one bridge, which has learnt from short captions; they differ in
    what stage 1 tells of the same scenes, or in whether half of the tower learns."""
    short = trained(args, "short/stage1", seed, "--recipe", "llava-1.5", "--stage", 1,
                    "--told", "short")
    learnt = lambda name, told, *flags: trained(
        args, f"{name}/stage1", seed, "--recipe", "sharegpt4v", "--stage", 1, "--from", short,
        "--told", told, *flags)
    frozen = "--train", "bridge,llm"
    models = {"detailed": learnt("descriptions", "descriptions"), "short, noisy":
              learnt("web", "web"), "imagined": learnt("imagined", "imagined"),
              "detailed, frozen": learnt("descriptions-frozen", "descriptions", *frozen),
              "short, noisy, frozen": learnt("web-frozen", "web", *frozen)}
    models["nine tenths by a captioner"], models["the captioner"] = recaptioned(args, seed, short)
    pixels, arms, drawn = pictures(scenes, world.SIDE, "square"), {}, {}
    for name, folder in models.items():                 # each in the words that it has learnt
        model = VLM.from_pretrained(folder)
        arms[name] = describe(model, scenes, pixels, template="plain")
        if "noisy" in name or "detailed" in name:
            seen = probe(model.vision, 300)
            arms[name]["tower"] = sum(seen.values()) / len(seen)
        if name in ("detailed", "imagined"):            # the likeliest word is seldom invented
            drawn[name] = describe(model, scenes, pixels, template="plain", temperature=1.0)
        if name == "detailed":
            other = describe(model, scenes, pixels.roll(len(scenes) // 2 | 1, 0),
                             template="plain")
    gain = {told: arms[told]["recall"] - arms[f"{told}, frozen"]["recall"]
            for told in ("detailed", "short, noisy")}
    some = lambda *names, **more: {**{name: arms[name] for name in names}, **more}
    return {
        "detailed captions beat short noisy ones: more found, less invented": {
            "arms": some("detailed", "short, noisy", **{"detailed, another's picture": other}),
            "holds": arms["detailed"]["recall"] > arms["short, noisy"]["recall"]
            and arms["detailed"]["invented"] < arms["short, noisy"]["invented"]},
        "captions by somebody who has not looked teach to invent": {
            "arms": some("detailed", "imagined"),
            "holds": arms["imagined"]["invented"] > arms["detailed"]["invented"]},
        "the same, words drawn at temperature 1": {
            "arms": drawn, "holds": drawn["imagined"]["invented"] > drawn["detailed"]["invented"]},
        "half of the tower learning helps, with detailed captions (Table 6)": {
            "arms": some("detailed", "detailed, frozen"), "holds": gain["detailed"] > 0},
        "and helps less with noisy ones": {
            "arms": some("short, noisy", "short, noisy, frozen"),
            "holds": gain["short, noisy"] < gain["detailed"]},
        "a captioner's captions come near true ones: 95 % of the recall": {
            "arms": some("detailed", "nine tenths by a captioner", "the captioner"),
            "holds": arms["nine tenths by a captioner"]["recall"]
            >= .95 * arms["detailed"]["recall"]}}


def blip2_claims(args, seed, scenes):
    """{claim: {"arms": {arm: {figure: value}}, "holds": bool}} of one seed."""
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
        "the representation stage helps, equal steps in all (Figure 5)": above({
            "stages 1 and 2": told(second, pixels), "stage 2 alone": told(alone, pixels),
            "stages 1 and 2, grey picture": told(second, torch.zeros_like(pixels))},
            "stages 1 and 2", "stage 2 alone", "recall"),
        "ITG helps retrieval (Table 6: +0.9 and +1.1 recall@1)": above({
            "ITC + ITM + ITG": recall(full, scenes), "ITC + ITM": recall(without, scenes),
            "ITC + ITM + ITG, ranked by ITC": recall(full, scenes, itm=False),
            "ITC + ITM, ranked by ITC": recall(without, scenes, itm=False)},
            "ITC + ITM + ITG", "ITC + ITM", "image to text 1", "text to image 1"),
        "ITM tells near misses apart better than ITC": {
            "arms": apart, "holds": all(rates["itm"] > rates["itc"] for rates in apart.values())}}


def minigpt4_claims(args, seed, scenes):
    """The same; the Q-Former is that of BLIP-2's second stage."""
    blip2, gpt = (lambda stage, name=name: ("--recipe", name, "--stage", stage)
                  for name in ("blip2", "minigpt4"))
    eye = trained(args, "blip2/stage2", seed, *blip2(2), "--from",
                  trained(args, "blip2/stage1", seed, *blip2(1)))
    first = trained(args, "minigpt4/stage1", seed, *gpt(1), "--qformer", eye)
    second = trained(args, "minigpt4/stage2", seed, *gpt(2), "--from", first)
    noisy = trained(args, "noisy/stage2", seed, *gpt(2), "--from", first, "--told", "web")
    return {"a small curated second stage mends repeated and broken text (Table 3: 35 % to 2 %)":
            above({name: ramblings(VLM.from_pretrained(folder), scenes[:200]) for name, folder in (
                ("stage 1, noisy captions", first), ("stage 2, curated descriptions", second),
                ("stage 2, noisy captions again", noisy))},
                "stage 1, noisy captions", "stage 2, curated descriptions", "fails")}


# ---------------------------------------------------------------------------------- the benchmarks

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "A", "B", "C", "D", "E"
JUDGE = "You compare answers with care and grade them fairly."
RULE = ("Two assistants have answered the question above, which a person asked while looking at a "
        "picture. You cannot see it; the context above tells what it shows, {}.\nGrade each answer "
        "from 1 to 10, the better the higher: does it help, does it keep to the question, is it "
        "true of the picture, does it tell enough?\nBegin with a line that holds two numbers with "
        "a space between them and nothing else, the grade of Assistant 1 and that of Assistant 2. "
        "From the next line on give your reasons in full. Take no side, and do not let it matter "
        "which answer you read first.")
KNOWN = "in a few sentences", ("in five sentences, and in the corners of its objects: (left, top, "
                               "right, bottom) in parts of its width and height, from 0 to 1")
FITS = {"text": lambda v: isinstance(v, str) and not instruct.broken(v),
        "a whole number": lambda v: type(v) is int,
        "texts": lambda v: isinstance(v, list) and all(map(FITS["text"], v)),
        "objects": lambda v: isinstance(v, list) and all(isinstance(x, dict) for x in v),
        "numbers": lambda v: isinstance(v, list) and all(type(x) in (int, float) for x in v),
        "null": lambda v: v is None}


def checked(where, row, **kinds):
    """The row and its place, if every field is of its kind, as "text or null". Raises BadData."""
    for name, kind in kinds.items():
        value = row.get(name) if isinstance(row, dict) else None
        if not any(FITS[k](value) for k in kind.split(" or ")):
            raise data.BadData(f"{where}.{name}: must be {kind}, in valid UTF-8: correct the row")
    return {**row, "where": where}


def table(path, key, **kinds):
    """{value of `key`: row} of a file of JSON lines, in its order. Raises data.BadData."""
    try:
        text = data.file_text(path, 1_000_000_000, "surrogateescape")
    except (OSError, ValueError) as error:
        raise data.BadData(f"{path}: cannot be read ({error}): give the official file") from None
    rows = {}
    for _, place, row in data.json_values(text):
        where = f"{path}: {place}"
        if isinstance(row, data.BadData):
            raise data.BadData(f"{where}: {row}")
        row = checked(where, row, **kinds)
        if row[key] in rows:
            raise data.BadData(f"{where}.{key}: {row[key]!r} is there twice: remove one")
        rows[row[key]] = row
    if not rows:
        raise data.BadData(f"{path}: holds no rows: give the official file")
    return rows


def write_lines(path, rows):
    """JSON lines, whole or not at all."""
    aside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(aside, "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def asked_of(args, model, job):
    """(ids, (pixels, sizes)) of a question. Raises BadImage, or BadData if it is too long."""
    if job.image:
        row = generate.ask([job.request], model.template, model.words)
        path = data.picture_path(args.images, job.image, args.follow_links)
        picture = generate.see(path, model)
    else:
        row, picture = data.chat_ids([{"from": "human", "value": job.request}], model.template,
                                     model.words, pictures=0), (None, None)
    if generate.places(model, row, picture[1]) >= model.llm.config.context:
        raise data.BadData("longer than the model's context: take another model")
    return row, picture


def replies(args, jobs, journal):
    """The model's answers, greedy as in LLaVA-1.5's tables; the picture stands first."""
    model = generate.load(args)
    if data.template_of(model.template).style == "plain":
        raise data.Usage(f"{args.model}: has learnt to caption, not to answer: take a model of "
                         "stage 2, or ask this one with --template v1")
    for _, chunk in instruct.chunks(jobs, journal, args.batch_size):
        some, rows, seen = [], [], []
        for job in chunk:
            try:
                row, picture = asked_of(args, model, job)
            except (data.BadImage, data.BadData) as error:
                journal.put_off([(job, str(error))], "it could not be asked")
                continue
            some.append(job)
            rows.append(row)
            seen.append(picture)
        if not some:
            continue
        said = generate_batch(model, rows, [x for x, _ in seen], sizes=[size for _, size in seen],
                              max_new_tokens=args.max_new_tokens)
        yield [(job, "".join(generate.spell(x, model.words)).strip(), "")
               for job, x in zip(some, said)]


def answered(args, asked):
    """Answers in the official form, written to --out, to questions {where, id, image, text, shown
    (the prompt as it is written down), metadata}: ([(question, answer)], [questions left out]).

    POPE's files share many of their questions: what is equal is put once. A question whose picture
    is damaged, or that is longer than the context, is left out and named; if a picture is not
    there at all, none is asked."""
    who = (args.what, instruct.weights_of(data.resolve(args.model)), args.template, args.dtype,
           args.max_new_tokens)
    jobs, size, missing = [], {None: 0}, []
    for q in asked:
        try:
            if q["image"] not in size:
                size[q["image"]] = data.picture_path(args.images, q["image"],
                                                     args.follow_links).stat().st_size
        except data.BadData as error:
            missing.append(f"{q['where']}: {error}")
            continue
        key = instruct.key_of(*who, q["image"], size[q["image"]], q["text"])
        jobs.append(instruct.Job(str(q["id"]), q["image"], key, q["text"]))
    if missing:
        more = f" (so are those of {len(missing) - 1:,} more question(s))" * (len(missing) > 1)
        raise data.BadData(missing[0] + more)
    once, journal = list({job.key: job for job in jobs}.values()), instruct.Journal(args.out)
    with journal.file:
        if any(job not in journal for job in once):
            instruct.collect(once, replies(args, once, journal), journal, args.what)
        said = [(text, lost) for _, text, lost in instruct.answered(jobs, journal)]
    left_out = [(q, lost) for q, (_, lost) in zip(asked, said) if lost]
    for q, lost in left_out[:10]:
        generate.note(f"left out: {q['where']}: {lost}")
    if len(left_out) == len(asked):
        raise data.BadData(f"none of the {len(asked)} questions could be asked: see the lines "
                           "above")
    rows = [{"question_id": q["id"], "prompt": q.get("shown", q["text"]), "text": text,
             # theirs is drawn; ours is a hash, so that another answer has another id
             "answer_id": instruct.key_of(job.key, q["id"], q.get("metadata"), text),
             "model_id": str(args.model), "metadata": q.get("metadata", {})}
            for q, job, (text, lost) in zip(asked, jobs, said) if not lost]
    write_lines(args.out, rows)
    kept = [q for q, (_, lost) in zip(asked, said) if not lost]
    return list(zip(kept, rows)), [q for q, _ in left_out]


def exam_question(problem, form):
    """A problem of ScienceQA as the model reads it, behind the picture if there is one."""
    question, hint, choices = problem["question"], problem["hint"].strip(), problem["choices"]
    if form == "QCM-LEA":           # convert_sqa_to_llava.py: for a model that lectures first
        options = " ".join(f"({n}) {c}" for n, c in zip(LETTERS, choices))
        text = f"Question: {question}\nContext: {hint or 'N/A'}\nOptions: {options}"
        # quirk: two spaces become one, once; "Question: " goes wherever it stands
        text = text.replace("  ", " ").strip().replace("Question: ", "")
        return text.replace(data.MARK, "").strip()
    # quirk: no released script writes this form; it is that of the released llava_test_CQM-A.json
    lines = [f"Context: {hint}"] * bool(hint) + [question]
    lines += [f"{n}. {c}" for n, c in zip(LETTERS, choices)]
    return "\n".join(lines).replace(data.MARK, "").strip() + f"\n{LETTER}"


def chosen(text, choices):
    """Which of so many choices an answer takes, by eval_science_qa.py; -1: one cannot tell."""
    hits = re.findall("The answer is ([A-Z]).", text)   # quirk: any sign will do at the end
    letter = (text if text in LETTERS else text[0] if text[:1] in LETTERS and text[1:3] == ". " else
              hits[0] if len(hits) == 1 else None)
    return LETTERS.index(letter) if letter in LETTERS[:choices] else -1


def chosen_leniently(text, choices):
    """The choice that an answer takes for a reader: what `chosen` reads, and "(B)", "b.", "B) yes",
    "Answer: B", or the words of exactly one choice. -1: one cannot tell."""
    if (pick := chosen(text, len(choices))) >= 0:
        return pick
    text = re.sub(r"[*_`\"“”]", "", text).strip()
    behind = re.fullmatch(r"(?:.*\b)?(?:answer|option|choice)(?: is)?:?\s+(.*)", text, re.I | re.S)
    letters, words = set(), []
    for part in (text, behind[1] if behind else text):
        alone = re.match(r"\(?([A-Ea-e])(?:\)|[.:](?=\s|$)|$)|([A-E])\s*[-–—]\s", part)
        if alone:
            letters.add((alone[1] or alone[2]).upper())
        words.append(part.casefold().strip(" .!\n"))
    letters |= set(re.findall(r"\b(?:answer|option|choice)(?: is)?:?\s+\(?([A-E])\b(?! \w)", text))
    named = [i for i, choice in enumerate(choices) if choice.casefold().strip(" .!\n") in words]
    picks = {LETTERS.index(letter) for letter in letters} or set(named)
    return picks.pop() if len(picks) == 1 and max(picks) < len(choices) else -1


def scienceqa(args):
    """Print the accuracy by ScienceQA's own groups. An answer that the official rule does not read
    (see `chosen`) is wrong; how many there are, and the accuracy if they are read leniently, stand
    beside it.

    [ScienceQA] 2209.09513. The columns of LLaVA's table; its test split has 4,241 questions."""
    problems, splits = data.read_json(args.problems), data.read_json(args.splits)
    ids = splits.get(args.split) if isinstance(splits, dict) else None
    if not isinstance(ids, list) or not ids or not isinstance(problems, dict):
        raise data.BadData(f"{args.splits}: has no list {args.split!r}, or {args.problems} is no "
                           "table: give pid_splits.json and problems.json")
    asked = []
    for name in ids:
        where = f"{args.problems}: {name}"
        p = checked(where, problems.get(str(name)), question="text", choices="texts", hint="text",
                    answer="a whole number", image="text or null", subject="text", grade="text")
        if not 0 <= p["answer"] < len(p["choices"]) <= len(LETTERS):
            raise data.BadData(f"{where}: needs 1 to 5 choices, and as answer the number of one, "
                               "from 0: correct the row")
        text = exam_question(p, args.form)
        asked.append({**p, "id": name, "text": text, "image": p["image"] and f"{name}/{p['image']}",
                      "shown": f"{data.MARK}\n{text}" if p["image"] else text})
    groups, failed = {"all": []}, 0
    pairs, left_out = answered(args, asked)
    for q, row in pairs:
        pick = chosen(row["text"], len(q["choices"]))
        failed += pick < 0
        hit = pick == q["answer"], chosen_leniently(row["text"], q["choices"]) == q["answer"]
        low = q["grade"] in [f"grade{n}" for n in range(1, 7)]
        for group in (q["subject"], "text context" * bool(q["hint"]),
                      "image context" * bool(q["image"]),
                      "no context" * (not q["hint"] and not q["image"]),
                      "grades 1-6" if low else "grades 7-12", "all"):
            groups.setdefault(group, []).append(hit)
    groups.pop("", None)
    made = {group: {"accuracy": sum(hit for hit, _ in hits) / len(hits), "questions": len(hits),
                    "lenient": sum(hit for _, hit in hits) / len(hits)}
            for group, hits in groups.items()}
    print(f"ScienceQA, {args.split}, {args.form}; {failed} answer(s) are wrong because the "
          "official rule reads no choice in them")
    for group, row in made.items():
        print(f"  {group:<20}{row['accuracy']:.4f} of {row['questions']:,}   "
              f"read leniently {row['lenient']:.4f}")
    if left_out:
        print(f"  {len(left_out)} question(s) could not be asked and are in no figure")
    # "without a letter": what the count is called in older files
    return {"split": args.split, "form": args.form, "rejected by the official rule": failed,
            "without a letter": failed, "left out": len(left_out), "groups": made}


def denies(text):
    """Is it a no? POPE's rule: by the words of the first sentence, without commas.

    quirk: "NO" is a yes, like all that holds none of the three words between two spaces."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return any(no in words for no in ("No", "not", "no"))


def says_neither(text):
    """Is there neither yes nor no in it? The official rule counts it as a yes."""
    return not re.search(r"\b(yes|no|not|\w+n['’]t)\b", text, re.I)


def pope(args):
    """Print a row for each file. [POPE] 2305.10355. Precision and recall are those of yes.

    Ours: a rate of nothing is 0, and notes where the figures do not speak of the pictures."""
    asked, counts, notes = [], {}, {}
    for path in args.questions:
        kind = Path(path).stem.removeprefix("coco_pope_")
        if kind in counts:
            raise data.Usage(f"--questions: two files would be the row {kind}: rename one")
        counts[kind], notes[kind] = Counter(), Counter()
        for q in table(path, "question_id", question_id="a whole number or text", image="text",
                       text="text", label="text").values():
            if q["label"] not in ("yes", "no"):
                raise data.BadData(f"{q['where']}.label: must be yes or no: correct the row")
            asked.append({**q, "id": q["question_id"], "text": f"{q['text']}\n{SHORT}",
                          "metadata": {"category": kind}})
    pairs, left_out = answered(args, asked)
    for q, row in pairs:
        kind = q["metadata"]["category"]
        counts[kind][not denies(row["text"]), q["label"] == "yes"] += 1
        notes[kind]["neither yes nor no"] += says_neither(row["text"])
    for q in left_out:
        notes[q["metadata"]["category"]]["left out"] += 1
    made, names = {}, ("accuracy", "precision", "recall", "F1", "yes rate")
    for kind, n in counts.items():
        hit, total = n[True, True], n.total()
        yes, there = hit + n[True, False], hit + n[False, True]
        rates = ((hit + n[False, False]) / max(1, total), hit / max(1, yes), hit / max(1, there),
                 2 * hit / max(1, yes + there), yes / max(1, total))
        made[kind] = {"questions": total, **dict(zip(names, rates)), **+notes[kind]}
    print(f"{'POPE':<16}{'questions':>10}" + "".join(f"{name:>11}" for name in names))
    for kind, row in made.items():
        print(f"{kind:<16}{row['questions']:>10,}" + "".join(f"{row[n]:>11.4f}" for n in names))
    for kind, row in made.items():
        if unclear := row.get("neither yes nor no"):
            print(f"note: {kind}: {unclear:,} of {row['questions']:,} answers hold neither yes nor "
                  "no; the official rule counts them as yes")
        if row["questions"] and row["yes rate"] in (0, 1):
            print(f"note: {kind}: every answer counts as {'yes' if row['yes rate'] else 'no'}: "
                  "these figures need no picture")
        if lost := row.get("left out"):
            print(f"note: {kind}: {lost:,} question(s) could not be asked and are in no figure")
    return made


def bench_questions(args):
    """LLaVA-Bench's questions, each with what is known of its picture and the reference answer."""
    seen, asked = table(args.context, "image", image="text"), []
    best = table(args.references, "question_id", question_id="a whole number or text", text="text")
    for q in table(args.questions, "question_id", question_id="a whole number or text",
                   image="text", text="text", category="text").values():
        about, name = seen.get(q["image"]), q["question_id"]
        if about is None or name not in best or q["category"] not in ("conv", "detail", "complex"):
            raise data.BadData(f"{q['where']}: its image has no context, its question_id no "
                               "reference, or its category is none of conv, detail and complex: "
                               "are the three files of one benchmark?")
        # COCO: captions and instances. In the wild: caption, one text or several
        boxes, lines = about.get("instances"), about.get("captions", about.get("caption"))
        lines = [lines] if isinstance(lines, str) else lines
        checked(about["where"], {"captions": lines, "instances": boxes}, captions="texts",
                instances="objects or null")
        known = "\n".join(lines) + "\n\n" * (boxes is not None) + "\n".join(
            f"{b['category']}: {b['bbox']}" for b in boxes or () if checked(
                about["where"], b, category="text", bbox="numbers"))
        asked.append({**q, "id": name, "known": known, "boxes": boxes is not None,
                      "best": best[name]})
    return asked


def grades(review):
    """[the reference's, the answer's] from a review's first line; [-1, -1] if there are not two.

    quirk: a comma is a space, so "8,9" is read and "8, 9", with two, is not."""
    try:
        pair = [float(word) for word in review.split("\n")[0].replace(",", " ").split(" ")]
    except ValueError:
        pair = []
    return pair if len(pair) == 2 and all(0 <= g <= 100 for g in pair) else [-1, -1]


def relative(pairs):
    """The answers' mean grade in percent of the references', and both means, as rounded by
    summarize_gpt_review.py. quirk: what has no grades counts as -1 in both. The score is None if
    the references have no grades."""
    reference, answer = (round(sum(column) / len(pairs), 3) for column in zip(*pairs))
    score = round(100 * answer / reference, 1) if reference > 0 else None
    return {"score": score, "reference": reference, "answer": answer, "questions": len(pairs)}


TRIES = 3       # of a review in one run, while it has no two grades


def tries_of(job, journal):
    """(the next try's job, the reviews so far). A review without two grades is followed by another
    try, under a key of its own; where there are grades, the job of the last try."""
    now, reviews = job, []
    while now in journal:
        text = journal.rows[now.key]["text"]
        reviews.append(without_thinking(text) or "")
        if grades(reviews[-1]) != [-1, -1]:
            break
        key = instruct.key_of(job.key, "again", len(reviews))
        now = instruct.Job(job.name, None, key, job.request)
    return now, reviews


def reviewed(args, jobs, journal):
    """[a review, or None if there is none] of the jobs; None if only the cost was asked for.

    One without two grades is asked for again, TRIES times in a run. If those requests fail, the
    others count all the same."""
    for i in range(TRIES):
        tries = [tries_of(job, journal) for job in jobs]
        again = [now for now, reviews in tries if reviews and now not in journal]
        if i and not again:
            break
        if again:
            generate.note(f"asked for again: {len(again)} review(s) without two grades, first that "
                          f"of question {again[0].name}")
        try:
            if not instruct.over_http(args, again if i else [now for now, _ in tries], journal):
                return None
        except data.Failure as error:
            if not i and not all(reviews for _, reviews in tries):
                raise
            generate.note(f"not asked for again: {error}")
            break
    done = [tries_of(job, journal)[1] for job in jobs]
    return [reviews[-1] if reviews else None for reviews in done]


def llava_bench(args):
    """Print the score by category: what a judge, who sees captions only, gives to the answers in
    percent of what it gives to the references. Files and layout are LLaVA's, the words are ours.

    The papers' judge was gpt-4-0314, which is gone: figures of two judges do not compare."""
    flags = argparse.ArgumentParser(prog="evaluate.py llava-bench", allow_abbrev=False)
    for flag, how in instruct.ASKING.items():
        flags.add_argument(flag, **how)
    flags.parse_args(args.rest, args)
    args.seed = 0
    like = {**vars(args), "what": "conversation", "captions": True, "toy": None, "llm": None}
    if wrong := instruct.fault(argparse.Namespace(**like)):     # of an endpoint: the same there
        raise data.Usage(wrong)
    jobs, (pairs, left_out) = [], answered(args, bench_questions(args))
    for q, row in pairs:
        # quirk: they have a rule for each category, all three the same
        sent = (("system", JUDGE), ("user", (
            f"[Context]\n{q['known']}\n\n[Question]\n{q['text']}\n\n"
            f"[Assistant 1]\n{q['best']['text']}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{row['text']}\n\n[End of Assistant 2]\n\n"
            f"[System]\n{RULE.format(KNOWN[q['boxes']])}\n\n")))
        key = instruct.key_of(args.endpoint_model, args.temperature, args.max_tokens, sent)
        jobs.append(instruct.Job(str(q["id"]), None, key, sent))
    journal = instruct.Journal(f"{args.out}.reviews")
    with journal.file:
        if (said := reviewed(args, jobs, journal)) is None:
            return None
    missing = [job.name for job, text in zip(jobs, said) if text is None]
    reviews = [{"id": i, "question_id": q["id"], "answer1_id": q["best"].get("answer_id", q["id"]),
                "answer2_id": row["answer_id"], "content": text, "tuple": grades(text),
                "category": ("" if q["boxes"] else "llava_bench_") + q["category"]}
               for i, ((q, row), text) in enumerate(zip(pairs, said), 1) if text is not None]
    write_lines(f"{args.out}.reviews.jsonl", reviews)
    groups, failed = {}, [row for row in reviews if row["tuple"] == [-1, -1]]
    for row in reviews:
        for group in (row["category"], "all"):
            groups.setdefault(group, []).append(row["tuple"])
    graded = [row["tuple"] for row in reviews if row["tuple"] != [-1, -1]]
    if reviews and not graded:
        raise data.BadData("the references have no grades: read the reviews; is the judge up to "
                           "it, or cut off by --max-tokens?")
    made = {group: relative(pairs) for group, pairs in sorted(groups.items())}
    print(f"LLaVA-Bench, judged by {args.endpoint_model}: percent of the references")
    for group, row in made.items():
        score = "  none" if row["score"] is None else f"{row['score']:6.1f}"
        print(f"  {group:<22}{score}   {row['answer']:.3f} to {row['reference']:.3f}, "
              f"{row['questions']} questions")
    if failed:
        names = ", ".join(f"{row['question_id']} ({row['category']})" for row in failed)
        without = relative(graded)["score"]
        print(f"  {len(failed)} review(s) without two grades count as -1 to -1, the official way; "
              f"without them, all: {without if without is None else format(without, '.1f')}; they "
              f"are those of question {names}, and are asked for again on the next run")
    if left_out:
        print(f"  {len(left_out)} question(s) could not be asked and are in no figure")
    if missing:
        raise data.BadData(f"{len(missing)} review(s) are missing, first that of question "
                           f"{missing[0]}: run the same command again")
    return {"judge": args.endpoint_model, "graded": len(graded), "left out": len(left_out),
            "groups": made}


def main(args):
    made = {"parts": parts, "toy": toy, "retrieval": retrieval, "claims": claims,
            "scienceqa": scienceqa, "pope": pope, "llava-bench": llava_bench}[args.what](args)
    if args.out and made:                   # none if only the judge's cost was asked for
        path = f"{args.out}.scores.json" if args.what in BENCHMARKS else args.out
        Path(path).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(data.guarded(lambda: main(ARGS), ARGS.debug))
