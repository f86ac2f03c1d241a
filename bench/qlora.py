"""bench.qlora: the toy's stage 2 with LoRA beside frozen weights in fp32, bf16, int8 and int4.

The same stage 1, seed, samples and steps; what differs is what the frozen weights are. Loss of the
last steps, and of samples that no run has seen, by the model as it is saved. And once more with A
and B merged into the weights from before they were coded: trainer/qlora.py says why that model is
not the one that is saved.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch

import data
import train
from projector import VLM
from toy.texts import training_sample
from trainer.lora import add_lora, merge_lora

STEPS, RANK, LAST, FRESH = 200, 16, 50, 200
BF16 = "--optimizer", "adamw8"
# what the frozen weights are -> flags; "in bf16": all else too, with masters and 8-bit moments
KINDS = {"fp32": (), "int8": ("--quantize", "int8"), "int4": ("--quantize", "int4"), "bf16": BF16,
         "int4, in bf16": (*BF16, "--quantize", "int4")}


def run(folder, name, *argv):
    """One run of train.py; returns its folder."""
    out = folder / name
    words = [*argv, "--threads", "1", "--save-every", "1000", "--output-dir", str(out)]
    if train.main(train.parse_args(words)):
        raise RuntimeError(f"{name}: the run did not end well")
    return out


@torch.no_grad()
def fresh_loss(model):
    """The mean loss of samples of a seed that is used nowhere else."""
    found = []
    for i in range(FRESH):
        image, talk = training_sample(18, 2, i, "dialogue")
        ids, labels = data.encode(talk, "v1", model.tokenizer, 1)
        pixels = data.preprocess(image, model.image_size, "pad")
        found.append(float(model.loss(torch.tensor([ids]), torch.tensor([labels]), pixels)))
    return statistics.fmean(found)


@torch.no_grad()
def merged_into_the_start(start, out):
    """What was trained in `out`, merged into the weights of `start` as they were."""
    model = VLM.from_pretrained(start, torch.float32)
    add_lora(model.llm, RANK)
    weights = data.load_weights(out / f"step-{STEPS:06d}/trained.safetensors")
    learned = {name: p for name, p in model.named_parameters()
               if name.startswith("projector.") or name.endswith((".a", ".b"))}
    if set(weights) != set(learned):
        raise RuntimeError(f"{out}: {min(set(weights) ^ set(learned))} is on one side alone")
    for name, p in learned.items():
        p.copy_(weights[name])
    merge_lora(model.llm)
    return model


def cpu_qlora():
    """Rows: LoRA beside each kind of frozen weights."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start = run(folder, "stage1", "--stage", "1") / "model"
        lora = ("--stage", "2", "--from", str(start), "--lora", str(RANK), "--steps", str(STEPS))
        for kind, flags in KINDS.items():
            out = run(folder, kind, *lora, *flags)
            losses = [json.loads(line)["loss"]
                      for line in (out / "metrics.jsonl").read_text().splitlines()]
            row = {"what": f"LoRA {RANK} beside {kind}", "first loss": losses[0],
                   f"last {LAST}": statistics.fmean(losses[-LAST:]),
                   "unseen": fresh_loss(VLM.from_pretrained(out / "model", torch.float32))}
            if "--quantize" in flags:
                row["unseen, merged into fp32"] = fresh_loss(merged_into_the_start(start, out))
            yield {**row, "ok": True}
