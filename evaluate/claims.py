"""TODO"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import generate
from evaluate.retrieval import pairwise_accuracy, recall_at_k
from evaluate.toy import description_scores, linear_probe, scene_pixels, score
from projector import VLM
from qformer import Blip2Stage1
from toy.texts import DESCRIBE, KINDS, things_in, training_sample
from toy.world import draw, make_scene, SIDE
from train import TOY


def is_degenerate(text, ended):
    """Does a long description repeat itself or break off? (repeats, breaks off)

    Repeats: a sentence, or a thing, twice. Breaks off: no end within the limit, or no full stop."""
    parts = [s.strip() for s in text.split(".") if s.strip()]
    things = things_in(text)
    return (len(set(parts)) < len(parts) or len(set(things)) < len(things),
            not ended or not text.strip().endswith("."))


def degeneration_rates(model, scenes, limit=90):
    """Rates over the descriptions that a model gives when it is asked for detail."""
    pixels = scene_pixels(scenes, model.image_size, model.aspect)
    ask_for = [generate.build_prompt([DESCRIBE[2]], "minigpt4", model.tokenizer)] * len(scenes)
    repeats = broken = either = words = found = there = 0
    for start in range(0, len(scenes), 100):
        said = generate.generate_batch(model, ask_for[start:start + 100],
                                       [p[None] for p in pixels[start:start + 100]],
                                       max_new_tokens=limit)
        for scene, tokens in zip(scenes[start:start + 100], said):
            text = model.tokenizer.decode(tokens).split("###")[0]
            again, off = is_degenerate(text, len(tokens) < limit)
            repeats, broken, either = repeats + again, broken + off, either + (again or off)
            truth = {(t.colour, t.shape) for t in scene.things}
            words, there = words + len(text.split()), there + len(truth)
            found += len(truth & set(things_in(text)))
    n = len(scenes)
    return {"fails": either / n, "repeats": repeats / n, "breaks off": broken / n,
            "words": words / n, "recall": found / there}


def run_script(script, *flags):
    """Run it; what went wrong its own line has said, and its exit code is ours."""
    if code := subprocess.run([sys.executable, *map(str, (Path(__file__).parents[1] / script, *flags))]).returncode:
        sys.exit(code if code > 0 else 128 - code)


def train_if_missing(args, name, seed, *flags):
    """The folder of a finished training, which is run if it is not there yet."""
    out = Path(args.runs) / f"seed{seed}" / name
    if not (out / "model").exists():
        run_script("train.py", "--seed", seed, "--output-dir", out, "--resume", "auto", *flags)
    return out / "model"


def main(args):
    """Print, for each claim of the papers, the arms' figures and in how many seeds it holds."""
    scenes = [make_scene(i, "test", 1 + i % 4) for i in range(args.scenes)]
    tests = {"llava": llava, "blip2": blip2, "minigpt4": minigpt4,
             "sharegpt4v": sharegpt4v}
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
        draw(args.picture, table)
    return {"seeds": args.seeds, "scenes": args.scenes, "claims": table}


def is_better(arms, better, worse, *figures):
    """The arms of a claim, and whether the one is above the other in all of these figures."""
    return {"arms": arms, "holds": all(arms[better][f] > arms[worse][f] for f in figures)}


def llava_scores(folder, args, picture="right"):
    """LLaVA's Table 4 has three columns and their mean; here: accuracy of questions of fact,
    recall of descriptions, accuracy of reasoning."""
    made = score(VLM.from_pretrained(folder), "test", args.scenes, picture)
    facts = [made[kind] for kind in KINDS if kind != "reasoning"]
    columns = {"conversation": sum(facts) / len(facts), "detail": made["recall"],
               "reasoning": made["reasoning"]}
    return {"overall": sum(columns.values()) / 3, **columns}


def llava(args, seed, scenes):
    """{claim: {"arms": {arm: {figure: value}}, "holds": bool}} of one seed."""
    llava = lambda stage: ("--recipe", "llava", "--stage", stage)
    first = train_if_missing(args, "llava/stage1", seed, *llava(1))
    full = train_if_missing(args, "llava/stage2", seed, *llava(2), "--from", first)
    talks = train_if_missing(args, "conversation/stage2", seed, *llava(2), "--from", first,
                    "--caption-style", "conversation")
    alone = train_if_missing(args, "no-stage1/stage2", seed, *llava(2), "--from", "none")
    arms = {name: llava_scores(folder, args) for name, folder in (
        ("no instruction tuning", first), ("conversation only", talks), ("all three kinds", full),
        ("all three, without stage 1", alone))}
    arms["all three, another's picture"] = llava_scores(full, args, "other")
    none, some, every, skipped, _ = (row["overall"] for row in arms.values())
    return {"instruction tuning, and all three kinds of it (Table 4: 21.5, 73.8, 85.1)":
            {"arms": arms, "holds": none < some < every},
            "skipping stage 1 hurts (Table 8: -5.1)": {
                "arms": {k: arms[k] for k in ("all three kinds", "all three, without stage 1")},
                "holds": skipped < every}}


