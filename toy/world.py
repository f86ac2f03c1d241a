"""toy.world: pictures of coloured shapes, drawn from scenes whose truth is known.

    seed, split --make_scene--> Scene: 1 to 4 SceneObjects, a background --draw--> picture 64 x 64

A scene is data, so every statement about it can be checked, and no judge is needed. Three splits:

    train    what training draws
    test     object sets that training never draws: decided by a hash of the content
    novel    scenes with one of three colour-shape pairs that training never draws

Positions and sizes are fractions of the picture's side. Row 0 is at the top, column 0 at the left.

    python -m toy.world         writes contact-sheet.png and prints one scene's texts

Next: toy/texts.py, what can be said and asked about a scene.
"""
import math
import random
import runpy
import zlib
from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace

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

# Corners of each shape as (radius, angle in degrees); angle -90 is up. A circle has none.
CORNERS = {
    "square": tuple((1.25, 45 + 90 * i) for i in range(4)),
    "triangle": tuple((1.15, -90 + 120 * i) for i in range(3)),
    "star": tuple(((1.15, .48)[i % 2], -90 + 36 * i) for i in range(10)),
    "cross": tuple((radius, angle + 90 * i) for i in range(4)
                   for radius, angle in ((1.1, -18.0), (1.1, 18.0), (.481, 45.0)))}


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
        points = []
        for radius, angle in CORNERS.get(self.shape, ()):
            radians = math.radians(angle + self.turn)
            points.append((self.centre[0] + self.radius * radius * math.cos(radians),
                           self.centre[1] + self.radius * radius * math.sin(radians)))
        return points

    @property
    def box(self):
        """(x1, y1, x2, y2) in fractions of the side, as LLaVA's data engine writes boxes."""
        (x, y), r = self.centre, self.radius
        xs, ys = (x - r, x + r), (y - r, y + r)
        if self.outline:
            xs, ys = zip(*self.outline)
        return tuple(round(min(max(v, 0), 1), 3) for v in (min(xs), min(ys), max(xs), max(ys)))


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Two scenes with the same `key` differ only in jitter and background."""
    things: tuple                           # SceneObjects in reading order: row by row
    background: str
    background_rgb: tuple                   # two RGB tones of the background
    pitch: int                              # period of the texture in pixels
    padding: tuple = (0, 0)                 # pixels above and below, left and right
    seed: str = ""

    @property
    def key(self):
        """The object set: what must not occur both in training and in testing."""
        return "|".join(sorted(f"{t.full} {t.place}" for t in self.things))


def split_of(scene):
    """"novel", "test" or "train": decided by the content, so that no seed can leak a test scene."""
    if any((t.colour, t.shape) in HELD_OUT_PAIRS for t in scene.things):
        return "novel"
    # crc32 is the same in every process, which Python's own hash is not
    return "test" if zlib.crc32(scene.key.encode()) % 8 == 0 else "train"


def make_object(rng, shape, colour, size, place, zoom=False):
    """An object with its jitter: up to 3 pixels of position, 10 degrees, a shade of its colour.

    zoom: a lone object that may fill much of the picture, so that close-ups occur in training."""
    hue, width, low, high = COLOURS[colour]
    shade = hsv_to_rgb((hue + rng.uniform(-width, width)) % 1, rng.uniform(.8, 1),
                       rng.uniform(low, high))
    if size == "small":                     # radii in pixels
        radius = rng.uniform(4.4, 5.6)
    else:
        radius = rng.uniform(8, 9.6)
    if zoom:
        most = 22 if place == 4 else 13.5   # place 4 is the middle: room on every side
        radius = rng.uniform(10, most)
    # a cell is 21.3 pixels wide; a small object may move further inside it than a large one
    reach = max(0, 10.5 - radius) * .6 + .8
    centre = tuple((10.7 + 21.3 * cell + rng.uniform(-reach, reach)) / SIDE
                   for cell in (place % 3, place // 3))
    if zoom:                                # keep it inside
        margin = 1.15 * radius / SIDE
        centre = tuple(min(max(c, margin), 1 - margin) for c in centre)
    return SceneObject(shape, colour, size, place, centre, radius / SIDE, rng.uniform(-10, 10),
                       tuple(round(255 * c) for c in shade))


def middle_colour(name):
    """"#rrggbb" of a colour's middle shade, for those who draw by hand."""
    hue, _, low, high = COLOURS[name]
    return "#" + bytes(round(255 * x) for x in hsv_to_rgb(hue, .9, (low + high) / 2)).hex()


