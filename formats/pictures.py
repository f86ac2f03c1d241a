"""Other people's pictures: found by name, checked, decoded to RGB; and which files of a folder are.

    a name in a row ── picture_path ── a regular file inside the picture folder
    a folder ───────── list_pictures ─ its pictures, and a line about its other files
    a file ─────────── load_image ──── RGB, upright, alpha on white

Two things decide whether a picture is read: its size, which is checked before memory is taken, and
its pixels. Metadata (EXIF, XMP, ICC profiles, comments) never does. It is left out before Pillow
reads the file, however long or broken it is; only the orientation is looked for, in the first MiB.
Pillow's own limits are global settings of the program, so they are left as they are.
"""
import io
import os
import struct
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import (
    BmpImagePlugin,
    features,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from formats.errors import BadData, BadImage
from formats.picture_metadata import without_metadata


class _Tiff(TiffImagePlugin.TiffImageFile):
    def load_end(self):
        """Pillow reads the EXIF here, and turns the picture: broken EXIF would end it."""


READERS = {"PNG": PngImagePlugin.PngImageFile, "JPEG": JpegImagePlugin.jpeg_factory,
           "WEBP": WebPImagePlugin.WebPImageFile, "GIF": GifImagePlugin.GifImageFile,
           "BMP": BmpImagePlugin.BmpImageFile, "TIFF": _Tiff}
if "avif" in features.modules and features.check("avif"):       # Pillow 11.3 and later
    from PIL import AvifImagePlugin
    READERS["AVIF"] = AvifImagePlugin.AvifImageFile
FORMATS = tuple(READERS)
GIVE = f"give a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
NOT_READ = {        # known by their first bytes: what to do instead
    "HEIC": "HEIC is not read here: convert it to JPEG first (heif-convert a.heic a.jpg; on a "
            "telephone set the camera to \"most compatible\")",
    "AVIF": "AVIF needs Pillow 11.3 or later: pip install -U pillow"}
SUFFIXES = (".png .apng .jpg .jpeg .jpe .jfif .jif .jfi .pjpeg .pjp .mpo .webp .gif .bmp .tif "
            ".tiff").split() + [".avif"] * ("AVIF" in READERS)
# A telephone's sensor has up to 200 million pixels (16,320 × 12,240). Decoding takes 8 bytes for
# each, so 1.6 GB; a progressive JPEG up to 10.
MOST = 205_000_000
# DEFLATE packs 1,000 equal bytes into one. Over 50 megapixels a file that holds 2,000 pixels a byte
# is no photograph.
PLAIN, PACKED = 50_000_000, 2000
# Intermediates take 4 bytes a pixel. LARGEST: a telephone's picture, made square; LARGE: that of a
# strip, STRIP times as long as wide.
LARGEST, LARGE, STRIP = 2 ** 28, 2 ** 26, 16
# What Pillow raises on damaged files, found by mutating some; UserError is none of these.
_DAMAGE = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError,
           OSError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error,
           Image.DecompressionBombError)


# ---------------------------------------------------------------- names

def picture_path(root, name: str, follow_links: bool = False) -> Path:
    """The regular file `name` inside the folder `root`, links resolved; else BadData.

    follow_links: a link in the folder may lead out of it, to a shared disk for example. The name
    itself never may: absolute names and ".." are refused always."""
    windows = PureWindowsPath(name)         # also splits at "/", so one look serves both worlds
    if not name or "\0" in name or windows.anchor or ".." in windows.parts:
        raise BadData(f"image {name!r}: must be a plain path inside {root}: correct the sample")
    try:
        path = Path(os.path.realpath(os.path.join(root, name)))     # half the time of resolve()
        inside, regular = path.is_relative_to(os.path.realpath(root)), path.is_file()
    except (OSError, ValueError) as error:
        raise BadData(f"image {name!r}: {error}: correct the sample") from None
    if not inside and not follow_links:
        raise BadData(f"image {name!r}: leads outside of {root} by a link: give --follow-links if "
                      "you trust the links in that folder, or correct the sample")
    if not regular:
        raise BadData(f"image {name!r}: is not a file of {root}: correct the sample or the folder")
    return path


