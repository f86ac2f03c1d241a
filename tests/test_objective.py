"""train.py against a plain loop: transformers' LLaVA, padded batches, PyTorch's AdamW in fp32.

The official objective is the mean over the learned tokens of a rank's samples, then over ranks; the
loop below is that sentence. However train.py cuts a step into rows, micro-batches and ranks, its
curve of losses must be the loop's, and a step that is packed or weighed wrongly must leave it.
"""
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import clip
import data
import llama
import projector
import train
from formats.errors import TrainingFailed
from tiny import loaded, shaken
from toy.parts import llama_tokenizer
from toy.texts import dialogue
from toy.world import SIDE, draw, make_scene
from train import parse_args as parse
from trainer.build import new_vlm
from trainer.distributed import all_ranks
from trainer.loader import MicroBatches, Samples

HERE = Path(__file__).resolve().parents[1]
SAMPLER = HERE.parent / "shared/goldens/sampler.json"
STEPS, BATCH, GROUPS, LR = 50, 8, 2, {1: 1e-2, 2: 4e-4}
STAGE1, STAGE2 = 1e-4, 1e-3         # largest relative distance of two losses: fp32; split masters


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A tiny LLaVA whose weights bf16 holds exactly, and 24 samples, some of them text alone."""
    root = tmp_path_factory.mktemp("ground")
    (root / "llama").mkdir()
    llama_tokenizer(root / "llama")
    rows = -(-(len(data.Tokenizer(root / "llama")) + 2) // 64) * 64
    torch.manual_seed(1)
    tongue = llama.Llama(llama.Config(rows, 32, 2, 4, 2, 64, 1e-5, 1e4, 1024))
    eye = shaken(clip.CLIP(clip.Config(32, 3, 2, 64, image_size=SIDE, patch_size=16),
                           clip.Config(32, 1, 2, 64, vocab=20, context=8, eos_id=19), 16))
    for name, part in (("llama", tongue), ("clip", eye)):
        part.bfloat16().float().save_pretrained(root / name)
    torch.manual_seed(3)
    model = new_vlm(root / "clip", root / "llama", "mlp", "v1", "pad")
    model.bfloat16().float().save_pretrained(root / "start")
    samples = []
    for i in range(24):
        scene = make_scene(i)
        pairs = dialogue(scene, random.Random(i), 1 + i % 3)
        talk = [{"from": who, "value": text} for pair in pairs
                for who, text in zip(("human", "gpt"), pair)]
        samples.append({"id": str(i), "conversations": talk})
        if i % 4:
            draw(scene).save(root / f"{i}.png")
            samples[-1]["image"] = f"{i}.png"
            talk[0]["value"] = "<image>\n" + talk[0]["value"]
    (root / "all.json").write_text(json.dumps(samples))
    captions = [{**s, "conversations": [{"from": "human", "value": "<image>\nDescribe it."},
                                        s["conversations"][1]]} for s in samples if "image" in s]
    (root / "captions.json").write_text(json.dumps(captions))
    return root


def flags(ground, stage, out, *more):
    return ["--stage", str(stage), "--from", str(ground / "start"), "--data",
            str(ground / ("captions.json" if stage == 1 else "all.json")), "--images", str(ground),
            "--batch", str(BATCH), "--loss-groups", str(GROUPS), "--steps", str(STEPS), "--lr",
            str(LR[stage]), "--clip", "0", "--threads", "1", "--save-every", "1000",
            "--output-dir", str(out), *(("--dtype", "fp32", "--muon", "0") if stage == 1 else
                                        ("--optimizer", "adamw8")), *map(str, more)]


def curve(out):
    return [json.loads(x)["loss"] for x in (out / "metrics.jsonl").read_text().splitlines()]


def ours(ground, stage, tmp_path, *more):
    assert train.main(parse(flags(ground, stage, tmp_path / "run", *more))) == 0
    return curve(tmp_path / "run")


@pytest.fixture(scope="module")
def plain(ground):
    """stage -> losses of the loop."""
    from transformers import LlavaForConditionalGeneration
    made = {}

    def run(stage):
        if stage in made:
            return made[stage]
        model = loaded(LlavaForConditionalGeneration, ground / "start").train()
        args = parse(flags(ground, stage, ground))
        samples, words = Samples(args), data.Tokenizer(ground / "start")
        image, places = words.added("<image>"), (SIDE // 16) ** 2
        trains = ("multi_modal_projector",) + ("language_model", "lm_head") * (stage == 2)
        for name, p in model.named_parameters():
            p.requires_grad_(any(part in name for part in trains))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                      LR[stage], weight_decay=0)
        losses, warm = [], math.ceil(.03 * STEPS)
        for step in range(STEPS):
            rate = step / warm if step < warm else (
                1 + math.cos(math.pi * (step - warm) / (STEPS - warm))) / 2
            optimizer.param_groups[0]["lr"] = LR[stage] * rate
            total = 0.
            for group in range(GROUPS):
                size = BATCH // GROUPS
                rows, pixels = [], []
                for i in range(step * BATCH + group * size, step * BATCH + (group + 1) * size):
                    picture, talk = samples[i]
                    ids, labels = data.encode(talk, args.row.template, words, picture is not None)
                    wide = [([x] if x != data.IMAGE else [image] * places, y)
                            for x, y in zip(ids, labels)]
                    rows.append(([x for xs, _ in wide for x in xs], [y for xs, y in wide
                                                                     for _ in xs]))
                    if picture is not None:
                        pixels.append(data.preprocess(picture, SIDE, args.row.image_aspect))
                ids, labels = data.collate(rows, 0)
                sizes = torch.tensor([len(row) for row, _ in rows])
                there = torch.arange(ids.shape[1]) < sizes[:, None]
                loss = model(input_ids=ids, labels=labels, attention_mask=there.long(),
                             pixel_values=torch.cat(pixels) if pixels else None).loss / GROUPS
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        made[stage] = losses
        return losses
    return run


def apart(a, b):
    """Largest relative distance of two curves that fell."""
    assert len(a) == len(b) == STEPS and sum(a[-10:]) < .99 * sum(a[:10]), a
    return max(abs(x - y) / y for x, y in zip(a, b))


WAYS = {"padded": (), "accumulated": ("--accum", 4), "packed": ("--pack", 256)}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_stage_one_is_the_plain_loop(ground, plain, tmp_path, way):
    assert apart(ours(ground, 1, tmp_path, *way), plain(1)) < STAGE1


@pytest.mark.parametrize("way", [("--accum", 4), ("--pack", 256)], ids=["accumulated", "packed"])
def test_stage_two_with_split_masters_is_the_plain_loop(ground, plain, tmp_path, way):
    assert apart(ours(ground, 2, tmp_path, *way), plain(2)) < STAGE2


def one_document(monkeypatch):
    """All texts of a row see each other."""
    real = projector.document_spans
    monkeypatch.setattr(projector, "document_spans",
                        lambda lengths, device: real([[sum(lengths[0])]], device))


def means_of_rows(monkeypatch):
    """Every row counts the same, however much is learned in it."""
    real = MicroBatches.plan

    def plan(self, step):
        rows = real(self, step)
        learned = [sum(x != data.IGNORE for t in row for x in t[2]) for row in rows]
        return [[t._replace(weight=1 / (len(rows) * n)) for t in row]
                for row, n in zip(rows, learned)]
    monkeypatch.setattr(MicroBatches, "plan", plan)


@pytest.mark.parametrize("wrong", [one_document, means_of_rows])
def test_a_wrong_packing_leaves_the_curve(ground, plain, tmp_path, monkeypatch, wrong):
    wrong(monkeypatch)
    assert apart(ours(ground, 1, tmp_path, "--pack", 256), plain(1)) > 3 * STAGE1


def test_another_objective_leaves_the_curve(ground, plain, tmp_path):
    assert apart(ours(ground, 1, tmp_path, "--loss-groups", 1), plain(1)) > 3 * STAGE1


def test_workers_change_no_bit(ground, tmp_path):
    kept = []
    for workers in (0, 1, 2):
        out = tmp_path / str(workers)
        assert train.main(parse(flags(ground, 2, out, "--workers", workers, "--pack",
                                                 256, "--steps", 4))) == 0
        kept.append((out / "model/model.safetensors").read_bytes())
    assert kept[0] == kept[1] == kept[2]


def test_frozen_matrices_keep_no_input(ground, tmp_path):
    """Of all that backward will need, nothing went into a frozen matrix of the LLaMA."""
    kept = {}
    for stage in (1, 2):
        args = parse(flags(ground, stage, tmp_path, "--optimizer", "adamw", "--dtype",
                                     "fp32"))
        job = train.vlm_job(args, tmp_path, "cpu")
        went_in, saved = [], set()
        for name, m in job.model.llm.blocks.named_modules():
            # what goes into `out` is attention's result, which attention keeps for itself
            if isinstance(m, torch.nn.Linear) and not name.endswith("out"):
                m.register_forward_pre_hook(lambda m, given: went_in.append(given[0].detach()))

        def attention_mask(t):
            saved.add(t.untyped_storage().data_ptr())
            return t
        with torch.autograd.graph.saved_tensors_hooks(attention_mask, lambda t: t):
            loss = job.model.loss(*next(job.batches(0))[:6])
        loss.backward()
        kept[stage] = sum(t.untyped_storage().data_ptr() in saved for t in went_in)
        assert len(went_in) == 6
    assert kept == {1: 0, 2: 6}             # stage 2 is the control


def test_text_alone_wakes_no_eye(ground, tmp_path):
    args = parse(flags(ground, 2, tmp_path, "--order", "shuffled"))
    job, looks, last = train.vlm_job(args, tmp_path, "cpu"), [], []
    job.model.vision.register_forward_hook(lambda *a: looks.append(1))
    job.model.vision.blocks[-1].register_forward_hook(lambda *a: last.append(1))
    micro = next(job.batches(0))
    with torch.no_grad():
        job.loss(micro)
        assert len(looks) == 1 and not last             # CLIP's last block is never run
        texts = [i for i in range(BATCH) if not (micro.ids[i] == data.IMAGE).any()]
        job.loss(micro._replace(pixels=None, **{name: getattr(micro, name)[texts] for name in (
            "ids", "labels", "attention_mask", "weights")}))
    assert texts and len(looks) == 1


# ------------------------------------------------------------------------------------ many ranks

def torchrun(argv, **named):
    """Two ranks of train.py; .communicate() says what they said."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         HERE / "train.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **named)


