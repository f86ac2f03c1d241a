"""toy.problems: the toy world in ScienceQA's files, so that its whole way can be gone without them.

    python -m toy.problems FOLDER --train 600 --test 200

    FOLDER/problems.json, pid_splits.json       the official layout: formats/scienceqa.py
    FOLDER/images/train/7/image.png             two problems in three have a picture; of the third
                                                the hint describes the scene in words
    FOLDER/images/train-other/7/image.png       a control: the picture of another problem

A problem is a question of the toy world with its value among the choices, in any order; the
solution is the answer in words. Test problems are about scenes that training never draws.
"""
import argparse
import json
import random
from pathlib import Path

from formats.errors import bounded, exit_status
from formats.files import atomic_write
from toy.texts import ANSWERS, description, question
from toy.world import draw, make_scene

KINDS = "colour", "shape", "where", "background"        # more than two values, and one sentence
CHOICES = 3


def make_problem(number, split):
    """(a row of problems.json, its scene) of problem `number` of a split, from 0."""
    rng = random.Random(f"problem {split} {number}")
    kind, asked = KINDS[number % len(KINDS)], None
    while asked is None:                        # the scene may have nothing to ask so about
        scene = make_scene(f"problem {number} {rng.random()}", split)
        asked = question(scene, kind, rng)
    text, answer, value = asked
    others = [other for other in ANSWERS[kind] if other != value]
    choices = [value, *rng.sample(others, CHOICES - 1)]
    rng.shuffle(choices)
    in_words = number % 3 == 2
    hint, image = (description(scene), None) if in_words else ("", "image.png")
    return {"question": text, "choices": choices, "answer": choices.index(value), "hint": hint,
            "image": image, "task": "closed choice", "grade": f"grade{1 + number % 12}",
            "subject": "natural science", "topic": kind, "category": kind, "skill": kind,
            "lecture": "", "solution": answer, "split": split}, scene


def save(picture, folder, split, name):
    place = Path(folder) / "images" / split / name
    place.mkdir(parents=True, exist_ok=True)
    picture.save(place / "image.png")


def write_problems(folder, **counts):
    """The files of so many problems of each split: write_problems(folder, train=600, test=200)."""
    problems, splits = {}, {}
    for split, count in counts.items():
        splits[split], shown = [], {}
        for number in range(count):
            name = str(len(problems) + 1)
            problems[name], scene = make_problem(number, split)
            splits[split].append(name)
            if problems[name]["image"]:
                shown[name] = draw(scene)
        names = list(shown)
        for i, name in enumerate(names):
            save(shown[name], folder, split, name)
            save(shown[names[i - 1]], folder, f"{split}-other", name)
    atomic_write(Path(folder) / "problems.json", json.dumps(problems, indent=1) + "\n")
    atomic_write(Path(folder) / "pid_splits.json", json.dumps(splits) + "\n")


def main(argv=None):
    p = argparse.ArgumentParser(description="The toy world in ScienceQA's files.",
                                allow_abbrev=False)
    count = bounded(int, 1, 10 ** 6)
    p.add_argument("folder")
    p.add_argument("--train", type=count, default=600, help="problems (default: 600)")
    p.add_argument("--test", type=count, default=200, help="problems (default: 200)")
    args = p.parse_args(argv)
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    write_problems(args.folder, train=args.train, test=args.test)
    print(f"{args.folder}: {args.train} problems to learn from, {args.test} to be asked")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
