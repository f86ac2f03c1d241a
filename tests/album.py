"""Forty pictures that toy.world.draw did not make: [(file, {(colour, shape)})], what is in them.

Twelve of other sizes, aspects and file formats; 28 with outlines, gradients, photographs behind
them, coarse JPEG, turned, or as a scanner sees a drawing. The shapes are drawn by the code below.

    python tests/album.py SHEET.png         all of them side by side
    python tests/album.py FOLDER ...        which of them each model names right
"""
import math
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from matplotlib import cbook
from PIL import Image, ImageDraw, ImageFilter

RED, ORANGE, YELLOW = (225, 20, 20), (255, 140, 0), (255, 220, 0)
GREEN, BLUE, PURPLE = (0, 150, 40), (20, 60, 220), (128, 0, 150)


def drawn(size, shapes, background="white"):
    """A picture with shapes drawn by hand: (kind, centre x, centre y, radius, fill)."""
    image = Image.new("RGB", size, background)
    pen = ImageDraw.Draw(image)
    for kind, x, y, r, fill in shapes:
        if kind == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == "triangle":
            pen.polygon([(x, y - r), (x - r, y + .8 * r), (x + r, y + .8 * r)], fill=fill)
        elif kind == "cross":
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
        else:
            pen.regular_polygon((x, y, r * .45), 5, rotation=180, fill=fill)
            for turn in range(5):
                inner = Image.new("L", size)
                tip = ImageDraw.Draw(inner)
                tip.polygon([(x, y - r), (x - .27 * r, y - .3 * r), (x + .27 * r, y - .3 * r)], 255)
                image.paste(fill, mask=inner.rotate(72 * turn, center=(x, y)))
    return image


def png16(path, image):
    """A 16-bit RGB PNG, which Pillow reads but does not write."""
    rows = b"".join(b"\0" + bytes(v for p in range(image.width)
                                  for c in image.getpixel((p, y)) for v in (c, c))
                    for y in range(image.height))

    def chunk(kind, body):
        return (struct.pack(">I", len(body)) + kind + body
                + struct.pack(">I", zlib.crc32(kind + body)))
    head = struct.pack(">IIBBBBB", *image.size, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def twelve(folder):
    """Other sizes, aspects and file formats."""
    made = []

    def store(name, image, truth, **options):
        image.save(folder / name, **options)
        made.append((folder / name, truth))
    store("1.png", drawn((200, 200), [("circle", 60, 60, 28, (255, 0, 0))]), {("red", "circle")})
    store("2.jpg", drawn((320, 220), [("square", 220, 110, 40, (0, 0, 255))]),
          {("blue", "square")}, quality=85)
    store("3.png", drawn((160, 240), [("star", 80, 120, 36, (255, 230, 0))]), {("yellow", "star")})
    store("4.png", drawn((64, 64), [("triangle", 12, 50, 9, (0, 150, 0))]), {("green", "triangle")})
    store("5.jpg", drawn((600, 600), [("cross", 300, 300, 90, (128, 0, 128))]),
         {("purple", "cross")}, quality=60)
    alpha = drawn((128, 128), [("square", 100, 30, 16, (255, 140, 0))]).convert("RGBA")
    paper = Image.eval(alpha.convert("L"), lambda v: 0 if v == 255 else 255)
    alpha.putalpha(paper)
    store("6.png", alpha, {("orange", "square")})
    turned = drawn((300, 200), [("triangle", 150, 100, 40, (230, 0, 0))]).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6                        # the viewer turns it by 90 degrees clockwise
    store("7.jpg", turned, {("red", "triangle")}, exif=exif)
    two = [("circle", 60, 150, 40, (0, 0, 255)), ("square", 240, 150, 40, (255, 230, 0))]
    png16(folder / "8.png", drawn((300, 300), two))
    made.append((folder / "8.png", {("blue", "circle"), ("yellow", "square")}))
    store("9.gif", drawn((150, 150), [("circle", 75, 25, 20, (0, 170, 0))]).convert("P"),
         {("green", "circle")})
    store("10.webp", drawn((256, 192), [("cross", 60, 96, 34, (220, 0, 0))]), {("red", "cross")})
    three = [("star", 70, 70, 42, (255, 0, 0)), ("circle", 200, 200, 38, (0, 0, 255)),
             ("square", 330, 330, 40, (0, 160, 0))]
    store("11.png", drawn((400, 400), three), {("red", "star"), ("blue", "circle"),
                                              ("green", "square")})
    store("12.bmp", drawn((90, 90), [("star", 45, 45, 13, (128, 0, 128))]), {("purple", "star")})
    return made


def corners(kind, x, y, r, turn=0.0):
    """Corner points of a shape, clockwise from the top."""
    if kind == "star":
        spokes = [(r if i % 2 == 0 else .42 * r, 36 * i) for i in range(10)]
    elif kind == "cross":
        spokes = [(1.05 * math.hypot(a, b) * r, math.degrees(math.atan2(a, b))) for a, b in (
            (-.33, 1), (.33, 1), (.33, .33), (1, .33), (1, -.33), (.33, -.33), (.33, -1),
            (-.33, -1), (-.33, -.33), (-1, -.33), (-1, .33), (-.33, .33))]
    else:
        sides, first = {"square": (4, 45), "triangle": (3, 0), "circle": (60, 0)}[kind]
        spokes = [(r * (1.2 if kind == "square" else 1), first + 360 / sides * i)
                  for i in range(sides)]
    return [(x + length * math.sin(math.radians(angle + turn)),
             y - length * math.cos(math.radians(angle + turn))) for length, angle in spokes]


def outlined(size, shapes, width, background="white"):
    """Shapes drawn as closed lines: (kind, x, y, radius, colour)."""
    image = Image.new("RGB", size, background)
    for kind, x, y, r, colour in shapes:
        points = corners(kind, x, y, r)
        ImageDraw.Draw(image).line(points + points[:2], fill=colour, width=width, joint="curve")
    return image


def ramp(size, start, end, upright=False):
    """From one colour to another, from left to right or from top to bottom."""
    share = np.linspace(0, 1, size[1] if upright else size[0])
    share = share[:, None, None] if upright else share[None, :, None]
    rows = np.array(start) * (1 - share) + np.array(end) * share
    return Image.fromarray(np.broadcast_to(rows, (size[1], size[0], 3)).astype(np.uint8))


def pasted(image, shapes, turn=0.0):
    """Shapes on an image: (kind, x, y, radius, a colour or an image of the same size)."""
    for kind, x, y, r, paint in shapes:
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).polygon(corners(kind, x, y, r, turn), fill=255)
        if isinstance(paint, tuple):
            paint = Image.new("RGB", image.size, paint)
        image.paste(paint, mask=mask)
    return image


