"""instruct.py: make and curate the text that models like these are trained on.

    captions_*.json --+                                       +-- an endpoint's model
    instances_*.json -+- what is known of a picture, as text -+-- the local LLaMA        nobody
    --toy N (world) --+                                       +-- the toy world itself   looks
                                                              |
    photos/ --- a model that sees --- says                 answers --- OUT.answers.jsonl
                                       |                      |        a line each, fsynced
             curate: go on, repair, keep or drop       parse or reject
                                       |                      |
                                       +--- LLaVA JSON: OUT --+        whole or not at all

Three ideas. LLaVA: a model that never saw the picture can write a talk about it from five captions
and the boxes of its objects.  MiniGPT-4: a few thousand clean descriptions mend a model that
rambles: describe, ask for more where it was short, repair, drop.  ShareGPT4V: a captioner trained
on a few good descriptions writes the rest.

    python instruct.py conversation --captions C.json --images DIR --endpoint URL ... --out OUT
    python instruct.py detail --toy 1000 --images DIR --out OUT         the world is the oracle
    python instruct.py caption PHOTOS --model FOLDER --out OUT
    python instruct.py curate PHOTOS --model FOLDER --out OUT           or a LLaVA JSON, no --model

Every answer is kept under a hash of all that it depends on. A run that was killed goes on from
there, --limit 1000 after --limit 10 asks 990 more, and another seed asks anew.
What is sent in the papers' place is in our own words: the papers' sentences are not ours to copy.
Left out: pictures sent to an endpoint (ShareGPT4V's first 100,000 came from GPT4-V that way).
[LLaVA] 2304.08485 section 3.  [MiniGPT-4] 2304.10592 section 3.2.  [ShareGPT4V] 2311.12793.
Next: train.py --data OUT --images DIR, which learns from it.
"""

import argparse
import os
import re

KINDS = ("conversation", "detail", "reasoning")


