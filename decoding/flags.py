"""decoding/flags.py: the command line of generate.py, and what is wrong with it.

This file imports no torch, so that `python generate.py --help` answers at once.
A check is a pair (is it wrong?, message). The message says what to do."""

import argparse
import math
import os
import re

from formats.errors import UsageError

DEFAULT_MODEL = "runs/toy/llava-1.5/stage2/model"
# of `generate`, in the order of settings_error; decoding/defaults.py knows others for BLIP-2
SETTINGS = {"max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "num_beams": 1,
            "repetition_penalty": 1.0, "stop": [], "length_penalty": 1.0}
DEFAULT_PORT = 7860
LAID_BYTES = 200e6      # of fp32 weights: so many are laid out for a CPU without being asked


def first_error(checks):
    """The message of the first check that is wrong, or None."""
    for wrong, message in checks:
        if wrong:
            return message
    return None


def prompt_error(text):
    """What is wrong with a question, or None."""
    # bytes that are not UTF-8 arrive as lone surrogates
    surrogates = [c for c in text if "\ud800" <= c < "\ue000"]
    return first_error([
        (not text.strip(), "the question is empty: write one"),
        ("\0" in text, "the question holds a NUL byte: remove it"),
        (surrogates, "the question is not valid UTF-8: type it again")])


def settings_error(max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0, num_beams=1,
                   repetition_penalty=1.0, stop=(), length_penalty=1.0):
    """What is wrong with these settings of `generate`, or None. The defaults are right."""
    stop = [stop] if type(stop) is str else stop
    texts = "".join(stop)
    greedy = temperature == 0
    unused = greedy and (top_p != 1 or top_k != 0)          # these two only change a random draw
    return first_error([
        (max_new_tokens < 1, "max-new-tokens must be at least 1"),
        (not 0 <= temperature < math.inf, "temperature must be 0 or more"),
        (not 0 < top_p <= 1, "top-p must be above 0 and at most 1"),
        (top_k < 0, "top-k must be 0 (all) or more"),
        (num_beams < 1, "num-beams must be at least 1"),
        (not 0 < repetition_penalty < math.inf, "repetition-penalty must be above 0"),
        (not all(stop), "stop must be a text to end at, not an empty one"),
        (texts != texts.encode(errors="replace").decode(),
         "stop is not valid UTF-8: type it again"),
        (not -math.inf < length_penalty < math.inf, "length-penalty must be a number"),
        (num_beams == 1 and length_penalty != 1,
         "length-penalty compares beams: give --num-beams above 1 as well, or leave it out"),
        (num_beams > 1 and not greedy, "num-beams above 1 needs temperature 0"),
        (num_beams > 1 and unused,
         "top-p and top-k do nothing with num-beams above 1: leave them out"),
        (unused, "top-p and top-k do nothing at temperature 0: give --temperature above 0 as "
         "well, or leave them out")])


def check_settings(*settings):
    """Raises UsageError for wrong settings of `generate`, in the order of SETTINGS."""
    if wrong := settings_error(*settings):
        raise UsageError(wrong)


def is_picture_name(text):
    """Is the last argument a picture, and not the question?

    A file that exists is a picture. So is one word, or a path in an existing folder, that ends as
    pictures do: a picture that is missing is an error, not a question."""
    if os.path.exists(text):
        return True
    folder, text = os.path.dirname(text), text.strip()
    if not re.search(r"\.(png|jpe?g|webp|gif|bmp|tiff?|heic|avif)$", text, re.I):
        return False
    return not re.search(r"\s", text) or bool(folder) and os.path.isdir(folder)


def build_parser():
    """The flags, in the groups that --help shows."""
    p = argparse.ArgumentParser(description="Talk to a model about an image.", allow_abbrev=False)
    p.add_argument("images", nargs="*", metavar="image", help="pictures that are asked about "
                   "together (each at its <image>, if the question has as many, else in front), or "
                   "a folder of pictures (then with --out)")
    p.add_argument("prompt", nargs="?", help="the question; without it, a chat in the terminal")
    p.add_argument("--caption", action="store_true", help="no question: a caption (BLIP-2)")
    p.add_argument("--text", action="store_true", help="no picture: a question or a chat about "
                   "text alone; --model may be a LLaMA's folder")

    add = p.add_argument_group("the model").add_argument
    add("--model", default=DEFAULT_MODEL, help="folder or hub id (default: %(default)s)")
    add("--model-base", metavar="MODEL", help="what --model, a LoRA adapter, is added to "
        "(default: the one it names)")
    add("--template", help="how the model is asked, instead of what its config says")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of the weights in memory; auto: as they are in the file, but fp16 becomes bf16 "
        "where the GPU has it, and on a CPU 16 bits become bf16 if it is quick at it, else fp32")
    add("--quantize", choices=("int8", "int4"), help="of the language model's weights")
    add("--lay-out", action="store_true", help="on a CPU: fp32 weights in its fastest layout, over "
        f"{LAID_BYTES / 1e6:.0f} MB of them too: a little faster for twice the memory")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")

    add = p.add_argument_group("how the next token is chosen").add_argument
    add("--temperature", type=float, help="0 (default): always the likeliest token")
    add("--top-p", type=float, help="of the likeliest that sum to p")
    add("--top-k", type=int, help="of the k likeliest; 0: of all")
    add("--num-beams", type=int, help="beam search (default: 1; 5 for BLIP-2 as published)")
    add("--length-penalty", type=float, help="beams are compared by the sum of their logarithms, "
        "divided by length to this power (default: 1)")
    add("--repetition-penalty", type=float, help="1 (default): none")
    add("--seed", type=int, default=0)

    add = p.add_argument_group("where the answer ends").add_argument
    add("--max-new-tokens", type=int, help="default: 256; 30 for BLIP-2 as published")
    add("--stop", action="append", metavar="TEXT",
        help="end before this text; may be given more than once")

    add = p.add_argument_group("a folder of pictures").add_argument
    add("--out", help="LLaVA JSON to write the answers about a folder to")
    add("--batch-size", type=int, help="pictures of a folder at a time (default: 8)")

    add = p.add_argument_group("a page in the browser").add_argument
    add("--page", action="store_true", help="pictures, questions and answers on a web page that "
        "only this machine can open, instead of here")
    add("--port", type=int, help=f"of the page (default: {DEFAULT_PORT}; 0: one that is free)")

    add = p.add_argument_group("a look inside").add_argument
    add("--attention", metavar="PNG", help="draw where each word of the answer looked")
    add("--layer", type=int, help="whose attention (default: the one that looks most)")
    add("--verbose", action="store_true", help="tokens a second")
    add("--debug", action="store_true", help="tracebacks")
    return p


