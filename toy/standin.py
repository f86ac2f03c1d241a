"""toy.standin: data in the layout of LLaVA's two files, so that a step can be timed without them.

    python -m toy.standin FOLDER --rows 1000 [--stage 1]    writes FOLDER/data.json, FOLDER/images/

Shares of the parts are those of LLaVA-1.5's release. Turns and lengths are approximate: they are
set so that a sample has on average the tokens that `train.py --plan` counts with: 324 of text, 180
of them with loss; without a picture 1,200 and 800. The words are descriptions of toy scenes and the
pictures are noise: nothing can be learned from them.
"""
import argparse
import functools
import json
import math
import random
from pathlib import Path

from PIL import Image

from formats.files import atomic_write
from toy.texts import DESCRIBE, description
from toy.world import make_scene

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
WHERE = "Please provide the bounding box coordinates of the region this sentence describes:"
# samples of 665,298, turns, words of a question, words of an answer, folder ("": no picture), and
# what ends the first question. An answer of 0 words is a box.
MIX = ((57_896, 4, 9, 115, "coco/train2017", ""),               # LLaVA-Instruct: conversation,
       (22_958, 1, 8, 220, "coco/train2017", ""),               # description
       (76_858, 1, 16, 250, "coco/train2017", ""),              # and reasoning, 58 : 23 : 77
       (40_688, 4, 86, 195, "", ""),                            # ShareGPT
       (82_783, 6, 7, 1, "coco/train2017", SHORT),              # VQAv2
       (72_140, 12, 8, 1, "gqa/images", SHORT),                 # GQA
       (8_998, 2, 9, 1, "coco/train2017", SHORT),               # OK-VQA
       (80_000, 5, 8, 3, "ocr_vqa/images", SHORT),              # OCR-VQA
       (66_160, 1, 24, 1, "coco/train2017", LETTER),            # A-OKVQA
       (21_953, 1, 24, 11, "textvqa/train_images", "Provide a one-sentence caption."),  # TextCaps
       (48_447, 14, 6, 0, "coco/train2017", WHERE),             # RefCOCO
       (86_417, 14, 5, 0, "vg/VG_100K", WHERE))                 # Visual Genome
# width, height: how often each stands here is how often it is drawn
PHOTO_SIZES = ((640, 480),) * 5 + ((480, 640),) * 2 + ((640, 427),) * 2 + ((500, 375), (375, 500))


@functools.cache
def description_words(number):
    return description(make_scene(number)).split()


def text_of(words, rng):
    """Sentences about scenes, cut to so many words."""
    found = []
    while len(found) < words:
        found += description_words(rng.randrange(300))
    return " ".join(found[:max(1, words)])


def length_near(mean, rng):
    """A length drawn around this mean, with the long tail that real answers have."""
    return max(1, round(rng.lognormvariate(math.log(max(mean, 1)) - .08, .4)))


def stage1_talk(rng):
    """[question, caption]; the picture stands before or behind the question."""
    ask = rng.choice(DESCRIBE)
    first = rng.choice((f"<image>\n{ask}", f"{ask}\n<image>"))
    return [first, text_of(length_near(23, rng), rng)]


def stage2_talk(rng):
    """([question, answer, ...], folder of the picture or "")."""
    _, turns, asked, answered, folder, ending = rng.choices(MIX, [row[0] for row in MIX])[0]
    talk = []
    for turn in range(1 if turns == 1 else min(length_near(turns, rng), 2 * turns)):
        ask = text_of(min(length_near(asked, rng), 3 * asked), rng).rstrip(".") + "?"
        if ending and turn == 0:
            ask = f"{ask}\n{ending}"
        box = sorted(rng.random() for _ in range(4))    # drawn always: the order of draws is fixed
        answer = f"[{box[0]:.2f}, {box[1]:.2f}, {box[2]:.2f}, {box[3]:.2f}]"
        if answered:
            answer = text_of(min(length_near(answered, rng), 2 * answered), rng)
        talk += [ask, answer]
    # 2,048 tokens are the end of a sample, and a picture takes 576 of them
    most = 900 if folder else 1500
    while len(talk) > 2 and sum(len(text.split()) for text in talk) > most:
        talk = talk[:-2]
    if folder:
        talk[0] = f"<image>\n{talk[0]}"
    return talk, folder


def stand_in_row(number, stage, rng):
    """One sample of the JSON file of a stage."""
    name = f"{number:012}"
    if stage == 1:
        talk, image = stage1_talk(rng), f"{number // 1000:05}/{name}.jpg"
    else:
        talk, folder = stage2_talk(rng)
        image = folder and f"{folder}/{name}.jpg"
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(talk)]
    # quirk: the release's rows of text alone have a "model" instead of an "image"
    about = {"image": image} if image else {"model": ""}
    return {"id": name, **about, "conversations": turns}


def photograph(rng):
    """A picture of a photograph's size, with detail at every scale, as a JPEG has to store it."""
    if rng.random() < .8:
        size = rng.choice(PHOTO_SIZES)
    else:
        size = rng.randint(336, 640), rng.randint(336, 640)
    image = None
    for cells, share in ((3, 1), (9, .5), (27, .35), (81, .2), (243, .2), (640, .2)):
        grain = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells))
        grain = grain.resize(size, Image.Resampling.BICUBIC)
        image = grain if image is None else Image.blend(image, grain, share)
    return image


def stand_in(folder, rows, stage=2, seed=0, pictures=500):
    """data.json and images/ in a folder, a function of the arguments.

    Picture files after the first `pictures` are hard links to those: reading them costs as much."""
    folder, samples, drawn = Path(folder), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(rows):
        row = stand_in_row(i, stage, random.Random(f"stand-in:{seed}:{stage}:{i}"))
        samples.append(row)
        if "image" not in row:
            continue
        path = folder / "images" / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(drawn) < pictures:
            photograph(random.Random(f"photograph:{seed}:{i}")).save(path, quality=90)
            drawn.append(path)
        else:
            path.hardlink_to(drawn[i % pictures])
    atomic_write(folder / "data.json", json.dumps(samples, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write stand-in data in LLaVA's layout.")
    parser.add_argument("folder", help="a new folder")
    parser.add_argument("--rows", type=int, default=1000, help="samples")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="whose data it is")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if Path(args.folder).exists():
        parser.error(f"{args.folder} is there already; give a new folder")
    stand_in(args.folder, args.rows, args.stage, args.seed)
    print(f"{args.rows} samples in {args.folder}/data.json, their pictures in {args.folder}/images")
