"""decoding/page.py: talk to the model on a web page of this machine: generate.py --page.

    GET  /          page.html, the page itself: all its script and style
    GET  /about     the model, its template, the settings of the command line
    POST /picture   a file -> the id of its pixels, and what the model sees of it
    POST /scene     for the toy: the same of a new scene, and what is true of it
    POST /ask       a talk -> lines of JSON: its prompt, pieces of the answer, its speed
    POST /look      a talk, an answer's tokens -> where each of its words looked
    POST /talk      a talk -> LLaVA JSON
    POST /stop      (decoding/server.py)

The browser holds the talk and sends all of it with each question. Kept here are only the pixels of
the newest pictures; a browser whose picture is gone sends the file again. So nothing grows with the
number of talks. No request names a file of this machine, and none is written."""

import base64
import io
import json
import random
import secrets
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path

import data
from decoding.attention_map import as_seen, attention_to_pictures, check_model
from decoding.attention_map import words_as_written
from decoding.chat import trim_history
from decoding.loading import load_model, speed_numbers
from decoding.pictures import check_context, image_turns, join_pictures, png_address
from decoding.prompt import build_prompt, prompt_length, prompt_pieces
from decoding.server import Call, FILE, html_page, JSON, listen, Server
from decoding.streaming import stream_text
from decoding.talk import NUMBERS, Talk
from formats.errors import note, UsageError
from formats.llava_rows import llava_row
from toy.texts import description, KINDS, question
from toy.world import COLOURS, CORNERS, draw, make_scene, middle_colour, SHAPES, SIDE

MOST_PICTURES = 32      # whose pixels are kept
CUT = {"length": "cut at the length of the settings: give more tokens", None: "stopped",
       "context": "cut where the context is full: start a new talk, or ask with fewer pictures"}