def background_tones(rng):
    """Two RGB tones: mostly light with a darker texture, sometimes dark with a lighter one."""
    value = rng.uniform(0, .3) if rng.random() < .15 else rng.uniform(.72, 1)
    if rng.random() < .25:
        value = 1.0                         # plain white paper is common
    contrast = rng.uniform(.14, .3)
    if value >= .5:
        contrast = -contrast
    # the order of the draws is part of a seed's meaning: hue, then saturation
    tint = hsv_to_rgb(rng.random(), 0 if value == 1 else rng.uniform(0, .1), 1)
    tones = []
    for brightness in (value, value + contrast):
        tones.append(tuple(round(255 * c * brightness) for c in tint))
    return tuple(tones)


def colour_shape_pairs(rng, number, shared):
    """So many different (colour, shape); shared: "colour" or "shape", of which there is one, or two
    in the whole scene."""
    colours, shapes = list(COLOURS), SHAPES
    if shared == "colour":
        colours = rng.sample(colours, rng.choice((1, 2)))
    if shared == "shape":
        shapes = rng.sample(shapes, rng.choice((1, 2)))
    return rng.sample([(c, s) for c in colours for s in shapes], number)


def make_scene(seed, split="train", count=None, shared=None):
    """The scene of this seed in this split; `count` fixes the number of objects (1 to 4).

    Scenes are drawn from one random stream until one belongs to the split. shared: "colour" or
    "shape" draws scenes whose objects have it in common (`colour_shape_pairs`)."""
    if split not in ("train", "test", "novel"):
        raise ValueError(f"split {split!r} is none of train, test and novel")
    rng = random.Random(f"{split}:{seed}")
    while True:
        number = count or rng.choices((1, 2, 3, 4), (20, 25, 25, 30))[0]
        padding, cells = (0, 0), list(range(9))
        if number < 4 and rng.random() < .12:       # a wide or a tall picture, padded to a square
            width = rng.randint(8, 18)
            padding, cells = rng.choice((((width, 0), [3, 4, 5]), ((0, width), [1, 4, 7])))
        pairs = colour_shape_pairs(rng, number, shared)
        zoom = number == 1 and padding == (0, 0) and rng.random() < .3
        things = []
        for (colour, shape), place in zip(pairs, sorted(rng.sample(cells, number))):
            size = "large" if zoom else rng.choice(SIZES)
            things.append(make_object(rng, shape, colour, size, place, zoom))
        tones = background_tones(rng)
        scene = Scene(tuple(things), rng.choice(BACKGROUNDS), tones, rng.randint(6, 12), padding,
                      f"{split}:{seed}")
        if split_of(scene) == split:
            return scene


def lone_scene(seed):
    """A training scene with one object of any size anywhere, as people draw or photograph one.

    Its place is the cell that its middle lies in; `make_scene` keeps objects near the cells'
    middles, and a tower that had seen only those read no place elsewhere."""
    rng = random.Random(f"lone:{seed}")
    while True:
        scene = make_scene(f"lone:{rng.random()}", count=1)
        old, = scene.things
        radius = 4.4 * 5 ** rng.random() / SIDE             # 4.4 to 22 pixels
        centre = tuple(rng.uniform(1.15 * radius, 1 - 1.15 * radius) for _ in range(2))
        column, row = (int(3 * v) for v in centre)
        size = "small" if radius * SIDE < 6.8 else "large"
        turn = rng.uniform(-180, 180) if rng.random() < .3 else old.turn
        thing = replace(old, size=size, place=3 * row + column, centre=centre, radius=radius,
                        turn=turn)
        scene = replace(scene, things=(thing,), padding=(0, 0))
        if split_of(scene) == "train":
            return scene


