"""world.py: the embedded toy world, where the truth about every picture is known exactly.

A scene is drawn from a seed: 1 to 4 objects in the cells of a 3 x 3 grid, on a background.

        +---------+---------+---------+      5 shapes  x  6 colours  x  2 sizes  x  9 places
        |    *    |         |         |      "This picture has a plain background.
        +---------+---------+---------+       At top left is a large red star.
        |         |   (o)   |         |       At middle centre is a small blue circle.
        +---------+---------+---------+       There are two objects in all."
        |         |         |         |
        +---------+---------+---------+

From the one truth come all the texts that the papers need:
  five short captions          as COCO has them, and as LLaVA's data engine reads them
  a noisy web-style caption    as CC3M and LAION have them (what ShareGPT4V improves on)
  a detailed description       LLaVA's "detail" kind
  questions with answers       LLaVA's "conversation" and "reasoning" kinds, in ten kinds of ours

Three splits, disjoint in seeds and in content:
  train   object sets (shape, colour, size, place of every object) whose hash is not 0 modulo 8
  test    object sets whose hash is 0 modulo 8: never seen in training, whatever the seed
  novel   at least one colour-shape pair of KEPT_OUT: words known, combination never seen or read

Answers restate what they are about, and say their reason before their conclusion ("..., so no."):
a small language model writes its intermediate steps into the text, where it can attend to them.

Alone: `python world.py` writes contact-sheet.png and prints one scene's texts.
`python world.py FOLDER --rows N` writes stand-in data: the layout, lengths and pictures' sizes of
LLaVA-1.5's data, without its content, so that a large model's step can be run and timed.
Next: clip.py, the eye that looks at these pictures.
"""

import argparse
import functools
import json
import math
import random
import zlib
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
# index = 3 * row + column; always a word for the row and another for the column
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom")
               for column in ("left", "centre", "right"))
# As the phrases say it that the eye learns from. With the names above it came to confuse places:
# .952 of them could be read off its patches after 2,000 steps, with these 1.000 after 2,400 (a
# small MLP, 500 held-out scenes).
SPOTS = ("top left", "top middle", "top right", "middle left", "centre", "middle right",
         "bottom left", "bottom middle", "bottom right")
BACKGROUNDS = ("plain", "striped", "dotted", "checked")
NUMBERS = ("zero", "one", "two", "three", "four")
# colour: hue in turns, half-width of the hue, range of the value; wide enough for pure RGB colours
COLOURS = {"red": (0.0, .02, .7, 1.0), "orange": (.092, .018, .9, 1.0),
           "yellow": (.16, .02, .85, 1.0), "green": (.34, .05, .45, 1.0),
           "blue": (.635, .04, .6, 1.0), "purple": (.80, .04, .5, .9)}
KEPT_OUT = (("purple", "triangle"), ("orange", "cross"), ("green", "star"))
SIDE = 64                                   # pixels of a picture's side
CANVAS = 3                                  # drawn at 3 x and averaged down: smooth edges
PAD = (122, 116, 104)                       # what LLaVA pads non-square pictures with, CLIP's mean
KINDS = ("colour", "shape", "size", "where", "count", "count of", "exist", "relation",
         "reasoning", "background")


