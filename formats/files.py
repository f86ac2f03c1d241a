"""TODO"""

import os
import os
from pathlib import Path

# Write aside, fsync, rename, then prune: whatever moment the power fails at, either the old
# checkpoint is whole or the new one is. A rename is the only step that others can see.

def fsync_path(path):
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_into_place(aside, final):
    """fsync everything in the folder `aside` and give it its name in one step."""
    for path in sorted(aside.rglob("*")):
        fsync_path(path)
    fsync_path(aside)
    os.rename(aside, final)
    fsync_path(final.parent)


def atomic_write(path, text):
    """Write a small file whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    fsync_path(aside)
    os.replace(aside, path)


def read_text(path, limit: int, errors: str = "strict") -> str:
    """A regular file of at most `limit` bytes, without its BOM. OSError or ValueError; BadData for
    one in UTF-16 or UTF-32."""
    if not os.path.isfile(path):                    # opening a pipe would hang, a device never end
        raise OSError("not a file" if os.path.exists(path) else "no such file")
    if (size := os.path.getsize(path)) > limit:
        raise ValueError(f"{size:,} bytes where at most {limit:,} are expected")
    return _text_of(path, BadData, errors)