def photograph(box, size):
    """A part of the portrait of Grace Hopper (US Navy, public domain) that matplotlib has."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB").crop(box).resize(size)


def relief(size):
    """Heights of a landscape, as grey values."""
    heights = cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"].astype(float)
    grey = 255 * (heights - heights.min()) / np.ptp(heights)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB").resize(size)


def scanned(image, seed):
    """Yellowish paper, uneven light, specks, unsharp, a little askew."""
    rng = np.random.default_rng(seed)
    image = image.rotate(rng.uniform(-4, 4), fillcolor="white").filter(ImageFilter.GaussianBlur(1))
    pixels = np.asarray(image).astype(float) * np.array((.97, .95, .88))
    light = np.linspace(.82, 1.02, image.width)[None, :, None]
    pixels = pixels * light + rng.normal(0, 9, pixels.shape)
    specks = rng.random(pixels.shape[:2]) < .004
    pixels[specks] = 70
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def twenty_eight(folder):
    """Line widths, gradients, photographs behind, JPEG of quality 30, turned, scanned."""
    made = []

    def store(image, *truth, name=None, **options):
        path = folder / f"{len(made) + 13}.{name or 'png'}"
        image.save(path, **options)
        made.append((path, set(truth)))

    # drawn with lines, thin to thick
    for (kind, colour, rgb), width in zip((
            ("circle", "red", RED), ("square", "blue", BLUE), ("triangle", "green", GREEN),
            ("star", "red", RED), ("cross", "purple", PURPLE), ("circle", "orange", ORANGE)),
            (10, 12, 14, 12, 16, 26)):
        store(outlined((240, 240), [(kind, 120, 120, 62, rgb)], width), (colour, kind))
    # gradients: of the shape, of the background, of both
    size = 200, 200
    store(pasted(Image.new("RGB", size, "white"),
                 [("circle", 60, 60, 34, ramp(size, (120, 0, 0), (255, 40, 40)))]),
          ("red", "circle"))
    store(pasted(Image.new("RGB", size, "white"),
                 [("square", 140, 140, 36, ramp(size, (0, 0, 120), (70, 110, 255), True))]),
          ("blue", "square"))
    store(pasted(ramp(size, (255, 255, 255), (170, 170, 170)), [("star", 100, 60, 42, PURPLE)]),
          ("purple", "star"))
    store(pasted(ramp(size, (235, 240, 255), (150, 170, 190), True),
                 [("triangle", 60, 140, 40, ramp(size, (255, 120, 0), (255, 170, 40)))]),
          ("orange", "triangle"))
    store(pasted(ramp(size, (40, 40, 40), (110, 110, 110)), [("cross", 140, 60, 40, YELLOW)]),
          ("yellow", "cross"))
    # photographs behind
    wall, cloth, face = (385, 40, 512, 300), (30, 400, 190, 590), (195, 195, 345, 325)
    store(pasted(photograph(wall, size), [("circle", 100, 100, 40, RED)]), ("red", "circle"),
          name="jpg", quality=85)
    store(pasted(photograph(cloth, size), [("star", 100, 60, 46, YELLOW)]), ("yellow", "star"))
    store(pasted(photograph(face, size), [("square", 60, 60, 38, BLUE)]), ("blue", "square"),
          name="jpg", quality=80)
    store(pasted(photograph(wall, size), [("triangle", 140, 140, 42, GREEN)]),
          ("green", "triangle"))
    store(pasted(relief(size), [("cross", 100, 140, 42, RED)]), ("red", "cross"))
    # JPEG of quality 30
    for shapes in ([("square", 50, 50, 26, GREEN)], [("circle", 100, 150, 30, YELLOW)],
                   [("star", 150, 50, 34, BLUE), ("circle", 50, 150, 28, RED)],
                   [("triangle", 50, 50, 30, ORANGE), ("cross", 150, 150, 30, PURPLE)]):
        names = {GREEN: "green", YELLOW: "yellow", BLUE: "blue", RED: "red", ORANGE: "orange",
                 PURPLE: "purple"}
        store(pasted(Image.new("RGB", size, (240, 240, 235)), shapes),
              *[(names[colour], kind) for kind, *_, colour in shapes], name="jpg", quality=30)
    # turned: the shape, or the whole picture
    store(pasted(Image.new("RGB", size, "white"), [("square", 100, 100, 40, RED)], 30),
          ("red", "square"))
    store(pasted(Image.new("RGB", size, "white"), [("triangle", 150, 50, 34, BLUE)], 180),
          ("blue", "triangle"))
    store(pasted(Image.new("RGB", size, "white"), [("cross", 50, 150, 32, GREEN)], 45),
          ("green", "cross"))
    store(pasted(Image.new("RGB", (200, 300), "white"), [("star", 100, 80, 50, ORANGE)]).rotate(
        90, expand=True), ("orange", "star"))
    # drawings on paper, scanned
    for number, (kind, colour, rgb, x, y) in enumerate((
            ("circle", "blue", BLUE, 60, 60), ("triangle", "red", RED, 140, 60),
            ("square", "purple", PURPLE, 60, 140), ("star", "yellow", YELLOW, 140, 140))):
        store(scanned(pasted(Image.new("RGB", size, "white"), [(kind, x, y, 36, rgb)]), number),
              (colour, kind), name="jpg", quality=60)
    return made


def album(folder):
    """All forty, written into a folder."""
    return twelve(folder) + twenty_eight(folder)


def named_right(model, folder):
    """[(file name, truth, text)] of the forty: those whose objects are not all named, or others."""
    import data
    from generate import build_prompt, generate
    from toy.texts import things_in
    wrong = []
    ids = build_prompt(["Describe this image"], model.template, model.tokenizer)
    for path, truth in album(folder):
        pixels = data.preprocess(data.load_image(path), model.image_size, model.aspect)
        text = model.tokenizer.decode(list(generate(model, ids, pixels, max_new_tokens=90)))
        if set(things_in(text)) != truth:
            wrong.append((path.name, truth, text.strip()))
    return wrong


def main():
    """A sheet, or a table of models."""
    with tempfile.TemporaryDirectory() as folder:
        made = album(Path(folder))
        if sys.argv[1].endswith(".png"):
            sheet = Image.new("RGB", (8 * 130, 5 * 130), "black")
            for i, (path, _) in enumerate(made):
                image = Image.open(path).convert("RGB")
                image.thumbnail((126, 126))
                sheet.paste(image, (i % 8 * 130 + 2, i // 8 * 130 + 2))
            sheet.save(sys.argv[1])
            return
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from projector import VLM
        for model in sys.argv[1:]:
            wrong = named_right(VLM.from_pretrained(model), Path(folder))
            print(f"{model}: {len(made) - len(wrong)} of {len(made)} named right")
            for name, truth, text in wrong:
                print(f"  {name}: {sorted(truth)}: {text}")


if __name__ == "__main__":
    main()
