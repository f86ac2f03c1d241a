"""docs.drawing.svg: a sheet of SVG that is legible on a phone, in light and in dark.

All sheets are WIDTH units wide, so a phone shows them at about three quarters: letters of 14 units
are 10 pixels there. The colours are classes with two values, one for each scheme; the sheet has a
ground of its own, so it can be read on any page. Every text is measured before it is written, in
DejaVu Sans, which is wider than what browsers have in its place: one that does not fit is an error.
"""
import base64
import functools
import io
from html import escape
from pathlib import Path

WIDTH, MARGIN = 480, 16
FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif'
# name: light, dark. paper is the ground; blue, orange, green, red and grey fill boxes; the names
# ending in -ink write
COLOURS = {
    "paper": ("#ffffff", "#16191d"), "ink": ("#1b1b1b", "#e8eaed"), "pale": ("#5f6368", "#a8adb4"),
    "line": ("#aeb3ba", "#5a6069"), "blue": ("#cfe2ff", "#24477a"),
    "orange": ("#ffd9a8", "#7a4a12"), "green": ("#c6ecce", "#1f5c33"),
    "red": ("#ffd0d0", "#7a2a2a"), "grey": ("#e9ebee", "#2c3138"),
    "blue-ink": ("#1a56b0", "#8ab4f8"), "orange-ink": ("#a85300", "#ffb870"),
    "green-ink": ("#0b7a33", "#7fd99a"), "red-ink": ("#c0182b", "#ff8f8f"),
    "purple-ink": ("#7a2fa0", "#d7a6f5")}


@functools.cache
def measured(size, bold):
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont
    name = f"fonts/ttf/DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), name), size)


def width_of(text, size=14, bold=False):
    """Units that a text takes, rather more than less."""
    return measured(100, bold).getlength(text) * size / 100


def wrapped(text, width, size=14, bold=False):
    """The text in lines that fit into a width."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width_of(longer, size, bold) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def style():
    """The colours as classes: .f-blue fills, .s-blue strokes."""
    def rules(scheme):
        return "".join(f".f-{name}{{fill:{pair[scheme]}}}.s-{name}{{stroke:{pair[scheme]}}}"
                       for name, pair in COLOURS.items())
    return (f"<style>text{{font-family:{FONT}}}{rules(0)}"
            f"@media(prefers-color-scheme:dark){{{rules(1)}}}</style>")


class Sheet:
    """What is drawn so far; y grows downward. `save` writes it."""

    def __init__(self, title):
        self.parts, self.bottom = [], 0
        self.title, y = title, MARGIN + 18
        for line in wrapped(title, WIDTH - 2 * MARGIN, 18, bold=True):
            self.text(MARGIN, y, line, 18, bold=True)
            y += 24
        self.bottom = y - 8

    def add(self, part, bottom):
        self.parts.append(part)
        self.bottom = max(self.bottom, bottom)

    def text(self, x, y, text, size=14, colour="ink", anchor="start", bold=False, room=None):
        """A line of text on the base line y; returns its width, at most `room`."""
        width = width_of(text, size, bold)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        most = room or WIDTH
        if width > most or left < 0 or left + width > WIDTH:
            raise ValueError(f"{text!r} is {width:.0f} units wide at x = {left:.0f}: it does not "
                             f"fit into {most:.0f}")
        weight = ' font-weight="700"' if bold else ""
        anchored = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.add(f'<text class="f-{colour}" x="{x:.1f}" y="{y:.1f}" font-size="{size}"{weight}'
                 f"{anchored}>{escape(text)}</text>", y + size / 3)
        return width

    def note(self, y, text, size=14, colour="pale", x=MARGIN, room=None):
        """Lines of a paragraph from y on; returns the y below it."""
        for line in wrapped(text, room or WIDTH - MARGIN - x, size):
            self.text(x, y, line, size, colour)
            y += size * 1.4
        return y

    def box(self, x, y, width, height, fill="grey", line="line", round_=3, thick=1):
        """A rectangle; line None: without a border."""
        stroke = f' class="f-{fill}"'
        if line:
            stroke = f' class="f-{fill} s-{line}" stroke-width="{thick}"'
        if fill is None:
            stroke = f' class="s-{line}" fill="none" stroke-width="{thick}"'
        self.add(f'<rect{stroke} x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
                 f'rx="{round_}"/>', y + height)

    def line(self, points, colour="line", thick=1.5, dashes=None):
        """A line through points [(x, y)]."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.add(f'<polyline class="s-{colour}" fill="none" stroke-width="{thick}"{dash} '
                 f'points="{path}"/>', max(y for _, y in points))

    def arrow(self, x1, y1, x2, y2, colour="line"):
        """An arrow straight down, or to the right."""
        self.line([(x1, y1), (x2, y2)], colour)
        head = ((-4, -8), (4, -8)) if x1 == x2 else ((-8, -4), (-8, 4))
        points = " ".join(f"{x2 + dx:.1f},{y2 + dy:.1f}" for dx, dy in ((0, 0), *head))
        self.add(f'<polygon class="f-{colour}" points="{points}"/>', y2)

    def dot(self, x, y, colour="ink", radius=3.5):
        self.add(f'<circle class="f-{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>', y + radius)

    def image(self, x, y, side, image):
        """A PIL image, square."""
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        code = base64.b64encode(file.getvalue()).decode()
        self.add(f'<image x="{x}" y="{y}" width="{side}" height="{side}" '
                 f'href="data:image/png;base64,{code}"/>', y + side)

    def svg(self):
        height = round(self.bottom + MARGIN)
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
                f'width="{WIDTH}" height="{height}" role="img"><title>{escape(self.title)}</title>'
                f'{style()}<rect class="f-paper" width="{WIDTH}" height="{height}" rx="6"/>'
                + "\n".join(self.parts) + "</svg>\n")

    def save(self, path):
        Path(path).write_text(self.svg(), encoding="utf-8")


def legend(sheet, y, entries):
    """A row of [(fill, words)], each behind a small box; returns the y below it."""
    x = MARGIN
    for fill, words in entries:
        width = 20 + width_of(words, 14) + 14
        if x + width - 14 > WIDTH - MARGIN:
            x, y = MARGIN, y + 22
        sheet.box(x, y - 11, 13, 13, fill)
        sheet.text(x + 20, y, words, 14)
        x += width
    return y + 22
