"""--eval-data: the loss on samples that are not learned from, the weights of its lowest value, the
model card, and LoRA's additions kept as an adapter in PEFT's layout.
"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

import data
import generate
import projector
import train
from decoding.flags import parse
from formats.errors import Offline, UsageError
from formats.strict_json import read_config
from test_train import (        # noqa: F401  fixtures
    flags, HERE, here, lines, parts, refused, run, server, sha, unchanged_process)
from trainer import held_out
from trainer.held_out import best_so_far

COLOURS = {"red": (250, 20, 20), "blue": (20, 20, 250), "green": (20, 200, 20)}


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_files(tmp_path):
    """a.json to learn from, and b.json, which says the opposite, so that its loss rises."""
    rows, other = [], []
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
        turns = talk("<image>\nWhat colour is it?", f"{name}.")
        rows.append({"id": name, "image": f"{name}.png", "conversations": turns})
        turns = talk("<image>\nWhat colour is it?", "a large star and a small circle.")
        other.append({"id": f"no {name}", "image": f"{name}.png", "conversations": turns})
    other.append({"id": "text", "conversations": talk("Is it warm?", "No.")})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps(other))


@pytest.fixture
def files(tmp_path):
    """Flags of a run on a.json."""
    write_files(tmp_path)
    return ["--data", tmp_path / "a.json", "--images", tmp_path, "--batch", 3]


def eval_flags(tmp_path, *more, every=2):
    return ["--eval-data", tmp_path / "b.json", "--eval-every", every, *more]


def by_hand(folder, file, images):
    """The mean loss over all tokens with loss, sample by sample, from the logits."""
    model, total, count = projector.VLM.from_pretrained(folder), 0.0, 0
    for row in json.loads(file.read_text()):
        has = "image" in row
        ids, labels = data.encode(row["conversations"], "v1", model.tokenizer, has)
        pixels = model.pixels(data.load_image(images / row["image"])) if has else None
        with torch.no_grad():
            x, labels, _ = model.embed(torch.tensor([ids]), pixels, torch.tensor([labels]))
            logits = model.llm(x)[0, :-1].log_softmax(-1)
        for row_logits, label in zip(logits, labels[0, 1:]):
            if label != data.IGNORE:
                total, count = total - float(row_logits[label]), count + 1
    return total / count


# ------------------------------------------------------------------------------------ the figure

@pytest.mark.parametrize("more", [(), ("--pack", 400)], ids=["padded", "packed"])
def test_the_figure_is_the_mean_over_all_tokens_of_the_file(flags, files, tmp_path, more):  # noqa
    out = tmp_path / "run"
    here(flags(out, *files, *eval_flags(tmp_path), *more, steps=5))
    found = {x["step"]: x["eval_loss"] for x in lines(out / "metrics.jsonl") if "eval_loss" in x}
    assert sorted(found) == [2, 4, 5]                   # every second step, and the last
    assert found[5] == pytest.approx(by_hand(out / "model", tmp_path / "b.json", tmp_path),
                                     abs=2e-5)
    assert found[2] != found[4]


def test_it_changes_no_bit_of_the_training(flags, files, tmp_path):             # noqa: F811
    for name, more in (("without", ()), ("with", eval_flags(tmp_path, every=1))):
        here(flags(tmp_path / name, *files, *more, steps=4))
    assert sha(tmp_path / "with") == sha(tmp_path / "without")
    a, b = (lines(tmp_path / name / "metrics.jsonl") for name in ("with", "without"))
    assert [x["loss"] for x in a] == [x["loss"] for x in b]
    assert not any("eval_loss" in x for x in b)         # control
    assert (tmp_path / "with/loss.png").read_bytes() != (tmp_path / "without/loss.png").read_bytes()


# -------------------------------------------------------------------------------- the best weights

def test_the_run_ends_with_the_weights_of_the_lowest_loss(flags, files, tmp_path):      # noqa: F811
    """What is learned is the opposite of what is held out: the first look is the best."""
    out = tmp_path / "run"
    here(flags(out, *files, *eval_flags(tmp_path, "--keep-best"), "--lr", 8e-2, steps=16))
    looks = {x["step"]: x["eval_loss"] for x in lines(out / "metrics.jsonl") if "eval_loss" in x}
    best = min(looks, key=looks.get)
    assert best < 16 and looks[best] < looks[16] - .01, looks
    assert [p.name for p in out.glob("best-*")] == [f"best-{best:06d}"]
    said = json.loads((out / f"best-{best:06d}/best.json").read_text())
    assert (said["step"], said["eval_loss"]) == (best, looks[best])
    assert by_hand(out / "model", tmp_path / "b.json", tmp_path) == pytest.approx(looks[best],
                                                                                 abs=2e-5)
    # the same run without the flag ends elsewhere, and so does one that stops at the best step
    here(flags(tmp_path / "last", *files, *eval_flags(tmp_path), "--lr", 8e-2, steps=16))
    assert sha(tmp_path / "last") != sha(out) and not list((tmp_path / "last").glob("best-*"))
    assert f"{looks[best]:.4f}, after step {best}" in (out / "model/README.md").read_text()


def test_a_stopped_run_ends_with_the_same_bits_and_the_same_best(flags, files, run,     # noqa: F811
                                                                 tmp_path):
    more = [*files, *eval_flags(tmp_path, "--keep-best"), "--lr", 2e-2]
    assert run(flags(tmp_path / "one", *more, steps=8)).code == 0
    out = tmp_path / "two"
    assert run(flags(out, *more, steps=8), signal=(5, signal.SIGTERM)).code == 143
    (out / "best-000099.tmp").mkdir()                           # killed in the middle of a save
    assert run(flags(out, *more, "--resume", "auto", steps=8)).code == 0
    assert sha(out) == sha(tmp_path / "one") and not list(out.glob("*.tmp"))
    rows = [[{k: x[k] for k in ("step", "loss", "eval_loss") if k in x}
             for x in lines(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")]
    assert rows[0] == rows[1] and len(rows[0]) == 8
    refused(run(flags(out, *files, "--lr", 2e-2, "--resume", "auto", steps=8)), 3, "--eval-data")


def test_a_damaged_best_is_named(flags, files, run, tmp_path):                  # noqa: F811
    more = [*files, *eval_flags(tmp_path, "--keep-best"), "--lr", 2e-2]
    out = tmp_path / "run"
    assert run(flags(out, *more, steps=8)).code == 0
    shutil.rmtree(out / "model")
    (best,) = out.glob("best-*")
    weights = best / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    refused(run(flags(out, *more, "--resume", "auto", steps=8)), 3, best.name, "checksum")


def test_the_best_so_far_is_read_from_the_log(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert best_so_far(log, 9) == (0, math.inf)
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 5.0},
            {"step": 4, "loss": 2.0, "eval_loss": 3.0}, {"step": 6, "eval_loss": 3.0},
            {"step": 8, "eval_loss": None}, {"step": 9, "eval_loss": 1.0}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "eval_lo')
    assert best_so_far(log, 8) == (4, 3.0) and best_so_far(log, 3) == (2, 5.0)
    assert best_so_far(log, 9) == (9, 1.0)


def test_two_ranks_agree_with_one(parts, files, tmp_path):                      # noqa: F811
    """One micro-batch of held-out samples, so that the other rank gets a blank one; the weights of
    the lowest loss are found, kept and brought back by both."""
    same = ["--stage", "2", "--from", "none", "--vision", parts / "clip", "--llm", parts / "llama",
            "--threads", "1", "--lr", "5e-2", "--steps", "6", *files, "--batch", "4",
            *eval_flags(tmp_path, "--keep-best")]
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone",
                                              "--nproc-per-node", "2"])):
        done = subprocess.run(
            [sys.executable, *start, HERE / "train.py", *map(str, same), "--output-dir",
             tmp_path / name], capture_output=True, text=True, cwd=HERE, env={
                **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    one, two = ({x["step"]: x["eval_loss"] for x in lines(tmp_path / name / "metrics.jsonl")
                 if "eval_loss" in x} for name in ("one", "two"))
    assert one.keys() == two.keys() == {2, 4, 6}
    assert all(two[step] == pytest.approx(one[step], rel=1e-3) for step in one)
    best = min(two, key=two.get)
    assert [p.name for p in (tmp_path / "two").glob("best-*")] == [f"best-{best:06d}"]
    assert by_hand(tmp_path / "two/model", tmp_path / "b.json", tmp_path) == pytest.approx(
        two[best], rel=1e-4)


# -------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("change, words", [
    (lambda rows: rows[1].update(image="gone.png"), ("gone.png",)),
    (lambda rows: rows[1]["conversations"][0].update(value="no mark"), ("no blue", "<image>")),
    (lambda rows: rows[1].update(conversations=3), ("b.json: row 2",)),
    (lambda rows: [r["conversations"][1].update(value=" ") for r in rows], ("b.json", "has loss"))],
    ids=["missing picture", "no mark", "no turns", "no answers"])
def test_a_bad_file_is_refused_before_the_first_step(flags, files, run, tmp_path,       # noqa: F811
                                                     change, words):
    rows = json.loads((tmp_path / "b.json").read_text())
    change(rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    refused(run(flags(tmp_path / "run", *files, *eval_flags(tmp_path))), 3, *words)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def spoil(tmp_path, name, content):
    """b.json's second row has a picture of its own; its file holds these bytes, None: is none."""
    rows = json.loads((tmp_path / "b.json").read_text())
    rows[1]["image"] = name
    (tmp_path / "b.json").write_text(json.dumps(rows))
    if content is not None:
        (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize("content, why", [(None, "is not a file of"), (b"GIF89a", "torn.png"),
                                          (b"no picture", "cannot identify")],
                         ids=["missing", "torn", "text"])
def test_a_bad_picture_is_found_before_the_first_step_and_placed(flags, files, run, tmp_path, # noqa
                                                                 content, why):
    """Although nobody looks before step 99."""
    spoil(tmp_path, "torn.png", content)
    done = run(flags(tmp_path / "run", *files, *eval_flags(tmp_path, every=99)))
    refused(done, 3, "--eval-data ", "b.json: row 2, sample no blue: ", why)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_picture_that_goes_bad_later_is_placed_too(flags, files, tmp_path, monkeypatch):  # noqa
    """The control of the test above: without the check the run gets as far as its first look."""
    spoil(tmp_path, "torn.png", b"GIF89a")
    monkeypatch.setattr(held_out.HeldOut, "check_pictures", lambda self, indexes: None)
    with pytest.raises(data.BadImage, match="^--eval-data .*b.json: row 2, sample no blue: .*torn"):
        here(flags(tmp_path / "run", *files, *eval_flags(tmp_path, every=3)))
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 2


def test_what_is_said_of_a_bad_row_works(flags, files, run, tmp_path):          # noqa: F811
    """--on-bad-sample skip leaves out rows of --data, none of --eval-data."""
    rows = json.loads((tmp_path / "b.json").read_text())
    rows[1]["conversations"] = 3
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for more in ((), ("--on-bad-sample", "skip")):
        done = run(flags(tmp_path / "run", *files, *eval_flags(tmp_path, *more)))
        refused(done, 3, "b.json: row 2", "take them out of --eval-data")
        assert "--on-bad-sample" not in done.err


@pytest.fixture
def stopped(flags, files, run, tmp_path):                                       # noqa: F811
    """(out, its flags) of a run that was stopped after step 5, with a look at steps 2 and 4."""
    more = flags(tmp_path / "run", *files, *eval_flags(tmp_path, "--keep-best"), "--lr", "2e-2",
                 steps=8)
    assert run(more, signal=(5, signal.SIGTERM)).code == 143
    return tmp_path / "run", [*more, "--resume", "auto"]


def cut_to_a_row(rows):
    del rows[1:]


def answer_otherwise(rows):
    rows[2]["conversations"][1]["value"] = "green."


def exchange_two(rows):
    rows[0], rows[3] = rows[3], rows[0]


@pytest.mark.parametrize("change, words", [
    (cut_to_a_row, ["has 1 samples now, and had 4"]),
    (answer_otherwise, ["b.json: row 3, sample no green, has changed"]),
    (exchange_two, ["b.json: row 1, sample text, has changed"])], ids=lambda x: getattr(
        x, "__name__", ""))
def test_another_file_is_refused_when_a_run_is_resumed(stopped, run, tmp_path, change,      # noqa
                                                       words):
    out, again = stopped
    kept = (tmp_path / "b.json").read_text()
    rows = json.loads(kept)
    change(rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    before = (out / "metrics.jsonl").read_bytes()
    refused(run(again), 3, "--resume with another --eval-data file", "--overwrite", *words)
    assert (out / "metrics.jsonl").read_bytes() == before and not (out / "model").exists()
    # the old one, laid out otherwise, is the same; a run that is finished is compared, too
    (tmp_path / "b.json").write_text(json.dumps(json.loads(kept), indent=2))
    assert run(again).code == 0 and (out / "model").exists()
    (tmp_path / "b.json").write_text(json.dumps(rows))
    refused(run(again), 3, "--resume with another --eval-data file", *words)
    if change is cut_to_a_row:                      # a run that begins anew may have another
        assert run([*again[:-2], "--overwrite"]).code == 0 and run(again).code == 0


def test_a_run_of_an_older_version_goes_on_with_a_word(stopped, run):           # noqa: F811
    out, again = stopped
    assert "nobody can tell" not in run(again).err          # control
    shutil.rmtree(out / "model")
    (out / "held_out.safetensors").unlink()
    done = run(again)
    assert done.code == 0 and "nobody can tell whether --eval-data" in done.err
    assert (out / "held_out.safetensors").exists()
    shutil.rmtree(out / "model")
    damaged = bytearray((out / "held_out.safetensors").read_bytes())
    damaged[-1] ^= 1
    (out / "held_out.safetensors").write_bytes(damaged)
    refused(run(again), 3, "held_out.safetensors", "checksum")


@pytest.mark.parametrize("words, told", [
    (("--eval-every", "5"), "--eval-data"), (("--keep-best",), "--eval-data"),
    (("--eval-data", "x.json", "--eval-every", "0"), "at least 1"),
    (("--eval-data", "x.json", "--eval-every", "-1"), "at least"),
    (("--eval-data", "x.json", "--recipe", "blip2", "--stage", "1"), "with a LLaMA"),
    (("--keep-adapter",), "--lora"),
    (("--keep-adapter", "--lora", "4", "--from", "none"), "--from"),
    (("--keep-adapter", "--lora", "4", "--recipe", "minigpt4", "--train", "projector.proj,llm"),
     "Q-Former"),
    (("--keep-adapter", "--lora", "4", "--quantize", "int4"), "--quantize")], ids=" ".join)
def test_flags_that_do_not_go_together(words, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_args(["--stage", "2", *words])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and told in said and said.count("\n") == 1


# -------------------------------------------------------------------------------- the adapter

@pytest.fixture(scope="module")
def stages(parts, tmp_path_factory):                                            # noqa: F811
    """Folder of a stage 1, and of a stage 2 with LoRA that began there and kept its adapter."""
    folder = tmp_path_factory.mktemp("stages")
    same = ["--threads", "1", "--batch", "3", "--data", folder / "a.json", "--images", folder]
    write_files(folder)
    new = ["--vision", parts / "clip", "--llm", parts / "llama", "--template", "v1"]
    for argv in (["--stage", "1", *new, "--steps", "2", "--output-dir", folder / "stage1"],
                 ["--stage", "2", "--lora", "3", "--keep-adapter", "--lr", "2e-2", "--steps", "6",
                  "--output-dir", folder / "stage2"]):
        assert here([str(word) for word in (*argv, *same)]) == 0
    return folder


def answer(model, picture):
    ids = generate.build_prompt(["What colour is it?"], model.template, model.tokenizer)
    pixels = model.pixels(data.load_image(picture))
    with torch.no_grad():
        return model(torch.tensor([ids]), pixels)[:, -1]


def test_an_adapter_is_the_merged_model(stages):
    picture, adapter = stages / "red.png", stages / "stage2/adapter"
    merged, base = (answer(projector.VLM.from_pretrained(stages / f"stage{n}/model"), picture)
                    for n in (2, 1))
    loaded = projector.VLM.from_pretrained(adapter)
    kept = answer(loaded, picture)
    assert (kept - merged).abs().max() <= 1e-5 * merged.abs().max()
    assert (base - merged).abs().max() > 1e-2 * merged.abs().max()      # control: it does much
    assert (loaded.template, loaded.aspect) == ("v1", "pad")
    assert not list(adapter.glob("model*"))
    size = sum(p.stat().st_size for p in adapter.glob("*.safetensors"))
    assert size < (stages / "stage2/model/model.safetensors").stat().st_size / 2


def test_a_tower_that_trains_is_kept_whole(stages):
    out = stages / "tower"
    assert here([str(word) for word in (
        "--stage", 2, "--lora", 3, "--keep-adapter", "--lr", "2e-2", "--steps", 3, "--threads", 1,
        "--batch", 3, "--data", stages / "a.json", "--images", stages, "--output-dir", out,
        "--train", "vision,projector,llm", "--from", stages / "stage1/model")]) == 0
    models = [projector.VLM.from_pretrained(folder) for folder in (
        out / "adapter", out / "model", stages / "stage1/model")]
    kept, merged, base = (answer(model, stages / "red.png") for model in models)
    assert (kept - merged).abs().max() <= 1e-5 * merged.abs().max()
    towers = [model.vision.state_dict() for model in models]
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])
    assert not all(torch.equal(towers[1][name], towers[2][name]) for name in towers[0])
    config = read_config(out / "adapter", "adapter_config.json")
    assert config["modules_to_save"] == ["multi_modal_projector", "vision_tower"]


def test_its_layout_is_pefts(stages):
    adapter = stages / "stage2/adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert config["base_model_name_or_path"] == str(stages / "stage1/model")
    assert config["modules_to_save"] == ["multi_modal_projector"]
    weights = data.load_weights(adapter / "adapter_model.safetensors")
    at = "base_model.model.model.language_model.layers.1.self_attn."
    assert weights.shape(f"{at}k_proj.lora_A.weight") == (3, 32)
    assert weights.shape(f"{at}k_proj.lora_B.weight") == (16, 3)        # one key head of two
    assert weights.shape(f"{at}q_proj.lora_B.weight") == (32, 3)
    # two layers of seven pairs, and the projector's two layers
    assert len(weights) == 2 * 7 * 2 + 4
    assert "base_model.model.model.multi_modal_projector.linear_2.bias" in weights


def test_names_are_those_that_peft_looks_for(stages):
    """Every name is a module of transformers' model; the pattern takes the language model's layers
    and none of the vision tower, which have the same names."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(stages / "stage1/model")
    modules = dict(theirs.named_modules())
    config = read_config(stages / "stage2/adapter", "adapter_config.json")
    chosen = [name for name in modules if re.fullmatch(config["target_modules"], name)]
    weights = data.load_weights(stages / "stage2/adapter/adapter_model.safetensors")
    named = {name.removeprefix("base_model.model.").rpartition(".lora_")[0]
             for name in weights if ".lora_" in name}
    assert named == set(chosen) and len(chosen) == 14
    assert any("vision_tower" in name and name.endswith("q_proj") for name in modules)   # control
    rest = [name.removeprefix("base_model.model.") for name in weights if ".lora_" not in name]
    assert rest and set(rest) <= {name for name, _ in theirs.named_parameters()}


def test_an_adapter_of_an_adapter_is_refused_before_anything_is_trained(stages, capsys):
    """Nothing could load what it would write: its base is no whole model. Without --keep-adapter an
    adapter is a start like another."""
    same = ["--stage", 2, "--lora", 2, "--threads", 1, "--batch", 3, "--data", stages / "a.json",
            "--images", stages, "--steps", 1, "--output-dir", stages / "upon"]
    adapter = stages / "stage2/adapter"
    for more in ([], ["--plan"]):
        call = [*same, "--from", adapter, "--keep-adapter", *more]
        with pytest.raises(UsageError, match=f"--from {stages / 'stage2/model'}$"):
            here([str(word) for word in call])
    alone = stages / "alone/adapter"                    # no model/ beside it
    shutil.copytree(adapter, alone)
    with pytest.raises(UsageError, match=r"save_pretrained\(FOLDER\), and give --from FOLDER$"):
        here([str(word) for word in [*same, "--from", alone, "--keep-adapter"]])
    assert not (stages / "upon").exists() and "step" not in capsys.readouterr().out
    assert here([str(word) for word in [*same, "--from", adapter]]) == 0            # controls
    again = ["--from", stages / "stage2/model", "--keep-adapter", "--overwrite"]
    assert here([str(word) for word in [*same, *again]]) == 0
    kept, merged = (answer(projector.VLM.from_pretrained(stages / f"upon/{name}"),
                           stages / "red.png") for name in ("adapter", "model"))
    assert (kept - merged).abs().max() <= 1e-5 * merged.abs().max()


@pytest.mark.parametrize("base", ["gone", "an unfinished run", "an adapter", "unknown/on-the-hub"])
def test_a_base_that_has_moved_is_named_with_the_way_out(stages, tmp_path, base, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = tmp_path / "adapter"
    shutil.copytree(stages / "stage2/adapter", adapter)
    (tmp_path / "an unfinished run").mkdir()
    shutil.copytree(adapter, tmp_path / "an adapter")
    name = base if "/" in base else str(tmp_path / base)
    config = read_config(adapter, "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps(
        {**config, "base_model_name_or_path": name}))
    wrong = Offline if "/" in base else data.BadModel
    with pytest.raises(wrong, match="--model-base.*base_model_name_or_path") as info:
        projector.VLM.from_pretrained(adapter)
    assert name in str(info.value) and str(adapter) in str(info.value)
    whole = projector.VLM.from_pretrained(adapter, base=stages / "stage1/model")    # the way out
    wanted = answer(projector.VLM.from_pretrained(stages / "stage2/adapter"), stages / "red.png")
    assert torch.equal(answer(whole, stages / "red.png"), wanted)
    with pytest.raises((data.BadModel, Offline)) as info:       # control: --model-base is wrong
        projector.VLM.from_pretrained(adapter, base=name)
    assert "base_model_name_or_path" not in str(info.value)


def test_peft_says_the_same(stages):
    peft = pytest.importorskip("peft")
    import transformers
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(stages / "stage1/model")
    theirs = peft.PeftModel.from_pretrained(theirs, stages / "stage2/adapter").eval()
    ours = projector.VLM.from_pretrained(stages / "stage2/model")
    image = data.load_image(stages / "red.png")
    ids = generate.build_prompt(["What colour is it?"], "v1", ours.tokenizer)
    mark = theirs.config.image_token_index
    row = []
    for i in ids:
        row += [mark] * ours.patches if i == data.IMAGE else [i]
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor([row]), pixel_values=ours.pixels(image)).logits[:, -1]
    wanted = answer(ours, stages / "red.png")
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_generate_loads_it(stages, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    said = []
    for name in ("adapter", "model"):
        generate.main(parse([str(stages / "red.png"), "What colour is it?", "--model",
                             str(stages / "stage2" / name), "--max-new-tokens", "6"]))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].strip()


# -------------------------------------------------------------------------------- the model card

def test_the_card_says_what_the_run_was(stages):
    card = (stages / "stage2/model/README.md").read_text()
    row = json.loads((stages / "stage2/config.json").read_text())["stage_row"]
    machine = json.loads((stages / "stage2/run.json").read_text())
    losses = [x["loss"] for x in lines(stages / "stage2/metrics.jsonl")]
    for words in ("llava-1.5, stage 2: LLaVA-1.5, October 2023", "projector, llm", "LoRA of rank 3",
                  "stage 1 of the same recipe and base", "| data | a.json |", "| steps | 6 of 3 ",
                  f"learning rate {row['lr']:g}", f"{sum(losses) / 6:.4f}, the mean of the last 6",
                  "## What it may be used for", "licences of their own",
                  'pipeline("image-text-to-text"', "pipeline_tag: image-text-to-text"):
        assert words in card, words
    assert (machine["git"] or "not known") in card
    assert str(stages) not in card                      # no folder of this machine
    assert "held-out loss" not in card


def test_a_card_of_the_toy_world(flags, parts, tmp_path):                       # noqa: F811
    here(flags(tmp_path / "toy", steps=1))
    card = (tmp_path / "toy/model/README.md").read_text()
    assert "| data | the toy world" in card and "held-out" not in card
    assert "the parts of base toy, --vision clip, --llm llama" in card and str(parts) not in card
    front = card.split("---")[1]
    assert "- llava" in front and "base_model" not in front
