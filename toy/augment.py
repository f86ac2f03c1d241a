"""toy.augment: scenes as others would draw them: the pictures from which the toy's CLIP learns.

    recolour         the same scene in colours that have no name here: grey, brown, pink, cyan ...
    draw_augmented   outlines, shading, turned shapes, a photograph behind them; blur, noise, JPEG

OpenAI's CLIP has seen 400 million pictures of all kinds, so LLaVA can rely on it. A tower that has
seen only the clean pictures of `toy.world.draw` fails on other people's drawings, and it learns
shapes together with the six colours: of an object whose colour-shape pair was kept out of training
a linear probe read the shape of .77 (docs/results.md). Shapes in colours without a name say that
the shape does not depend on the colour. They are never the colour of a pair that is kept out, not
even pale.

Next: toy/parts.py, which mixes them in.
"""
import colorsys
import io
import math
import random
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from toy.world import CANVAS, COLOURS, draw, draw_padding, HELD_OUT_PAIRS, SIDE

CANVAS_SIDE = SIDE * CANVAS
STYLES = ("solid", "solid", "hollow", "contour", "gradient", "gradient")    # of an object


def hue_distance(hue, colour):
    """From a hue to the nearest that has this colour's name, in turns; negative inside."""
    middle, width, _, _ = COLOURS[colour]
    distance = abs(hue - middle)
    return min(distance, 1 - distance) - width


def unnamed_rgb(rng, shape):
    """A colour that is none of COLOURS, and not near one that this shape is never seen in."""
    while True:
        hue = rng.random()
        saturation = rng.choice((rng.uniform(0, .12), rng.uniform(.3, 1), rng.uniform(.5, 1)))
        value = rng.uniform(.15, 1)
        grey = saturation <= .12                    # it looks the same for every hue
        has_name = saturation > .45 and value > .4 and min(
            hue_distance(hue, colour) for colour in COLOURS) < .03
        kept_out = any(shape == other and hue_distance(hue, colour) < .06
                       for colour, other in HELD_OUT_PAIRS)
        if grey or not (has_name or kept_out):
            return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, saturation, value))


def is_visible(rgb, background):
    """Does a colour differ from both tones of a background?"""
    return all(sum(abs(a - b) for a, b in zip(rgb, tone)) > 150 for tone in background)


def recolour(scene, seed):
    """The same scene in colours without a name: every object's `colour` is ""."""
    things = []
    for i, t in enumerate(scene.things):
        rng = random.Random(f"{seed}:{i}:{t.shape}")
        for _ in range(50):
            rgb = unnamed_rgb(rng, t.shape)
            if is_visible(rgb, scene.background_rgb):
                break
        things.append(replace(t, colour="", rgb=rgb))
    return replace(scene, things=tuple(things))


# ------------------------------------------------------------------- what an image is painted with

def photo_noise(rng):
    """Light and shade at several scales, as an unsharp photograph has them."""
    image, size = None, (CANVAS_SIDE, CANVAS_SIDE)
    for cells, share in ((3, 1), (6, .5), (16, .35), (48, .25)):
        grain = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells))
        grain = grain.resize(size, Image.Resampling.BICUBIC)
        image = grain if image is None else Image.blend(image, grain, share * rng.random())
    return image


def gradient(rng, start, end, side=CANVAS_SIDE):
    """From one RGB colour to another, in a random direction."""
    steps, angle = np.linspace(-.5, .5, side), rng.uniform(0, 2 * math.pi)
    ramp = .5 + steps[None] * math.cos(angle) + steps[:, None] * math.sin(angle)
    ramp = np.clip(ramp, 0, 1)[..., None]                                   # (side, side, 1)
    return Image.fromarray((np.array(start) * (1 - ramp) + np.array(end) * ramp).astype(np.uint8))


def shade(rgb, factor):
    """Darker, or brighter."""
    return tuple(min(255, max(0, round(v * factor))) for v in rgb)