@dataclass(frozen=True)
class Thing:
    """One object. `centre` and `radius` are fractions of the picture's side; `turn` in degrees."""
    shape: str
    colour: str
    size: str
    place: int                              # 0..8, see PLACES
    centre: tuple = (0.5, 0.5)
    radius: float = 0.15
    turn: float = 0.0
    rgb: tuple = (255, 0, 0)

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def full(self):
        return f"{self.size} {self.name}"

    @property
    def where(self):
        return PLACES[self.place]

    @property
    def row(self):
        return self.place // 3

    @property
    def column(self):
        return self.place % 3

    @property
    def outline(self):
        """Corner points in fractions of the side; empty for a circle."""
        ring = {"square": [(1.25, 45 + 90 * i) for i in range(4)],
                "triangle": [(1.15, -90 + 120 * i) for i in range(3)],
                "star": [((1.15, .48)[i % 2], -90 + 36 * i) for i in range(10)],
                "cross": [(r, a + 90 * i) for i in range(4)
                          for r, a in ((1.1, -18.0), (1.1, 18.0), (.481, 45.0))]}
        return [(self.centre[0] + self.radius * r * math.cos(math.radians(a + self.turn)),
                 self.centre[1] + self.radius * r * math.sin(math.radians(a + self.turn)))
                for r, a in ring.get(self.shape, ())]

    @property
    def box(self):
        """(x1, y1, x2, y2) in fractions of the side, as LLaVA's data engine writes boxes."""
        (x, y), r = self.centre, self.radius
        xs, ys = zip(*self.outline) if self.outline else ((x - r, x + r), (y - r, y + r))
        return tuple(round(min(max(v, 0), 1), 3) for v in (min(xs), min(ys), max(xs), max(ys)))


@dataclass(frozen=True)
class Scene:
    things: tuple                           # in reading order: row by row, left to right
    background: str
    paint: tuple                            # two RGB tones of the background
    pitch: int                              # period of the texture in pixels
    bars: tuple = (0, 0)                    # padding in pixels above/below and left/right
    seed: str = ""

    @property
    def key(self):
        """The object set: what must not occur both in training and in testing."""
        return "|".join(sorted(f"{t.full} {t.place}" for t in self.things))


def split_of(scene):
    """"novel", "test" or "train": decided by the content, so that no seed can leak a test scene."""
    if any((t.colour, t.shape) in KEPT_OUT for t in scene.things):
        return "novel"
    return "test" if zlib.crc32(scene.key.encode()) % 8 == 0 else "train"