def kind_of(head: bytes):
    """Which format a file's first bytes say: a key of READERS or NOT_READ, or None."""
    if head[4:8] == b"ftyp":                # AVIF and HEIC are MPEG-4 containers with a list of
        size = max(16, int.from_bytes(head[:4], "big"))                         # four-letter brands
        brands = {head[i:i + 4] for i in range(8, min(size, len(head)), 4)}
        return ("AVIF" if brands & {b"avif", b"avis"} else
                "HEIC" if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm",
                                    b"hevs", b"mif1", b"msf1"} else None)
    if head[:4] == b"RIFF":
        return "WEBP" if head[8:12] == b"WEBP" else None
    if head[:2] == b"BM":                   # a text may begin so too: look at its header's size
        known = (12, 16, 40, 52, 56, 64, 108, 124)
        return "BMP" if int.from_bytes(head[14:18], "little") in known else None
    begins = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "GIF": b"GIF8"}
    found = [kind for kind, magic in begins.items() if head.startswith(magic)]
    tiff = head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")
    return found[0] if found else "TIFF" if tiff else None


def _is_picture(path):
    """(is it a picture that is read here?, the format of one that is not).

    By the ending; without one by the first bytes. An ending of something else is believed: a
    camera's raw file begins like a TIFF."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return True, None
    if suffix in (".heic", ".heif", ".hif"):
        return False, "HEIC"
    if suffix == ".avif":
        return False, "AVIF"
    if suffix or not path.is_file():        # opening a pipe would hang
        return False, None
    try:
        with open(path, "rb") as file:
            kind = kind_of(file.read(64))
    except OSError:
        return False, None
    return kind in READERS, kind if kind not in READERS else None


def _names(paths, root):
    """The first few, in printable letters."""
    names = ["".join(c if c.isprintable() else "?" for c in p.relative_to(root).as_posix())
             for p in sorted(paths)[:3]]
    return ", ".join(names) + " ..." * (len(paths) > 3)


def list_pictures(folder, below=False, follow_links=False):
    """(paths of the pictures of a folder by name, lines about what else is there).

    below: those of the folders in it too. A link to a folder is entered with follow_links only, and
    no folder twice. A link to a file counts by its ending; one without is opened only if it stays
    inside the folder, or with follow_links."""
    root, real = Path(folder), os.path.realpath(folder)
    pictures, others, unread, closed, links, entered = [], [], {}, [], [], {real}
    for top, folders, files in os.walk(root, followlinks=follow_links):
        inside, folders[:] = sorted(folders), []
        for path in (Path(top, name) for name in inside):
            target = os.path.realpath(path)
            if not below:
                closed.append(path)
            elif path.is_symlink() and not follow_links or target in entered:
                links.append(path)
            else:
                entered.add(target)
                folders.append(path.name)
        for path in (Path(top, name) for name in files):
            out = path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real)
            if out and not follow_links and not path.suffix:
                links.append(path)
                continue
            good, kind = _is_picture(path)
            (pictures if good else unread.setdefault(kind, []) if kind else others).append(path)
    lines = [f"{len(paths)} {kind} file(s) passed over, {_names(paths, root)}: {NOT_READ[kind]}"
             for kind, paths in sorted(unread.items())]
    why = "lead to a folder read already" if follow_links else "not followed without --follow-links"
    for paths, what in ((others, "file(s) are no pictures"), (links, f"link(s) {why}"),
                        (closed, "folder(s) in it are not entered")):
        if paths:
            lines.append(f"{len(paths)} {what}: {_names(paths, root)}")
    return sorted(pictures), lines


# ---------------------------------------------------------------- pixels

_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}


def _turn(image):
    """How EXIF or XMP says that the picture is to be turned; None: not at all, or nobody can tell.

    Pillow's exif_transpose would also write the EXIF anew, which broken EXIF ends."""
    try:
        orientation = image.getexif().get(0x0112)
    except _DAMAGE:
        return None
    return _TURNS.get(orientation) if type(orientation) is int else None


