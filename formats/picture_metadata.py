"""A PNG or JPEG without what does not decide about its pixels.

Pillow refuses a whole picture for a long or broken comment, colour profile or EXIF. So the file is
walked through, from header to header, and Pillow is shown the other parts only.
"""
import io
import os
import struct
import zlib
from bisect import bisect_right

METADATA = 1 << 20      # bytes of EXIF and XMP that are kept, for the orientation in them


class _Parts(io.RawIOBase):
    """A file of which only some stretches [(start, stop)] can be read, one behind the other."""

    def __init__(self, file, parts):
        self.file, self.parts, self.starts, self.end, self.at = file, parts, [], 0, 0
        for start, stop in parts:
            self.starts.append(self.end)
            self.end += stop - start

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        self.at = max(0, offset + (0, self.at, self.end)[whence])
        return self.at

    def readinto(self, buffer):
        if self.at >= self.end:
            return 0
        part = bisect_right(self.starts, self.at) - 1
        start, stop = self.parts[part]
        start += self.at - self.starts[part]
        self.file.seek(start)
        got = self.file.read(min(len(buffer), stop - start))
        buffer[:len(got)] = got
        self.at += len(got)
        return len(got)


def _inflates(packed):
    """Does it unpack, to at most METADATA bytes?"""
    one = zlib.decompressobj()
    try:
        one.decompress(packed, METADATA)
    except zlib.error:
        return False
    return not one.unconsumed_tail


def _tells_orientation(name, body):
    """Can this chunk of a PNG tell how the picture is to be turned, and is it short?"""
    key, _, rest = body.partition(b"\0")
    if name == b"zTXt":
        return key == b"Raw profile type exif" and rest[:1] == b"\0" and _inflates(rest[1:])
    if name == b"iTXt":                     # packed?, how, \0 language \0 keyword \0 text
        text = rest[2:].split(b"\0", 2)[-1]
        return key == b"XML:com.adobe.xmp" and (rest[:1] == b"\0" or _inflates(text))
    return name == b"eXIf" or key in (b"Raw profile type exif", b"exif")


def _png_parts(file, end):
    """The signature, and the chunks that decide about pixels: the critical ones (capital letter),
    transparency, frames of an animation, and a MiB of what may tell the orientation."""
    parts, at, left = [(0, 8)], 8, METADATA
    while at + 12 <= end:
        file.seek(at)
        length, name = struct.unpack(">I4s", file.read(8))
        stop = at + 12 + length
        if stop > end or not name.isalnum():        # damaged: Pillow says how
            break
        wanted = name[:1].isupper() or name in (b"tRNS", b"acTL", b"fcTL", b"fdAT")
        if name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and length <= left:
            body, crc = file.read(length), file.read(4)
            whole = crc == struct.pack(">I", zlib.crc32(name + body))
            wanted = whole and _tells_orientation(name, body)
            left -= length * wanted
        if wanted:
            parts.append((at, stop))
        at = stop
    return [*parts, (at, end)]


def _jpeg_parts(file, end):
    """The segments that decide about pixels: all but APP1 to APP13, APP15 and comments; of EXIF and
    XMP (APP1) a MiB. APP0 and APP14 tell the colours, if they are as long as they have to be."""
    parts, at, left = [(0, 2)], 2, METADATA
    while True:
        file.seek(at)
        head = file.read(4)
        if head[:2] == b"\xff\xff":                 # a byte of filling
            at += 1
            continue
        if head[:1] != b"\xff":                     # a length was wrong: Pillow may know better
            return [(0, end)]
        marker, length = head[1:2], int.from_bytes(head[2:4], "big")
        stop = at + 2 + length
        if len(head) < 4 or not b"\xc0" <= marker <= b"\xfe" or (
                marker == b"\xda" or b"\xd0" <= marker <= b"\xd9" or length < 2 or stop > end):
            break                                   # the scan, or damage: Pillow says which
        wanted = not (b"\xe0" <= marker <= b"\xef" or marker == b"\xfe")
        wanted |= marker == b"\xe0" and length >= 16 or marker == b"\xee" and length >= 14
        if marker == b"\xe1" and length <= left:
            wanted, left = True, left - length
        if wanted:
            parts.append((at, stop))
        at = stop
    return [*parts, (at, end)]


def without_metadata(file, kind):
    """The file, or a view of it without the metadata."""
    read = {"PNG": _png_parts, "JPEG": _jpeg_parts}.get(kind, lambda file, end: [(0, end)])
    end, joined = file.seek(0, os.SEEK_END), []
    for start, stop in read(file, end):
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    file.seek(0)
    return file if joined == [(0, end)] else io.BufferedReader(_Parts(file, joined), 65536)