def test_two_ranks_are_one(ground, tmp_path):
    """In steps of text alone on both ranks or one, and where a checkpoint of two goes on as one."""
    argv = ["--optimizer", "adamw", "--dtype", "fp32", "--steps", 8, "--save-every", 4]
    two, one, again = (tmp_path / name for name in ("two", "one", "again"))
    said = torchrun(flags(ground, 2, two, *argv)).communicate(timeout=500)[0]
    assert (two / "model").exists(), said
    args = parse(flags(ground, 2, one, *argv))
    samples = Samples(args)
    texts = [[samples.read(i)[0] is None for i in range(b, b + BATCH // 2)]
             for b in range(0, 8 * BATCH, BATCH // 2)]
    ranks = list(zip(texts[::2], texts[1::2]))
    assert any(all(a) != all(b) for a, b in ranks) or any(all(a) and all(b) for a, b in ranks)
    assert train.main(args) == 0
    shutil.copytree(two, again)
    for path in (again / "model", again / "step-000008"):
        shutil.rmtree(path)
    assert train.main(parse(flags(ground, 2, again, *argv, "--resume", "auto"))) == 0
    for out in (two, again):
        assert max(abs(a - b) / b for a, b in zip(curve(out), curve(one))) < 1e-5
        for name in ("trained", "optimizer"):
            a, b = (load_file(f / f"step-000008/{name}.safetensors") for f in (out, one))
            assert {n: (t.shape, t.dtype) for n, t in a.items()} == {
                n: (t.shape, t.dtype) for n, t in b.items()}


def test_two_ranks_with_split_masters_are_the_plain_loop(ground, plain, tmp_path):
    """And with states and sums of gradients in the host's memory the same bits."""
    made = []
    for name, more in (("run", ()), ("host", ("--offload-optimizer", "--offload-gradients"))):
        out = tmp_path / name
        said = torchrun(flags(ground, 2, out, "--pack", 256, *more)).communicate(timeout=500)[0]
        assert (out / "model").exists(), said
        assert apart(curve(out), plain(2)) < STAGE2
        made.append(load_file(out / f"step-{STEPS:06d}/optimizer.safetensors"))
        assert made[-1]["llm.head.weight|low"].dtype == torch.int16
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_a_killed_rank_ends_the_other(ground, tmp_path):
    process = torchrun(flags(ground, 2, tmp_path / "run", "--steps", 10 ** 5))
    started, log = time.time(), tmp_path / "run/metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 1):
        assert process.poll() is None and time.time() - started < 400
        time.sleep(.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    killed = time.time()
    said = process.communicate(timeout=60)[0]
    assert time.time() - killed < 30 and process.returncode == 1
    assert "error: another rank is gone" in said and "--resume auto" in said, said
    assert not Path(f"/proc/{children[0]}").exists()


def test_a_rank_that_is_lost_before_all_have_met_is_one_line(monkeypatch):
    """Controls: another error is not called so, and one process has no other ranks."""
    failures = [torch.distributed.DistNetworkError("Connection reset by peer"),
                torch.distributed.DistStoreError("wait timeout"), RuntimeError("a shape differs")]

    def fails(*args, **more):
        raise failures[0]

    monkeypatch.setattr(torch.distributed, "init_process_group", fails)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for message in ("another rank is gone.*reset by peer", "another rank is gone.*timeout"):
        with pytest.raises(TrainingFailed, match=message), all_ranks(None, "cpu"):
            pass
        del failures[0]
    with pytest.raises(RuntimeError, match="^a shape differs"), all_ranks(None, "cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="^an address of a peer"), all_ranks(None, "cpu"):
        raise RuntimeError("an address of a peer")


# ------------------------------------------------------------------ which samples stand together

def test_packing_fills_rows_and_loses_nobody():
    dice = random.Random(0)
    for _ in range(50):
        lengths = [dice.randint(1, 40) for _ in range(dice.randint(1, 60))]
        rows = data.pack(lengths, 64)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        sums = [sum(lengths[i] for i in row) for row in rows]
        assert max(sums) <= 64 and rows == data.pack(lengths, 64)
        assert sum(s <= 32 for s in sums) <= 1          # two half-empty rows would have been one
    assert data.pack([3, 5, 2, 4], 7) == [[1, 2], [3, 0]]
    with pytest.raises(data.BadData, match="65 tokens .* row of 64"):
        data.pack([3, 65], 64)


def test_a_sample_longer_than_a_row_is_named(ground, tmp_path):
    args = parse(flags(ground, 2, tmp_path, "--pack", 60))
    with pytest.raises(data.BadData, match=r"sample \d+: .* row of --pack 60"):
        next(train.vlm_job(args, tmp_path, "cpu").batches(0))


def test_a_long_sample_is_cut_where_asked(ground, tmp_path):
    """From the end, the picture counted whole; and not at all unless asked."""
    def texts(*more):
        job = train.vlm_job(parse(flags(ground, 2, tmp_path, "--pack", 400, *more)),
                               tmp_path, "cpu")
        return [t for micro in job.batches.plan(0) for t in micro], job.batches
    whole, _ = texts()
    short, batches = texts("--max-length", 80)
    before, cut = ({index: (ids, labels) for index, ids, labels, _ in some}
                   for some in (whole, short))
    assert max(batches.size(ids) for ids, _ in before.values()) > 80 and cut
    for index, (ids, labels) in cut.items():
        n = len(ids)
        assert (ids, labels) == tuple(x[:n] for x in before[index])
        assert batches.size(ids) == min(80, batches.size(before[index][0]))
    # the message names the number from which on the picture is whole
    with pytest.raises(data.BadData, match="its picture ends behind --max-length 6: give more "
                       r"than (\d+), or .*--on-bad-sample skip") as info:
        texts("--max-length", 6)
    enough = int(re.search(r"give more than (\d+)", str(info.value))[1])
    name = str(info.value).split(": its picture")[0]
    with pytest.raises(data.BadData, match=f"{name}: its picture ends behind"):
        texts("--max-length", enough - 1)
    try:
        texts("--max-length", enough)
    except data.BadData as error:                   # another sample may need more, this one not
        assert not str(error).startswith(f"{name}: its picture")


@pytest.mark.skipif(not SAMPLER.exists(), reason=f"{SAMPLER} is not here")
def test_the_official_order_of_samples():
    for case in json.loads(SAMPLER.read_text())["cases"]:
        given = case["lengths"], case["batch_size"], case["world_size"]
        for seed, same in ((case["seed"], True), (case["seed"] + 1, False)):
            order = data.modality_order(*given, torch.Generator().manual_seed(seed))
            assert (order == case["indices"]) == same


def test_steps_hold_one_kind_of_sample():
    lengths = [i + 1 if i % 3 else -i - 1 for i in range(60)]
    order = data.modality_order(lengths, 4, 2, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(60))
    steps = [order[i:i + 8] for i in range(0, 60, 8)]
    assert all(len({lengths[i] > 0 for i in step}) == 1 for step in steps[:6])
    assert order[48:] == sorted(order[48:]) and order[:48] != sorted(order[:48])    # the rest
    with pytest.raises(data.BadData, match="number 1 .* no words"):
        data.modality_order([3, 0], 1, 1, None)