def pad_to_square(image, colour):
    """The picture in the middle of a square of this colour. Raises BadImage for a strip whose
    square would take hundreds of MB: 64 x 15,000 pixels, a file of 12 KB, would take 900."""
    side = max(image.size)
    check_pixels(side, side, LARGE if side > STRIP * min(image.size) else LARGEST)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def check_pixels(width, height, most=LARGEST):
    """Refuse an intermediate picture that would fill the memory."""
    if width * height > most:
        raise BadImage(f"a {width}×{height} intermediate is too large: crop the picture first")


def _to_rgb(image):
    """Any mode to RGB as a viewer would show it: alpha on white, 16 bits scaled to 8."""
    if image.mode.startswith("I"):              # convert() would clip 16 bits to white
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its numbers lie outside 0 .. 65535")
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pictures do not say which number is white")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _rgb(image):
    """`_to_rgb` by strips of 4 megapixels, so that a large picture stands in memory twice, not five
    times. A pixel's colour depends on no other pixel."""
    small = image.width * image.height <= 1 << 22
    if small or image.mode == "RGB" and "transparency" not in image.info:
        return _to_rgb(image)
    rgb, rows = Image.new("RGB", image.size), max(1, (1 << 22) // image.width)
    for top in range(0, image.height, rows):
        box = 0, top, image.width, min(top + rows, image.height)
        rgb.paste(_to_rgb(image.crop(box)), box)
    return rgb


def _decoded(file, name):
    """RGB of an open file. Raises BadImage, or one of _DAMAGE."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    kind = kind_of(file.read(64))
    if kind not in READERS:
        if kind in NOT_READ:
            raise BadImage(f"{name}: {NOT_READ[kind]}")
        raise ValueError("cannot identify it as a picture")
    image = READERS[kind](without_metadata(file, kind), "")
    width, height = image.size
    pixels, large = width * height, f"{name}: {width}×{height}"
    if pixels > MOST:
        raise BadImage(f"{large} is over {MOST // 10 ** 6} megapixels: make it smaller first")
    if pixels > PLAIN and size * PACKED < pixels:
        raise BadImage(f"{large} is over {PLAIN // 10 ** 6} megapixels in {size:,} bytes, which is "
                       "no photograph but may fill the memory: make it smaller first")
    turn = _turn(image) if kind == "TIFF" else None     # its EXIF is read while the file is open
    try:
        image.load()
        turn = turn or _turn(image)                     # a PNG's may stand behind the pixels
        image = _rgb(image)
        return image if turn is None else image.transpose(turn)
    except MemoryError:
        if pixels < 2 ** 24:                            # Pillow's word for some kinds of damage
            raise
        raise BadImage(f"{large} is too large for this machine's memory: make it smaller "
                       "first") from None
    except Image.DecompressionBombError:
        raise BadImage(f"{large} is more than Pillow reads of {kind}: make it smaller "
                       "first") from None


def load_image(path) -> Image.Image:
    """A picture as RGB: upright by its EXIF tag, alpha on white, first frame of an animation.

    path: a file name or a binary file object. PNG, JPEG, WEBP, GIF, BMP, TIFF or AVIF, at most 205
    megapixels (checked before decoding). Raises BadImage for every other file, however damaged."""
    named = isinstance(path, (str, Path))
    name = path if named else getattr(path, "name", "picture")
    try:
        if named and not Path(path).is_file():          # opening a pipe would hang
            raise OSError("no such file")
        if not named and not path.seekable():
            path = io.BytesIO(path.read())
        with open(path, "rb") if named else nullcontext(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decoded(file, name)
    except _DAMAGE as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"{name}: {why}: {GIVE}") from None
