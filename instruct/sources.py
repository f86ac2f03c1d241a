"""instruct.sources: what there is to write about: COCO's files, toy scenes, a folder of pictures.

COCO's boxes are [x, y, width, height] in pixels; here they become (x1, y1, x2, y2) in fractions of
the picture's sides, as LLaVA's data engine shows them. No picture is opened for that.
"""
import os
from dataclasses import dataclass, field
from pathlib import Path

import data
from formats.errors import note
from formats.pictures import list_pictures, picture_path
from formats.strict_json import is_broken_text, read_json
from instruct.journal import cache_key, model_fingerprint, Request
from toy.texts import captions
from toy.world import draw, make_scene


@dataclass
class KnownPicture:
    """What is known of a picture without looking at it."""
    name: str                               # id of the sample
    image: str                              # its file, relative to the folder of pictures
    captions: list
    boxes: list                             # (name of the object, (x1, y1, x2, y2) in fractions)
    scene: object = None                    # of a toy picture: the truth


# -------------------------------------------------------------------------------------- COCO

def coco_list(path, read, name):
    """[(where, row)] of one list of a COCO file."""
    rows = read.get(name) if isinstance(read, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise data.BadData(f"{path}: {name} must be a list of objects, as in COCO's files")
    return [(f"{path}: {name}[{i}]", row) for i, row in enumerate(rows)]


def is_box(value):
    """[x, y, width, height]: finite (1e999 is read as infinity), no negative width or height."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    if not all(type(v) in (int, float) and abs(v) <= 1_000_000 for v in value):
        return False
    return min(value[2:]) >= 0


def coco_field(where, row, name):
    """One value of a row, checked by its name; ids become text. Raises data.BadData."""
    value = row.get(name)
    if name in ("id", "image_id", "category_id"):
        fine, what = type(value) in (int, str) and 0 < len(str(value)) <= 200, "a number or a name"
        value = str(value)
    elif name in ("width", "height"):
        fine, what = type(value) is int and 0 < value <= 1_000_000, "a number of pixels"
    elif name == "bbox":
        fine, what = is_box(value), "[x, y, width, height] in pixels"
    else:
        fine, what = isinstance(value, str) and value.strip(), "some text"
    broken = isinstance(value, str) and is_broken_text(value)
    if not fine or broken:
        also = ", in valid UTF-8" if broken else ""
        raise data.BadData(f"{where}.{name}: must be {what}{also}: correct the row")
    return value


@dataclass
class CocoImage:
    """A row of `images`, and what the lists of annotations say about it."""
    where: str
    row: dict
    captions: list = field(default_factory=list)
    boxes: list = field(default_factory=list)


def read_captions(path):
    """{id: CocoImage} of captions_*.json, in the file's order."""
    read, images = read_json(path), {}
    for where, row in coco_list(path, read, "images"):
        name = coco_field(where, row, "id")
        if name in images:
            raise data.BadData(f"{where}.id: {name} is there twice: remove one")
        images[name] = CocoImage(where, row)
    for where, row in coco_list(path, read, "annotations"):
        name = coco_field(where, row, "image_id")
        if name not in images:
            raise data.BadData(f"{where}.image_id: there is no image {name}: remove the row")
        images[name].captions.append(" ".join(coco_field(where, row, "caption").split()))
    return images


def read_boxes(path, images):
    """Add the boxes of instances_*.json to those of `images` that they belong to."""
    read, kinds = read_json(path), {}
    for where, row in coco_list(path, read, "categories"):
        kinds[coco_field(where, row, "id")] = coco_field(where, row, "name")
    for where, row in coco_list(path, read, "annotations"):
        kind = coco_field(where, row, "category_id")
        x, y, w, h = coco_field(where, row, "bbox")
        if kind not in kinds:
            raise data.BadData(f"{where}.category_id: there is no category {kind}: remove it")
        image = images.get(coco_field(where, row, "image_id"))
        if image is None:
            continue
        wide = coco_field(image.where, image.row, "width")
        high = coco_field(image.where, image.row, "height")
        if x >= wide or y >= high or x + w < 0 or y + h < 0:
            raise data.BadData(f"{where}.bbox: lies outside of its {wide} × {high} picture: "
                               "correct the row")
        box = x / wide, y / high, (x + w) / wide, (y + h) / high
        image.boxes.append((kinds[kind], tuple(min(max(v, 0), 1) for v in box)))


def read_coco(args):
    """[KnownPicture] of the pictures that have captions, in the file's order, up to --limit.

    Raises data.BadData naming file, row and field."""
    everything = read_captions(args.captions)
    images = {name: image for name, image in everything.items() if image.captions}
    if not images:
        raise data.BadData(f"{args.captions}: holds no captions: give COCO's captions_*.json")
    images = dict(list(images.items())[:args.limit])
    note(f"{len(images):,} of {len(everything):,} pictures: those with captions, up to --limit")
    for image in images.values():
        try:
            picture_path(args.images, coco_field(image.where, image.row, "file_name"),
                         args.follow_links)
        except data.BadData as error:
            raise data.BadData(f"{image.where}.file_name: {error}") from None
    if args.what != "conversation":
        read_boxes(args.instances, images)
    # quirk: some pictures of COCO have six or seven captions; LLaVA shows five
    return [KnownPicture(name, image.row["file_name"], image.captions[:5], image.boxes)
            for name, image in images.items()]


# ----------------------------------------------------------------------- toy scenes, folders

def toy_scenes(args):
    """Yield a KnownPicture for each toy scene; draws the pictures."""
    folder = Path(args.images)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(args.toy, args.limit or args.toy)):
        scene = make_scene(f"instruct:{args.seed}:{i}", args.split)
        name = f"{args.split}-{args.seed}-{i:06}"
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        draw(scene).save(temporary, "PNG")
        os.replace(temporary, folder / f"{name}.png")   # a killed run leaves no half picture
        boxes = [(t.name, t.box) for t in scene.things]
        yield KnownPicture(name, f"{name}.png", captions(scene), boxes, scene)


def folder_requests(args):
    """A Request for every picture of a folder and of those below it, by name."""
    root = Path(args.source)
    files, others = list_pictures(root, below=True, follow_links=args.follow_links)
    for line in others:
        note(f"note: {line}")
    who = (args.what, model_fingerprint(args.model), args.template, args.prompt, args.seed,
           args.dtype, args.temperature, args.max_tokens, getattr(args, "short", None))
    for path in files:
        name = path.relative_to(root).as_posix()
        # name and size identify a picture: its time changes when a folder is copied
        status = path.stat() if args.follow_links and path.exists() else path.lstat()
        yield Request(name, name, cache_key(*who, name, status.st_size))
