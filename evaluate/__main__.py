"""evaluate: score a model, with the figures beside it that say what the score is worth.

    python -m evaluate parts                        the gates of the shipped CLIP, LLaMA, Q-Former
    python -m evaluate toy --model FOLDER [...]     questions and descriptions of unseen scenes
    python -m evaluate retrieval --model FOLDER     pictures for texts and texts for pictures
    python -m evaluate claims --only llava,blip2    what the papers claim, in the toy world
    python -m evaluate scienceqa | pope | llava-bench --model FOLDER --images DIR --out OUT ...
    python -m evaluate vqa | caption --model FOLDER --images DIR --out OUT ...

In the toy world the truth is known exactly, so no judge is needed. Three columns stand beside every
accuracy:

    majority   always the most frequent answer: a yes/no question is worth .5 before it is read
    other      the same model asked the same questions with another scene's picture
    grey       with a grey picture: answering blind

A model that uses the picture falls to the blind score when the picture is wrong. A model that
guesses well does not fall.

Several models (seeds) give the mean and half the spread between them. Descriptions are scored by
objects, a colour-shape pair each:

    precision     named objects that are in the scene
    recall        objects of the scene that are named
    hallucinated  named objects whose shape is nowhere in the scene, [CHAIR] 1809.02156
    repeated      descriptions that name an object twice

`claims` trains what it needs (train.py, in runs/claims) with several seeds, and prints the result,
whether or not it agrees with the paper. Retrieval uses the published score: the best few by ITC's
cosine, sorted again by match logit + cosine.

The last five read the official files. OUT gets the answers in the official form, OUT.scores.json
the scores; a run that was killed is resumed from OUT.answers.jsonl.

Next: docs/results.md, the tables.
"""
import json
import os
import sys
from pathlib import Path

from evaluate.flags import BENCHMARKS, parse


def main(args):
    """Run one command and write its figures, if --out says where."""
    from evaluate import benchmarks, captions, claims, judge, qformer_parts, retrieval, toy, vqa
    from formats.files import atomic_write
    commands = {"parts": qformer_parts.eval_all_parts, "toy": toy.eval_toy,
                "retrieval": retrieval.eval_retrieval, "claims": claims.main,
                "scienceqa": benchmarks.scienceqa, "pope": benchmarks.pope,
                "llava-bench": judge.llava_bench, "vqa": vqa.vqa, "caption": captions.caption}
    figures = commands[args.what](args)
    if args.out and figures:                # none if only the judge's cost was asked for
        path = f"{args.out}.scores.json" if args.what in BENCHMARKS else args.out
        atomic_write(Path(path), json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    args = parse()                          # before torch is imported: --help answers at once
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from formats.errors import exit_status
    sys.exit(exit_status(lambda: main(args), args.debug))
