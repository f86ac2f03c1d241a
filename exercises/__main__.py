"""exercises: twelve functions to write, from a patch embedding to a tile of flash attention.

    python -m exercises                  the twelve, and which of yours are right
    python -m exercises 4                run exercise 4 beside the project's own function
    python -m exercises 4 --file my.py   the same for a function that stands elsewhere

Each is a file of this folder with a text, a signature and `raise NotImplementedError`: write it
there. The check says in one line what differs, and knows the classic mistakes by name; a wrong
mask is drawn beside the right one. The solutions are the project's own functions;
exercises/README.md says where they stand.

Exit status: 0 right, 1 wrong or not written yet, 2 no such exercise.
"""
import argparse
import os
import sys

COUNT = 12


def parse(argv=None):
    """The command line, read before torch is imported, so that --help answers at once."""
    p = argparse.ArgumentParser(prog="python -m exercises", allow_abbrev=False,
                                description="Check a function that you have written.")
    p.add_argument("numbers", nargs="*", type=int, metavar="number",
                   help=f"1 to {COUNT}; none: list them all")
    p.add_argument("--file", help="where the function stands, instead of the exercise's own file")
    p.add_argument("--debug", action="store_true", help="tracebacks")
    args = p.parse_args(argv)
    for number in args.numbers:
        if not 1 <= number <= COUNT:
            p.error(f"there is no exercise {number}: take 1 to {COUNT}")
    if args.file and len(args.numbers) != 1:
        p.error("--file goes with the number of one exercise")
    if args.file and not os.path.isfile(args.file):
        p.error(f"--file {args.file}: there is no such file")
    return args


def main(args):
    """Check exercises; the exit status. Without a number: list them, which is no failure."""
    from exercises.checking import check
    from exercises.index import EXERCISES
    failed = False
    for number in args.numbers or range(1, COUNT + 1):
        exercise = EXERCISES[number]
        verdict = check(exercise, args.file)
        failed = failed or verdict.state != "right"
        print(f"{number:2} {exercise.title}: {verdict.text}")
        if verdict.drawing and args.numbers:
            print(verdict.drawing)
    return int(failed and bool(args.numbers))


if __name__ == "__main__":
    args = parse()                          # before torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from formats.errors import exit_status
    sys.exit(exit_status(lambda: main(args), args.debug))
