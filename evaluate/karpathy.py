"""evaluate.karpathy: pictures and their captions in the forms of file that captioning is judged on.

    dataset_coco.json, dataset_flickr30k.json   Karpathy's: images with sentences and a split
    captions_val2014.json, nocaps_val_*.json    COCO's form: images, and annotations beside them
    coco_karpathy_test.json                     LAVIS': [{image, caption: one or several}]

Each becomes [{image, id, captions, domain}]: image is a name under --images; domain is NoCaps'
in-domain, near-domain or out-domain, or None.
"""
from pathlib import Path

import data
from evaluate.benchmarks import require
from formats.strict_json import read_json


def read_pictures(path, images, split="test"):
    """The pictures of a file. images: the folder; split: of Karpathy's files. Raises BadData."""
    table = read_json(path)
    if isinstance(table, list):
        found = from_lavis(path, table)
    elif isinstance(table, dict) and "annotations" in table:
        found = from_coco(path, table)
    elif isinstance(table, dict) and "images" in table:
        found = from_karpathy(path, table, split)
    else:
        raise data.BadData(f"{path}: none of Karpathy's, COCO's, NoCaps' or LAVIS' caption files: "
                           "give the official file")
    if not found:
        raise data.BadData(f"{path}: holds no picture with captions: give the official file, and "
                           "the right --split")
    for picture in found:
        if not picture["captions"]:
            raise data.BadData(f"{picture['where']}: {picture['image']} has no caption: give the "
                               "official file")
        picture["image"] = first_that_exists(images, picture.pop("names"))
    return found


def first_that_exists(folder, names):
    """The first of these names that is a file of the folder; the first at all if none is."""
    for name in names:
        if (Path(folder) / name).exists():
            return name
    return names[0]


def from_karpathy(path, table, split):
    """quirk: "restval" is trained on; it is a split of its own here."""
    rows = require(path, table, images="objects")["images"]
    splits = sorted({row["split"] for row in rows if type(row.get("split")) is str})
    if split not in splits:
        raise data.BadData(f"{path}: has no split {split!r}: give --split with one of "
                           f"{', '.join(splits)}")
    found = []
    for i, row in enumerate(rows):
        if row.get("split") != split:
            continue
        where = f"{path}: images[{i}]"
        require(where, row, filename="text", sentences="objects", filepath="text or null")
        texts = [require(where, one, raw="text")["raw"] for one in row["sentences"]]
        names = [row["filename"]]
        if row.get("filepath"):
            names = [f"{row['filepath']}/{row['filename']}", row["filename"]]
        found.append({"where": where, "id": row.get("cocoid", row["filename"]), "names": names,
                      "image": row["filename"], "captions": texts, "domain": None})
    return found


def from_coco(path, table):
    require(path, table, images="objects", annotations="objects")
    captions = {}
    for i, note in enumerate(table["annotations"]):
        note = require(f"{path}: annotations[{i}]", note, image_id="a whole number or text",
                       caption="text")
        captions.setdefault(note["image_id"], []).append(note["caption"])
    found = []
    for i, row in enumerate(table["images"]):
        where = f"{path}: images[{i}]"
        require(where, row, id="a whole number or text", file_name="text or null")
        name = row.get("file_name") or f"COCO_val2014_{row['id']:012}.jpg"
        found.append({"where": where, "id": row["id"], "names": [name, f"val2014/{name}"],
                      "image": name, "captions": captions.get(row["id"], []),
                      "domain": row.get("domain")})
    return found


def from_lavis(path, rows):
    found = []
    for i, row in enumerate(rows):
        where = f"{path}: row {i + 1}"
        require(where, row, image="text", caption="text or texts")
        texts = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
        name = row["image"]
        found.append({"where": where, "id": row.get("image_id", name), "image": name,
                      "names": [name, Path(name).name], "captions": texts, "domain": None})
    return found
