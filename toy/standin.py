"""TODO"""

import functools
import json
import math
import random
from pathlib import Path

from PIL import Image

from toy.texts import DESCRIBE, description
from toy.world import make_scene

# The layout of LLaVA-1.5's two files, so that a step can be run and timed without them. Shares are
# the release's. Turns and words are rough, set so that a sample has on average the tokens that
# train.py --plan counts with: 324 of text, 180 of them learned; text alone 1,200, and 800.

# what it stands for: samples of 665,298, turns, words of a question, words of an answer, folder
# ("": no picture), and what ends the first question. An answer of 0 words is a box.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
WHERE = "Please provide the bounding box coordinates of the region this sentence describes:"
MIX = ((57_896, 4, 9, 115, "coco/train2017", ""),               # LLaVA-Instruct: conversation,
       (22_958, 1, 8, 220, "coco/train2017", ""),               # description
       (76_858, 1, 16, 250, "coco/train2017", ""),              # and reasoning, 58 : 23 : 77
       (40_688, 4, 86, 195, "", ""),                            # ShareGPT
       (82_783, 6, 7, 1, "coco/train2017", SHORT), (72_140, 12, 8, 1, "gqa/images", SHORT),
       (8_998, 2, 9, 1, "coco/train2017", SHORT), (80_000, 5, 8, 3, "ocr_vqa/images", SHORT),
       (66_160, 1, 24, 1, "coco/train2017", LETTER),
       (21_953, 1, 24, 11, "textvqa/train_images", "Provide a one-sentence caption."),
       (48_447, 14, 6, 0, "coco/train2017", WHERE), (86_417, 14, 5, 0, "vg/VG_100K", WHERE))
SIZES_MIX = ((640, 480),) * 5 + ((480, 640),) * 2 + ((640, 427),) * 2 + ((500, 375), (375, 500))


@functools.cache
def description_words(number):
    return description(make_scene(number)).split()


def text_of(words, dice):
    """Sentences about scenes, cut to so many words."""
    made = []
    while len(made) < words:
        made += description_words(dice.randrange(300))
    return " ".join(made[:max(1, words)])


def stand_in_row(number, stage, dice):
    """One sample of the JSON file of a stage, and whether it has a picture."""
    drawn = lambda mean: max(1, round(dice.lognormvariate(math.log(max(mean, 1)) - .08, .4)))
    name = f"{number:012}"
    if stage == 1:
        ask = dice.choice(DESCRIBE)
        talk = [dice.choice((f"<image>\n{ask}", f"{ask}\n<image>")), text_of(drawn(23), dice)]
        picture = f"{number // 1000:05}/{name}.jpg"
    else:
        _, turns, asked, answered, folder, ending = dice.choices(MIX, [m[0] for m in MIX])[0]
        picture, talk = folder and f"{folder}/{name}.jpg", []
        for turn in range(1 if turns == 1 else min(drawn(turns), 2 * turns)):
            ask = text_of(min(drawn(asked), 3 * asked), dice).rstrip(".") + "?"
            box = sorted(dice.random() for _ in range(4))
            talk += [ask if turn or not ending else f"{ask}\n{ending}",
                     text_of(min(drawn(answered), 2 * answered), dice) if answered else
                     f"[{box[0]:.2f}, {box[1]:.2f}, {box[2]:.2f}, {box[3]:.2f}]"]
        # 2,048 tokens are the end of a sample, and a picture takes 576 of them
        while len(talk) > 2 and sum(len(x.split()) for x in talk) > (900 if picture else 1500):
            talk = talk[:-2]
        if picture:
            talk[0] = f"<image>\n{talk[0]}"
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(talk)]
    return {"id": name, **({"image": picture} if picture else {"model": ""}),
            "conversations": turns}


def photograph(dice):
    """A picture of a photograph's sizes, with detail at every scale, as a JPEG has to store it."""
    size = dice.choice(SIZES_MIX) if dice.random() < .8 else (dice.randint(336, 640),
                                                              dice.randint(336, 640))
    image = None
    for cells, share in ((3, 1), (9, .5), (27, .35), (81, .2), (243, .2), (640, .2)):
        grain = Image.frombytes("RGB", (cells, cells), dice.randbytes(3 * cells * cells))
        grain = grain.resize(size, Image.Resampling.BICUBIC)
        image = grain if image is None else Image.blend(image, grain, share)
    return image


def stand_in(folder, rows, stage=2, seed=0, pictures=500):
    """data.json and images/ in a folder, a function of the arguments. Files of pictures past the
    first `pictures` are hard links to those: they are read, not looked at."""
    folder, made, have = Path(folder), [], []
    for i in range(rows):
        row = stand_in_row(i, stage, random.Random(f"stand-in:{seed}:{stage}:{i}"))
        made.append(row)
        if "image" not in row:
            continue
        path = folder / "images" / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(have) < pictures:
            photograph(random.Random(f"photograph:{seed}:{i}")).save(path, quality=90)
            have.append(path)
        else:
            path.hardlink_to(have[i % pictures])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(made, indent=1) + "\n")
