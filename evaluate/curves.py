"""evaluate.curves: what loss is normal? The curves that `python train.py ... --compare` knows.

    python -m evaluate.curves                               all stages of the toy, 3 seeds
    python -m evaluate.curves --only llava-1.5 --seeds 2    some; the others stay as they are
    python -m evaluate.curves --table                       trains nothing, prints the table

A stage is trained by train.py into --runs/seed<n>/<recipe>/stage<n>, if it is not finished there.
The losses go into trainer/curves.json, in tenths of the run (trainer/compare.py), and a table for
docs/results.md is printed. --jobs 2 trains two seeds at a time, each on one core.
"""
import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from formats.errors import exit_status, UsageError
from formats.files import atomic_write

RECIPES = "llava", "llava-1.5", "blip2", "minigpt4", "sharegpt4v"


def stages_of(recipe):
    """{name of the curve: (number of the stage, its folder below that of a seed)}."""
    found = {str(stage): (stage, f"{recipe}/stage{stage}") for stage in (1, 2)}
    if recipe == "blip2":               # no stage 1 lies beside it: from the shipped Q-Former
        found["2 alone"] = 2, "blip2-alone/stage2"
    return found


def parse(argv=None):
    """The command line, read before torch is imported."""
    p = argparse.ArgumentParser(prog="python -m evaluate.curves", allow_abbrev=False,
                                description="Make the curves of train.py --compare.")
    p.add_argument("--only", default=",".join(RECIPES), help="recipes, with commas")
    p.add_argument("--seeds", type=int, default=3, help="trainings of each stage (default: 3)")
    p.add_argument("--runs", default="runs/curves", help="where they lie, or will lie; runs/claims "
                   "has some of them")
    p.add_argument("--jobs", type=int, default=1, help="seeds that are trained at a time")
    p.add_argument("--table", action="store_true", help="print the table, train nothing")
    args = p.parse_args(argv)
    args.only = list(dict.fromkeys(args.only.split(",")))
    if set(args.only) - set(RECIPES) or not 2 <= args.seeds <= 100 or not 1 <= args.jobs <= 100:
        p.error(f"--only takes {', '.join(RECIPES)}; --seeds 2 to 100; --jobs 1 to 100")
    return args


def recipe_row(recipe, stage):
    """The toy's row of a recipe's stage, as a run writes it into its config.json."""
    from train import parse_args
    row = parse_args(["--stage", str(stage), "--recipe", recipe]).row
    return json.loads(json.dumps(vars(row)))


def train_seed(args, seed):
    """Train the stages of one seed that are not there yet."""
    from evaluate.claims import stage_flags, train_if_missing
    stages = [(recipe, *found) for recipe in args.only for found in stages_of(recipe).values()]
    if "sharegpt4v" in args.only:           # starts from the stage 1 of llava-1.5 beside it
        stages.insert(0, ("llava-1.5", *stages_of("llava-1.5")["1"]))
    threads = ("--threads", 1) if args.jobs > 1 else ()
    for recipe, stage, name in stages:
        train_if_missing(args, name, seed, *stage_flags(recipe, stage), *threads)


def folders_of(args, recipe, stage, name):
    """The folders of a stage with all seeds. Raises UsageError where one is of other settings."""
    outs = []
    for seed in range(args.seeds):
        out = Path(args.runs) / f"seed{seed}" / name
        row = json.loads((out / "config.json").read_text())["stage_row"]
        if row != recipe_row(recipe, stage):
            raise UsageError(f"{out} was trained with other settings than the recipe has now: "
                             "delete it, or give another --runs")
        outs.append(out)
    return outs


def make(args):
    """Train what is missing, and write the curves; those of other recipes stay as they are."""
    from trainer.compare import curve_of, CURVES, read_curves
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(partial(train_seed, args), range(args.seeds)))
    curves = read_curves()
    for recipe in args.only:
        curves[recipe] = {key: curve_of(folders_of(args, recipe, stage, name))
                          for key, (stage, name) in stages_of(recipe).items()}
    ordered = {name: curves[name] for name in RECIPES if name in curves}
    atomic_write(CURVES, json.dumps(ordered, indent=1) + "\n")


def table():
    """The markdown table of docs/results.md: the band at three places of each run."""
    from trainer.compare import band, read_curves
    rows = ["| recipe, stage | steps | seeds | first tenth | fifth tenth | last tenth |",
            "|---|---|---|---|---|---|"]
    for recipe, stages in read_curves().items():
        for stage, curve in sorted(stages.items()):
            limits = band(curve)
            cells = [f"{low:.3f} to {high:.3f}" for low, high in (limits[i] for i in (0, 4, -1))]
            rows.append(f"| {recipe}, {stage} | {curve['steps']} | {len(curve['seeds'])} | "
                        f"{' | '.join(cells)} |")
    return "\n".join(rows)


def main(args):
    if not args.table:
        make(args)
    print(table())


if __name__ == "__main__":
    ARGS = parse()
    sys.exit(exit_status(lambda: main(ARGS)))
