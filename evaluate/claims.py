"""evaluate.claims: what four papers claim, tried in the toy world with several seeds.

Each paper has a function (args, seed, scenes) -> {claim: {"arms": {arm: {figure: value}},
"holds": bool}}. An arm is one trained model. Arms that are not trained yet are trained by train.py,
in runs/claims/seed<n>/<arm>/; what is there is used. `main` prints, for each claim, the figures
and in how many seeds it holds.

[LLaVA] 2304.08485.  [BLIP2] 2301.12597.  [MiniGPT4] 2304.10592.  [ShareGPT4V] 2311.12793.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from decoding.prompt import build_prompt
from evaluate import figure
from evaluate.retrieval import pairwise_accuracy, recall_at_k
from evaluate.toy import description_scores, held_out_scenes, linear_probe, scene_pixels, score
from formats.files import atomic_write
from generate import generate_batch
from projector import VLM
from qformer import Blip2Stage1
from toy.texts import DESCRIBE, KINDS, things_in, training_sample
from toy.world import SIDE
from train import TOY

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------ running arms

def run_script(program, *flags):
    """Run train.py or a room ("instruct"). If it fails, it has said why; its exit code is ours."""
    words = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = subprocess.run([sys.executable, *words, *map(str, flags)], env=env).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)      # a signal's number is negative there


def train_if_missing(args, name, seed, *flags):
    """The folder of a finished training, which is run if it is not there yet."""
    out = Path(args.runs) / f"seed{seed}" / name
    if not (out / "model").exists():
        run_script("train.py", "--seed", seed, "--output-dir", out, "--resume", "auto", *flags)
    return out / "model"


def stage_flags(recipe, stage):
    return "--recipe", recipe, "--stage", stage


def is_better(arms, better, worse, *figures):
    """A claim: the one arm is above the other in all of these figures."""
    return {"arms": arms, "holds": all(arms[better][f] > arms[worse][f] for f in figures)}


def chosen(arms, *names):
    return {name: arms[name] for name in names}


# ------------------------------------------------------------------------------------- LLaVA

def llava_scores(folder, args, picture="right"):
    """LLaVA's Table 4 has three columns and their mean; here: accuracy of questions of fact,
    recall of descriptions, accuracy of reasoning."""
    scores = score(VLM.from_pretrained(folder), "test", args.scenes, picture)
    facts = [scores[kind] for kind in KINDS if kind != "reasoning"]
    columns = {"conversation": sum(facts) / len(facts), "detail": scores["recall"],
               "reasoning": scores["reasoning"]}
    return {"overall": sum(columns.values()) / 3, **columns}


def llava(args, seed, scenes):
    """Instruction tuning, its three kinds of text, and stage 1."""
    second = stage_flags("llava", 2)
    first = train_if_missing(args, "llava/stage1", seed, *stage_flags("llava", 1))
    full = train_if_missing(args, "llava/stage2", seed, *second, "--from", first)
    talks = train_if_missing(args, "conversation/stage2", seed, *second, "--from", first,
                             "--caption-style", "conversation")
    alone = train_if_missing(args, "no-stage1/stage2", seed, *second, "--from", "none")
    arms = {"no instruction tuning": llava_scores(first, args),
            "conversation only": llava_scores(talks, args),
            "all three kinds": llava_scores(full, args),
            "all three, without stage 1": llava_scores(alone, args),
            "all three, another's picture": llava_scores(full, args, "other")}
    none, some, every, skipped, _ = (row["overall"] for row in arms.values())
    return {"instruction tuning, and all three kinds of it (Table 4: 21.5, 73.8, 85.1)":
            {"arms": arms, "holds": none < some < every},
            "skipping stage 1 hurts (Table 8: -5.1)": {
                "arms": chosen(arms, "all three kinds", "all three, without stage 1"),
                "holds": skipped < every}}


# -------------------------------------------------------------------------------- ShareGPT4V

def share_captioner(args, seed, start):
    """(the model that learns from a captioner's captions, the captioner), [ShareGPT4V].

    The pictures are those of the arm `descriptions/stage1`. The captioner learns from the true
    descriptions of a tenth of them, for as many steps, and describes the others."""
    place, stage = Path(args.runs).resolve() / f"seed{seed}", TOY["sharegpt4v"][0]
    photos, rest, rows = place / "pictures", place / "rest", []
    flags = [*stage_flags("sharegpt4v", 1), "--from", start, "--images", photos,
             "--train", ",".join(stage["train"])]
    for field in ("lr", "batch", "steps", "clip"):
        flags += [f"--{field}", stage[field]]
    photos.mkdir(parents=True, exist_ok=True)
    for i in range(stage["steps"] * stage["batch"]):
        image, talk = training_sample(seed, 1, i, "descriptions")
        rows.append({"id": str(i), "image": f"{i:05}.png", "conversations": talk})
        if not (photos / rows[i]["image"]).exists():
            image.save(photos / rows[i]["image"])
    tenth = rows[:len(rows) // 10]
    atomic_write(place / "tenth.json", json.dumps(tenth))
    captioner = train_if_missing(args, "captioner/stage1", seed, *flags,
                                 "--data", place / "tenth.json")
    rest.mkdir(exist_ok=True)
    for row in rows[len(tenth):]:
        if not (rest / row["image"]).exists():
            os.link(photos / row["image"], rest / row["image"])
    written = place / "told.json"
    if not written.exists():
        run_script("instruct", "caption", rest, "--model", captioner, "--out", written,
                   "--batch-size", 64)
    atomic_write(place / "all.json", json.dumps(tenth + json.loads(written.read_text())))
    model = train_if_missing(args, "recaptioned/stage1", seed, *flags,
                             "--data", place / "all.json")
    return model, captioner


def sharegpt4v_models(args, seed):
    """{arm: folder}. All start from one projector, which was trained on short captions; they
    differ in the captions of stage 1, or in whether half of the vision tower is trained."""
    short = train_if_missing(args, "short/stage1", seed, *stage_flags("llava-1.5", 1),
                             "--caption-style", "short")

    def arm(name, style, *flags):
        return train_if_missing(args, f"{name}/stage1", seed, *stage_flags("sharegpt4v", 1),
                                "--from", short, "--caption-style", style, *flags)
    frozen = "--train", "projector,llm"
    models = {"detailed": arm("descriptions", "descriptions"),
              "short, noisy": arm("web", "web"),
              "imagined": arm("imagined", "imagined"),
              "detailed, frozen": arm("descriptions-frozen", "descriptions", *frozen),
              "short, noisy, frozen": arm("web-frozen", "web", *frozen)}
    again, captioner = share_captioner(args, seed, short)
    return models | {"nine tenths by a captioner": again, "the captioner": captioner}


def sharegpt4v(args, seed, scenes):
    """Detailed captions, captions by somebody who has not looked, and training the tower."""
    pixels, arms, sampled = scene_pixels(scenes, SIDE, "square"), {}, {}
    for name, folder in sharegpt4v_models(args, seed).items():
        model = VLM.from_pretrained(folder)
        # each is asked in the template that it was trained with
        arms[name] = description_scores(model, scenes, pixels, template="plain")
        if "noisy" in name or "detailed" in name:
            probes = linear_probe(model.vision, 300)
            arms[name]["tower"] = sum(probes.values()) / len(probes)
        if name in ("detailed", "imagined"):        # the likeliest word is seldom hallucinated
            sampled[name] = description_scores(model, scenes, pixels, template="plain",
                                               temperature=1.0)
        if name == "detailed":
            other = description_scores(model, scenes, pixels.roll(len(scenes) // 2 | 1, 0),
                                       template="plain")
    gain = {name: arms[name]["recall"] - arms[f"{name}, frozen"]["recall"]
            for name in ("detailed", "short, noisy")}
    detailed, noisy, again = (arms[name] for name in (
        "detailed", "short, noisy", "nine tenths by a captioner"))
    return {
        "detailed captions beat short noisy ones: more found, less invented": {
            "arms": chosen(arms, "detailed", "short, noisy")
            | {"detailed, another's picture": other},
            "holds": detailed["recall"] > noisy["recall"]
            and detailed["hallucinated"] < noisy["hallucinated"]},
        "captions by somebody who has not looked teach to invent": {
            "arms": chosen(arms, "detailed", "imagined"),
            "holds": arms["imagined"]["hallucinated"] > detailed["hallucinated"]},
        "the same, words drawn at temperature 1": {
            "arms": sampled,
            "holds": sampled["imagined"]["hallucinated"] > sampled["detailed"]["hallucinated"]},
        "half of the tower learning helps, with detailed captions (Table 6)": {
            "arms": chosen(arms, "detailed", "detailed, frozen"), "holds": gain["detailed"] > 0},
        "and helps less with noisy ones": {
            "arms": chosen(arms, "short, noisy", "short, noisy, frozen"),
            "holds": gain["short, noisy"] < gain["detailed"]},
        "a captioner's captions come near true ones: 95 % of the recall": {
            "arms": chosen(arms, "detailed", "nine tenths by a captioner", "the captioner"),
            "holds": again["recall"] >= .95 * detailed["recall"]}}


# ------------------------------------------------------------------------ BLIP-2 and MiniGPT-4

# Steps of stage 1 and of stage 2: the recipe's own, and four times as many. Four was chosen before
# any claim was looked at; beside each arm is printed whether its loss is flat, see `falls_by`.
BUDGETS = {"short": (TOY["blip2"][0]["steps"], TOY["blip2"][1]["steps"]),
           "long": (4 * TOY["blip2"][0]["steps"], 4 * TOY["blip2"][1]["steps"])}


def falls_by(folder):
    """By which share of itself did the loss of a finished training fall between the third quarter
    of its steps and the last? Under .05 it is called flat."""
    lines = (folder.parent / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    quarter = len(losses) // 4
    before, last = losses[-2 * quarter:-quarter], losses[-quarter:]
    return 1 - (sum(last) / len(last)) / (sum(before) / len(before))


def blip2_stages(args, seed, budget):
    """(stage 1, stage 2 after it, stage 2 alone for as many steps): folders."""
    one, two = BUDGETS[budget]
    second_flags = stage_flags("blip2", 2)
    first = train_if_missing(args, f"blip2-{budget}/stage1", seed, *stage_flags("blip2", 1),
                             "--steps", one)
    second = train_if_missing(args, f"blip2-{budget}/stage2", seed, *second_flags, "--from", first,
                              "--steps", two)
    alone = train_if_missing(args, f"no-stage1-{budget}/stage2", seed, *second_flags,
                             "--from", "none", "--steps", one + two)
    return first, second, alone


def blip2_figure5(args, seed, scenes, budget):
    """(the claim about the representation stage at one budget, folder of stage 1)."""
    first, second, alone = blip2_stages(args, seed, budget)
    pixels = scene_pixels(scenes, SIDE, "squash")

    def described(folder, images):
        scores = description_scores(VLM.from_pretrained(folder), scenes, images)
        return chosen(scores, "precision", "recall") | {"loss still fell by": falls_by(folder)}
    return is_better({
        "stages 1 and 2": described(second, pixels),
        "stage 2 alone": described(alone, pixels),
        "stages 1 and 2, grey picture": described(second, torch.zeros_like(pixels))},
        "stages 1 and 2", "stage 2 alone", "recall"), first


def blip2(args, seed, scenes):
    """The representation stage at two budgets, ITG's part in it, and ITM beside ITC."""
    found = {}
    for budget in BUDGETS:
        steps = " + ".join(map(str, BUDGETS[budget]))
        name = f"the representation stage helps, equal steps in all (Figure 5), {steps} steps"
        found[name], first = blip2_figure5(args, seed, scenes, budget)
    # what is left is measured on the long training
    without_itg = train_if_missing(args, "no-itg-long/stage1", seed, *stage_flags("blip2", 1),
                                   "--losses", "itc,itm", "--steps", BUDGETS["long"][0])
    full = Blip2Stage1.from_pretrained(first)
    without = Blip2Stage1.from_pretrained(without_itg)
    falls, pairwise = falls_by(first), pairwise_accuracy(full, scenes)
    return found | {
        "ITG helps retrieval (Table 6: +0.9 and +1.1 recall@1)": is_better({
            "ITC + ITM + ITG": recall_at_k(full, scenes) | {"loss still fell by": falls},
            "ITC + ITM": recall_at_k(without, scenes)
            | {"loss still fell by": falls_by(without_itg)},
            "ITC + ITM + ITG, ranked by ITC": recall_at_k(full, scenes, itm=False),
            "ITC + ITM, ranked by ITC": recall_at_k(without, scenes, itm=False)},
            "ITC + ITM + ITG", "ITC + ITM", "image to text 1", "text to image 1"),
        "ITM tells near misses apart better than ITC": {
            "arms": pairwise,
            "holds": all(rates["itm"] > rates["itc"] for rates in pairwise.values())}}


def is_degenerate(text, ended):
    """Does a long description repeat itself or break off? (repeats, breaks off)

    Repeats: a sentence or an object twice. Breaks off: no end within the limit, or no full stop."""
    sentences = [s.strip() for s in text.split(".") if s.strip()]
    things = things_in(text)
    repeats = len(set(sentences)) < len(sentences) or len(set(things)) < len(things)
    return repeats, not ended or not text.strip().endswith(".")


def degeneration_rates(model, scenes, limit=90):
    """Rates over the descriptions that a model gives when it is asked for detail."""
    pixels = scene_pixels(scenes, model.image_size, model.aspect)
    prompts = [build_prompt([DESCRIBE[2]], "minigpt4", model.tokenizer)] * len(scenes)
    repeats = broken = either = words = found = present = 0
    for start in range(0, len(scenes), 100):
        part = slice(start, start + 100)
        rows = generate_batch(model, prompts[part], [p[None] for p in pixels[part]],
                              max_new_tokens=limit)
        for scene, tokens in zip(scenes[part], rows):
            text = model.tokenizer.decode(tokens).split("###")[0]
            again, breaks = is_degenerate(text, len(tokens) < limit)
            repeats, broken, either = repeats + again, broken + breaks, either + (again or breaks)
            truth = {(t.colour, t.shape) for t in scene.things}
            words, present = words + len(text.split()), present + len(truth)
            found += len(truth & set(things_in(text)))
    n = len(scenes)
    return {"fails": either / n, "repeats": repeats / n, "breaks off": broken / n,
            "words": words / n, "recall": found / present}


def minigpt4(args, seed, scenes):
    """The curated second stage; the Q-Former is the shipped one, as MiniGPT-4's is Salesforce's."""
    second_flags = stage_flags("minigpt4", 2)
    first = train_if_missing(args, "minigpt4/stage1", seed, *stage_flags("minigpt4", 1))
    second = train_if_missing(args, "minigpt4/stage2", seed, *second_flags, "--from", first)
    noisy = train_if_missing(args, "noisy/stage2", seed, *second_flags, "--from", first,
                             "--caption-style", "mixed")
    arms = {}
    for name, folder in (("stage 1, noisy captions", first),
                         ("stage 2, curated descriptions", second),
                         ("stage 2, noisy captions again", noisy)):
        arms[name] = degeneration_rates(VLM.from_pretrained(folder), scenes[:200])
    claim = "a small curated second stage mends repeated and broken text (Table 3: 35 % to 2 %)"
    return {claim: is_better(arms, "stage 1, noisy captions", "stage 2, curated descriptions",
                             "fails")}


# ------------------------------------------------------------------------------------- tables

def print_claim(paper, claim, runs):
    """The verdict, and for each arm the mean and half the spread of its figures over the seeds."""
    held = sum(run[claim]["holds"] for run in runs)
    verdict = "holds" if held == len(runs) else "does not hold"
    print(f"\n{paper}: {claim}\n  {verdict} here: in {held} of {len(runs)} seeds")
    for arm, figures in runs[0][claim]["arms"].items():
        cells = []
        for name in figures:
            values = [run[claim]["arms"][arm][name] for run in runs]
            cells.append(f"{name} {sum(values) / len(values):.3f} "
                         f"±{(max(values) - min(values)) / 2:.3f}")
        print(f"  {arm:<32}" + "   ".join(cells))


def main(args):
    """Print, for each claim of the papers, the arms' figures and in how many seeds it holds."""
    scenes = held_out_scenes(args.scenes)
    papers = {"llava": llava, "blip2": blip2, "minigpt4": minigpt4, "sharegpt4v": sharegpt4v}
    table = {paper: [papers[paper](args, seed, scenes) for seed in range(args.seeds)]
             for paper in args.only}
    print(f"{args.scenes} held-out scenes (MiniGPT-4's at most 200, tower 300), {args.seeds} "
          "seeds, ± half the spread")
    for paper, runs in table.items():
        for claim in runs[0]:
            print_claim(paper, claim, runs)
    if args.picture:
        figure.draw(args.picture, table)
    return {"seeds": args.seeds, "scenes": args.scenes, "claims": table}
