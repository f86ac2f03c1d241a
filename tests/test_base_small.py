"""--base small: its sizes, recipe and plan without a network; what its kind of model keeps."""

import json
import re

import pytest
from PIL import Image

import clip
import data
import llama
import projector
import train
from test_own_llm import language_model
from test_plan import asked, kept_for_backward, model_of, offline, POLICIES, told   # noqa: F401
from test_train import here, unchanged_process                                      # noqa: F401
from tiny import shaken
from train import parse_args as parse
from trainer.forecast import activation_bytes, static_bytes

SMALL = "--base", "small"


def test_sizes_are_those_of_the_published_files():
    """ViT-B/16: 85.8 M weights; SmolLM2-360M: 361.8 M, the head being the embedding."""
    model = model_of(asked(*SMALL))
    count = lambda part: sum(p.numel() for p in part.parameters())
    assert count(model.llm) == 361_821_120
    assert count(model.vision) == 85_799_424
    assert model.num_image_tokens() == 196
    assert count(model.projector) == 768 * 960 + 960 + 960 * 960 + 960


def test_the_recipe_is_llavas_with_tinyllavas_groups():
    first, second = (parse(["--stage", str(stage), *SMALL]).row for stage in (1, 2))
    assert (first.lr, first.batch, first.loss_groups, first.template) == (1e-3, 256, 4, "plain")
    assert (second.lr, second.batch, second.loss_groups, second.order) == (2e-5, 128, 8, "modality")
    assert parse(["--stage", "2", *SMALL, "--lr", "5e-5"]).row.lr == 5e-5
    assert parse(["--stage", "1", *SMALL]).pack == 6144         # a GPU's defaults, not the toy's
    for recipe in train.RECIPES:
        for stage in (1, 2):
            args = asked("--stage", stage, "--recipe", recipe, *SMALL, "--steps", 9)
            if not args.row.losses:
                places = 32 if args.row.projector_type == "qformer" else 196
                assert model_of(args).num_image_tokens() == places
    upper = asked("--stage", 1, "--recipe", "sharegpt4v", *SMALL, "--steps", 9)
    trains = {name.split(".")[2] for name, p in model_of(upper).named_parameters()
              if p.requires_grad and name.startswith("vision.blocks")}
    assert trains == {str(i) for i in range(6, 12)}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("memory", [8, 12, 24])
def test_the_plan_fits_small_cards_without_a_network(offline, capsys, stage, memory):  # noqa: F811
    text = told(capsys, "--stage", stage, *SMALL, "--memory", memory)
    assert "   fits into " in text and "does not fit" not in text and "hours at 60%" in text
    hours = float(re.search(r"([\d.]+) hours", text)[1])
    assert 0 < hours < 10
    assert "361.8 M" in text
    if memory == 8 and stage == 2:                                  # control: 7B does not
        assert "does not fit" in told(capsys, "--memory", 24)


@pytest.mark.parametrize("fast", [False, True], ids=["fp32", "autocast"])
def test_bytes_kept_for_backward_of_its_kind(fast):
    """Three query heads a key head, tied embeddings, patches of 16: within 10 % of what autograd
    keeps, under each policy; another policy's forecast is further off."""
    model = shaken(projector.VLM(
        clip.ViT(clip.Config(48, 3, 3, 192, image_size=64, patch_size=16)), "mlp",
        llama.Llama(llama.Config(110, 60, 6, 15, 5, 160, 1e-5, 1e5, tie_embeddings=True)), None))
    train.set_trainable(model, ("projector", "llm"))
    B, T, places = 3, 90, 16
    said = {policy: activation_bytes(model, B * (T + places - 1), B * 40, B, policy, 4,
                                     4 - 2 * fast, kernels=False)[0] for policy in POLICIES}
    for policy in POLICIES:
        found = kept_for_backward_64(model, B, T, policy, fast)
        assert said[policy] == pytest.approx(found, rel=.1), policy
        assert all(abs(said[p] / found - 1) > .1 for p in POLICIES if p != policy), policy
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = static_bytes(model, asked(*SMALL))
    assert sizes["gradients"] == 2 * trained                        # a tied head counts once


def kept_for_backward_64(model, B, T, policy, fast):
    """`kept_for_backward` of pictures of 64 pixels."""
    import test_plan
    real = test_plan.torch.randn
    test_plan.torch.randn = lambda *shape: real(B, 3, 64, 64)
    try:
        return kept_for_backward(model, B, T, policy, fast, model.parameters())
    finally:
        test_plan.torch.randn = real


def test_a_run_of_the_base_keeps_what_the_plan_says(tmp_path, capsys):
    """On tiny parts of one's own: two steps, the memory, the template, the model."""
    llm = language_model(tmp_path / "llm", heads=3, kv_heads=1, width=48, mlp=128,
                         tie_embeddings=True)
    sizes = clip.Config(48, 3, 3, 192, image_size=64, patch_size=16)
    clip.CLIP(sizes, clip.Config(32, 1, 2, 64, vocab=20, context=8, eos_id=19), 16
              ).save_pretrained(tmp_path / "clip")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    rows = [{"id": str(i), "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it, number " + "x" * i},
        {"from": "gpt", "value": "It is red."}]} for i in range(8)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    argv = ["--stage", "2", *SMALL, "--from", "none", "--vision", tmp_path / "clip", "--llm", llm,
            "--data", tmp_path / "x.json", "--images", tmp_path, "--batch", 8, "--epochs", 2,
            "--pack", 0, "--workers", 0, "--threads", 1, "--output-dir", tmp_path / "run"]
    assert here([*map(str, argv), "--optimizer", "adamw", "--checkpoint", "attention"]) == 0
    kept, said = re.search(r"kept for backward: ([\d.]+) MB, forecast ([\d.]+) MB",
                           capsys.readouterr().out).groups()
    assert float(said) == pytest.approx(float(kept), rel=.1) and float(kept) > 0
    model = projector.VLM.from_pretrained(tmp_path / "run/model")
    assert model.template == "smollm2" and model.llm.config.tie_embeddings
    assert isinstance(model.tokenizer, data.Tokenizer)
