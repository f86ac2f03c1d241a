"""TODO"""

import argparse
import math
import os
import re

DEFAULT_MODEL = "runs/toy/llava-1.5/stage2/model"


def check_prompt(text):
    """What is wrong with a question, or None."""
    return ("the question is empty: write one" if not text.strip() else
            "the question holds a NUL byte: remove it" if "\0" in text else
            "the question is not valid UTF-8: type it again"
            if any("\ud800" <= c < "\ue000" for c in text) else None)


def check_settings(max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0, num_beams=1,
          repetition_penalty=1.0, stop=()):
    """What is wrong with these settings, or None; the defaults are everybody's."""
    stop = [stop] if type(stop) is str else stop
    texts = "".join(stop)
    unused = temperature == 0 and (top_p != 1 or top_k != 0)
    wrong = {"max-new-tokens must be at least 1": max_new_tokens < 1,
             "temperature must be 0 or more": not 0 <= temperature < math.inf,
             "top-p must be above 0 and at most 1": not 0 < top_p <= 1,
             "top-k must be 0 (all) or more": top_k < 0,
             "num-beams must be at least 1": num_beams < 1,
             "repetition-penalty must be above 0": not 0 < repetition_penalty < math.inf,
             "stop must be a text to end at, not an empty one": not all(stop),
             "stop is not valid UTF-8: type it again":
                 texts != texts.encode(errors="replace").decode(),
             "num-beams above 1 needs temperature 0": num_beams > 1 and temperature > 0,
             "top-p and top-k do nothing with num-beams above 1: leave them out":
                 num_beams > 1 and unused,
             "top-p and top-k do nothing at temperature 0: give --temperature above 0 as well, or "
             "leave them out": unused}
    return next((line for line, true in wrong.items() if true), None)


def named_picture(text):
    """Is the last argument a picture, and not the question? A file that exists is one, and so is a
    word that ends as pictures do: a missing picture is an error, not a question."""
    folder = os.path.dirname(text)
    suffix = re.search(r"\.(png|jpe?g|webp|gif|bmp|tiff?|heic|avif)$", text.strip(), re.I)
    one_path = not re.search(r"\s", text.strip()) or bool(folder) and os.path.isdir(folder)
    return os.path.exists(text) or bool(suffix) and one_path


def parse(argv=None):
    p = argparse.ArgumentParser(description="Talk to a model about an image.", allow_abbrev=False)
    p.add_argument("images", nargs="+", metavar="image", help="pictures that are asked about "
                   "together, or a folder of pictures (then with --out)")
    p.add_argument("prompt", nargs="?", help="the question; without it, a chat in the terminal")
    p.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id (default: %(default)s)")
    p.add_argument("--model-base", metavar="MODEL", help="what --model, a LoRA adapter, is added "
                   "to (default: the one it names)")
    p.add_argument("--template", help="how the model is asked, instead of what its config says")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the weights in memory; auto: as they are in the file, but fp16 becomes "
                   "bf16 where the GPU has it, and on a CPU 16 bits become bf16 if it is quick at "
                   "it, else fp32")
    p.add_argument("--quantize", choices=("int8", "int4"), help="of the language model's weights")
    p.add_argument("--out", help="LLaVA JSON to write the answers about a folder to")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    p.add_argument("--top-p", type=float, default=1.0, help="of the likeliest that sum to p")
    p.add_argument("--top-k", type=int, default=0, help="of the k likeliest; 0: of all")
    p.add_argument("--num-beams", type=int, default=1, help="beam search")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="1: none")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT",
                   help="end before this text; may be given more than once")
    p.add_argument("--attention", metavar="PNG", help="draw where each word of the answer looked")
    p.add_argument("--layer", type=int, help="whose attention (default: the one that looks most)")
    p.add_argument("--verbose", action="store_true", help="tokens a second")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch-size", type=int, help="pictures of a folder at a time (default: 8)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--debug", action="store_true", help="tracebacks")
    a = p.parse_args(argv)
    a.settings = {name: getattr(a, name) for name in
                  ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams",
                   "repetition_penalty", "stop")}
    # argparse gives `images` all it gets: the last one is the question if it is no picture
    if len(a.images) > 1 and not named_picture(a.images[-1]):
        a.prompt = a.images.pop()
    a.image = a.images[0]
    folder, wrong = os.path.isdir(a.image), check_settings(**a.settings)
    if a.prompt is not None:
        a.prompt, wrong = a.prompt.strip(), wrong or check_prompt(a.prompt)
    if not folder and a.batch_size is not None:
        wrong = "--batch-size is for a folder of pictures: leave it out"
    a.batch_size = 8 if a.batch_size is None else a.batch_size
    if a.batch_size < 1 or not 0 <= a.seed < 2 ** 62:
        wrong = "batch-size must be at least 1, seed 0 or more (below 2^62)"
    if len(a.images) > 1 and any(map(os.path.isdir, a.images)):
        wrong = "a folder of pictures is asked about alone: give one folder, or pictures"
    elif folder and not (a.prompt and a.out):
        wrong = wrong or f"{a.image} is a folder: give a question and --out FILE.json"
    if a.out and os.path.exists(a.image) and not folder:
        wrong = "--out is for a folder of pictures; the answer about one goes to stdout"
    if a.attention and (folder or a.prompt is None or len(a.images) > 1):
        wrong = "--attention is for one question about one picture"
    if a.layer is not None and not a.attention:
        wrong = "--layer says whose attention is drawn: give --attention FILE.png as well"
    if a.out and not os.path.isdir(os.path.dirname(a.out) or "."):
        wrong = f"--out {a.out}: no such folder: make it first"
    return p.error(wrong) if wrong else a
