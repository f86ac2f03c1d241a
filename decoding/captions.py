"""decoding/captions.py: the same question about every picture of a folder, into LLaVA JSON.

A picture that cannot be used is skipped with a line; the others are asked in batches."""

import time

import data
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
    """[(name, pixels, sizes)] of the files that can be used."""
    batch = []
    for path in paths:
        try:
            path.name.encode()                      # a name that is not UTF-8 fits no JSON
            batch.append((path.name, *load_picture(model, path)))
        except (data.BadImage, UnicodeEncodeError) as error:
            note(f"skipped: {error}")
    return batch


def caption_folder(model, files, args, generate_batch):
    """Write one sample for each picture to args.out. generate_batch: generate.py's, handed in.

    Raises BadImage if none of the pictures can be used."""
    ids = build_prompt([args.prompt], model.template, model.tokenizer)
    samples, reasons, tokens, start = [], [], 0, time.perf_counter()
    files = sort_by_length(model, files)
    starts = range(0, len(files), args.batch_size)
    for at in progress(starts, "pictures", len(files), args.batch_size):
        batch = load_batch(model, files[at:at + args.batch_size])
        names, pixels, sizes = zip(*batch) if batch else ((), (), ())
        answers = generate_batch(model, [ids] * len(batch), list(pixels), sizes=list(sizes),
                                 seed=args.seed + at, **args.settings)
        for name, answer in zip(names, answers):
            text = "".join(stream_text(answer, model.tokenizer)).strip()
            samples.append(llava_row(name, [args.prompt, text]))
            reasons.append(answer.finish_reason)
            tokens += len(answer)
    samples.sort(key=lambda sample: sample["image"])
    if not samples:
        raise data.BadImage(f"{args.image}: none of its {len(files)} pictures can be used; "
                            "see the lines above")
    write_json(args.out, samples)
    note(f"{args.out}: {len(samples)} of {len(files)} pictures")
    for reason in ("length", "context"):
        if reason in reasons:
            why = cut_reason(reason, model, args.max_new_tokens)
            note(f"note: {reasons.count(reason)} of {len(samples)} answers: {why}")
    if args.verbose:
        seconds = time.perf_counter() - start
        note(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.1f}/s")
