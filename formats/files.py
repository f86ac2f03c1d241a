"""formats/files.py: files that are whole or not there, and text in whatever Unicode it is saved.

    atomic_write         a small file: written aside, fsync, then renamed
    write_json           the same for a file that the user named
    rename_into_place    the same for a folder
    read_text            text without its BOM; UTF-16 and UTF-32 are named, not misread
    interrupted_later    Ctrl-C waits until a library has done what it does

Write aside, fsync, rename: whatever moment the power fails at, the old file is whole or the new
one is. A rename is the only step that others can see."""

import json
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from formats.errors import BadData, UserError


def fsync_path(path):
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_into_place(tmp, final):
    """fsync everything in the folder `tmp` and give it its name in one step."""
    for path in sorted(tmp.rglob("*")):
        fsync_path(path)
    fsync_path(tmp)
    os.rename(tmp, final)
    fsync_path(final.parent)


def atomic_write(path, text):
    """Write a small file (UTF-8) whole or not at all. Raises OSError, or UnicodeEncodeError."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")        # a fixed name: a next run overwrites it
    try:
        tmp.write_text(text, encoding="utf-8")
        fsync_path(tmp)
        os.replace(tmp, path)
    except (OSError, UnicodeEncodeError):
        tmp.unlink(missing_ok=True)
        raise


def write_json(path, rows):
    """A file that the user named, whole or not at all. Raises UserError."""
    folder = os.path.dirname(path) or "."
    # a rename would replace /dev/stdout itself
    if not os.path.isdir(folder) or os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a file in a folder that exists: name another")
    try:
        atomic_write(path, json.dumps(rows, ensure_ascii=False, indent=1))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: name another file") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: not written: a picture's name is not valid UTF-8: rename "
                        "it") from None


def other_unicode(raw: bytes) -> str:
    """UTF-16 or UTF-32, if the bytes of a JSON file are one of them; else "".

    A BOM shows it. Without one, zero bytes do: JSON begins with ASCII, which in UTF-8 has none. A
    text that ends in half a character is neither."""
    if len(raw) % 2:
        return ""
    if raw[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "UTF-32"
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    zeros = [byte == 0 for byte in raw[:4]]
    if zeros in ([True, True, True, False], [False, True, True, True]):
        return "UTF-32"
    if zeros[:2] in ([True, False], [False, True]):
        return "UTF-16"
    return ""


def text_of(path, kind, errors: str = "strict") -> str:
    """A file's text without its BOM. Raises `kind` where it is written in UTF-16 or UTF-32."""
    raw = Path(path).read_bytes()
    if other := other_unicode(raw):
        raise kind(f"{path}: is {other}: save it as UTF-8")
    return raw.decode("utf-8-sig", errors)


def read_text(path, limit: int, errors: str = "strict") -> str:
    """A regular file of at most `limit` bytes, without its BOM. OSError or ValueError; BadData for
    one in UTF-16 or UTF-32."""
    if not os.path.isfile(path):                    # opening a pipe would hang, a device never end
        raise OSError("not a file" if os.path.exists(path) else "no such file")
    if (size := os.path.getsize(path)) > limit:
        raise ValueError(f"{size:,} bytes where at most {limit:,} are expected")
    return text_of(path, BadData, errors)


@contextmanager
def interrupted_later():
    """Ctrl-C inside is Ctrl-C behind it: safetensors makes a ValueError of a KeyboardInterrupt that
    comes while it asks PyTorch for memory."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield                                   # Python hands signals to the main thread alone
        return
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if asked:
            signal.raise_signal(signal.SIGINT)