def number(kind, low, high):
    """A type for argparse: an int or float between two bounds."""
    def value(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    value.__name__ = f"{kind.__name__} ({low} to {high})"
    return value


COUNT, TIME, PRICE = number(int, 1, 10 ** 9), number(float, 0, 86400), number(float, 0, 1e9)
SHARED = {              # of all five; then of those that may ask an endpoint
    "--out": dict(required=True, help="LLaVA JSON; the answers stay in OUT.answers.jsonl"),
    "--seed": dict(type=number(int, 0, 2 ** 62), default=0),
    "--temperature": dict(type=number(float, 0, 100), help="default: the endpoint's; here 0"),
    "--max-tokens": dict(type=COUNT, default=512, help="of one answer"),
    "--batch-size": dict(type=COUNT, default=8, help="of a local model"),
    "--device": dict(default="auto", help="of a local model: auto, cpu, cuda, cuda:1 ..."),
    "--dtype": dict(choices=("auto", "fp32", "bf16", "fp16"), default="auto"),
    "--template": dict(help="how a local model is asked (default: as its files say; a LLaMA: v1)"),
    "--follow-links": dict(action="store_true", help="links in the folder of pictures may lead out "
                           "of it"),
    "--debug": dict(action="store_true", help="tracebacks")}
ASKING = {
    "--endpoint": dict(help="URL before /chat/completions, such as https://host/v1"),
    "--endpoint-model": dict(help="name of the model to ask there"),
    "--key-env": dict(default="OPENAI_API_KEY", help="variable that holds the key"),
    "--token-field": dict(default="max_tokens", help="newer models: max_completion_tokens"),
    "--workers": dict(type=number(int, 1, 256), default=4, help="requests under way at once"),
    "--per-minute": dict(type=number(float, 0, 1e6), default=0, help="requests; 0: no limit"),
    "--retries": dict(type=number(int, 0, 100), default=6, help="of one request"),
    "--backoff": dict(type=TIME, default=1, help="seconds before the first retry; doubles"),
    "--longest-wait": dict(type=TIME, default=300, help="seconds between two attempts"),
    "--timeout": dict(type=number(float, .001, 86400), default=120, help="seconds of a reply"),
    "--price-in": dict(type=PRICE, help="of a million tokens read"),
    "--price-out": dict(type=PRICE, help="of a million tokens written"),
    "--estimate": dict(action="store_true", help="print what it costs, ask nothing")}


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Make and curate training text.", allow_abbrev=False)
    sub = p.add_subparsers(dest="what", required=True)
    made = {kind: sub.add_parser(kind, help=f"LLaVA's {kind} text from captions and boxes",
                                 allow_abbrev=False) for kind in KINDS}
    for q in made.values():
        q.add_argument("--captions", help="COCO's captions_*.json")
        q.add_argument("--instances", help="COCO's instances_*.json: the boxes, which "
                       "conversation does not show")
        q.add_argument("--toy", type=COUNT, help="instead: so many toy scenes, drawn to --images")
        q.add_argument("--split", choices=("train", "test", "novel"), default="train")
        q.add_argument("--images", required=True, help="folder of the pictures; none is opened "
                       "(--toy draws them there)")
        q.add_argument("--limit", type=COUNT, help="the first pictures only")
        q.add_argument("--llm", help="folder of a LLaMA that answers instead of an endpoint")
        q.add_argument("--shots", type=number(int, 0, 3), default=3, help="examples shown, at "
                       "most; conversation has 2")
    for name, told in (("caption", "describe a folder of pictures"),
                       ("curate", "MiniGPT-4's curation: of a folder, or of a LLaVA JSON")):
        q = made[name] = sub.add_parser(name, help=told, allow_abbrev=False)
        q.add_argument("source", help="folder of pictures; for curate a LLaVA JSON will do")
        q.add_argument("--model", help="folder or hub id of the model that describes pictures")
        q.add_argument("--prompt", default="Describe the image in detail.")
    q.add_argument("--short", type=number(int, 0, 10 ** 9), default=80, metavar="TOKENS",
                   help="a description of at most this many is asked to go on")
    q.add_argument("--min-words", type=COUNT, default=5, help="fewer are dropped")
    for name, q in made.items():
        for flag, how in (SHARED | (ASKING if name != "caption" else {})).items():
            q.add_argument(flag, **how)
    a = p.parse_args(argv)
    return made[a.what].error(wrong) if (wrong := fault(a)) else a


def fault(a):
    """What is wrong with a command line, or None."""
    url, key = getattr(a, "endpoint", None), os.environ.get(getattr(a, "key_env", ""), "")
    at = re.fullmatch(r"(https?)://([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?(/[\w./~-]*)?", url or "",
                      re.A)
    folder, new = os.path.isdir(getattr(a, "source", "")), a.what in KINDS
    wrong = {
        f"--out {a.out}: not a file in a folder that exists":
            not os.path.isdir(os.path.dirname(a.out) or ".") or os.path.isdir(a.out),
        "--endpoint: give a URL such as https://host/v1": url and not at,
        "--endpoint needs --endpoint-model: which of its models to ask":
            url and not a.endpoint_model,
        "--estimate is of what an endpoint costs: give --endpoint":
            not url and getattr(a, "estimate", False),
        "the key holds what no header may: set its variable again":
            url and not re.fullmatch(r"[!-~]*", key),
        "--endpoint: http shows the key to all on the way: use https, or unset its variable":
            key and at and at[1] == "http" and at[2] not in ("localhost", "127.0.0.1", "[::1]")}
    if new:
        wrong |= {
            "give --captions FILE or --toy N": bool(a.captions) == bool(a.toy),
            "who answers? --endpoint URL or --llm FOLDER (only --toy has its own oracle)":
                url and a.llm or a.captions and not (url or a.llm),
            f"{a.what} needs the boxes too: --instances FILE":
                a.captions and a.what != "conversation" and not a.instances}
    else:
        wrong |= {
            f"{a.source}: no such file or folder": a.model and not os.path.exists(a.source),
            f"{a.source}: a folder of pictures needs --model, and --model a folder":
                folder != bool(a.model) or a.what == "caption" and not folder,
            "--prompt: give it some printable words": not a.prompt.strip()
            or not a.prompt.isprintable(),
            "--out would replace its own input":
                os.path.realpath(a.source) == os.path.realpath(a.out)}
    return next((line for line, true in wrong.items() if true), None)


if __name__ == "__main__":
    ARGS = arguments()              # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import fcntl
import functools
import hashlib
import http.client
import json
import math
import queue
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import torch
from tqdm import tqdm

import data
import world
from formats import replies
from formats.templates import end_ids
from generate import ask, generate_batch, load, note, sample_of, see, spell, write
from llama import Llama

# ------------------------------------------------------------------------- what is sent, our words

TOLD = "Some people looked at a picture, and each wrote a sentence about it. "
BOXES = ("Below them stands where its objects are, as name: [left, top, right, bottom] in parts of "
         "width and height. ")
SYSTEM = {
    "conversation": TOLD +
        "Answer as somebody who has that picture before their eyes. Write down a talk in which a "
        "person asks and you reply: what things there are, how many, of what colour, what they do, "
        "where they are and how they lie to each other. Each question must have a sure answer: the "
        "thing can be seen, or surely is not there. Then come one or two questions for which one "
        "has to know more than the picture shows; reply to those at length. Do not mention the "
        "sentences that you were given.",
    "detail": TOLD + BOXES +
        "Write one paragraph that tells all there is to see, as if the picture lay before you. "
        "Turn the numbers into words such as 'on the left' or 'behind', say how many there are of "
        "a thing, and repeat neither the numbers nor the fact that you were given any.",
    "reasoning": TOLD + BOXES +
        "Make up one hard question about what the picture means: why something is done, what may "
        "happen next, what is risky or useful. It needs both the picture and knowledge of the "
        "world, and must not give away what can be seen. Then reply step by step as somebody who "
        "sees the picture. Mention neither sentences nor numbers."}
FORM = "\n\nUse this form and write nothing around it:\n"
MEND = ("You get a text that should describe a picture. Leave out what is said a second time, "
        "stray signs and anything that is not English. Finish or leave out sentences that break "
        "off. Change nothing else. Reply with the text alone, even if nothing was wrong with it.")
MORE = "Continue"                   # [MiniGPT-4] section 3.2, as the facts are told there
# Three invented pictures: (captions, boxes, conversation, description, question and reply).
SHOWN = (
    (("A woman cuts bread on a wooden counter.", "Somebody makes breakfast in a bright kitchen.",
      "A cat watches a woman who slices a loaf.", "A grey cat sits beside a kitchen counter.",
      "A woman with a knife, a loaf and two bowls."),
     (("person", (.31, .08, .662, .97)), ("cat", (.702, .55, .88, .93)),
      ("knife", (.44, .51, .53, .575)), ("bowl", (.12, .522, .2, .59)),
      ("bowl", (.215, .53, .287, .594))),
     (("What is the woman doing?", "She is cutting a loaf of bread on the counter."),
      ("Which animal is in the kitchen?", "A grey cat is sitting beside the counter."),
      ("How many bowls are there?", "There are two bowls."),
      ("Is there a dog?", "No, the only animal is the cat."),
      ("Why might the cat be waiting there?", "Cats learn quickly that food falls where people cook"
       ". It may hope for a crumb, or simply keep company with somebody it knows.")),
     "A woman stands in the middle of a bright kitchen and cuts a loaf of bread on a wooden "
     "counter. To her left, close together, are two bowls. On the right a grey cat sits low beside "
     "the counter and looks up at her.",
     ("What should the woman be careful about?", "She is holding a sharp knife while an animal is "
      "within reach. Cats jump without warning, and one that lands on the counter could push her "
      "arm. She would do well to keep the cat away until the loaf is cut.")),
    (("People wait for a bus in the rain.", "Three umbrellas at a bus stop on a grey day.",
      "A red bus comes towards people with umbrellas.", "A wet street with a bus and a bicycle.",
      "A bicycle leans against the bus stop sign."),
     (("bus", (.52, .2, .985, .76)), ("person", (.1, .4, .19, .88)), ("person", (.2, .41, .29, .9)),
      ("person", (.33, .39, .41, .87)), ("bicycle", (.01, .58, .11, .9))),
     (("What is the weather like?", "It is raining, and the street is wet."),
      ("What colour is the bus?", "The bus is red."),
      ("How many people are waiting?", "Three people are waiting, each under an umbrella."),
      ("Where is the bicycle?", "It leans against the sign of the bus stop, on the far left."),
      ("Why may the cyclist have stopped?", "Riding in the rain is slippery and cold. The owner may"
       " have decided to leave the bicycle and go on by bus.")),
     "It is a rainy day. On the left three people stand in a row under umbrellas, and at the very "
     "edge a bicycle leans against the sign of the bus stop. From the right a large red bus comes "
     "along the wet street and fills almost half of the view.",
     ("What will these people probably do in a moment?", "They stand in a row at a stop while the "
      "vehicle they wait for is already close. As it halts they will close their umbrellas, let "
      "others get off and step in, glad to be out of the rain.")),
    (("A boy flies a kite on the beach.", "A dog runs after a child at the sea.",
      "A yellow kite high above the sand.", "A child and a dog play on an empty beach.",
      "A boy with a kite looks up to the sky."),
     (("person", (.42, .6, .5, .91)), ("dog", (.6, .75, .71, .9)), ("kite", (.2, .05, .31, .17))),
     (),
     "A boy stands near the middle of an empty beach and looks up at a yellow kite, which flies "
     "high on the left. A little to his right a dog runs towards him over the sand.",
     ("What does the scene tell about the wind?", "Such a toy stays up only if air moves past it "
      "steadily, and near the sea that is common. Since it flies far to one side of the boy, the "
      "wind blows towards that side, strongly enough to carry it and hold the line tight.")))


def laid_out(pairs):
    """[(question, answer)] in LLaVA's blocks."""
    return "\n===\n".join(f"Question:\n===\n{q}\n===\nAnswer:\n===\n{a}" for q, a in pairs)


def context(kind, captions, boxes):
    """What is known of a picture, as text: captions, an empty line, name: [x1, y1, x2, y2]."""
    if kind == "conversation":      # quirk: official ones show no boxes, and 2 examples, not 3
        boxes = ()
    rows = [f"{name}: [{', '.join(str(round(v, 3)) for v in box)}]" for name, box in boxes]
    return "\n".join([*captions, *([""] if rows else []), *rows])


@functools.cache
def opening(kind, shots):
    """[(role, text)]: what to do, and examples. One tuple, shared by all requests of a run."""
    form = {"conversation": FORM + laid_out([("...", "...")] * 2),
            "reasoning": FORM + laid_out([("...", "...")]), "detail": ""}[kind]
    rows = [("system", SYSTEM[kind] + form)]
    for lines, boxes, talk, told, hard in SHOWN[:min(shots, 2 + (kind != "conversation"))]:
        rows.append(("user", context(kind, lines, boxes)))
        rows.append(("assistant", {"conversation": laid_out(talk), "detail": told,
                                   "reasoning": laid_out([hard])}[kind]))
    return tuple(rows)


# ------------------------------------------------------------------------------ what comes back

CONTROL = re.compile(r"</?s>|###|<image>|<unk>|<\|\w+\|>|\[/?INST\]", re.I)
# Some of these are true answers, about the caption under a cartoon: better one too few.
SOURCE = re.compile(r"\b(captions?|bounding box(es)?|coordinates)\b|\[\s*[01]?\.\d+\s*,", re.I)


HALF = re.compile("[\0\ud800-\udfff]")


def broken(text):
    """Does it hold half a surrogate pair, or a NUL?"""
    return bool(HALF.search(text))


def parse(kind, reply):
    """The turns of an answer: [question, answer, ...]; for detail, [description].

    Raises data.BadData with the reason, one of a few, so that reasons can be counted."""
    reply = reply.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    reply = replies.without_thinking(reply)
    if reply is None:
        raise data.BadData("thinking that does not end")
    if not reply:
        raise data.BadData("empty")
    if broken(reply):
        raise data.BadData("not Unicode text")
    turns = parse_detail(reply) if kind == "detail" else parse_blocks(replies.unfenced(reply))
    if any(map(CONTROL.search, turns)):
        raise data.BadData("holds a control token")
    if any(map(SOURCE.search, turns)):
        raise data.BadData("speaks of captions or boxes")
    if kind == "reasoning" and len(turns) != 2:
        raise data.BadData("more than one question")
    return turns


def parse_detail(reply):
    """[description]."""
    if replies.SPLIT.search(reply):
        raise data.BadData("blocks in a description")
    text = replies.description(reply)
    if text is None:
        raise data.BadData("a code fence in a description")
    return [text]


def parse_blocks(reply):
    """[question, answer, ...]: in the form that was asked for, or in one that is as clear."""
    parts = [x.strip() for x in replies.SPLIT.split(reply)]
    ruled = len(parts) > 1
    parts = parts[not parts[0]:len(parts) - (not parts[-1])]    # a === may open and close the whole
    names = [replies.label(x) for x in parts[::2]]
    if ruled and not len(parts) % 4 and names == [("question", ""), ("answer", "")] * (
            len(parts) // 4):
        if not all(parts):
            raise data.BadData("an empty block")
        return parts[1::2]
    if turns := replies.questions_and_answers(reply):
        return turns
    raise data.BadData("blocks are not question and answer by turns" if ruled else "no === blocks")


# ------------------------------------------------------------------------------------ the input

@dataclass(frozen=True)
class Job:
    """One thing to be answered. `key`: hash of all that the answer depends on."""
    name: str                               # id of the sample
    image: str | None                       # its picture, relative to the folder
    key: str
    request: tuple = ()                     # (role, text) ...
    scene: object = None


def key_of(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def weights_of(model):
    """What tells a model from the one that is trained next into the same folder."""
    stats = [(p.name, p.stat()) for p in sorted(data.resolve(model).glob("*.safetensors"))]
    return str(model), [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def table(path, read, name):
    """[(where, row)] of one list of a COCO file."""
    rows = read.get(name) if isinstance(read, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise data.BadData(f"{path}: {name} must be a list of objects, as in COCO's files")
    return [(f"{path}: {name}[{i}]", row) for i, row in enumerate(rows)]


def field(where, row, name):
    """One value of a row, checked by its name; ids become text. Raises data.BadData."""
    value = row.get(name)
    if name in ("id", "image_id", "category_id"):
        fine, what = type(value) in (int, str) and 0 < len(str(value)) <= 200, "a number or a name"
        value = str(value)
    elif name in ("width", "height"):
        fine, what = type(value) is int and 0 < value <= 1_000_000, "a number of pixels"
    elif name == "bbox":                                # also refuses infinity, as 1e999 is read
        fine, what = isinstance(value, list) and len(value) == 4 and all(
            type(v) in (int, float) and abs(v) <= 1_000_000 for v in value) and min(
            value[2:]) >= 0, "[x, y, width, height] in pixels"
    else:
        fine, what = isinstance(value, str) and value.strip(), "some text"
    if not fine or isinstance(value, str) and broken(value):
        raise data.BadData(f"{where}.{name}: must be {what}, in valid UTF-8: correct the row")
    return value


def coco(args):
    """[(id, file name, captions, boxes)] of the pictures that have captions, in the file's order.

    Raises data.BadData naming file, row and field."""
    read, pictures = data.read_json(args.captions), {}
    for where, row in table(args.captions, read, "images"):
        if (name := field(where, row, "id")) in pictures:
            raise data.BadData(f"{where}.id: {name} is there twice: remove one")
        pictures[name] = (where, row, [], [])
    for where, row in table(args.captions, read, "annotations"):
        if (name := field(where, row, "image_id")) not in pictures:
            raise data.BadData(f"{where}.image_id: there is no image {name}: remove the row")
        pictures[name][2].append(" ".join(field(where, row, "caption").split()))
    told = {name: p for name, p in pictures.items() if p[2]}
    if not told:
        raise data.BadData(f"{args.captions}: holds no captions: give COCO's captions_*.json")
    told = dict(list(told.items())[:args.limit])
    note(f"{len(told):,} of {len(pictures):,} pictures: those with captions, up to --limit")
    for where, row, *_ in told.values():
        try:
            data.picture_path(args.images, field(where, row, "file_name"), args.follow_links)
        except data.BadData as error:
            raise data.BadData(f"{where}.file_name: {error}") from None
    if args.what != "conversation":
        read = data.read_json(args.instances)
        kinds = {field(where, row, "id"): field(where, row, "name")
                 for where, row in table(args.instances, read, "categories")}
        for where, row in table(args.instances, read, "annotations"):
            kind, (x, y, w, h) = field(where, row, "category_id"), field(where, row, "bbox")
            if kind not in kinds:
                raise data.BadData(f"{where}.category_id: there is no category {kind}: remove it")
            if (name := field(where, row, "image_id")) not in told:
                continue
            at, picture, _, boxes = told[name]
            W, H = field(at, picture, "width"), field(at, picture, "height")
            if x >= W or y >= H or x + w < 0 or y + h < 0:
                raise data.BadData(f"{where}.bbox: lies outside of its {W} × {H} picture: correct "
                                   "the row")
            box = x / W, y / H, (x + w) / W, (y + h) / H
            boxes.append((kinds[kind], tuple(min(max(v, 0), 1) for v in box)))
    # quirk: some pictures of COCO have six or seven captions; LLaVA shows five
    return [(name, row["file_name"], lines[:5], boxes)
            for name, (_, row, lines, boxes) in told.items()]


def toy(args):
    """[(id, file name, captions, boxes, scene)]; draws the pictures."""
    folder = Path(args.images)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(args.toy, args.limit or args.toy)):
        scene = world.scene(f"instruct:{args.seed}:{i}", args.split)
        name = f"{args.split}-{args.seed}-{i:06}"
        aside = folder / f".{name}.{os.getpid()}.tmp"
        world.draw(scene).save(aside, "PNG")
        os.replace(aside, folder / f"{name}.png")       # none is ever half there
        yield (name, f"{name}.png", world.captions(scene), [(t.name, t.box) for t in scene.things],
               scene)


def photos(args):
    """A job for every picture of a folder and of those below it, by name."""
    root = Path(args.source)
    files, others = data.list_pictures(root, below=True, follow_links=args.follow_links)
    for line in others:
        note(f"note: {line}")
    who = (args.what, weights_of(args.model), args.template, args.prompt, args.seed, args.dtype,
           args.temperature, args.max_tokens, getattr(args, "short", None))
    for path in files:
        name = path.relative_to(root).as_posix()
        # a picture is told by its name and size: times change when a folder is copied
        size = path.stat() if args.follow_links and path.exists() else path.lstat()
        yield Job(name, name, key_of(*who, name, size.st_size))


# ---------------------------------------------------------------------------- answers on the disk

class Journal:
    """Answers so far: OUT.answers.jsonl, one {"key", "id", "text" or "reject"} a line.

    A line counts once its newline is on the disk; the torn one of a killed run is cut off."""

    def __init__(self, out):
        self.path, self.rows, whole = f"{out}.answers.jsonl", {}, 0
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise data.Usage(f"{self.path}: not a file: choose another --out")
        self.file = open(self.path, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise data.Usage(f"{self.path}: another run is writing it: wait, or choose another "
                             "--out") from None
        self.file.seek(0)
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = data.parse_json(line.decode())
                self.rows[row["key"]] = row
                row["text"], row["reject"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise data.BadData(f"{self.path}: line {number} is damaged ({error!r}): remove "
                                   "that line, and it is asked again") from None
            whole += len(line)
        self.file.truncate(whole)

    def __contains__(self, job):
        return job.key in self.rows and "again" not in self.rows[job.key]

    def failed(self, job):
        """What an earlier run wrote about a request that nobody answered: "others were answered",
        "nobody was", or None. It is asked again."""
        return self.rows.get(job.key, {}).get("again")

    def put_off(self, failed, why):
        """[(job, reason)] that are dropped for now; `why`: see `failed`."""
        if failed:
            self._write({job.key: {"key": job.key, "id": job.name, "text": "", "reject": reason,
                                   "again": why} for job, reason in failed})

    def add(self, answers):
        """[(job, text, reason of a rejection or "")]; those that are there already are not new."""
        new = {job.key: {"key": job.key, "id": job.name, "text": text, "reject": reason}
               for job, text, reason in answers if job not in self}
        self._write(new)

    def _write(self, rows):
        # ASCII: half a surrogate pair in a bad answer must not stop the run
        self.file.write("".join(json.dumps(row) + "\n" for row in rows.values()).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.rows |= rows


def collect(jobs, answers, journal, what):
    """Write down the answers as they come."""
    left = sum(job not in journal for job in jobs)
    bar = tqdm(total=len(jobs), initial=len(jobs) - left, desc=what, disable=None, mininterval=.5)
    told = time.monotonic()
    for some in answers:
        new = sum(job not in journal for job, *_ in some)
        journal.add(some)
        bar.update(new)
        if bar.disable and time.monotonic() - told > 5:
            told = time.monotonic()
            note(f"{what}: {sum(job in journal for job in jobs)}/{len(jobs)}")
    bar.close()


def answered(jobs, journal):
    """[(job, text, reason of a rejection)] in the order of the jobs."""
    refused = {"text": "", "reject": "refused by the endpoint"}
    rows = [journal.rows.get(job.key, refused) for job in jobs]
    return [(job, row["text"], row["reject"]) for job, row in zip(jobs, rows)]


def chunks(jobs, journal, size):
    """Jobs by `size`, without the chunks that are answered.

    A chunk that a killed run left half done is done whole again: a row's dice are its place in the
    chunk, so it says the same; the journal drops what it has."""
    for start in range(0, len(jobs), size):
        if any(job not in journal for job in jobs[start:start + size]):
            yield start, jobs[start:start + size]


# ----------------------------------------------------------------------------------- who answers

def oracle(args, jobs, journal):
    """The world writes in the blocks that it asks of others; all of it is true."""
    for _, some in chunks(jobs, journal, 200):
        made = []
        for job in some:
            dice = random.Random(f"{args.what}:{args.seed}:{job.name}")
            if args.what == "detail":
                text = world.description(job.scene)
            elif args.what == "conversation":
                often = [n * (kind != "reasoning") for kind, n in zip(world.KINDS, world.OFTEN)]
                text = laid_out(world.dialogue(job.scene, dice, 4, often, described=0))
            else:
                asked = None
                while not asked:                    # some scenes have no two colours to compare
                    asked = world.question(job.scene, "reasoning", dice)
                text = laid_out([asked[:2]])
            made.append((job, text, ""))
        yield made


def local(args, jobs, journal):
    """A LLaMA on this machine; the request is its template's first turns."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    if args.template and args.template not in data.TEMPLATES:
        raise data.Usage(f"--template {args.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    folder = data.resolve(args.llm)
    llm, words = Llama.from_pretrained(folder, dtype), data.Tokenizer(folder)
    template = args.template or data.folder_template(folder, words) or "v1"
    try:
        device = auto if args.device == "auto" else args.device
        llm = llm.to(device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)               # kernels start on the current one
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().split("\n")[0]
        raise data.Usage(f"--device {args.device}: {why}: try --device cpu") from None
    eos = data.end_ids(template, words) | end_ids(folder, data.read_config(folder))
    for start, some in chunks(jobs, journal, args.batch_size):
        rows = []
        for job in some:
            (_, first), (_, second), *rest = job.request
            turns = [f"{first}\n\n{second}", *(text for _, text in rest)]
            rows.append(data.chat_ids([{"from": ("human", "gpt")[i % 2], "value": text}
                                       for i, text in enumerate(turns)], template, words, 0))
        said = generate_batch(llm, rows, max_new_tokens=args.max_tokens, eos=eos,
                              temperature=args.temperature or 0.0, seed=args.seed + start)
        yield [(job, words.decode(x), "" if x.finish_reason == "end" else "cut off")
               for job, x in zip(some, said)]


def eyes(args, jobs, journal):
    """A model that sees describes pictures; in curation, one that was brief is asked to go on."""
    model = load(args)
    # a captioner hears no question, an InstructBLIP only the last
    more = args.what == "curate" and data.template_of(model.template).style not in (
        "plain", "instruct")

    def say(turns, seen, seed):
        """[(tokens, is it whole?, text)]"""
        rows = [ask(t, model.template, model.words) for t in turns]
        said = generate_batch(model, rows, [x for x, _ in seen], sizes=[size for _, size in seen],
                              seed=seed, max_new_tokens=args.max_tokens,
                              temperature=args.temperature or 0.0)
        return [(len(x), x.finish_reason == "end", "".join(spell(x, model.words)).strip())
                for x in said]

    for start, some in chunks(jobs, journal, args.batch_size):
        good, bad = [], []
        for job in some:
            try:
                job.image.encode()                          # a name may be no text
                good.append((job, see(data.picture_path(
                    args.source, job.image, args.follow_links), model)))
            except (data.BadImage, data.BadData, UnicodeEncodeError) as error:
                note(f"skipped: {error}")
                bad.append((job, "", "not a usable picture"))
        said = say([[args.prompt]] * len(good), [x for _, x in good], args.seed + start)
        texts = [text for *_, text in said]
        if brief := [i for i, (n, *_) in enumerate(said) if more and n <= args.short]:
            added = say([[args.prompt, texts[i], MORE] for i in brief],
                        [good[i][1] for i in brief], args.seed + start)
            for i, (*_, text) in zip(brief, added):
                texts[i] = f"{texts[i]} {text}".strip()
        # a description that breaks off is repaired in curation, and else no caption
        ends = [whole or args.what == "curate" for _, whole, _ in said]
        yield [(job, text, "" if text and end else "cut off" if text else "empty")
               for (job, _), text, end in zip(good, texts, ends)] + bad


class Again(Exception):
    """A request that may succeed later: why it failed, seconds the server asked to wait."""


class Refused(Exception):
    """A request that the server will never take."""


class GaveUp(Exception):
    """A request that failed as often as it may: the failure that ends the run if it has to end, the
    reason to be counted if not, and whether others were answered while it was tried."""

    def __init__(self, failure, why, others):
        super().__init__(str(failure))
        self.failure, self.others, self.ends = failure, others, False
        status = re.match(r"HTTP \d+", why)
        self.why = f"no answer ({status[0] if status else why})"


class Stay(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn POST into GET."""

    def redirect_request(self, *_):
        return None


def seconds(header):
    """What Retry-After asks for, a number or a date, in seconds; 0 if it says nothing."""
    try:
        if re.fullmatch(r"\d{1,9}", header or ""):
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


class Endpoint:
    """/chat/completions of any OpenAI-compatible server, asked by several threads."""

    def __init__(self, args):
        self.args, self.key = args, os.environ.get(args.key_env, "")
        self.url = args.endpoint.rstrip("/") + "/chat/completions"
        self.http = urllib.request.build_opener(Stay)
        self.lock, self.over, self.used = threading.Lock(), threading.Event(), Counter()
        self.next = self.quiet = 0.0        # when the rate, and when the server, lets us ask again
        self.answered = self.in_a_row = self.doubtful = 0       # see `must_end`

    def turn(self):
        """Wait until this request may go out."""
        with self.lock:
            at = max(time.monotonic(), self.next)
            self.next = at + (60 / self.args.per_minute if self.args.per_minute else 0)
        while (left := max(at, self.quiet) - time.monotonic()) > 0:
            if self.over.wait(left):
                break

    def pause(self, key, attempt):
        """Seconds before another attempt: doubling, and a half of it drawn from (seed, key)."""
        dice = random.Random(f"{self.args.seed}:{key}:{attempt}").random()
        return min(self.args.longest_wait, self.args.backoff * 2 ** attempt) * (1 + dice) / 2

    def plain(self, text):
        """Words of the server on one line, without the key."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]

    def post(self, body):
        """The parsed reply. Raises Again, Refused, or data.Failure where a retry is useless."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        until, got = time.monotonic() + self.args.timeout, b""
        try:
            with self.http.open(urllib.request.Request(self.url, body, headers),
                                timeout=self.args.timeout) as reply:
                while piece := reply.read1(65536):      # a server may trickle for ever
                    got += piece
                    if len(got) > 16_000_000 or time.monotonic() > until:
                        raise ValueError("a reply too long or too slow")
            return data.parse_json(got.decode())
        except urllib.error.HTTPError as error:
            try:
                words = self.plain(error.read(2000).decode(errors="replace"))
            except (OSError, http.client.HTTPException):
                words = ""
            why = f"HTTP {error.code} {words}".strip()
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise Again(why, seconds(error.headers.get("Retry-After"))) from None
            if error.code in (400, 413, 422):
                raise Refused(why) from None
            raise data.Failure(why) from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise Again(self.plain(str(error)) or type(error).__name__, 0.0) from None

    def read(self, reply):
        """(text, reason of a rejection or "") of a parsed reply; its tokens are counted.

        A content may be a list of parts. Some servers put all that a model writes into its thinking
        if it forgets to end it: an answer in a form of its own can be found there, others not."""
        try:
            message, end = reply["choices"][0]["message"], reply["choices"][0].get("finish_reason")
            text, lost = message["content"] if "content" in message else None, ""
            if isinstance(text, list):
                text = "".join(part["text"] for part in text
                               if part.get("type") in ("text", "output_text"))
            thought = message.get("reasoning_content") or message.get("reasoning")
            if not text and thought:
                text = thought
                lost = "thinking without an answer" * (self.args.what in ("detail", "curate"))
            text = text or ""
            used = reply.get("usage") or {}
            counts = {name: used.get(name) for name in ("prompt_tokens", "completion_tokens")}
        except (AttributeError, LookupError, TypeError):
            raise Again("a reply that is no chat completion", 0.0) from None
        if not isinstance(text, str):
            raise Again("a reply whose content is no text", 0.0)
        with self.lock:
            self.used.update({name: n for name, n in counts.items() if type(n) is int})
            self.answered += 1
            self.in_a_row = self.doubtful = 0
        return text, {"length": "cut off", "content_filter": "filtered"}.get(end, lost)

    def ask(self, job):
        """(text, reason of a rejection or ""). Raises Refused or GaveUp."""
        a, before = self.args, self.answered
        body = {"model": a.endpoint_model, a.token_field: a.max_tokens,
                "messages": [{"role": role, "content": text} for role, text in job.request]}
        body |= {} if a.temperature is None else {"temperature": a.temperature}
        for attempt in range(a.retries + 1):
            self.turn()
            if self.over.is_set():
                raise Refused("the run is over")
            try:
                return self.read(self.post(json.dumps(body).encode()))
            except Again as again:
                why, after = again.args
            except data.Failure as error:
                raise GaveUp(data.Failure(
                    f"{self.url}: {error}: check --endpoint, --endpoint-model and the key in "
                    f"{a.key_env}"), str(error), self.answered > before) from None
            if after > a.longest_wait:
                break
            if attempt < a.retries:
                with self.lock:
                    self.quiet = max(self.quiet, time.monotonic() + after)  # for all threads
                self.over.wait(self.pause(job.key, attempt))
        raise GaveUp(data.Offline(
            f"{self.url}: no answer in {attempt + 1} attempts ({why}): run the same command later, "
            "it goes on where it stopped"), why, self.answered > before)

    def must_end(self, gave_up, failed, most, few):
        """Is it the server that fails, and not one request? `failed`: see Journal.

        It is the request if others were answered while it was tried, or in an earlier run, or if it
        failed in two runs and is one of a few that are left. If not, one cannot know; the run ends
        when the requests under way (`most`, or 5 and more once somebody was answered) have all
        failed with no answer in between."""
        with self.lock:
            self.in_a_row += 1
            if gave_up.others or failed == "others were answered" or failed and (
                    self.answered or few):
                return self.in_a_row >= 20 + self.args.workers
            self.doubtful += 1
            return self.doubtful >= (max(5, self.args.workers + 1) if self.answered else most)

    def answers(self, jobs, journal, known=False):
        """[(job, text, reason)], one by one as they come, of those the server takes; what gets no
        answer while others do is put off. known: has this server answered in an earlier run?"""
        todo, done, refused, unsure = queue.Queue(), queue.Queue(), 0, []
        for job in sorted(jobs, key=lambda job: bool(journal.failed(job))):
            todo.put(job)
        most = min(self.args.workers, sum(
            journal.failed(job) != "others were answered" for job in jobs))
        few = known and len(jobs) <= max(5, self.args.workers + 1)

        def work():
            while not self.over.is_set():
                job, result = todo.get(), None
                try:
                    result = self.ask(job)
                except Refused as error:
                    result = error
                except GaveUp as error:
                    result, error.ends = error, self.must_end(
                        error, journal.failed(job), most, few)
                finally:
                    if isinstance(result, GaveUp) and result.ends:
                        self.over.set()
                    done.put((job, result))     # None: a fault of ours, its traceback is printed

        for _ in range(min(self.args.workers, len(jobs))):
            threading.Thread(target=work, daemon=True).start()      # Ctrl-C does not wait for them
        try:
            for _ in jobs:
                job, result = done.get()
                if isinstance(result, GaveUp):
                    note(f"{job.name}: {result}")
                    unsure.append((job, result.why))
                    if result.ends:
                        journal.put_off(unsure, "nobody was")
                        raise result.failure
                    continue
                if not isinstance(result, Refused):
                    journal.put_off(unsure, "others were answered")
                    unsure.clear()
                refused = refused + 1 if isinstance(result, Refused) else 0
                if refused == 20 and not self.answered and not known:
                    raise data.Failure(f"{self.url}: took none of 20 requests in a row ({result}): "
                                       "check --endpoint-model and --token-field")
                if refused:
                    note(f"{job.name}: {result}")
                else:
                    yield [(job, *result)]
            journal.put_off(unsure, "others were answered")
        finally:
            self.over.set()                     # nobody asks, and pays, for what nobody will read

    def estimate(self, jobs, total):
        """Print what asking costs: a token is 4 characters, a message 4 more."""
        a = self.args
        read = sum(math.ceil(len(text) / 4) + 4 for job in jobs for _, text in job.request)
        print(f"{len(jobs):,} requests to {a.endpoint_model} ({total - len(jobs):,} answered "
              f"already): about {read:,} tokens to read (4 characters a token, 4 tokens a message),"
              f" at most {len(jobs) * a.max_tokens:,} to write")
        cost = "not known without --price-in and --price-out"
        if a.price_in is not None and a.price_out is not None:
            read, wrote = read * a.price_in / 1e6, len(jobs) * a.max_tokens * a.price_out / 1e6
            cost = f"at most about {read + wrote:,.2f} ({read:,.2f} of it to read)"
        print("cost:", cost, flush=True)


def over_http(args, jobs, journal):
    """Estimate, then ask. False if only the estimate was wanted."""
    todo, endpoint = [job for job in jobs if job not in journal], Endpoint(args)
    endpoint.estimate(todo, len(jobs))
    if not args.estimate:
        collect(jobs, endpoint.answers(todo, journal, known=len(todo) < len(jobs)), journal,
                args.what)
        if left := sum(job not in journal and bool(journal.failed(job)) for job in jobs):
            note(f"{left} request(s) got no answer while others did: dropped for now, and asked "
                 "again when the same command is run")
        print("used: {:,} tokens read, {:,} written, as the server counts them".format(
            endpoint.used["prompt_tokens"], endpoint.used["completion_tokens"]))
    return not args.estimate


# ------------------------------------------------------------------------------------- curation

SORRY = re.compile(r"\bi( a|')m (\w+ )?sorry\b|\bi apologi[sz]e|\bmy apologies\b|\bmade a mistake\b"
                   r"|\bas an ai\b", re.I)


def repair(text):
    """(text, Counter of what was taken out): MiniGPT-4's clean-up by rules instead of ChatGPT.

    Crude where English is: "Mr." at the head of a sentence is a fragment, and goes."""
    out, kept, seen = Counter(), [], set()
    clean = re.sub(r"[^\w\s]{4,}|##+|[\x00-\x08\x0b-\x1f\x7f\ufffd]+", " ", text)
    out["runs of signs"] = clean != text
    for piece in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')])\s+|\n+", clean):
        piece = " ".join(piece.split())
        letters = sum(c.isascii() and c.isalpha() for c in piece)
        bare = "".join(c for c in piece.lower() if c.isalnum())
        if not piece:
            continue
        if 2 * letters < len(piece.replace(" ", "")):
            out["not English letters"] += 1
        elif not piece.rstrip("\"')")[-1:] in (".", "!", "?") or len(piece.split()) < 2:
            out["fragments"] += 1
        elif bare in seen:
            out["repeated sentences"] += 1
        else:
            kept.append(piece)
            seen.add(bare)
    return " ".join(kept), +out


def mended(said, min_words):
    """`repair`, or data.BadData with why the text is dropped. An apology counts wherever it is."""
    text, out = repair(said)
    reason = ("not Unicode text" if broken(said) else
              "an apology" if SORRY.search(said.replace("’", "'")) else
              "nothing left" if not text else
              "holds a control token" if CONTROL.search(text) else
              f"fewer than {min_words} words" if len(text.split()) < min_words else "")
    if reason:
        raise data.BadData(reason)
    return text, out


def counted(reasons):
    """"3 empty, 1 cut off"."""
    return ", ".join(f"{n} {why}" for why, n in Counter(reasons).most_common())


def curate(args, journal):
    """[(job, text, reason of a rejection)] described or read, and mended if there is an endpoint;
    None if only the cost was asked for."""
    if os.path.isdir(args.source):
        said = described(args, journal)
    else:
        said, path = [], args.source
        for i, row in enumerate(data.read_conversations(path), 1):
            turns, where = row["conversations"], f"{path}: row {i}"
            if len(turns) != 2 or turns[1]["from"] not in ("gpt", "assistant"):
                raise data.BadData(f"{where}: conversations: must be a question and a description: "
                                   "remove the row")
            name, image = str(row["id"]), field(where, row, "image")
            said.append((Job(name, image, key_of(path, i)), turns[1]["value"], ""))
    if not args.endpoint:
        return said
    who = "mend", args.endpoint, args.endpoint_model, args.temperature, args.max_tokens, args.seed
    jobs = [Job(job.name, job.image, key_of(*who, job.key, text),
                [("system", MEND), ("user", text)]) for job, text, lost in said if not lost]
    if not over_http(args, jobs, journal):
        return None
    return [row for row in said if row[2]] + answered(jobs, journal)


# ----------------------------------------------------------------------------------------- main

def described(args, journal):
    jobs = list(photos(args))
    if not jobs:
        raise data.BadData(f"{args.source}: holds no picture: give another folder")
    collect(jobs, eyes(args, jobs, journal), journal, "describe")
    return answered(jobs, journal)


def written(args, journal):
    """LLaVA's three kinds: [(job, text, reason of a rejection)], or None."""
    known, jobs = list(toy(args) if args.toy else coco(args)), []
    who = args.endpoint_model or args.llm and weights_of(args.llm) or "the world"
    how = (args.what, args.endpoint, who, args.seed, args.temperature, args.max_tokens,
           args.template, args.dtype)
    for name, image, captions, boxes, *scene in known:
        sent = (*opening(args.what, args.shots), ("user", context(args.what, captions, boxes)))
        jobs.append(Job(name, image, key_of(*how, name, image, sent), sent, *scene))
    if args.endpoint:
        return answered(jobs, journal) if over_http(args, jobs, journal) else None
    collect(jobs, (local if args.llm else oracle)(args, jobs, journal), journal, args.what)
    return answered(jobs, journal)


def turns_of(args, name, text, taken):
    """What a sample says: question, answer, ... Raises data.BadData with why it is rejected."""
    if args.what == "caption":
        if CONTROL.search(text):
            raise data.BadData("holds a control token")
        return [args.prompt, text]
    if args.what in ("conversation", "reasoning"):
        return parse(args.what, text)
    dice = random.Random(f"{args.seed}:{name}")         # the question is drawn, as in the papers
    if args.what == "detail":
        return [dice.choice(world.DESCRIBE), *parse("detail", text)]
    if args.endpoint and (text := replies.without_thinking(text)) is None:
        raise data.BadData("thinking that does not end")
    text, out = mended(text, args.min_words)
    taken += out
    return [dice.choice(data.INSTRUCTIONS), text]


def main(args):
    """Answers, then the samples in the order of the pictures, then what became of the others."""
    journal = Journal(args.out)
    with journal.file:
        said = {"caption": described, "curate": curate}.get(args.what, written)(args, journal)
    if said is None:                                    # only the cost was asked for
        return
    samples, dropped, taken = [], [], Counter()
    for job, text, lost in said:
        try:
            if lost:
                raise data.BadData(lost)
            turns = turns_of(args, job.name, text, taken)
            samples.append({**sample_of(job.image, turns), "id": job.name})
        except data.BadData as error:
            dropped.append({key: value.encode(errors="replace").decode() for key, value in
                            (("id", job.name), ("reason", str(error)), ("text", text))})
    why = counted(row["reason"] for row in dropped)
    write(f"{args.out}.dropped.json", dropped)
    if not samples:
        raise data.BadData(f"{args.out}: not written: none of {len(said)} can be used ({why})")
    write(args.out, samples)
    print(f"{args.out}: {len(samples):,} of {len(said):,} kept, {len(samples) / len(said):.1%}"
          + f"; dropped: {why}" * bool(dropped))
    if args.what == "curate":
        print("taken out of those kept:", counted(taken.elements()) or "nothing")


if __name__ == "__main__":
    sys.exit(data.guarded(lambda: main(ARGS), ARGS.debug))
