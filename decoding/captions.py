"""decoding/captions.py: the same question about every picture of a folder, into LLaVA JSON.

A picture that cannot be used is skipped with a line; the others are asked in batches. At the end a
line says how many pictures and tokens a second there were."""

import os
import time

import data
from decoding.caption_journal import files_of_model, Journal, MODEL_FILES, state_of
from decoding.pictures import load_picture
from decoding.prompt import build_prompt
from decoding.stopping import cut_reason
from decoding.streaming import stream_text
from formats.errors import note, progress
from formats.files import write_json
from formats.llava_rows import llava_row


def sort_by_length(model, files):
    """Files of pictures that take the same number of positions side by side: a batch is padded to
    its longest prompt. Only a model that cuts pictures into tiles makes a difference."""
    if model.aspect != "anyres":
        return files

    def length(path):
        try:
            return model.num_image_tokens(data.load_image(path).size), path
        except data.BadImage:
            return 0, path                          # it is skipped, with a line, later
    return sorted(files, key=length)


def load_batch(model, paths):
    """([(path, pixels, sizes)] of the files that can be used, [rows of the others])."""
    batch, skipped = [], []
    for path in paths:
        try:
            path.name.encode()                      # a name that is not UTF-8 fits no JSON
            batch.append((path, *load_picture(model, path)))
        except (data.BadImage, UnicodeEncodeError) as error:
            note(f"skipped: {error}")
            skipped.append({"image": path.name, "state": state_of(path), "text": None})
    return batch, skipped


def answer_batch(model, paths, ids, seed, args, generate_batch):
    """[{image, state, text, reason, tokens}] of a batch; text is None for what is no picture."""
    batch, rows = load_batch(model, paths)
    paths, pixels, sizes = zip(*batch) if batch else ((), (), ())
    answers = generate_batch(model, [ids] * len(batch), list(pixels), sizes=list(sizes),
                             seed=seed, **args.settings)
    for path, answer in zip(paths, answers):
        text = "".join(stream_text(answer, model.tokenizer)).strip()
        rows.append({"image": path.name, "state": state_of(path), "text": text,
                     "reason": answer.finish_reason, "tokens": len(answer)})
    return rows


def caption_folder(model, files, args, generate_batch):
    """Write one sample for each picture to args.out, by name. generate_batch: generate.py's, handed
    in. What a killed run has answered is not asked again: decoding/caption_journal.py.

    Raises BadImage if none of the pictures can be used, UserError for another run's journal."""
    journal = Journal(args.out, {"question": args.prompt, "model": args.model, "seed": args.seed,
                                 "template": str(model.template), "settings": args.settings,
                                 "quantize": args.quantize, "dtype": args.dtype,
                                 MODEL_FILES: files_of_model(args.model, args.model_base)})
    if os.path.isfile(args.out):
        note(f"note: {args.out} is there already: its answers are replaced when all pictures are "
             "done; name another --out to keep them")
    ids = build_prompt([args.prompt], model.template, model.tokenizer)
    files = sort_by_length(model, files)
    done, tokens, start = 0, 0, time.perf_counter()
    starts = range(0, len(files), args.batch_size)
    for at in progress(starts, "pictures", len(files), args.batch_size):
        paths = files[at:at + args.batch_size]
        if not journal.has(paths):      # a batch is asked as a whole: its row i draws by seed + i
            rows = answer_batch(model, paths, ids, args.seed + at, args, generate_batch)
            journal.add(rows)
            done, tokens = done + len(rows), tokens + sum(row.get("tokens", 0) for row in rows)
    write_answers(model, files, args, journal)
    seconds = time.perf_counter() - start
    there = f", {len(files) - done} were there" if done < len(files) else ""
    note(f"{done} pictures in {seconds:.1f} s: {done / seconds:,.2f} pictures/s, "
         f"{tokens / seconds:,.1f} tokens/s{there}")


def write_answers(model, files, args, journal):
    """The finished file, in the order of the names, and lines about what is missing in it."""
    rows = [journal.rows[name] for name in sorted(path.name for path in files)]
    rows = [row for row in rows if row["text"] is not None]
    if not rows:
        journal.remove()
        raise data.BadImage(f"{args.image}: none of its {len(files)} pictures can be used; "
                            "see the lines above")
    write_json(args.out, [llava_row(row["image"], [args.prompt, row["text"]]) for row in rows])
    journal.remove()
    note(f"{args.out}: {len(rows)} of {len(files)} pictures")
    reasons = [row["reason"] for row in rows]
    for reason in ("length", "context"):
        if reason in reasons:
            why = cut_reason(reason, model, args.max_new_tokens)
            note(f"note: {reasons.count(reason)} of {len(rows)} answers: {why}")
