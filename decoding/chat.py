"""TODO"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
from decoding.flags import check_prompt
from decoding.prompt import build_prompt, places
from decoding.stopping import spell
from formats.conversations import llava_row
from formats.errors import note, UsageError, UserError


def trim_history(model, turns, shown, max_new_tokens):
    """The newest turns that fit the context with an answer behind them, at least the last, and
    their pictures {turn: (pixels, sizes, ...)}: if they have none, the newest of those before."""
    context, kept = model.llm.config.context, turns
    room = context - min(max_new_tokens, context // 4)
    while len(kept) > 1 and places(model, build_prompt(kept, model.template, model.tokenizer, numbers(shown)),
                                   together(shown)[1]) > room:
        kept, old = kept[2:], shown
        shown = {i - 2: picture for i, picture in old.items() if i >= 2}
        shown = shown or {0: old[max(old)]}
    if kept is not turns:
        note(f"note: the context of {context} places is full: the oldest "
             f"{(len(turns) - len(kept)) // 2} question(s) and answer(s) are forgotten")
    return kept, shown


def chat(model, picture, args, answer):
    """Questions from stdin until it ends. What goes wrong in a turn ends that turn only."""
    turns, shown = [], {0: picture}
    note("chat: /image PATH (one more picture, behind those before)  /reset  /save FILE  /quit")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        command, _, path = (part.strip() for part in line.partition(" "))
        try:
            if not line:
                continue
            if check_prompt(line):
                raise UsageError(check_prompt(line))
            if command == "/quit":
                return 0
            if command == "/reset":
                turns, shown = [], {0: shown[max(shown)]}
            elif command == "/image":
                shown = with_picture(model, shown, len(turns), path)
                turns = turns if len(turns) in shown else []        # the talk began anew
            elif command == "/save" and path and turns:
                saved(path, turns, shown)
            elif command.startswith("/"):
                raise UsageError("the commands are /image PATH, /reset, /save FILE (once something "
                                 "has been said), /quit")
            else:
                kept, after = trim_history(model, turns + [line], shown, args.max_new_tokens)
                turns, shown = kept + [answer(model, kept, after, args)], after
        except UserError as error:
            note(f"error: {error}")


def tokens_of(path, model):
    """Places that a picture's file will take; 0 if it cannot be read."""
    try:
        return model.num_image_tokens(data.load_image(path).size)
    except data.BadImage:
        return 0


def caption_folder(model, files, args, generate_batch):
    """Ask the same about every picture and write LLaVA JSON; bad pictures are passed over."""
    ids, samples, told = build_prompt([args.prompt], model.template, model.tokenizer), [], time.time()
    reasons, count, began = [], 0, time.perf_counter()
    if model.aspect == "anyres":            # elsewhere all pictures take the same places
        files = sorted(files, key=lambda path: (tokens_of(path, model), path))
    for start in tqdm(range(0, len(files), args.batch_size), disable=None):
        good = []
        for path in files[start:start + args.batch_size]:
            try:
                path.name.encode()
                good.append((path.name, see(path, model)))
            except (data.BadImage, UnicodeEncodeError) as error:
                note(f"skipped: {error}")
        said = generate_batch(model, [ids] * len(good), [x for _, (x, _) in good],
                              sizes=[size for _, (_, size) in good], seed=args.seed + start,
                              **args.settings)
        reasons += [tokens.finish_reason for tokens in said]
        count += sum(map(len, said))
        samples += [llava_row(name, [args.prompt, "".join(spell(x, model.tokenizer)).strip()])
                    for (name, _), x in zip(good, said)]
        if not sys.stderr.isatty() and time.time() - told > 5:
            told = time.time()
            note(f"{min(start + args.batch_size, len(files))}/{len(files)} pictures")
    samples.sort(key=lambda sample: sample["image"])
    if not samples:
        raise data.BadImage(f"{args.image}: none of its {len(files)} pictures can be used; "
                            "see the lines above")
    write(args.out, samples)
    note(f"{args.out}: {len(samples)} of {len(files)} pictures")
    for reason in ("length", "context"):
        if reason in reasons:
            why = cut_at(reason, model, args.max_new_tokens)
            note(f"note: {reasons.count(reason)} of {len(samples)} answers: {why}")
    if args.verbose:
        seconds = time.perf_counter() - began
        note(f"{count} tokens in {seconds:.1f} s, {count / seconds:,.1f}/s")


