"""decoding/pictures.py: the pictures of a conversation.

A picture group is a tuple (pixels, sizes, paths): pixels (n, 3, S, S), sizes [(width, height)]
where the model cuts pictures into tiles and None elsewhere, and their files. A conversation keeps
{turn: group}: the pictures that stand in front of that turn."""

import base64
import io

import torch

import data
from decoding.prompt import build_prompt, prompt_length
from formats.errors import note, UserError
from formats.pictures import FORMATS, list_pictures


def load_picture(model, path):
    """A file -> pixels (n, 3, S, S) and [its size] where the model cuts pictures, else None."""
    image = data.load_image(path)
    sizes = [image.size] if model.aspect == "anyres" else None
    return model.pixels(image), sizes


def join_pictures(groups):
    """{turn: group} -> all pixels and all sizes (None if there are none), in the turns' order."""
    if not groups:
        return None, None                           # a talk without pictures
    pixels, sizes = [], []
    for turn in sorted(groups):
        pixels.append(groups[turn][0])
        sizes += groups[turn][1] or []
    return torch.cat(pixels), sizes or None


def join_batch(pictures, sizes, like):
    """The pictures of a batch's rows, some None -> all pixels (None if there are none), in the
    dtype and on the device of the tensor `like`, and all sizes."""
    all_pixels, all_sizes = [], []
    for pixels, row_sizes in zip(pictures, sizes):
        if pixels is not None:
            all_pixels.append(pixels)
        all_sizes += row_sizes or []
    if not all_pixels:
        return None, all_sizes
    return torch.cat(all_pixels).to(like), all_sizes


def load_pictures(model, paths):
    """The group of one turn. Raises BadImage, and as `check_context` does."""
    groups = {i: load_picture(model, path) for i, path in enumerate(paths)}
    group = *join_pictures(groups), list(paths)
    check_context(model, group)
    return group


def load_groups(model, paths):
    """{0: the group of these pictures}, in front of the first question; {} without pictures."""
    return {0: load_pictures(model, paths)} if paths else {}


def png_address(image):
    """PIL image -> its PNG as an address that a web page can show: data:image/png;base64,..."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_turns(groups):
    """{turn: group} -> the number of its turn for each picture, as `build_prompt` takes it."""
    turns = []
    for turn in sorted(groups):
        pixels, sizes = groups[turn][:2]
        turns += [turn] * len(sizes or pixels)      # sizes: one picture is several tiles
    return turns


def check_pictures(paths):
    """Read the files once, before the model is loaded. Raises BadImage."""
    for path in paths:
        data.load_image(path)


def find_pictures(folder):
    """The pictures of a folder; a note for each other file. Raises BadImage if there are none."""
    files, others = list_pictures(folder)
    for line in others:
        note(f"note: {line}")
    if not files:
        raise data.BadImage(f"{folder}: holds no picture: give a folder with some "
                            f"({', '.join(FORMATS)})")
    return files


def check_context(model, group):
    """Raises UsageError if a turn cannot hold these pictures, UserError if the context cannot."""
    ids = build_prompt(["?"], model.template, model.tokenizer, image_turns({0: group}))
    taken, context = prompt_length(model, ids, group[1]), model.llm.config.context
    if taken >= context:
        raise UserError(f"{', '.join(map(str, group[2]))}: take {taken} places in one question, "
                        f"the model's context has {context}: give fewer pictures")
