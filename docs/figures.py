"""docs/figures.py: the ten pictures of the book, drawn by the code that they explain.

    python docs/figures.py              the seven that need no trained model
    python docs/figures.py masks way    some of them, by name
    python docs/figures.py --all        all ten; three are of a toy model that train.py has trained

    way         a photo's way to an answer            frozen      what is frozen and what trains
    splice      the row and its labels                memory      where the memory of a 7B step goes
    masks       the Q-Former's three masks            packed      rows packed, rows padded
    tiles       what flash attention skips
    learning    one picture's answers in training     of --run    (stage 1)
    logit_lens  the word of each patch, by layer      of --run    (stage 2)
    knock_out   what is lost without an object        of --run    (stage 2)

They go to docs/pictures/NAME.svg, learning.png aside. The last two print the table that belongs
into docs/results.md.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))           # python docs/figures.py puts docs/ there

from formats.errors import BadModel, exit_status

FREE = "way", "splice", "masks", "frozen", "memory", "packed", "tiles"
TRAINED = "learning", "logit_lens", "knock_out"


def parse(argv=None):
    """The command line, read before torch is imported."""
    p = argparse.ArgumentParser(description="Draw the pictures of the book.", allow_abbrev=False)
    p.add_argument("names", nargs="*", metavar="name", help=", ".join((*FREE, *TRAINED)))
    p.add_argument("--all", action="store_true", help="all ten")
    p.add_argument("--run", default="runs/toy/llava-1.5",
                   help="the folder of stage1/ and stage2/ of a toy run")
    p.add_argument("--scenes", type=int, default=200, help="scenes that are measured")
    p.add_argument("--out", default=ROOT / "docs/pictures", type=Path, help="a folder")
    args = p.parse_args(argv)
    unknown = set(args.names) - {*FREE, *TRAINED}
    if unknown:
        p.error(f"no picture {sorted(unknown)[0]}: take {', '.join((*FREE, *TRAINED))}")
    if args.scenes < 4:
        p.error("--scenes must be at least 4")
    args.names = args.names or FREE
    if args.all:
        args.names = (*FREE, *TRAINED)
    return args


def trained(args, stage, name):
    """A file or folder of a finished stage. Raises BadModel where it is missing."""
    path = Path(args.run) / f"stage{stage}" / name
    if not path.exists():
        raise BadModel(f"{path}: is not there: train it first, python train.py --stage 1 and "
                       "--stage 2, or name another --run")
    return path


def draw(name, args):
    """Draw one picture; returns its path."""
    path = args.out / f"{name}.svg"
    if name in FREE:
        from docs.drawing import masks, packed, parts, way
        draw = {"way": way.draw_way, "splice": way.draw_splice, "masks": masks.draw_masks,
                "tiles": masks.draw_tiles, "frozen": parts.draw_frozen,
                "memory": parts.draw_memory, "packed": packed.draw_packed}[name]
        draw(path)
    elif name == "learning":
        from trainer.learning import draw_learning
        path = args.out / "learning.png"
        draw_learning(trained(args, 1, "samples.jsonl").parent, path)
    elif name == "logit_lens":
        from docs.drawing.lens import draw_lens
        print(draw_lens(path, trained(args, 2, "model"), args.scenes))
    else:
        from docs.drawing.knock_out import draw_knock_out
        print(draw_knock_out(path, trained(args, 2, "model"), args.scenes))
    return path


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        print(f"{draw(name, args)} written", flush=True)


if __name__ == "__main__":
    ARGS = parse()
    sys.exit(exit_status(lambda: main(ARGS)))
