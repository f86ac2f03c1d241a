"""The command line of llama.py. No torch here, so that --help answers at once."""

import argparse


def parse(argv=None):
    """The arguments: text, folder (None: the shipped toy). Ends the program with status 2 for a
    flag, of which there are none; behind "--" a text may begin like one."""
    p = argparse.ArgumentParser("llama.py", description="Continue a text by 40 tokens.",
                                allow_abbrev=False)
    p.add_argument("text", nargs="?", default="This picture shows two objects on",
                   help='the text (default: "%(default)s")')
    p.add_argument("folder", nargs="?", help="folder or hub id of a LLaMA (default: the shipped "
                   "toy)")
    return p.parse_args(argv)
