"""decoding/caption_journal.py: the answers about a folder so far, so that a killed run goes on.

    captions.json            the finished file: written once, at the end
    captions.json.partial    while the run lasts: a line with its settings, then a line a picture

The same command goes on where the one before was killed; another one is refused, and so are other
files of the model. A line that was cut short is dropped, and a picture that has changed since is
asked about again."""

import hashlib
import json
import os
from pathlib import Path

from formats.adapters import is_adapter
from formats.errors import UserError
from formats.hub import resolve, weight_files
from formats.strict_json import read_config

MODEL_FILES = "model files"         # the setting that tells a model from its successor


def state_of(path):
    """What tells whether a picture is still the same: its size and time; [] if it is gone."""
    try:
        stat = os.stat(path)
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def other_files(first, settings):
    """What is said of a journal that only the model's files do not fit."""
    if MODEL_FILES not in first:
        return ("begun by an older version, which did not note the model's files: they may be "
                "others now; delete the file to begin anew")
    return (f"begun with other files in {settings['model']}: put them back to go on, or delete the "
            "file to begin anew")


def files_of_model(model, base=None):
    """A digest of what decides a model's answers: the sizes and times of its weight files, which
    may be many GB, and all of its small files. base: of an adapter, else the one that it names."""
    folders = [resolve(model)]
    if is_adapter(folders[0]):
        config = read_config(folders[0], "adapter_config.json")
        folders.append(resolve(base or config["base_model_name_or_path"]))
    found = hashlib.sha256()
    for folder in folders:
        found.update(json.dumps(weight_files(folder)).encode())
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
            content = path.read_bytes()
            found.update(f"{path.name} {len(content)} ".encode() + content)
    return found.hexdigest()


class Journal:
    """`rows`: {name: row} of the pictures that have an answer, or were skipped."""

    def __init__(self, out, settings):
        """settings: what decides the answers, as JSON has it. Raises UserError."""
        self.path, self.rows = Path(f"{out}.partial"), {}
        settings = json.loads(json.dumps(settings))
        if self.path.exists():
            lines = self.whole_lines()
            first = lines[0] if lines else settings
            changed = [key for key in settings if first.get(key) != settings[key]]
            if changed == [MODEL_FILES]:
                raise UserError(f"{self.path}: {other_files(first, settings)}")
            if changed:
                raise UserError(f"{self.path}: begun with another {', '.join(changed)}: give the "
                                "same command to go on, or delete the file to begin anew")
            self.rows = {row["image"]: row for row in lines[1:]}
        self.replace([settings, *self.rows.values()])

    def whole_lines(self):
        """The lines of the file that were written to their end. Raises UserError."""
        try:
            lines = self.path.read_bytes().decode().splitlines(keepends=True)
            found = [json.loads(line) for line in lines if line.endswith("\n")]
            if any(type(line) is not dict for line in found):
                raise ValueError("a line is no object")
            if not all("image" in row and "state" in row for row in found[1:]):
                raise ValueError("a line names no picture")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a journal of answers ({error}): delete it") from None
        return found

    def replace(self, rows):
        """Write the file anew, without what was cut short."""
        try:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}: name another --out") from None

    def has(self, paths):
        """Are all these pictures done, and unchanged?"""
        return all(self.rows.get(path.name, {}).get("state") == state_of(path) for path in paths)

    def add(self, rows):
        """Rows of a batch, each with image and state: on the disk before the next one begins."""
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["image"]: row for row in rows}

    def remove(self):
        self.path.unlink()
