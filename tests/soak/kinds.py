"""The runs that are disturbed: all kinds of stage, on models that take a second for eight steps."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

import trainer.build
from formats.bert import BertTokenizer
from qformer import Config as QFormerConfig
from tiny import write_parts
from toy import texts
from toy.world import draw, make_scene

STEPS = 8
TINY_QFORMER = dict(width=32, depth=2, heads=2, mlp=64, num_queries=4)


@dataclass(frozen=True)
class Kind:
    """flags: of train.py, without those that all kinds have."""
    name: str
    flags: tuple
    ranks: int = 1


def make_kinds(folder):
    """{name: Kind} of runs on the parts that `write_world` has put into `folder`."""
    llm = ("--llm", f"{folder}/llama")
    parts = ("--vision", f"{folder}/clip", *llm)
    stage2 = ("--stage", "2", "--from", "none", *parts)
    own_data = ("--data", f"{folder}/rows.jsonl", "--images", f"{folder}/pictures",
                "--on-bad-sample", "skip", "--workers", "1")
    kinds = [
        Kind("stage 1", ("--stage", "1", *parts)),
        Kind("stage 2", stage2),
        Kind("LoRA", (*stage2, "--lora", "2")),
        Kind("packed", (*stage2, "--pack", "256", "--optimizer", "adamw8", "--clip", "0")),
        Kind("two ranks", stage2, ranks=2),
        Kind("own data", (*stage2, *own_data)),
        Kind("blip2 stage 1", ("--recipe", "blip2", "--stage", "1", "--vision", f"{folder}/clip")),
        Kind("blip2 stage 2", ("--recipe", "blip2", "--stage", "2", "--from", f"{folder}/qformer",
                               *llm)),
        Kind("minigpt4", ("--recipe", "minigpt4", "--stage", "1", "--qformer",
                          f"{folder}/qformer", *llm))]
    return {kind.name: kind for kind in kinds}


def flags_of(kind, out, *more, steps=STEPS, save_every=2):
    """The command line of a run of this kind into the folder `out`."""
    return [*kind.flags, "--threads", "1", "--batch", "2", "--steps", str(steps), "--dtype", "fp32",
            "--device", "cpu", "--save-every", str(save_every), "--output-dir", str(out),
            *map(str, more)]


def tiny_stage1(vision, seed=0):
    """In the place of trainer.build.new_toy_stage1: a Q-Former that knows a few hundred words."""
    known = [texts.description(make_scene(i)) for i in range(200)]
    for i in range(200):
        known += texts.captions(make_scene(i))
    tokenizer = BertTokenizer.build(known)
    config = QFormerConfig(**TINY_QFORMER, vision_width=32, vocab=len(tokenizer))
    return trainer.build.new_blip2_stage1(vision, tokenizer, config, seed, shared=16)


def write_world(folder):
    """The parts that the runs start from: CLIP, LLaMA, Q-Former, and a data file with bad rows.

    Runs in a child: the process that forks must not compute."""
    folder = Path(folder)
    torch.set_num_threads(1)
    write_parts(folder)
    tiny_stage1(folder / "clip").save_pretrained(folder / "qformer")
    (folder / "pictures").mkdir()
    lines = []
    for i in range(12):
        scene = make_scene(i)
        draw(scene).save(folder / f"pictures/{i}.png")
        lines.append({"id": f"r{i}", "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nDescribe this image"},
            {"from": "gpt", "value": texts.captions(scene)[0]}]})
    lines[3]["image"] = "missing.png"
    lines[5] = {"id": "r5", "image": "5.png", "conversations": "none"}
    lines[7] = {"id": "text", "conversations": [{"from": "human", "value": "What is red?"},
                                                {"from": "gpt", "value": "A colour."}]}
    lines[8]["conversations"][1]["value"] = " "         # nothing to learn
    (folder / "pictures/9.png").write_bytes(b"no picture")
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
