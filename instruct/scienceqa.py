"""instruct.scienceqa: ScienceQA's problems become training samples, as LLaVA was trained on them.

    FOLDER/problems.json, FOLDER/pid_splits.json --> OUT, LLaVA JSON

Nobody is asked anything: the lecture, the solution and the answer are the data set's own. The form
is QCM-LEA (formats/scienceqa.py), the only one that LLaVA published a result for.

    python -m instruct scienceqa FOLDER --out sqa.json
    python train.py --stage 2 --recipe llava --task scienceqa --data sqa.json \\
        --images FOLDER/images/train
    python -m evaluate scienceqa --form QCM-LEA --model MODEL ...

A split's pictures lie in a folder of its own. --prefix puts that folder before their names, so that
one --images serves the training data and held-out data:

    python -m instruct scienceqa FOLDER --prefix train --out train.json
    python -m instruct scienceqa FOLDER --split val --prefix val --out val.json
    python train.py ... --data train.json --eval-data val.json --images FOLDER/images

[LLaVA] 2304.08485 section 5.2. [ScienceQA] 2209.09513.
"""

import os
from pathlib import Path

from formats.errors import UsageError
from formats.files import write_json
from formats.scienceqa import ANSWER_FIELDS, read_problems, training_row


def main(args):
    """Write the samples of a split, and say how many have a picture."""
    folder = Path(args.source)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder: give the one with problems.json and "
                         "pid_splits.json")
    problems = read_problems(folder / "problems.json", folder / "pid_splits.json", args.split,
                             **ANSWER_FIELDS)
    # an id that the split lists twice is one sample
    rows = list({str(p["id"]): training_row(p, args.prefix) for p in problems}.values())
    write_json(args.out, rows)
    names = [row["image"] for row in rows if "image" in row]
    print(f"{args.out}: {len(rows):,} samples, {len(names):,} of them with a picture")
    for images in (folder / "images" / args.split, folder / "images", folder):
        if names and os.path.isfile(images / names[0]):
            print(f"their pictures: --images {images}")
            break