def thing(rng, shape, colour, size, place, zoom=False):
    """An object with its jitter: up to 3 pixels of position, 10 degrees, a shade of its colour."""
    hue, width, low, high = COLOURS[colour]
    shade = hsv_to_rgb((hue + rng.uniform(-width, width)) % 1, rng.uniform(.8, 1),
                       rng.uniform(low, high))
    radius = rng.uniform(4.4, 5.6) if size == "small" else rng.uniform(8, 9.6)
    if zoom:                                # a lone object may fill much of the picture, so that
        radius = rng.uniform(10, 22 if place == 4 else 13.5)        # close-ups are not foreign
    reach = max(0, 10.5 - radius) * .6 + .8
    centre = tuple((10.7 + 21.3 * cell + rng.uniform(-reach, reach)) / SIDE
                   for cell in (place % 3, place // 3))
    if zoom:                                # keep it inside
        margin = 1.15 * radius / SIDE
        centre = tuple(min(max(c, margin), 1 - margin) for c in centre)
    return Thing(shape, colour, size, place, centre, radius / SIDE, rng.uniform(-10, 10),
                 tuple(round(255 * c) for c in shade))


def scene(seed, split="train", count=None):
    """The scene of this seed in this split; `count` fixes the number of objects (1 to 4)."""
    if split not in ("train", "test", "novel"):
        raise ValueError(f"split {split!r} is none of train, test and novel")
    rng = random.Random(f"{split}:{seed}")
    while True:
        number = count or rng.choices((1, 2, 3, 4), (20, 25, 25, 30))[0]
        bars, cells = (0, 0), list(range(9))
        if number < 4 and rng.random() < .12:       # a wide or a tall picture, padded to a square
            width = rng.randint(8, 18)
            bars, cells = rng.choice((((width, 0), [3, 4, 5]), ((0, width), [1, 4, 7])))
        pairs = rng.sample([(c, s) for c in COLOURS for s in SHAPES], number)
        zoom = number == 1 and bars == (0, 0) and rng.random() < .3
        things = tuple(thing(rng, s, c, "large" if zoom else rng.choice(SIZES), place, zoom)
                       for (c, s), place in zip(pairs, sorted(rng.sample(cells, number))))
        value = rng.uniform(0, .3) if rng.random() < .15 else rng.uniform(.72, 1)
        if rng.random() < .25:
            value = 1.0                             # plain white paper is common
        contrast = rng.uniform(.14, .3) * (1 if value < .5 else -1)
        tint = hsv_to_rgb(rng.random(), 0 if value == 1 else rng.uniform(0, .1), 1)
        paint = tuple(tuple(round(255 * c * v) for c in tint) for v in (value, value + contrast))
        made = Scene(things, rng.choice(BACKGROUNDS), paint, rng.randint(6, 12), bars,
                     f"{split}:{seed}")
        if split_of(made) == split:
            return made


def twin(scene_, seed):
    """The same picture with one attribute of every object changed: a hard negative for the eye."""
    rng = random.Random(f"twin:{seed}:{scene_.key}")
    while True:
        things = []
        for old in scene_.things:
            shape, colour = old.shape, old.colour
            if rng.random() < .7:
                shape = rng.choice([s for s in SHAPES if s != shape])
            else:
                colour = rng.choice([c for c in COLOURS if c != colour])
            new = thing(rng, shape, colour, old.size, old.place)
            things.append(Thing(shape, colour, old.size, old.place, old.centre, old.radius,
                                new.turn, new.rgb))
        made = Scene(tuple(things), scene_.background, scene_.paint, scene_.pitch, scene_.bars,
                     f"twin:{scene_.seed}")
        if len({t.name for t in things}) == len(things) and split_of(made) == "train":
            return made


def draw(scene_, side=SIDE):
    """PIL image (side, side) RGB of a scene."""
    scale = side * CANVAS
    unit = scale / SIDE
    image = Image.new("RGB", (scale, scale), scene_.paint[0])
    pen, pitch = ImageDraw.Draw(image), scene_.pitch * unit
    steps = [i * pitch for i in range(int(scale / pitch) + 2)]
    if scene_.background == "striped":
        for at in steps:
            pen.rectangle((0, at, scale, at + pitch / 2), fill=scene_.paint[1])
    if scene_.background == "dotted":
        for i, x in enumerate(steps):
            for y in steps:
                y += pitch / 2 * (i % 2)
                pen.ellipse((x - pitch / 4, y - pitch / 4, x + pitch / 4, y + pitch / 4),
                            fill=scene_.paint[1])
    if scene_.background == "checked":
        for i, x in enumerate(steps):
            for y in steps[i % 2::2]:
                pen.rectangle((x, y, x + pitch, y + pitch), fill=scene_.paint[1])
    for t in scene_.things:
        if t.shape == "circle":
            (x, y), r = t.centre, t.radius
            pen.ellipse(tuple(scale * v for v in (x - r, y - r, x + r, y + r)), fill=t.rgb)
        else:
            pen.polygon([(scale * x, scale * y) for x, y in t.outline], fill=t.rgb)
    high, wide = (round(v * unit) for v in scene_.bars)
    for box in ((0, 0, scale, high), (0, scale - high, scale, scale),
                (0, 0, wide, scale), (scale - wide, 0, scale, scale)):
        if (box[2] - box[0]) and (box[3] - box[1]):
            pen.rectangle(box, fill=PAD)
    return image.reduce(CANVAS)


# ---------------------------------------------------------------------------------------- texts

def listed(names):
    """["a", "b", "c"] -> "a, b and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def objects(number):
    return f"{NUMBERS[number]} object" + "s" * (number != 1)


def captions(scene_):
    """Five short captions, each telling a part of the truth, as five people would."""
    ts = scene_.things
    if len(ts) > 1:
        a, b = ts[0], ts[1]
        how = "left of" if a.column < b.column else "right of" if a.column > b.column else "above"
        fifth = f"{article(a.name)} {how} {article(b.name)}"
    else:
        fifth = f"a single {ts[0].full}"
    return [listed([article(t.name) for t in ts]),
            listed([article(t.full) for t in ts]),
            listed([f"{article(t.name)} in the {t.where}" for t in ts]),
            f"{objects(len(ts))} on a {scene_.background} background", fifth]


def web_caption(scene_, rng):
    """A caption as the web has them: objects missing, attributes wrong, words of the trade."""
    names = [rng.choice((t.name, t.shape, t.name, f"{t.colour} shape")) for t in scene_.things
             if rng.random() < .6] or ["shapes"]
    if rng.random() < .15:
        names[0] = f"{rng.choice(list(COLOURS))} thing"
    tail = rng.sample(("free download", "stock photo", "wallpaper hd", "clipart", "vector",
                       "for sale", "best price", "new 2 0 1 8", "icon set"), rng.randint(1, 3))
    rng.shuffle(names)
    return " ".join(names + tail)


def total(number):
    """The sentence that counts: 2 -> "There are two objects"."""
    return f"There {'is' if number == 1 else 'are'} {objects(number)}"


def sentence(t):
    """One object in full."""
    return f"At {t.where} is {article(t.full)}."


def description(scene_, rng=None):
    """The detailed description; with `rng`, its object sentences are shuffled."""
    order = list(scene_.things)
    if rng:
        rng.shuffle(order)
    return " ".join([f"This picture has a {scene_.background} background."]
                    + [sentence(t) for t in order] + [total(len(order)) + " in all."])


def imagined(scene_, dice):
    """A description by somebody who has read a short caption, the colours and shapes of some of the
    things, and not seen the picture: sizes, places and the background are guesses, and one thing in
    two descriptions is made up. What LLaVA's data engine is asked not to do."""
    names = [(t.colour, t.shape) for t in scene_.things if dice.random() < .8] or [
        (scene_.things[0].colour, scene_.things[0].shape)]
    if dice.random() < .5 and len(names) < 4:
        names.append(dice.choice([(c, s) for c in COLOURS for s in SHAPES
                                  if (c, s) not in KEPT_OUT and (c, s) not in names]))
    places = sorted(dice.sample(range(9), len(names)))
    guessed = [f"At {PLACES[at]} is {article(f'{dice.choice(SIZES)} {c} {s}')}."
               for at, (c, s) in zip(places, names)]
    return " ".join([f"This picture has a {dice.choice(BACKGROUNDS)} background.", *guessed,
                     total(len(names)) + " in all."])


def notes(scene_, dice):
    """The objects as terse notes in reading order: "large red star top left; plain background."."""
    made = [f"{t.full} {t.where}" for t in scene_.things]
    made.insert(dice.choice((0, len(made))), f"{scene_.background} background")
    return "; ".join(made) + "."


def word_picture(scene_, dice, side=8):
    """What a perfect eye would say of each patch, row by row: side² phrases, all words or some.

    An object's full note where its middle is, most of the words elsewhere on it, and the
    background's name around it."""
    told = [f"{scene_.background} background"] * side ** 2
    for t in scene_.things:
        note = f"{t.full} {t.where}".split()
        away = {i: math.dist(t.centre, ((i % side + .5) / side, (i // side + .5) / side))
                for i in range(side ** 2)}
        for i in (i for i in away if away[i] < t.radius + .02):
            told[i] = " ".join(w for w in note if dice.random() < .9) or note[2]
        told[min(away, key=away.get)] = " ".join(note)
    return told


def phrases(scene_, dice):
    """[(phrase, fact)]: one a thing and one for the background, each leaving some things unsaid.

    A fact is (shape, colour, size, place, background) with None for what the phrase does not say.
    Shapes are named most: they are what a contrastively trained eye forgets first."""
    made = []
    for t in scene_.things:
        everything = dice.random() < .3
        size_ = t.size if everything or dice.random() < .4 else None
        colour_ = t.colour if everything or dice.random() < .6 else None
        shape_ = t.shape if everything or dice.random() < .85 else None
        place = t.place if everything or dice.random() < .45 else None
        text = article(" ".join(filter(None, (size_, colour_, shape_ or "object"))))
        text += f" in the {SPOTS[place]}" if place is not None else ""
        made.append((text, (shape_, colour_, size_, place, None)))
    return made + [(f"a {scene_.background} background", (None,) * 4 + (scene_.background,))]


def holds(fact, scene_):
    """Is the fact of a phrase true of a scene, whoever the phrase was written for?"""
    *wanted, behind = fact
    if behind:
        return scene_.background == behind
    return any(all(w in (None, have) for w, have in
                   zip(wanted, (t.shape, t.colour, t.size, t.place))) for t in scene_.things)


DESCRIBE = ("Describe this image", "Describe this image.", "Describe the image in detail.",
            "Describe this picture.", "What do you see?", "What is in this picture?",
            "What does the image show?", "Please describe the picture in detail.",
            "Give a detailed description of the image.", "What is shown here?")


def unique(scene_, attribute):
    """The things whose attribute nothing else in the scene shares."""
    values = [getattr(t, attribute) for t in scene_.things]
    return [t for t in scene_.things if values.count(getattr(t, attribute)) == 1]


def colour(scene_, rng):
    if not (named := unique(scene_, "shape")):
        return None
    t = rng.choice(named)
    what = t.shape
    ask = rng.choice(("What colour is the {}?", "What color is the {}?",
                      "Which colour does the {} have?", "Tell me the colour of the {}."))
    return ask.format(what), f"The {what} is {t.colour}.", t.colour


def shape(scene_, rng):
    if not (named := unique(scene_, "colour")):
        return None
    t = rng.choice(named)
    what = t.colour + rng.choice((" object", " shape", " thing"))
    ask = rng.choice(("What is the {}?", "Which shape does the {} have?",
                      "What kind of shape is the {}?", "What shape is the {}?"))
    return ask.format(what), f"The {what} is {article(t.shape)}.", t.shape


def size(scene_, rng):
    t = rng.choice(scene_.things)
    what = t.name
    ask = rng.choice(("How big is the {}?", "What size is the {}?", "How large is the {}?",
                      "Is the {} large or small?", "Is the {} small or large?"))
    return ask.format(what), f"The {what} is {t.size}.", t.size


def where(scene_, rng):
    t = rng.choice(scene_.things)
    ask = rng.choice(("Where is the {}?", "Where in the picture is the {}?",
                      "In which part of the image is the {}?", "Where do you see the {}?"))
    return ask.format(t.name), f"The {t.name} is {t.where}.", t.where


def tally(things, what=""):
    """"One star top left, one star bottom right, so two": counting by pointing."""
    each = f"one {what}".strip()
    text = ", ".join(f"{each} {t.where}" for t in things) or f"no {what}".strip()
    return f"{text[0].upper()}{text[1:]}, so {NUMBERS[len(things)]}"


def count(scene_, rng):
    ask = rng.choice(("How many objects are there?", "How many objects are in the picture?",
                      "Count the objects.", "How many shapes do you see?"))
    return ask, tally(scene_.things) + ".", NUMBERS[len(scene_.things)]


def count_of(scene_, rng):
    if rng.random() < .5:
        what = rng.choice([t.colour for t in scene_.things] + [rng.choice(list(COLOURS))])
        found, many = [t for t in scene_.things if t.colour == what], what + " objects"
    else:
        what = rng.choice([t.shape for t in scene_.things] + [rng.choice(SHAPES)])
        found = [t for t in scene_.things if t.shape == what]
        many = what + ("es" if what == "cross" else "s")
    ask = rng.choice((f"How many {many} are there?", f"How many {many} do you see?",
                      f"Count the {many}."))
    return ask, tally(found, what) + ".", NUMBERS[len(found)]


def exist(scene_, rng):
    """Half the answers are yes; half the noes are near misses: one attribute of a present thing."""
    present = {t.name for t in scene_.things}
    t = rng.choice(scene_.things)
    ask = rng.choice(("Is there {}?", "Is there {} in the picture?", "Do you see {}?",
                      "Does the image show {}?"))
    if rng.random() < .5:
        what = article(t.name)
        return ask.format(what), f"A{what[1:]} is {t.where}, so yes.", "yes"
    near = ([(t.colour, s) for s in SHAPES] + [(c, t.shape) for c in COLOURS]
            + [(a.colour, b.shape) for a in scene_.things for b in scene_.things] * 2)
    far = [(c, s) for c in COLOURS for s in SHAPES]
    pool = [f"{c} {s}" for c, s in (near if rng.random() < .7 else far)
            if f"{c} {s}" not in present and (c, s) not in KEPT_OUT]
    what = article(rng.choice(pool))
    return ask.format(what), f"A{what[1:]} is not there, so no.", "no"


RELATIONS = {"left of": lambda a, b: a.column < b.column,
             "right of": lambda a, b: a.column > b.column,
             "above": lambda a, b: a.row < b.row, "below": lambda a, b: a.row > b.row}


def relation(scene_, rng):
    """Half yes: the truth is drawn first, then a pair for which it holds."""
    wanted, how = rng.random() < .5, rng.choice(list(RELATIONS))
    pairs = [(a, b, how) for how in RELATIONS for a in scene_.things for b in scene_.things
             if a is not b and RELATIONS[how](a, b) == wanted]
    pairs = [p for p in pairs if p[2] == how] or pairs
    if not pairs:
        return None
    a, b, how = rng.choice(pairs)
    ask = rng.choice(("Is the {} {} the {}?", "Is the {} {} the {} in the picture?",
                      "Can you tell whether the {} is {} the {}?"))
    word, axis = "yes" if wanted else "no", 1 if "of" in how else 0
    x, y = (t.where.split()[axis] for t in (a, b))
    return (ask.format(a.name, how, b.name), f"The {a.name} is {a.where} and the {b.name} is "
            f"{b.where}; is {x} {how} {y}? {word.capitalize()}.", word)


def reasoning(scene_, rng):
    """Answers that need a step: take one away, compare two sizes, compare two colours."""
    n = len(scene_.things)
    kind = rng.choice(("remove", "size", "colour") if n > 1 else ("remove",))
    if kind == "remove":
        t = rng.choice(scene_.things)
        ask = rng.choice((f"If the {t.name} were removed, how many objects would be left?",
                          f"How many objects would remain without the {t.name}?"))
        rest = [other for other in scene_.things if other is not t]
        return ask, tally(rest) + " would remain.", NUMBERS[n - 1]
    wanted = rng.random() < .5
    named = "name" if kind == "size" else "shape"
    things = list(scene_.things) if kind == "size" else unique(scene_, "shape")
    pairs = [(a, b) for a in things for b in things if a is not b]
    pairs = [p for p in pairs if (getattr(p[0], kind) == getattr(p[1], kind)) == wanted] or pairs
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    word = "yes" if getattr(a, kind) == getattr(b, kind) else "no"
    x, y = getattr(a, named), getattr(b, named)
    ask = rng.choice((f"Do the {x} and the {y} have the same {kind}?",
                      f"Are the {x} and the {y} of the same {kind}?"))
    one, two = getattr(a, kind), getattr(b, kind)
    return ask, f"The {x} is {one} and the {y} is {two}: {one} and {two}, so {word}.", word


def background(scene_, rng):
    ask = rng.choice(("What is the background like?", "How does the background look?",
                      "What kind of background is it?", "Describe the background."))
    return ask, f"The background is {scene_.background}.", scene_.background


ASK = dict(zip(KINDS, (colour, shape, size, where, count, count_of, exist, relation, reasoning,
                       background)))
ANSWERS = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES,
           "where": sorted(PLACES, key=len, reverse=True),
           "count": NUMBERS, "count of": NUMBERS, "exist": ("yes", "no"), "relation": ("yes", "no"),
           "reasoning": ("yes", "no") + NUMBERS, "background": BACKGROUNDS}


def question(scene_, kind, rng):
    """(question, answer, value) of one of KINDS, or None where the scene has nothing to ask."""
    return ASK[kind](scene_, rng)


def value_of(kind, text):
    """What an answer in words says, as one of ANSWERS[kind], or "" if it says none of them.

    Reasons come before conclusions, so the last value counts."""
    words = "".join(c if c.isalpha() else " " for c in text.lower())
    padded = " " + " ".join(words.split()) + " "
    found = [(padded.rfind(f" {v} "), v) for v in ANSWERS[kind] if f" {v} " in padded]
    return max(found, default=(0, ""), key=lambda f: (f[0], len(f[1])))[1]


def things_in(text):
    """The (colour, shape) pairs that a text names, in order, repeats kept."""
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    singular = {s: s for s in SHAPES}
    return [(c, singular[s]) for c, s in zip(words, words[1:]) if c in COLOURS and s in singular]


OFTEN = (9, 9, 7, 9, 8, 16, 12, 28, 14, 4)              # how often each of KINDS is asked


def dialogue(scene_, rng, turns, often=OFTEN, described=.125):
    """`turns` question-answer pairs about a scene; kinds as `often`, a share of descriptions.

    Returns [(question, answer), ...]; two answers never repeat. A description answers every later
    question in words; put last, nothing can be read off it."""
    pairs, seen = [], set()
    while len(pairs) < turns:
        if rng.random() < described:
            made = (rng.choice(DESCRIBE), description(scene_), "")
        else:
            made = question(scene_, rng.choices(KINDS, often)[0], rng)
        if made and made[1] not in seen:
            seen.add(made[1])
            pairs.append(made[:2])
    return sorted(pairs, key=lambda pair: pair[0] in DESCRIBE)


def contact_sheet(scenes, columns=8):
    """PIL image with the pictures of the scenes side by side."""
    rows = math.ceil(len(scenes) / columns)
    sheet = Image.new("RGB", (columns * (SIDE + 4), rows * (SIDE + 4)), "white")
    for i, s in enumerate(scenes):
        sheet.paste(draw(s), (i % columns * (SIDE + 4) + 2, i // columns * (SIDE + 4) + 2))
    return sheet


# ------------------------------------------------------------------------------- stand-in data
# The layout of LLaVA-1.5's two files, so that a step can be run and timed without them. Shares are
# the release's. Turns and words are rough, set so that a sample has on average the tokens that
# train.py --plan counts with: 324 of text, 180 of them learned; text alone 1,200, and 800.

# what it stands for: samples of 665,298, turns, words of a question, words of an answer, folder
# ("": no picture), and what ends the first question. An answer of 0 words is a box.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
WHERE = "Please provide the bounding box coordinates of the region this sentence describes:"
MIX = ((57_896, 4, 9, 115, "coco/train2017", ""),               # LLaVA-Instruct: conversation,
       (22_958, 1, 8, 220, "coco/train2017", ""),               # description
       (76_858, 1, 16, 250, "coco/train2017", ""),              # and reasoning, 58 : 23 : 77
       (40_688, 4, 86, 195, "", ""),                            # ShareGPT
       (82_783, 6, 7, 1, "coco/train2017", SHORT), (72_140, 12, 8, 1, "gqa/images", SHORT),
       (8_998, 2, 9, 1, "coco/train2017", SHORT), (80_000, 5, 8, 3, "ocr_vqa/images", SHORT),
       (66_160, 1, 24, 1, "coco/train2017", LETTER),
       (21_953, 1, 24, 11, "textvqa/train_images", "Provide a one-sentence caption."),
       (48_447, 14, 6, 0, "coco/train2017", WHERE), (86_417, 14, 5, 0, "vg/VG_100K", WHERE))
SIZES_MIX = ((640, 480),) * 5 + ((480, 640),) * 2 + ((640, 427),) * 2 + ((500, 375), (375, 500))


@functools.cache
def told(number):
    return description(scene(number)).split()


def text_of(words, dice):
    """Sentences about scenes, cut to so many words."""
    made = []
    while len(made) < words:
        made += told(dice.randrange(300))
    return " ".join(made[:max(1, words)])


def stand_in_row(number, stage, dice):
    """One sample of the JSON file of a stage, and whether it has a picture."""
    drawn = lambda mean: max(1, round(dice.lognormvariate(math.log(max(mean, 1)) - .08, .4)))
    name = f"{number:012}"
    if stage == 1:
        ask = dice.choice(DESCRIBE)
        talk = [dice.choice((f"<image>\n{ask}", f"{ask}\n<image>")), text_of(drawn(23), dice)]
        picture = f"{number // 1000:05}/{name}.jpg"
    else:
        _, turns, asked, answered, folder, ending = dice.choices(MIX, [m[0] for m in MIX])[0]
        picture, talk = folder and f"{folder}/{name}.jpg", []
        for turn in range(1 if turns == 1 else min(drawn(turns), 2 * turns)):
            ask = text_of(min(drawn(asked), 3 * asked), dice).rstrip(".") + "?"
            box = sorted(dice.random() for _ in range(4))
            talk += [ask if turn or not ending else f"{ask}\n{ending}",
                     text_of(min(drawn(answered), 2 * answered), dice) if answered else
                     f"[{box[0]:.2f}, {box[1]:.2f}, {box[2]:.2f}, {box[3]:.2f}]"]
        # 2,048 tokens are the end of a sample, and a picture takes 576 of them
        while len(talk) > 2 and sum(len(x.split()) for x in talk) > (900 if picture else 1500):
            talk = talk[:-2]
        if picture:
            talk[0] = f"<image>\n{talk[0]}"
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(talk)]
    return {"id": name, **({"image": picture} if picture else {"model": ""}),
            "conversations": turns}


def photograph(dice):
    """A picture of a photograph's sizes, with detail at every scale, as a JPEG has to store it."""
    size = dice.choice(SIZES_MIX) if dice.random() < .8 else (dice.randint(336, 640),
                                                              dice.randint(336, 640))
    image = None
    for cells, share in ((3, 1), (9, .5), (27, .35), (81, .2), (243, .2), (640, .2)):
        grain = Image.frombytes("RGB", (cells, cells), dice.randbytes(3 * cells * cells))
        grain = grain.resize(size, Image.Resampling.BICUBIC)
        image = grain if image is None else Image.blend(image, grain, share)
    return image


def stand_in(folder, rows, stage=2, seed=0, pictures=500):
    """data.json and images/ in a folder, a function of the arguments. Files of pictures past the
    first `pictures` are hard links to those: they are read, not looked at."""
    folder, made, have = Path(folder), [], []
    for i in range(rows):
        row = stand_in_row(i, stage, random.Random(f"stand-in:{seed}:{stage}:{i}"))
        made.append(row)
        if "image" not in row:
            continue
        path = folder / "images" / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(have) < pictures:
            photograph(random.Random(f"photograph:{seed}:{i}")).save(path, quality=90)
            have.append(path)
        else:
            path.hardlink_to(have[i % pictures])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Look at the toy world, or write stand-in data.")
    parser.add_argument("folder", nargs="?", help="write stand-in data there, and exit")
    parser.add_argument("--rows", type=int, default=1000, help="samples")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="whose data it is")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.folder:
        if Path(asked.folder).exists():
            parser.error(f"{asked.folder} is there already; give a new folder")
        stand_in(asked.folder, asked.rows, asked.stage, asked.seed)
        print(f"{asked.rows} samples in {asked.folder}/data.json, their pictures in "
              f"{asked.folder}/images")
        parser.exit()
    contact_sheet([scene(i) for i in range(48)]).save("contact-sheet.png")
    shown, dice = scene(3, count=3), random.Random(0)
    print("contact-sheet.png written: 48 scenes of the training split\n")
    print("object set   ", shown.key)
    for t in shown.things:
        print(f"box          {t.name}: {list(t.box)}")
    for text in captions(shown):
        print("caption      ", text)
    print("web caption  ", web_caption(shown, dice))
    print("description  ", description(shown))
    for kind in KINDS:
        print(f"{kind:<12} ", " -> ".join(question(shown, kind, dice)[:2]))