class Page:
    """What the browser can ask for, without HTTP. generate: generate.py's, handed in."""

    def __init__(self, model, args, generate):
        self.model, self.args, self.generate = model, args, generate
        self.pixels = OrderedDict()                 # id: (pixels, sizes), the newest last
        self.has_map, self.notes = True, []         # of the attention; what the person must know
        if data.template_of(model.template).style == "plain":
            self.notes.append("This model knows no questions: it writes a caption.")
        try:
            check_model(model, args.layer)
        except UsageError as error:
            if args.layer is not None:
                raise
            self.has_map = False
            self.notes.append(f"Where it looked is not shown: {error}.")

    def about(self):
        """What the page shows before anything is asked."""
        model, args = self.model, self.args
        about = {"model": args.model, "template": str(model.template), "has_map": self.has_map,
                 "notes": [*self.notes, f"Context: {model.llm.config.context} tokens."],
                 "settings": {name: getattr(args, name) for name in NUMBERS}}
        if model.image_size == SIDE:                # drawn scenes are of this size: the toy
            colours = {name: middle_colour(name) for name in COLOURS}
            about["toy"] = {"shapes": SHAPES, "corners": CORNERS, "colours": colours}
        return about

    def add(self, image):
        """Keep a picture's pixels. -> its id, tokens, size, and a PNG of what the model sees."""
        sizes = [image.size] if self.model.aspect == "anyres" else None
        pixels = self.model.pixels(image)
        check_context(self.model, (pixels, sizes, ["the picture"]))
        name = secrets.token_urlsafe(16)            # nobody else can guess it
        self.pixels[name] = pixels, sizes
        while len(self.pixels) > MOST_PICTURES:
            self.pixels.popitem(last=False)
        return {"id": name, "tokens": self.model.num_image_tokens(image.size), "size": image.size,
                "seen": png_address(as_seen(pixels[0]))}

    def picture(self, body):
        """A file's bytes: as `add`. Raises BadImage."""
        return self.add(data.load_image(io.BytesIO(body)))

    def scene(self, _):
        """A scene that training never draws: as `add`, and what is true of it."""
        seed = secrets.randbelow(10 ** 6)
        scene, rng = make_scene(seed, "test"), random.Random(seed)
        asked = [question(scene, kind, rng) for kind in rng.sample(KINDS, 5)]
        image = draw(scene, 256)
        return {**self.add(image), "name": f"scene-{seed}.png", "file": png_address(image),
                "truth": description(scene), "asked": [pair[:2] for pair in asked if pair]}

    def talk(self, request):
        """The `Talk` of a request. Raises UsageError and Refused."""
        return Talk(request, self.model, self.pixels,
                    {"seed": self.args.seed, **self.args.settings})

    def prompt(self, talk):
        """(ids, pixels, sizes, how many of the oldest turns are left out) of a question."""
        model = self.model
        if len(talk.turns) % 2 == 0:
            raise UsageError("the last turn must be a question")
        turns, groups = trim_history(model, talk.turns, talk.groups,
                                     talk.settings["max_new_tokens"])
        ids = build_prompt(turns, model.template, model.tokenizer, image_turns(groups))
        return ids, *join_pictures(groups), len(talk.turns) - len(turns)

    def ask(self, talk, job):
        """Yield what the browser is told about an answer while it is written."""
        model = self.model
        ids, pixels, sizes, left_out = self.prompt(talk)
        yield {"prompt": prompt_pieces(model, ids, sizes), "left_out": left_out}
        start, text = time.perf_counter(), ""
        answer = self.generate(model, ids, pixels, sizes=sizes, **talk.settings)
        for piece in stream_text(answer, model.tokenizer):
            text += piece
            if piece:
                yield {"text": piece}
            if job.stopped:
                break
        words = [word for word, _ in words_as_written(answer.tokens, model.tokenizer)]
        yield {"answer": text.strip(), "tokens": answer.tokens, "words": words,
               "rest": answer.rest, "why": CUT.get(answer.finish_reason),
               "speed": speed_numbers(model, ids, sizes, start, answer.times)}

    def look(self, talk, job):
        """Yield the attention of each word of an answer to the patches of the pictures."""
        ids, pixels, sizes, _ = self.prompt(talk)
        taken = prompt_length(self.model, ids, sizes) + len(talk.tokens)
        if pixels is None or not talk.tokens or taken > self.model.llm.config.context:
            raise UsageError("a look needs a picture and the tokens of an answer about it")
        found = attention_to_pictures(self.model, ids, talk.tokens, pixels, self.args.layer)
        words = []
        for _, numbers in words_as_written(talk.tokens, self.model.tokenizer):
            grid = found[numbers].mean(0)           # (n, P), the mean over the word's tokens
            light = (grid / grid.max().clamp(min=1e-12) * 255).byte()
            words.append([base64.b64encode(light.numpy().tobytes()).decode(), float(grid.sum())])
        yield {"look": words, "pictures": found.shape[1]}

    def row(self, request):
        """The talk as a row of LLaVA JSON; `names` are the file names of its pictures."""
        talk = self.talk(request)
        shown = image_turns(talk.groups)
        if len(talk.names) != len(shown):
            raise UsageError("each picture of the talk must have a name")
        names = talk.names[0] if len(talk.names) == 1 else talk.names
        row = llava_row(names or "talk", talk.turns, shown)
        if not names:
            del row["image"]
        return [row]


def page_server(page, listening):
    """A `Server` of this `Page`. listening: of `listen`."""
    def job(function):                              # what is wrong with a talk is said at once
        return Call(lambda request: partial(function, page.talk(request)), job=True)
    gets = {"/": html_page(Path(__file__).with_name("page.html").read_text("utf-8")),
            "/about": (JSON, json.dumps(page.about()).encode())}
    calls = {"/picture": Call(page.picture, FILE, thread=True), "/ask": job(page.ask),
             "/scene": Call(page.scene, thread=True), "/look": job(page.look),
             "/talk": Call(page.row)}
    return Server(listening, gets, calls)


def serve(args, generate):
    """Serve the page until Ctrl-C. generate: generate.py's. Raises as `listen`, `load_model` do."""
    with listen(args.port) as listening:            # first of all: a model takes a while to load
        server = page_server(Page(load_model(args, args.quantize), args, generate), listening)
        print(f"http://{server.hosts[0]}", flush=True)
        note("open this address in a browser of this machine; Ctrl-C ends the page")
        server.run()