def training_scene(seed):
    """What stages 0, 1 and 2 show: six in ten scenes have objects of the same colour, or of the
    same shape; one in ten is a `lone_scene`.

    Of the scenes of make_scene only one in four needs to know *which* red object is meant."""
    rng = random.Random(f"confusable:{seed}")
    kind = rng.random()
    if kind < .6:
        return make_scene(f"confusable:{seed}", count=rng.choice((2, 3, 3, 4, 4)),
                          shared=rng.choice(("colour", "colour", "shape")))
    return lone_scene(seed) if kind < .7 else make_scene(seed)


def hard_negative_scene(scene, seed):
    """The same picture with one attribute of every object changed.

    A hard negative for contrastive training: colours or places alone do not tell the two apart."""
    rng = random.Random(f"twin:{seed}:{scene.key}")
    while True:
        things = []
        for old in scene.things:
            shape, colour = old.shape, old.colour
            if rng.random() < .7:
                shape = rng.choice([s for s in SHAPES if s != shape])
            else:
                colour = rng.choice([c for c in COLOURS if c != colour])
            new = make_object(rng, shape, colour, old.size, old.place)
            things.append(SceneObject(shape, colour, old.size, old.place, old.centre, old.radius,
                                      new.turn, new.rgb))
        twin = Scene(tuple(things), scene.background, scene.background_rgb, scene.pitch,
                     scene.padding, f"twin:{scene.seed}")
        if len({t.name for t in things}) == len(things) and split_of(twin) == "train":
            return twin


def draw_background(pen, scene, side, pitch):
    """Stripes, dots or checks of period `pitch` over a canvas of `side` pixels."""
    tone = scene.background_rgb[1]
    steps = [i * pitch for i in range(int(side / pitch) + 2)]
    if scene.background == "striped":
        for y in steps:
            pen.rectangle((0, y, side, y + pitch / 2), fill=tone)
    if scene.background == "dotted":
        for i, x in enumerate(steps):
            for y in steps:
                y += pitch / 2 * (i % 2)            # every second column is moved by half a period
                pen.ellipse((x - pitch / 4, y - pitch / 4, x + pitch / 4, y + pitch / 4), fill=tone)
    if scene.background == "checked":
        for i, x in enumerate(steps):
            for y in steps[i % 2::2]:
                pen.rectangle((x, y, x + pitch, y + pitch), fill=tone)


def draw_padding(pen, side, high, wide):
    """The bars beside a wide or a tall picture, on a canvas of `side` pixels."""
    for box in ((0, 0, side, high), (0, side - high, side, side),
                (0, 0, wide, side), (side - wide, 0, side, side)):
        if (box[2] - box[0]) and (box[3] - box[1]):     # Pillow would draw a line for an empty box
            pen.rectangle(box, fill=PAD)


def draw(scene, side=SIDE):
    """PIL image (side, side) RGB of a scene."""
    scale = side * CANVAS                           # pixels of the canvas, averaged down at the end
    unit = scale / SIDE
    image = Image.new("RGB", (scale, scale), scene.background_rgb[0])
    pen = ImageDraw.Draw(image)
    draw_background(pen, scene, scale, scene.pitch * unit)
    for t in scene.things:
        if t.shape == "circle":
            (x, y), r = t.centre, t.radius
            pen.ellipse(tuple(scale * v for v in (x - r, y - r, x + r, y + r)), fill=t.rgb)
        else:
            pen.polygon([(scale * x, scale * y) for x, y in t.outline], fill=t.rgb)
    draw_padding(pen, scale, *(round(v * unit) for v in scene.padding))
    return image.reduce(CANVAS)


def contact_sheet(scenes, columns=8):
    """PIL image with the pictures of the scenes side by side."""
    rows = math.ceil(len(scenes) / columns)
    cell = SIDE + 4                                 # 2 white pixels on each side
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for i, scene in enumerate(scenes):
        sheet.paste(draw(scene), (i % columns * cell + 2, i // columns * cell + 2))
    return sheet


if __name__ == "__main__":
    contact_sheet([make_scene(i) for i in range(48)]).save("contact-sheet.png")
    print("contact-sheet.png written: 48 scenes of the training split\n")
    # texts.py imports this file, so it is run rather than imported
    runpy.run_module("toy.texts", run_name="__main__")