def background_image(scene, rng):
    """(image, does it still show the scene's background?)"""
    kept, size = rng.random() < .45, (CANVAS_SIDE, CANVAS_SIDE)
    if kept:
        empty = draw(replace(scene, things=()), SIDE)
        return empty.resize(size, Image.Resampling.NEAREST), True
    tone, how = scene.background_rgb[0], rng.random()
    if how < .5:
        photo = photo_noise(rng)
        image = Image.blend(photo, Image.new("RGB", size, tone), rng.uniform(.3, .85))
    elif how < .85:
        start, end = shade(tone, rng.uniform(.55, 1)), shade(tone, rng.uniform(.8, 1.2))
        image = gradient(rng, start, end)
    else:
        image = Image.new("RGB", size, tone)
    draw_padding(ImageDraw.Draw(image), CANVAS_SIDE, *(CANVAS * v for v in scene.padding))
    return image, False


def shape_mask(t, scale, turn):
    """Where an object lies, drawn `scale` times as large and turned further by `turn` degrees."""
    mask = Image.new("L", (CANVAS_SIDE, CANVAS_SIDE))
    pen, (x, y), r = ImageDraw.Draw(mask), t.centre, t.radius * scale
    if t.shape == "circle":
        pen.ellipse([CANVAS_SIDE * v for v in (x - r, y - r, x + r, y + r)], fill=255)
    else:
        outline = replace(t, radius=r, turn=t.turn + turn).outline
        pen.polygon([(CANVAS_SIDE * px, CANVAS_SIDE * py) for px, py in outline], fill=255)
    return mask


def paint(image, t, turn, rng):
    """Paint one object in one of STYLES."""
    style, whole = rng.choice(STYLES), shape_mask(t, 1, turn)
    if style == "solid":
        image.paste(t.rgb, mask=whole)
    if style == "gradient":
        darkest = rng.uniform(.62, .95)
        image.paste(gradient(rng, shade(t.rgb, darkest), t.rgb), mask=whole)
    if style == "hollow":                           # lines of different widths
        inner = np.array(shape_mask(t, rng.uniform(.4, .75), turn))
        line = np.where(inner > 0, 0, np.array(whole))
        image.paste(t.rgb, mask=Image.fromarray(line))
    if style == "contour":
        image.paste(rng.choice(((0, 0, 0), shade(t.rgb, .5), (255, 255, 255))), mask=whole)
        image.paste(t.rgb, mask=shape_mask(t, rng.uniform(.75, .92), turn))


def degrade(image, rng):
    """What cameras, scanners and files do: blur, noise, uneven light, JPEG; each now and then."""
    if rng.random() < .35:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(.3, 1.)))
    if rng.random() < .4:
        pixels = np.asarray(image).astype(np.float32)
        numbers = np.random.default_rng(rng.randrange(2 ** 32))
        # one noise for all three colours, or one for each
        grain = numbers.standard_normal((*pixels.shape[:2], rng.choice((1, 3))), dtype=np.float32)
        pixels = np.clip(pixels + grain * rng.uniform(3, 22), 0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
    if rng.random() < .3:
        darkest = (round(255 * rng.uniform(.65, 1)),) * 3
        light = np.asarray(gradient(rng, darkest, (255,) * 3, SIDE)).astype(np.float32) / 255
        image = Image.fromarray((np.asarray(image) * light).astype(np.uint8))
    if rng.random() < .4:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(20, 75))
        image = Image.open(file).convert("RGB")
    return image


def draw_augmented(scene, rng):
    """(PIL image (SIDE, SIDE) RGB, does it still show the scene's background?)"""
    image, kept = background_image(scene, rng)
    turned = rng.random() < .4
    for t in scene.things:
        paint(image, t, rng.uniform(-180, 180) if turned else rng.uniform(-15, 15), rng)
    return degrade(image.reduce(CANVAS), rng), kept


if __name__ == "__main__":                          # python -m toy.augment: a sheet to look at
    from toy.world import make_scene
    sheet = Image.new("RGB", (8 * (SIDE + 4), 6 * (SIDE + 4)), "white")
    for i in range(48):
        shown = make_scene(i)
        if i % 3 == 0:
            shown = recolour(shown, i)
        place = i % 8 * (SIDE + 4) + 2, i // 8 * (SIDE + 4) + 2
        sheet.paste(draw_augmented(shown, random.Random(i))[0], place)
    sheet.save("augmented-sheet.png")
    print("augmented-sheet.png written: every third scene is in colours without a name")
