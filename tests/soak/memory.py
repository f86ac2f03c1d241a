"""Does a long run, or do a thousand answers, take more memory as they go on?"""

import json

import torch

from faults import in_child, resident
from generate import build_prompt, generate
from soak.room import Tally

FLAT = .01              # growth that still counts as flat


def growth_of(samples):
    """(growth, bytes early, bytes late): the mean of the last tenth relative to that of the second,
    for the first fills what a process keeps for good."""
    tenth = max(1, len(samples) // 10)
    early = sum(samples[tenth:2 * tenth]) / tenth
    late = sum(samples[-tenth:]) / tenth
    return late / early - 1, early, late


def judge(samples, files, what):
    """A record of resident bytes and open files, sampled over a run."""
    growth, early, late = growth_of(samples)
    tally, faults = Tally(), []
    if growth > FLAT:
        faults.append(f"memory grows by {growth:.2%}")
    if files[-1] > files[len(files) // 10]:
        faults.append(f"open files: {files[len(files) // 10]}, then {files[-1]}")
    tally.add(1, faults, what)
    return tally.record(note=f"{what}: {early / 1e6:.1f} MB, at the end {late / 1e6:.1f} MB "
                             f"({growth:+.2%})")


def long_run(room, kind, seed, steps=10_000, plant=None):
    """Resident memory and open files of one run of so many steps."""
    log, out = room.folder / "memory.jsonl", room.fresh()
    log.unlink(missing_ok=True)
    fault = {"memory": (str(log), max(1, steps // 200))}
    if plant:
        fault["plant"] = plant
    result = room.run(kind, out, steps=steps, save_every=steps // 20, fault=fault, limit=3600)
    if faults := result.faults(0):
        tally = Tally()
        tally.add(1, faults, f"{steps:,} steps")
        return tally.record()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return judge([line["bytes"] for line in lines], [line["files"] for line in lines],
                 f"{steps:,} steps")


def answer_pictures(folder, answers):
    """Resident memory and open files after each of so many answers about pictures."""
    import data
    from projector import VLM
    from toy.world import draw, make_scene
    torch.set_num_threads(1)
    model = VLM.from_pretrained(folder).eval()
    ids, seen = build_prompt(["Describe this image"], "v1", model.tokenizer), []
    for i in range(answers):
        pixels = data.preprocess(draw(make_scene(i)), model.image_size, "pad")
        list(generate(model, ids, pixels, max_new_tokens=20, temperature=1.0))
        seen.append(resident())
    return seen


def many_answers(room, kind, seed, answers=1000):
    """A thousand answers of a very small model about a thousand pictures."""
    seen = in_child(answer_pictures, room.reference(kind)[0] / "model", answers, limit=3600)
    return judge([one["bytes"] for one in seen], [one["files"] for one in seen],
                 f"{answers:,} answers")
