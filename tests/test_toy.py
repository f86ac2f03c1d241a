"""The whole path, as a newcomer walks it: two stages, then questions about pictures never seen.

Trains the default recipe once (about seven minutes of one core) and looks at what came out.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clip import ViT
from data import Tokenizer
from generate import generate
from llama import Llama
from projector import VLM
from album import album, named_right
from browser import chromium, page              # noqa: F401 (fixtures)
from browser import ask, put
from evaluate.toy import linear_probe, majority_baseline, score, text_only_accuracy
from generate import build_prompt
from test_page import Visitor
from toy.texts import KINDS, things_in
from toy.world import draw, make_scene

ROOT = Path(__file__).parents[1]


def yardstick():
    """CPU seconds that one core needs for work like the toy's, in PyTorch's own layers."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layers = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(
        128, 4, 352, dropout=0, batch_first=True), 5, enable_nested_tensor=False)
    started = time.process_time()
    for _ in range(2):
        layers(torch.randn(12, 96, 128)).square().mean().backward()
    torch.set_num_threads(threads)
    return time.process_time() - started


def trained(*flags):
    """CPU seconds of train.py, in yardsticks. These are taken while it runs, so that whatever else
    runs on the machine slows both."""
    yardstick()                         # warms up
    before, yards = resource.getrusage(resource.RUSAGE_CHILDREN), []
    child = subprocess.Popen([sys.executable, ROOT / "train.py", "--threads", "1", *flags])
    while child.poll() is None:
        started = time.time()
        yards.append(yardstick())
        try:
            child.wait(30 * (time.time() - started))
        except subprocess.TimeoutExpired:
            pass
    assert child.returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    print(f"{spent:.0f} CPU seconds, yardstick {sum(yards) / len(yards):.4f} of {len(yards)}, "
          f"{min(yards):.4f} to {max(yards):.4f}")
    return spent * len(yards) / sum(yards)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Folder with stage1/ and stage2/, trained from the shipped parts; what each cost."""
    out, cost = tmp_path_factory.mktemp("run"), {}
    for stage in (1, 2):
        cost[stage] = trained("--stage", str(stage), "--output-dir", out / f"stage{stage}",
                              *(["--from", out / "stage1/model"] * (stage - 1)))
    print("yardsticks:", cost)
    return out, cost


@pytest.fixture(scope="session")
def model(run):
    return VLM.from_pretrained(run[0] / "stage2/model")


@pytest.fixture(scope="session")
def right(model):
    return score(model, "test", 200, "right")


def test_the_stages_cost_what_they_did(run):
    """No wall clock: a slow or a busy machine slows the yardstick as well."""
    # 105 and 335 CPU seconds on one core whose yardstick is .23: 457 and 1,457. (25 steps of stage
    # 1: 55 yardsticks with AVX-512, 51 with AVX2.) Another processor may need .6 times as many
    # again; twice the work would not pass.
    for stage, most in ((1, 730), (2, 2330)):
        assert run[1][stage] < most, run[1]


def test_loss_falls_and_samples_show_it(run):
    for stage in (1, 2):
        lines = [json.loads(x) for x in (run[0] / f"stage{stage}/metrics.jsonl").open()]
        assert lines[-1]["loss"] < lines[0]["loss"] / 2
    samples = [json.loads(x) for x in (run[0] / "stage2/samples.jsonl").open()]
    last = [s for s in samples if s["step"] == samples[-1]["step"]]
    first = [s for s in samples if s["step"] == samples[0]["step"]]
    hits = [sum(things_in(s["truth"]) == things_in(s["says"]) for s in some)
            for some in (first, last)]
    assert len(last) == 4 and hits[1] >= hits[0] >= 0 and hits[1] >= 1


def test_it_answers_and_it_looks(model, right):
    """Right on unseen object sets; with another scene's picture, no better than blind."""
    other, grey = (score(model, "test", 200, p) for p in ("other", "grey"))
    print({k: round(v, 3) for k, v in right.items()}, other["mean"], grey["mean"])
    # the goals (.975, .99, .98, .95 for each kind), less three standard errors of 60 questions a
    # kind and 500 objects
    assert right["mean"] >= .95 and right["precision"] >= .975 and right["hallucinated"] <= .02
    assert right["recall"] >= .96 and right["repeated"] <= .035
    assert min(right[k] for k in KINDS) >= .86
    assert right["errors, colour shared"] <= 2 * right["errors, nothing shared"] + .1
    blind = max(grey["mean"], majority_baseline("test", 200)["mean"])
    assert other["mean"] <= blind + .05
    assert other["recall"] < .3


def test_after_stage_one_it_captions_but_does_not_converse(run, right):
    early = score(VLM.from_pretrained(run[0] / "stage1/model"), "test", 100, "right")
    assert early["recall"] > .3 and early["mean"] < right["mean"]


@pytest.fixture(scope="module")
def visitor(model):
    return Visitor(model, generate, "--max-new-tokens", "200")


def test_the_page_describes_scenes_in_a_browser(page, tmp_path):
    """Upload, ask, and what streams in is right: at 52 of 60 scenes every word of it was."""
    right = []
    for number in range(8):
        scene, file = make_scene(number, "test"), tmp_path / f"{number}.png"
        draw(scene, 256).save(file)
        page.click("#new")
        put(page, file)
        answer = ask(page, "Describe this image").locator(".answer").inner_text()
        right.append(things_in(answer) == [(t.colour, t.shape) for t in scene.things])
    assert sum(right) >= 5, right


# ------------------------------------------------------------- pictures not from our renderer

def test_pictures_not_from_our_renderer(model, tmp_path):
    """The first twelve, all but one. Of all forty the goal is 38 and is not reached: drawings in
    lines and photographs behind objects fail (docs/results.md); three seeds name 29, 32 and 30."""
    wrong = named_right(model, tmp_path)
    print(*wrong, sep="\n")
    assert sum(int(name.split(".")[0]) <= 12 for name, *_ in wrong) <= 1 and len(wrong) <= 14, wrong


def test_grey_is_not_described_as_any_of_the_forty(model, tmp_path):
    """The control of the above: what is said of a blank sheet must not pass for a picture."""
    ids = build_prompt(["Describe this image"], model.template, model.tokenizer)
    text = model.tokenizer.decode(list(generate(model, ids, torch.zeros(1, 3, 64, 64))))
    assert sum(set(things_in(text)) == truth for _, truth in album(tmp_path)) <= 2, text


def test_the_shipped_parts_pass_their_gates():
    clip = linear_probe(ViT.from_pretrained(ROOT / "toy/weights/clip"), 300)
    assert clip["colour"] >= .97 and clip["shape"] >= .95 and clip["size"] >= .90, clip
    folder = ROOT / "toy/weights/llama"
    llama = text_only_accuracy(Llama.from_pretrained(folder), Tokenizer(folder),
                               n=60)
    # the gates are .97 and .95; two errors of 60 more are chance
    assert all(llama[k] >= .93 for k in KINDS), llama


def test_an_untrained_tower_fails_the_gate():
    """The control: the probe reads shapes from training, not from random features."""
    torch.manual_seed(0)
    config = ViT.from_pretrained(ROOT / "toy/weights/clip").config
    assert linear_probe(ViT(config).eval(), 100)["shape"] < .8
