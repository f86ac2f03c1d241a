"""TODO"""

import math
import random
import zlib
from colorsys import hsv_to_rgb
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
# index = 3 * row + column; always a word for the row and another for the column
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom")
               for column in ("left", "centre", "right"))
BACKGROUNDS = ("plain", "striped", "dotted", "checked")
NUMBERS = ("zero", "one", "two", "three", "four")
# colour: hue in turns, half-width of the hue, range of the value; wide enough for pure RGB colours
COLOURS = {"red": (0.0, .02, .7, 1.0), "orange": (.092, .018, .9, 1.0),
           "yellow": (.16, .02, .85, 1.0), "green": (.34, .05, .45, 1.0),
           "blue": (.635, .04, .6, 1.0), "purple": (.80, .04, .5, .9)}
HELD_OUT_PAIRS = (("purple", "triangle"), ("orange", "cross"), ("green", "star"))
SIDE = 64                                   # pixels of a picture's side
CANVAS = 3                                  # drawn at 3 x and averaged down: smooth edges
PAD = (122, 116, 104)                       # what LLaVA pads non-square pictures with, CLIP's mean


@dataclass(frozen=True)
class SceneObject:
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
    if any((t.colour, t.shape) in HELD_OUT_PAIRS for t in scene.things):
        return "novel"
    return "test" if zlib.crc32(scene.key.encode()) % 8 == 0 else "train"


def make_object(rng, shape, colour, size, place, zoom=False):
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
    return SceneObject(shape, colour, size, place, centre, radius / SIDE, rng.uniform(-10, 10),
                 tuple(round(255 * c) for c in shade))


def make_scene(seed, split="train", count=None):
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
        things = tuple(make_object(rng, s, c, "large" if zoom else rng.choice(SIZES), place, zoom)
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


def hard_negative_scene(scene_, seed):
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
            new = make_object(rng, shape, colour, old.size, old.place)
            things.append(SceneObject(shape, colour, old.size, old.place, old.centre, old.radius,
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


def contact_sheet(scenes, columns=8):
    """PIL image with the pictures of the scenes side by side."""
    rows = math.ceil(len(scenes) / columns)
    sheet = Image.new("RGB", (columns * (SIDE + 4), rows * (SIDE + 4)), "white")
    for i, s in enumerate(scenes):
        sheet.paste(draw(s), (i % columns * (SIDE + 4) + 2, i // columns * (SIDE + 4) + 2))
    return sheet
