"""What a run leaves to look at: loss.png, and learning.png, what it said of one picture meanwhile.

    is_sampled      at which steps the model is asked: 0, 50, 100, 200, 400 ... and the last
    shown_scenes    the four held-out pictures that it is asked about
    plot_loss       loss.png: the curve alone
    draw_learning   learning.png: the picture, the curve, and the answers one below the other

An object that is named and is there is green; one that is not there is red and struck out. A run
without samples (--data, BLIP-2's first stage, stage 0) has the curve alone."""

import io
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from toy.texts import description, things_in
from toy.world import COLOURS, draw, make_scene, SHAPES
from trainer.logs import read_lines

WIDTH, MARGIN, LABEL = 960, 24, 150         # pixels; LABEL: the column of the steps
SIDE = 288                                  # of the picture
SIZE, SPACE = 26, 34                        # of the letters; from line to line
MOST_LINES = 3                              # of an answer
INK, PALE, GREEN, RED = "#1b1b1b", "#5f6368", "#0b7a33", "#c0182b"
SHOWN = 3                                   # the scene of learning.png has so many objects


def is_sampled(step, steps, every=None):
    """Is the model asked after so many steps? The first steps change most: 0, 50, 100, 200, 400,
    800 ... and the last; in a run of less than 100 steps from an eighth of it on.

    every: after so many steps each, and after the last; 0: never."""
    if every is not None:
        return every > 0 and (step % every == 0 or step == steps)
    first = 50 if steps >= 100 else max(1, steps // 8)
    doublings = math.log2(step / first) if step else 0.0
    return step in (0, steps) or doublings >= 0 and doublings.is_integer()


def shown_scenes():
    """Four held-out scenes, of one to four objects, always the same."""
    return [make_scene(count, "test", count=count) for count in (1, 2, 3, 4)]


def rows_of(path, **kinds):
    """The lines of a .jsonl as dicts, of those that have a step and all of `kinds` {key: type};
    none where there is no file."""
    return [row for _, row in read_lines(path, **kinds)] if path.exists() else []


def numbers_of(lines, name):
    """A number of each line; NaN, a gap in a curve, where there is none."""
    return [line[name] if type(line.get(name)) is float else math.nan for line in lines]


# ------------------------------------------------------------------------------ the curve

def curve(out, size, dpi, marks=()):
    """PIL image of the loss in `out`, size in inches; marks: steps that get a dot."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
    lines = rows_of(out / "metrics.jsonl")
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    names = [name for name in ("itc", "itm", "itg") if any(name in line for line in lines)]
    for name in ("loss", *names):
        axes.plot([line["step"] for line in lines], numbers_of(lines, name), label=name)
    held_out = [line for line in lines if type(line.get("eval_loss")) is float]
    if held_out:
        axes.plot([line["step"] for line in held_out], [line["eval_loss"] for line in held_out],
                  "o-", label="held-out")
    if names or held_out:                               # BLIP-2's three, and their sum
        axes.legend()
    dots = [line for line in lines if line["step"] in marks]
    axes.plot([line["step"] for line in dots], numbers_of(dots, "loss"), "o", color=INK)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    # 0.1, not 10 to the -1; numbers between powers of ten where there is room
    axes.yaxis.set_major_formatter(ticker.LogFormatter())
    axes.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(1, .4)))
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi)
    pyplot.close(figure)
    return Image.open(file).convert("RGB")


def plot_loss(out):
    """loss.png from metrics.jsonl."""
    curve(out, (6, 3), 100).save(out / "loss.png")


# ------------------------------------------------------------------------------ the answers

def font(style=""):
    """DejaVu Sans, which comes with matplotlib; style: "" or "-Bold"."""
    import matplotlib
    return ImageFont.truetype(Path(matplotlib.get_data_path(), f"fonts/ttf/DejaVuSans{style}.ttf"),
                              SIZE)


def judged_words(text, truth):
    """[(word, INK, GREEN or RED)]: the two words of a named object are green if it is there."""
    words, there = text.split(), set(things_in(truth))
    colours = [INK] * len(words)
    for i in range(len(words) - 1):
        found = things_in(f"{words[i]} {words[i + 1]}")
        if found and words[i] in COLOURS and words[i + 1].strip(".,;:") in SHAPES:
            colours[i] = colours[i + 1] = GREEN if found[0] in there else RED
    return list(zip(words, colours))


def score_line(text, truth):
    """"2 of 3": objects that are there and are named."""
    there = set(things_in(truth))
    return f"{len(there & set(things_in(text)))} of {len(there)}"


def lay_out(words, width):
    """[[(x, word, colour)]]: the lines of a text, at most MOST_LINES; the last may end in "…"."""
    lines, x = [[]], 0
    space = font().getlength(" ")
    for word, colour in words:
        size = font("-Bold" if colour != INK else "").getlength(word)
        if lines[-1] and x + size > width:
            if len(lines) == MOST_LINES:
                lines[-1].append((min(x, width), "…", INK))
                return lines
            lines.append([])
            x = 0
        lines[-1].append((x, word, colour))
        x += size + space
    return lines


def draw_answer(pen, top, row, truth):
    """One answer at height `top`; returns the height below it."""
    lines = lay_out(judged_words(row["says"], truth), WIDTH - 2 * MARGIN - LABEL - SIZE)
    pen.text((MARGIN, top), f"step {row['step']:,}", INK, font("-Bold"))
    pen.text((MARGIN, top + SPACE), score_line(row["says"], truth), PALE, font())
    for number, line in enumerate(lines):
        y = top + number * SPACE
        for x, word, colour in line:
            x += MARGIN + LABEL
            style = font("-Bold" if colour != INK else "")
            pen.text((x, y), word, colour, style)
            if colour == RED:
                middle = y + .62 * SIZE
                pen.line((x, middle, x + style.getlength(word), middle), RED, 3)
    return top + max(2, len(lines)) * SPACE + SPACE // 2


def draw_learning(out, path=None):
    """learning.png from metrics.jsonl and samples.jsonl of the run in `out`; path: elsewhere."""
    path, scene = path or out / "learning.png", shown_scenes()[SHOWN - 1]
    truth = description(scene)
    rows = rows_of(out / "samples.jsonl", truth=str, says=str)
    rows = [row for row in rows if row["truth"] == truth]
    if not rows:
        curve(out, (4.8, 2.8), 200).save(path)
        return
    plot = curve(out, ((WIDTH - SIDE - 2 * MARGIN) / 160, (SIDE + 2 * MARGIN) / 160), 160,
                 [row["step"] for row in rows])
    sheet = Image.new("RGB", (WIDTH, 3000), "white")
    sheet.paste(plot, (SIDE + 2 * MARGIN, 0))
    sheet.paste(draw(scene, SIDE), (MARGIN, MARGIN))
    pen, top = ImageDraw.Draw(sheet), SIDE + 3 * MARGIN
    for row in rows:
        pen.line((MARGIN, top - SPACE // 4, WIDTH - MARGIN, top - SPACE // 4), "#dadce0", 2)
        top = draw_answer(pen, top, row, truth)
    sheet.crop((0, 0, WIDTH, top + MARGIN // 2)).save(path)