def page_error(a):
    """What is wrong with --page and the other arguments, or None."""
    port = DEFAULT_PORT if a.port is None else a.port
    return first_error([
        (a.text and (a.page or a.out or a.attention or a.caption or a.batch_size is not None),
         "--text is one question, or a chat in the terminal, about no picture: leave out --page, "
         "--out, --attention, --caption and --batch-size"),
        (a.text and a.images,
         "--text takes no pictures, and one question in quotes at most"),
        (not a.images and not a.page and not a.text,
         "give a picture (generate.py img.jpg \"What is it?\"), or --page for a web page"),
        (a.port is not None and not a.page, "--port is the page's: give --page as well"),
        (a.page and a.images, "--page takes pictures and questions in the browser: leave them out"),
        (a.page and (a.out or a.attention or a.batch_size is not None or a.verbose or a.caption),
         "--out, --batch-size, --attention, --verbose and --caption are not for --page: it shows "
         "the speed and where each word looked, and saves a talk"),
        (a.page and a.num_beams > 1, "--page writes word by word, which beams do not: leave out "
         "--num-beams"),
        (not 0 <= port < 2 ** 16, "port must be 0 to 65535")])


def arguments_error(a):
    """What is wrong with the arguments together, or None."""
    is_folder = os.path.isdir(a.image or "")
    several = len(a.images) > 1
    a_folder_among_several = several and any(map(os.path.isdir, a.images))
    batch_size = 8 if a.batch_size is None else a.batch_size
    no_prompt = a.prompt is None
    is_chat = no_prompt and not a.caption
    settings = dict(a.settings)
    if "num_beams" not in a.given and math.isfinite(a.length_penalty):
        settings["length_penalty"] = 1.0        # judged later: a BLIP-2 has beams without a flag
    return page_error(a) or first_error([
        (a.out and not os.path.isdir(os.path.dirname(a.out) or "."),
         f"--out {a.out}: no such folder: make it first"),
        (a.layer is not None and not a.attention and not a.page,
         "--layer says whose attention is drawn: give --attention FILE.png as well"),
        (a.attention and (is_folder or is_chat or several),
         "--attention is for one question about one picture"),
        (a.out and os.path.exists(a.image or "") and not is_folder,
         "--out is for a folder of pictures; the answer about one goes to stdout"),
        (a_folder_among_several,
         "a folder of pictures is asked about alone: give one folder, or pictures"),
        (batch_size < 1 or not 0 <= a.seed < 2 ** 62,
         "batch-size must be at least 1, seed 0 or more (below 2^62)"),
        (not is_folder and a.batch_size is not None,
         "--batch-size is for a folder of pictures: leave it out"),
        (settings_error(**settings), settings_error(**settings)),
        (a.caption and not no_prompt, "--caption asks no question: leave the question out"),
        (not no_prompt and prompt_error(a.prompt or ""), prompt_error(a.prompt or "")),
        (is_folder and not ((a.prompt or a.caption) and a.out),
         f"{a.image} is a folder: give a question and --out FILE.json")])


def parse(argv=None):
    """The arguments; `settings` are those of `generate`, `given` the names of those that the
    command line gives, `image` is the first of `images`. The prompt of --caption is "".

    Ends the program with status 2 where something is wrong."""
    p = build_parser()
    a = p.parse_args(argv)
    a.given = {name for name in SETTINGS if getattr(a, name) is not None}
    for name in SETTINGS.keys() - a.given:
        setattr(a, name, SETTINGS[name])
    a.settings = {name: getattr(a, name) for name in SETTINGS}
    # argparse puts all it gets into `images`: the last is the question if it is no picture
    if a.text and len(a.images) == 1 or len(a.images) > 1 and not is_picture_name(a.images[-1]):
        a.prompt = a.images.pop()
    if a.prompt is not None:
        a.prompt = a.prompt.strip()
    a.image = a.images[0] if a.images else ""       # none for a page, and with --text
    if wrong := arguments_error(a):
        p.error(wrong)
    if a.caption:
        a.prompt = ""
    if a.batch_size is None:
        a.batch_size = 8
    if a.port is None:
        a.port = DEFAULT_PORT
    return a
