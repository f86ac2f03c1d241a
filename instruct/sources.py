"""TODO"""

import os
from pathlib import Path

import data
from formats.errors import note
from formats.pictures import list_pictures, picture_path
from formats.strict_json import is_broken_text, read_json
from instruct.journal import cache_key, model_fingerprint, Request
from toy import texts as toy_texts
from toy.world import draw, make_scene


def coco_list(path, read, name):
    """[(where, row)] of one list of a COCO file."""
    rows = read.get(name) if isinstance(read, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise data.BadData(f"{path}: {name} must be a list of objects, as in COCO's files")
    return [(f"{path}: {name}[{i}]", row) for i, row in enumerate(rows)]


def coco_field(where, row, name):
    """One value of a row, checked by its name; ids become text. Raises data.BadData."""
    value = row.get(name)
    if name in ("id", "image_id", "category_id"):
        fine, what = type(value) in (int, str) and 0 < len(str(value)) <= 200, "a number or a name"
        value = str(value)
    elif name in ("width", "height"):
        fine, what = type(value) is int and 0 < value <= 1_000_000, "a number of pixels"
    elif name == "bbox":                                # also refuses infinity, as 1e999 is read
        fine, what = isinstance(value, list) and len(value) == 4 and all(
            type(v) in (int, float) and abs(v) <= 1_000_000 for v in value) and min(
            value[2:]) >= 0, "[x, y, width, height] in pixels"
    else:
        fine, what = isinstance(value, str) and value.strip(), "some text"
    if not fine or isinstance(value, str) and is_broken_text(value):
        raise data.BadData(f"{where}.{name}: must be {what}, in valid UTF-8: correct the row")
    return value


def read_coco(args):
    """[(id, file name, captions, boxes)] of the pictures that have captions, in the file's order.

    Raises data.BadData naming file, row and field."""
    read, pictures = read_json(args.captions), {}
    for where, row in coco_list(args.captions, read, "images"):
        if (name := coco_field(where, row, "id")) in pictures:
            raise data.BadData(f"{where}.id: {name} is there twice: remove one")
        pictures[name] = (where, row, [], [])
    for where, row in coco_list(args.captions, read, "annotations"):
        if (name := coco_field(where, row, "image_id")) not in pictures:
            raise data.BadData(f"{where}.image_id: there is no image {name}: remove the row")
        pictures[name][2].append(" ".join(coco_field(where, row, "caption").split()))
    told = {name: p for name, p in pictures.items() if p[2]}
    if not told:
        raise data.BadData(f"{args.captions}: holds no captions: give COCO's captions_*.json")
    told = dict(list(told.items())[:args.limit])
    note(f"{len(told):,} of {len(pictures):,} pictures: those with captions, up to --limit")
    for where, row, *_ in told.values():
        try:
            picture_path(args.images, coco_field(where, row, "file_name"), args.follow_links)
        except data.BadData as error:
            raise data.BadData(f"{where}.file_name: {error}") from None
    if args.what != "conversation":
        read = read_json(args.instances)
        kinds = {coco_field(where, row, "id"): coco_field(where, row, "name")
                 for where, row in coco_list(args.instances, read, "categories")}
        for where, row in coco_list(args.instances, read, "annotations"):
            kind, (x, y, w, h) = coco_field(where, row, "category_id"), coco_field(where, row, "bbox")
            if kind not in kinds:
                raise data.BadData(f"{where}.category_id: there is no category {kind}: remove it")
            if (name := coco_field(where, row, "image_id")) not in told:
                continue
            at, picture, _, boxes = told[name]
            W, H = coco_field(at, picture, "width"), coco_field(at, picture, "height")
            if x >= W or y >= H or x + w < 0 or y + h < 0:
                raise data.BadData(f"{where}.bbox: lies outside of its {W} × {H} picture: correct "
                                   "the row")
            box = x / W, y / H, (x + w) / W, (y + h) / H
            boxes.append((kinds[kind], tuple(min(max(v, 0), 1) for v in box)))
    # quirk: some pictures of COCO have six or seven captions; LLaVA shows five
    return [(name, row["file_name"], lines[:5], boxes)
            for name, (_, row, lines, boxes) in told.items()]


def toy_scenes(args):
    """[(id, file name, captions, boxes, scene)]; draws the pictures."""
    folder = Path(args.images)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(args.toy, args.limit or args.toy)):
        scene = make_scene(f"instruct:{args.seed}:{i}", args.split)
        name = f"{args.split}-{args.seed}-{i:06}"
        aside = folder / f".{name}.{os.getpid()}.tmp"
        draw(scene).save(aside, "PNG")
        os.replace(aside, folder / f"{name}.png")       # none is ever half there
        yield (name, f"{name}.png", toy_texts.captions(scene), [(t.name, t.box) for t in scene.things],
               scene)


def folder_requests(args):
    """A job for every picture of a folder and of those below it, by name."""
    root = Path(args.source)
    files, others = list_pictures(root, below=True, follow_links=args.follow_links)
    for line in others:
        note(f"note: {line}")
    who = (args.what, model_fingerprint(args.model), args.template, args.prompt, args.seed, args.dtype,
           args.temperature, args.max_tokens, getattr(args, "short", None))
    for path in files:
        name = path.relative_to(root).as_posix()
        # a picture is told by its name and size: times change when a folder is copied
        size = path.stat() if args.follow_links and path.exists() else path.lstat()
        yield Request(name, name, cache_key(*who, name, size.st_size))