def share_captioner(args, seed, start):
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
        picture, talk = training_sample(seed, 1, i, "descriptions")
        rows.append({"id": str(i), "image": f"{i:05}.png", "conversations": talk})
        if not (photos / rows[i]["image"]).exists():
            picture.save(photos / rows[i]["image"])
    tenth, rest = rows[:len(rows) // 10], place / "rest"
    (place / "tenth.json").write_text(json.dumps(tenth))
    writer = train_if_missing(args, "captioner/stage1", seed, *flags, "--data", place / "tenth.json")
    rest.mkdir(exist_ok=True)
    for row in rows[len(tenth):]:
        if not (rest / row["image"]).exists():
            os.link(photos / row["image"], rest / row["image"])
    told = place / "told.json"
    if not told.exists():
        run_script("instruct.py", "caption", rest, "--model", writer, "--out", told, "--batch-size", 64)
    (place / "all.json").write_text(json.dumps(tenth + json.loads(told.read_text())))
    return train_if_missing(args, "recaptioned/stage1", seed, *flags, "--data", place / "all.json"), writer


def sharegpt4v(args, seed, scenes):
    """The same. All start from one bridge, which has learnt from short captions; they differ in
    what stage 1 tells of the same scenes, or in whether half of the tower learns."""
    short = train_if_missing(args, "short/stage1", seed, "--recipe", "llava-1.5", "--stage", 1,
                    "--caption-style", "short")
    learnt = lambda name, told, *flags: train_if_missing(
        args, f"{name}/stage1", seed, "--recipe", "sharegpt4v", "--stage", 1, "--from", short,
        "--caption-style", told, *flags)
    frozen = "--train", "bridge,llm"
    models = {"detailed": learnt("descriptions", "descriptions"), "short, noisy":
              learnt("web", "web"), "imagined": learnt("imagined", "imagined"),
              "detailed, frozen": learnt("descriptions-frozen", "descriptions", *frozen),
              "short, noisy, frozen": learnt("web-frozen", "web", *frozen)}
    models["nine tenths by a captioner"], models["the captioner"] = share_captioner(args, seed, short)
    pixels, arms, drawn = scene_pixels(scenes, SIDE, "square"), {}, {}
    for name, folder in models.items():                 # each in the words that it has learnt
        model = VLM.from_pretrained(folder)
        arms[name] = description_scores(model, scenes, pixels, template="plain")
        if "noisy" in name or "detailed" in name:
            seen = linear_probe(model.vision, 300)
            arms[name]["tower"] = sum(seen.values()) / len(seen)
        if name in ("detailed", "imagined"):            # the likeliest word is seldom invented
            drawn[name] = description_scores(model, scenes, pixels, template="plain", temperature=1.0)
        if name == "detailed":
            other = description_scores(model, scenes, pixels.roll(len(scenes) // 2 | 1, 0),
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


def blip2(args, seed, scenes):
    """{claim: {"arms": {arm: {figure: value}}, "holds": bool}} of one seed."""
    blip2 = lambda stage: ("--recipe", "blip2", "--stage", stage)
    first = train_if_missing(args, "blip2/stage1", seed, *blip2(1))
    second = train_if_missing(args, "blip2/stage2", seed, *blip2(2), "--from", first)
    steps = sum(json.loads((x.parent / "run.json").read_text())["steps"] for x in (first, second))
    alone = train_if_missing(args, "no-stage1/stage2", seed, *blip2(2), "--from", "none", "--steps", steps)
    silent = train_if_missing(args, "no-itg/stage1", seed, *blip2(1), "--losses", "itc,itm")
    pixels = scene_pixels(scenes, SIDE, "squash")

    def told(folder, shown):
        made = description_scores(VLM.from_pretrained(folder), scenes, shown)
        return {k: made[k] for k in ("precision", "recall")}
    full, without = (Blip2Stage1.from_pretrained(x) for x in (first, silent))
    apart = pairwise_accuracy(full, scenes)
    return {
        "the representation stage helps, equal steps in all (Figure 5)": is_better({
            "stages 1 and 2": told(second, pixels), "stage 2 alone": told(alone, pixels),
            "stages 1 and 2, grey picture": told(second, torch.zeros_like(pixels))},
            "stages 1 and 2", "stage 2 alone", "recall"),
        "ITG helps retrieval (Table 6: +0.9 and +1.1 recall@1)": is_better({
            "ITC + ITM + ITG": recall_at_k(full, scenes), "ITC + ITM": recall_at_k(without, scenes),
            "ITC + ITM + ITG, ranked by ITC": recall_at_k(full, scenes, itm=False),
            "ITC + ITM, ranked by ITC": recall_at_k(without, scenes, itm=False)},
            "ITC + ITM + ITG", "ITC + ITM", "image to text 1", "text to image 1"),
        "ITM tells near misses apart better than ITC": {
            "arms": apart, "holds": all(rates["itm"] > rates["itc"] for rates in apart.values())}}


def minigpt4(args, seed, scenes):
    """The same; the Q-Former is that of BLIP-2's second stage."""
    blip2, gpt = (lambda stage, name=name: ("--recipe", name, "--stage", stage)
                  for name in ("blip2", "minigpt4"))
    eye = train_if_missing(args, "blip2/stage2", seed, *blip2(2), "--from",
                  train_if_missing(args, "blip2/stage1", seed, *blip2(1)))
    first = train_if_missing(args, "minigpt4/stage1", seed, *gpt(1), "--qformer", eye)
    second = train_if_missing(args, "minigpt4/stage2", seed, *gpt(2), "--from", first)
    noisy = train_if_missing(args, "noisy/stage2", seed, *gpt(2), "--from", first, "--caption-style", "web")
    return {"a small curated second stage mends repeated and broken text (Table 3: 35 % to 2 %)":
            is_better({name: degeneration_rates(VLM.from_pretrained(folder), scenes[:200]) for name, folder in (
                ("stage 1, noisy captions", first), ("stage 2, curated descriptions", second),
                ("stage 2, noisy captions again", noisy))},
                "stage 1, noisy captions", "stage 2, curated descriptions", "fails")}
