"""The flags of `python data.py check` and `show`. No torch here, so that --help answers at once."""
import argparse

from formats.templates import ROWS

WHAT = {"check": "the dataset doctor: exit status 0 clean, 3 faults",
        "show": "one row: its tokens, those with loss marked"}


def parse(argv=None):
    p = argparse.ArgumentParser("data.py", description="Look at training data.", allow_abbrev=False)
    sub = p.add_subparsers(dest="what", help="nothing: one conversation, as the model meets it")
    for name, help_text in WHAT.items():
        q = sub.add_parser(name, help=help_text, allow_abbrev=False)
        q.add_argument("file", help="JSON or JSON lines of LLaVA, LLaMA-Factory, "
                       "OpenAI, ShareGPT4V, MiniGPT-4 or LAVIS")
        q.add_argument("--llm", help="folder or hub id of the LLaMA whose tokens are counted")
        q.add_argument("--template", choices=sorted(ROWS), metavar="NAME",
                       help="how the words are laid out (default: as the model of --llm has "
                       "learned it, else v1): " + ", ".join(ROWS))
        q.add_argument("--places", type=int, default=576, metavar="N", help="tokens of a picture "
                       "(default: LLaVA's 576; with a Q-Former 32)")
        q.add_argument("--debug", action="store_true", help="tracebacks")
        if name == "show":
            q.add_argument("--sample", type=int, default=1, metavar="N", help="row, from 1")
        else:
            add_check_flags(q)
    args = p.parse_args(argv)
    for flag in ("places", "sample", "pack"):
        if getattr(args, flag, 1) < 1:
            p.error(f"--{flag}: a number from 1")
    if getattr(args, "max_length", 0) < 0:
        p.error("--max-length: a number from 1, or 0 to cut nothing")
    return args


def add_check_flags(q):
    q.add_argument("--images", metavar="DIR", help="folder that the pictures' names start from")
    q.add_argument("--follow-links", action="store_true", help="links in that folder may lead "
                   "out of it")
    q.add_argument("--open", action=argparse.BooleanOptionalAction, default=True,
                   help="decode the pictures too, each once (default: yes)")
    q.add_argument("--pack", type=int, default=6144, metavar="N",
                   help="tokens of the longest sample that is no fault (default: 6144)")
    q.add_argument("--max-length", type=int, default=0, metavar="N", help="tokens behind which "
                   "training cuts a sample, as in train.py (default: 0, it is not cut)")