def see(path, model):
    """A picture's file -> pixels (n, 3, S, S) and, where the model cuts pictures, [its size]."""
    image = data.load_image(path)
    return model.pixels(image), [image.size] if model.aspect == "anyres" else None


def names_in(paths):
    """The folder that holds all the pictures, and their names in it."""
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return root, [Path(os.path.relpath(path, root)).as_posix() for path in paths]


def write(path, samples):
    """JSON, whole or not at all: aside, fsync, rename. Raises data.Failure."""
    aside = os.path.join(os.path.dirname(path), f".generate-{os.getpid()}.tmp")
    # a rename would replace /dev/stdout itself
    if not os.path.isdir(os.path.dirname(path) or ".") or (os.path.exists(path)
                                                           and not os.path.isfile(path)):
        raise UserError(f"{path}: not a file in a folder that exists: name another")
    try:
        with open(aside, "w", encoding="utf-8") as f:
            json.dump(samples, f, ensure_ascii=False, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        raise UserError(f"{path}: {error.strerror}: name another file") from None
    except UnicodeEncodeError:
        Path(aside).unlink(missing_ok=True)
        raise UserError(f"{path}: not written: a picture's name is not valid UTF-8: rename "
                           "it") from None


def together(shown):
    """{turn: (pixels, sizes, ...)} -> all pixels, all sizes or None, in the order of the turns."""
    pictures = [shown[i][:2] for i in sorted(shown)]
    sizes = [size for _, some in pictures for size in some or ()]
    return torch.cat([pixels for pixels, _ in pictures]), sizes or None


def numbers(shown):
    """{turn: (pixels, sizes, ...)} -> the turns as `ask` takes them, one number for a picture."""
    return [i for i, (pixels, sizes, *_) in sorted(shown.items()) for _ in sizes or pixels]


def pictured(model, paths):
    """The pictures of one turn: (pixels (n, 3, S, S), sizes or None, their files)."""
    return *together(dict(enumerate(see(path, model) for path in paths))), list(paths)


def cut_at(reason, model, max_new_tokens):
    """What to tell of an answer whose `finish_reason` says that it was cut; None for the others."""
    return {"length": f"cut at --max-new-tokens {max_new_tokens}: give more",
            "context": f"cut where the model's context of {model.llm.config.context} places is "
            "full: use fewer words or pictures (/reset in a chat)"}.get(reason)


def check_room(model, picture):
    """Raises data.Usage if a turn cannot hold these pictures, data.Failure if the model's context
    cannot."""
    taken = places(model, build_prompt(["?"], model.template, model.tokenizer, numbers({0: picture})),
                   picture[1])
    if taken >= model.llm.config.context:
        raise UserError(f"{', '.join(map(str, picture[2]))}: take {taken} places in one "
                           f"question, the model's context has {model.llm.config.context}: give "
                           "fewer pictures")


def with_picture(model, shown, turn, path):
    """`shown` with one more picture in this turn, behind those that it has; {0: the new one alone}
    if the model takes no more. Raises as `check_room` does."""
    new = pictured(model, [path])
    both = new
    if turn in shown:
        pixels, sizes = together({0: shown[turn], 1: new})
        both = pixels, sizes, [*shown[turn][2], path]
    after = {**shown, turn: both}
    try:
        build_prompt(["?"] * (turn + 1), model.template, model.tokenizer, numbers(after))
    except UsageError as error:
        note(f"note: {error}: the talk begins anew with this one")
        return {0: new}
    check_room(model, both)
    return after


def saved(path, turns, shown):
    """Write a talk as LLaVA JSON, with the pictures of the turns that have been asked."""
    asked = {i: picture for i, picture in shown.items() if i < len(turns)}
    root, names = names_in([name for i in sorted(asked) for name in asked[i][2]])
    write(path, [llava_row(names if len(names) > 1 else names[0], turns, numbers(asked))])
    note(f"saved: {path}" + (f", its pictures are in {root}" if len(names) > 1 else ""))
