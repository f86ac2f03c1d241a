"""The recipes beside LLaVA's: what learns, at what rate, with which decay, and to the same bits."""

import hashlib
import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import llama
import train
from clip import CLIP, Config
from formats.errors import UsageError
from formats.folders import leave_out_tower
from train import parse_args as parse
from trainer import build, run_folder, start
from trainer.checkpoint import save_checkpoint
from trainer.schedules import lr_schedule

TOY_PARTS = Path(__file__).parents[1] / "toy/weights"
SMALL = dict(width=128, depth=2, heads=4, mlp=64, num_queries=3)


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch):
    """Runs inside this process set threads, signals and determinism: put them back."""
    monkeypatch.setattr(train, "generate", lambda *a, **more: iter((5, 6, 7)))
    monkeypatch.setattr(build, "TOY_QFORMER", SMALL)
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in
                                                  (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(out, recipe, stage, *more, steps=3):
    """Exit code of a short run."""
    return train.main(parse([
        "--recipe", recipe, "--stage", str(stage), "--output-dir", str(out), "--batch", "2",
        "--steps", str(steps), "--save-every", "1", "--threads", "1", *map(str, more)]))


def sha(out):
    return hashlib.sha256((out / "model/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """blip2 and minigpt4, both stages each, three steps a stage."""
    sizes, generate = build.TOY_QFORMER, train.generate
    build.TOY_QFORMER = SMALL
    train.generate = lambda *a, **more: iter((5, 6, 7))
    top = tmp_path_factory.mktemp("toy")
    for recipe in ("blip2", "minigpt4"):
        for stage in (1, 2):
            own = ()
            if (recipe, stage) == ("minigpt4", 1):      # else it takes the shipped one
                own = "--qformer", top / "blip2/stage2/model"
            assert run(top / recipe / f"stage{stage}", recipe, stage, *own) == 0
    build.TOY_QFORMER, train.generate = sizes, generate
    return top


def weights(folder):
    return data.load_weights(folder / "model")


def test_every_stage_starts_where_the_one_before_ended(chain):
    """And trains its parts alone: what is frozen has the bits of the stage before."""
    first, second = weights(chain / "blip2/stage1"), weights(chain / "blip2/stage2")
    third, fourth = weights(chain / "minigpt4/stage1"), weights(chain / "minigpt4/stage2")
    tower = "vision_model.encoder.layers.0.mlp.fc1.weight"
    asks = "qformer.encoder.layer.0.attention.attention.query.weight"
    tongue = "language_model.model.layers.0.mlp.down_proj.weight"
    for a, b in ((first, second), (second, third), (third, fourth)):
        assert torch.equal(a[tower], b[tower])
    assert not torch.equal(first[asks], second[asks])           # blip2's second stage trains it
    assert torch.equal(second[asks], third[asks]) and torch.equal(third[asks], fourth[asks])
    own = llama.Llama.from_pretrained(TOY_PARTS / "llama").blocks[0].down.weight
    assert all(torch.equal(w[tongue], own) for w in (second, third, fourth))
    proj = "language_projection.weight"
    assert not torch.equal(second[proj], third[proj])           # MiniGPT-4's is a new one
    assert not torch.equal(third[proj], fourth[proj])


def test_the_three_losses_are_logged_and_one_can_be_left_out(chain, tmp_path):
    line = json.loads((chain / "blip2/stage1/metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss"] == pytest.approx(line["itc"] + line["itm"] + line["itg"], abs=1e-4)
    assert run(tmp_path / "run", "blip2", 1, "--losses", "itc,itm") == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert "itg" not in line and line["loss"] == pytest.approx(line["itc"] + line["itm"], abs=1e-4)


@pytest.mark.parametrize("recipe, stage", [("blip2", 1), ("blip2", 2), ("minigpt4", 1)])
def test_a_run_that_was_stopped_ends_with_the_same_bits(chain, tmp_path, recipe, stage,
                                                        monkeypatch):
    start = {("blip2", 2): ("--from", chain / "blip2/stage1/model"),
             ("minigpt4", 1): ("--qformer", chain / "blip2/stage2/model")}.get((recipe, stage), ())
    real, calls = save_checkpoint, []

    def stopping(job, out, step, keep):
        real(job, out, step, keep)
        if step == 2 and not calls:
            calls.append(step)
            raise KeyboardInterrupt
    monkeypatch.setattr(run_folder, "save_checkpoint", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", recipe, stage, *start)
    assert run(tmp_path / "run", recipe, stage, *start, "--resume", "auto") == 0
    assert sha(tmp_path / "run") == sha(chain / recipe / f"stage{stage}")
    assert run(tmp_path / "other", recipe, stage, *start, "--seed", 1) == 0
    assert sha(tmp_path / "other") != sha(chain / recipe / f"stage{stage}")


def test_sharegpt4v_unlocks_the_upper_half_of_the_tower(tmp_path):
    """Block 4, the tower's last, is unlocked too and gets no gradient: LLaVA reads block 3."""
    with pytest.raises(data.BadModel, match="llava-1.5 --stage 1 first"):
        run(tmp_path / "sharegpt4v/stage1", "sharegpt4v", 1)
    for recipe in ("llava-1.5", "sharegpt4v"):
        assert run(tmp_path / recipe / "stage1", recipe, 1) == 0
    old, new = weights(tmp_path / "llava-1.5/stage1"), weights(tmp_path / "sharegpt4v/stage1")
    at = "vision_tower.vision_model.encoder.layers.{}.mlp.fc1.weight".format
    assert [torch.equal(old[at(i)], new[at(i)]) for i in range(5)] == [True] * 2 + [False] * 2 + [
        True]
    for name in ("vision_tower.vision_model.embeddings.patch_embedding.weight",
                 "vision_tower.vision_model.pre_layrnorm.weight"):
        assert torch.equal(old[name], new[name])
    for name in ("multi_modal_projector.linear_1.weight", "language_model.model.norm.weight"):
        assert not torch.equal(old[name], new[name])
    assert run(tmp_path / "sharegpt4v/stage2", "sharegpt4v", 2) == 0        # keeps the tuned tower
    last = weights(tmp_path / "sharegpt4v/stage2")
    assert all(torch.equal(new[at(i)], last[at(i)]) for i in range(5))


# --------------------------------------------------------------------------------- the schedules

def rates(recipe, stage, steps, **changes):
    """The learning rate of every step of a row, in its own units."""
    row = replace(train.RECIPES[recipe][stage - 1], **changes)
    factor = lr_schedule(row, steps)
    return [row.lr * factor(step) for step in range(steps)]


def test_lavis_stands_still_within_an_epoch():
    """1e-4 -> 1e-5 over ten epochs; the warm-up from 1e-6 happens in the first of them only."""
    made = rates("blip2", 1, 100_000)
    assert made[0] == pytest.approx(1e-6) and made[2500] == pytest.approx((1e-6 + 1e-4) / 2)
    assert set(made[5000:10_000]) == {made[9999]} and made[9999] == pytest.approx(1e-4)
    assert len(set(made[10_000:20_000])) == 1
    assert made[10_000] == pytest.approx(1e-5 + 9e-5 * (1 + math.cos(math.pi / 10)) / 2)
    late = rates("blip2", 1, 20_000)            # epochs of 2,000 steps: the warm-up breaks off
    assert late[1999] < 5e-5 and late[2000] == pytest.approx(made[10_000])
    smooth = rates("blip2", 1, 100_000, schedule="minigpt4")
    assert len(set(smooth[10_000:20_000])) > 1                              # the control


def test_minigpt4_falls_at_once_after_the_warm_up():
    """Its cosine has been running since step 0: 9.707e-5 right after the warm-up."""
    made = rates("minigpt4", 1, 20_000)
    assert made[0] == pytest.approx(1e-6) and made[4999] == pytest.approx(1e-4, rel=1e-3)
    assert made[5000] == pytest.approx(9.707e-5, rel=1e-4)
    assert made[-1] == pytest.approx(8e-5, rel=1e-4)
    assert made[7500] < 9.5e-5
    assert rates("minigpt4", 1, 20_000, schedule="lavis")[7500] > 9.5e-5    # the control


def test_what_decays():
    """Not vectors; and a number without dimensions in LAVIS's rule alone, as BLIP-2's temp."""
    named = {"w": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.nn.Parameter(torch.ones(2)),
             "temp": torch.nn.Parameter(torch.tensor(.07))}

    def decaying(recipe):
        groups = train.parameter_groups(named, train.RECIPES[recipe][0])
        return {n for n, p in named.items() for g in groups
                if g["weight_decay"] == .05 and any(p is q for q in g["params"])}
    assert decaying("blip2") == {"w", "temp"} and decaying("minigpt4") == {"w"}
    assert not decaying("llava-1.5")


# ------------------------------------------------------------------------------------- bad input

def test_parts_that_are_not_there_are_named(tmp_path):
    with pytest.raises(data.BadModel, match="stage 1 first"):
        run(tmp_path / "minigpt4/stage2", "minigpt4", 2)
    with pytest.raises(data.BadModel, match="not a model folder"):
        run(tmp_path / "minigpt4/stage1", "minigpt4", 1, "--qformer", tmp_path / "none")
    with pytest.raises(UsageError, match="no such part"):
        run(tmp_path / "run", "blip2", 1, "--train", "qformer,ear")


@pytest.mark.parametrize("argv", [
    ["--recipe", "blip2", "--projector-type", "mlp"], ["--recipe", "blip2", "--losses", "itc,itx"],
    ["--recipe", "llava", "--losses", "itc"], ["--recipe", "blip2", "--losses", ""],
    ["--recipe", "blip2", "--show-batch", "1"], ["--schedule", "flat"],
    ["--caption-style", "lies"], ["--recipe", "llava", "--qformer", "x"],
    ["--recipe", "blip2", "--qformer", "x"],
    ["--recipe", "blip2", "--stage", "2", "--qformer", "x", "--from", "y"]])
def test_flags_that_do_not_fit_a_recipe(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(["--stage", "1", *argv])
    assert leaving.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("captions, why", [
    (("", "a red star"), "sample 1.*no word"), (("a star", "A star!"), "no negatives"),
    (("word " * 2000, "a red star"), None)])
def test_odd_captions(tmp_path, captions, why):
    """An empty one is refused by name, like ones have no negatives, a long one is cut."""
    Image.new("RGB", (70, 50), "red").save(tmp_path / "one.png")
    rows = [{"id": str(i), "image": "one.png", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]}
        for i, caption in enumerate(captions, 1)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    given = (tmp_path / "run", "blip2", 1, "--data", tmp_path / "rows.json", "--images", tmp_path)
    if why:
        with pytest.raises(data.BadData, match=why):
            run(*given)
    else:
        assert run(*given) == 0
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
            assert math.isfinite(json.loads(line)["loss"])


def test_a_batch_of_one_has_no_negatives(tmp_path):
    with pytest.raises(data.BadData, match="no negatives"):
        run(tmp_path / "run", "blip2", 1, "--batch", 1)


# ------------------------------------------------------------------------------------- Muon

def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    """Tables of tokens, the output head, vectors: what [Muon] leaves to AdamW."""
    named = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in {
        "projector.first.weight": (4, 4), "projector.first.bias": (4,),
        "projector.second.weight": (4, 4), "llm.embed.weight": (8, 4), "llm.head.weight": (8, 4),
        "llm.blocks.0.qkv.weight": (6, 4), "llm.blocks.0.norm_1.weight": (4,)}.items()}
    row = train.parse_args(["--stage", "1"]).row
    matrices, rest = train.make_optimizers(named, row, train.parse_args(["--stage", "1"]))
    assert type(matrices) is torch.optim.Muon and matrices.param_groups[0]["lr"] == row.muon > 0
    assert type(rest) is torch.optim.AdamW and rest.param_groups[0]["lr"] == row.lr
    of = {id(p): name for name, p in named.items()}
    assert [of[id(p)] for p in matrices.param_groups[0]["params"]] == [
        "projector.first.weight", "projector.second.weight", "llm.blocks.0.qkv.weight"]
    assert len(rest.param_groups[0]["params"]) == 4


@pytest.mark.parametrize("flags", [("--muon", "0"), ("--optimizer", "adamw8"),
                                   ("--stage", "2", "--lora", "4"), ("--base", "7b")])
def test_without_muon(flags):
    """LoRA, 8-bit states and full size know AdamW alone."""
    assert train.parse_args(["--stage", "1", *flags]).row.muon == 0


def test_muon_beside_adamw8_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--stage", "1", "--optimizer", "adamw8", "--muon", ".01"])
    assert "--muon 0" in capsys.readouterr().err


# ------------------------------------------------------------------------- the shipped Q-Former

ASKS = "qformer.encoder.layer.0.attention.attention.query.weight"


@pytest.fixture
def shipped(chain, monkeypatch):
    """Weights of a Q-Former of 16 queries that stands for the shipped one: the same sizes."""
    sizes = {**SMALL, "num_queries": 16}
    monkeypatch.setattr(build, "TOY_QFORMER", sizes)
    folder = chain / "shipped"
    build.new_toy_stage1(TOY_PARTS / "clip", seed=9).save_pretrained(folder)
    leave_out_tower(folder, "toy/weights/clip")
    for module in (build, start):
        monkeypatch.setattr(module, "SHIPPED_QFORMER", str(folder))
    monkeypatch.setattr(build, "TOY_QFORMER", SMALL)
    return data.load_weights(folder)


def test_minigpt4_starts_from_the_shipped_qformer(tmp_path, chain, shipped):
    """With nothing before it, and also beside a BLIP-2 of the user's own, which --qformer names."""
    (tmp_path / "blip2").symlink_to(chain / "blip2")
    assert run(tmp_path / "minigpt4/stage1", "minigpt4", 1) == 0
    found = weights(tmp_path / "minigpt4/stage1")
    assert torch.equal(found[ASKS], shipped[ASKS])
    assert found["query_tokens"].shape[1] == 16 and weights(chain / "minigpt4/stage1")[
        "query_tokens"].shape[1] == 3


def test_blip2s_second_stage_starts_from_the_shipped_one_or_from_the_first(tmp_path, chain, capsys,
                                                                           shipped):
    assert run(tmp_path / "blip2/stage2", "blip2", 2, steps=2) == 0
    assert "starts from the shipped Q-Former" in capsys.readouterr().err
    found = weights(tmp_path / "blip2/stage2")
    assert found["query_tokens"].shape[1] == 16
    config = json.loads((tmp_path / "blip2/stage2/config.json").read_text())
    assert config["start"] == build.SHIPPED_QFORMER
    # near the shipped one, and no copy of it: the rate of the first step is 0
    gap = (found[ASKS] - shipped[ASKS]).abs().max()
    assert 0 < gap < .05
    # beside a stage 1 it goes on from there, without a word: `chain` did
    assert weights(chain / "blip2/stage2")["query_tokens"].shape[1] == 3
    config = json.loads((chain / "blip2/stage2/config.json").read_text())
    assert config["start"] is None
    # told otherwise, by either flag
    capsys.readouterr()
    for flag in ("--from", "--qformer"):
        out = tmp_path / f"told{flag}"
        assert run(out, "blip2", 2, flag, chain / "blip2/stage1/model", steps=1) == 0
        assert weights(out)["query_tokens"].shape[1] == 3
    assert "shipped" not in capsys.readouterr().err


def test_a_stage_one_that_came_later_does_not_change_a_run(tmp_path, chain, shipped):
    """Begun from the shipped one, it is refused, not resumed from something else."""
    out = tmp_path / "blip2/stage2"
    assert run(out, "blip2", 2, steps=1) == 0
    (tmp_path / "blip2/stage1").symlink_to(chain / "blip2/stage1")
    with pytest.raises(data.BadData, match="--from"):
        run(out, "blip2", 2, "--resume", "auto", steps=1)
    assert run(out, "blip2", 2, "--resume", "auto", "--from", build.SHIPPED_QFORMER, steps=1) == 0


def test_what_is_shipped_is_found_from_any_folder(tmp_path, monkeypatch):
    """Relative to the program, not to the current folder; if it is missing, its name is said."""
    monkeypatch.chdir(tmp_path)
    missing = "toy/weights/no-such-qformer"
    for module in (build, start):
        monkeypatch.setattr(module, "SHIPPED_QFORMER", missing)
    for recipe, stage in (("blip2", 2), ("minigpt4", 1)):
        with pytest.raises(data.BadModel, match=str(build.HERE / missing)):
            run(f"{recipe}/stage{stage}", recipe, stage, steps=1)


def test_qformers_that_do_not_fit(tmp_path, chain):
    """One line, with both numbers: the width of the features; words where none are read."""
    narrow = tmp_path / "narrow"
    model = build.new_blip2_stage1(
        TOY_PARTS / "clip", build.build_blip2_stage1(parse(["--stage", "1", "--recipe", "blip2"]))
        .tokenizer, build.QFormerConfig(**SMALL, vision_width=128, vocab=200))
    model.save_pretrained(narrow)
    tower = tmp_path / "tower"
    save_clip_of_width(tower, 64)
    with pytest.raises(data.BadModel, match="128.*64") as info:
        run(tmp_path / "a", "minigpt4", 1, "--qformer", narrow, "--vision", tower)
    assert "\n" not in str(info.value)
    with pytest.raises(data.BadModel, match="128.*64"):
        run(tmp_path / "b", "blip2", 2, "--from", narrow, "--vision", tower)
    asking = build.new_vlm(None, TOY_PARTS / "llama", "qformer", "minigpt4", "squash",
                           qformer=narrow)
    words = replace(asking.projector.qformer.config, vocab=200)
    asking.projector.qformer = build.QFormer(words)
    asking.qformer_tokenizer = model.tokenizer
    asking.template = "instructblip"
    asking.save_pretrained(tmp_path / "instructblip")
    with pytest.raises(data.BadModel, match="200 tokens.*reads 0") as info:
        run(tmp_path / "c", "minigpt4", 1, "--qformer", tmp_path / "instructblip")
    assert "\n" not in str(info.value)


def save_clip_of_width(folder, width):
    tower = Config(width, 2, 2, 2 * width, image_size=64, patch_size=8)
    CLIP(tower, Config(32, 1, 2, 64, vocab=9, context=8, eos_id=8), 16).save_pretrained(folder)
