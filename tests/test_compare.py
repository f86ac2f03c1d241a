"""--compare: a run inside the band of its recipe, above it, below it; what is named as cause."""
import copy
import json
from pathlib import Path

import pytest

import train
from evaluate import curves
from trainer import compare
from trainer.flags import parse
from trainer.start import SHIPPED_QFORMER

STEPS = 40


def flags(*more):
    return train.parse_args(["--stage", "1", *map(str, more)])


def write_run(out, losses, args, **machine):
    out.mkdir(parents=True)
    lines = [json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(losses)]
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    row = json.loads(json.dumps(vars(args.row)))
    (out / "config.json").write_text(json.dumps({"seed": 0, "stage_row": row}))
    (out / "run.json").write_text(json.dumps(
        {"steps": len(losses), "dtype": "torch.float32", "git": "0123456789", **machine}))
    return out


def falling(factor=1.0):
    """A loss from about 3 to about 0.1."""
    return [factor * (.1 + 3 * .9 ** step) for step in range(STEPS)]


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A curve of three seeds for llava-1.5's stage 1, in a file of its own; no other recipe's."""
    path = tmp_path / "curves.json"
    path.write_text("{}")
    monkeypatch.setattr(compare, "CURVES", path)
    outs = [write_run(tmp_path / f"seed{i}", falling(1 + i / 50), flags()) for i in range(3)]
    path.write_text(json.dumps({"llava-1.5": {"1": compare.curve_of(outs)}}))
    return path


def said(tmp_path, losses, *more, **machine):
    args = flags("--compare", *more)
    return compare.lines(write_run(tmp_path / "run", losses, args, **machine), args)


def test_a_run_like_the_others_is_inside(known, tmp_path):
    line, = said(tmp_path, falling(1.03))
    assert line.startswith("--compare: loss 0.1") and line.endswith(": inside")
    assert "the band of 3 seeds is" in line


@pytest.mark.parametrize("factor, side", [(1.5, "above"), (.5, "below")])
def test_a_run_unlike_the_others_is_outside_from_the_start(known, tmp_path, factor, side):
    first, second, *causes = said(tmp_path, falling(factor))
    assert first.endswith(f": {side} it since step 1") and second.endswith("usually is the cause:")
    text = "\n".join(causes)
    if side == "above":
        assert "it starts from something else" in text and "the learning rate" in text
    else:
        assert "tokens have loss" in text and "learning rate" not in text


def test_a_run_that_leaves_the_band_later_says_since_when(known, tmp_path):
    losses = falling()
    losses[20:] = [1.0] * 20
    first, *rest = said(tmp_path, losses)
    assert first.endswith("above it since step 21")
    assert "it starts from something else" not in "\n".join(rest)


def test_a_run_that_comes_back_is_inside_and_says_where_it_was(known, tmp_path):
    losses = falling()
    losses[8:12] = [9.0] * 4
    first, second = said(tmp_path, losses)
    assert first.endswith(": inside") and second.endswith("outside in steps 9 to 12")


def test_what_differs_is_named_first(known, tmp_path):
    text = "\n".join(said(tmp_path, falling(2), "--lr", ".1", "--train", "projector,llm",
                          dtype="torch.bfloat16"))
    first = text.splitlines()[2]
    assert first == "  - --train projector,llm instead of projector"
    assert "--lr 0.1 instead of 0.012" in text
    assert "computed in torch.bfloat16, the curve in torch.float32" in text
    assert "are other weights than" not in text         # control: they are the same


def test_other_weights_are_named(known, tmp_path):
    curve = json.loads(known.read_text())
    curve["llava-1.5"]["1"]["weights"]["clip"] = curve["llava-1.5"]["1"]["weights"].pop("vision")
    curve["llava-1.5"]["1"]["weights"] = {"vision": "0" * 12}
    known.write_text(json.dumps(curve))
    text = "\n".join(said(tmp_path, falling(2)))
    assert "toy/weights/clip are other weights than those that the curve was made with" in text


def test_steps_without_a_loss_are_left_out(known, tmp_path):
    losses = falling()
    losses[3] = None
    assert said(tmp_path, losses)[0].endswith(": inside")
    assert compare.tenths([None] * 10 + [1.0] * 10)[:6] == [None] * 5 + [1.0]


def test_the_band_is_wider_than_the_seeds_and_never_empty():
    curve = {"low": [1.0, 2.0, .01], "high": [1.2, 2.0, 1.0]}
    assert compare.band(curve) == [pytest.approx((.8, 1.4)), pytest.approx((1.9, 2.1)),
                                   pytest.approx((0., 1.99))]


@pytest.mark.parametrize("more, why", [
    (["--base", "7b"], "--compare knows the toy's stages"),
    (["--data", "x.json"], "--compare knows the toy's stages"),
    (["--recipe", "minigpt4"], "there is no curve of stage 1 of minigpt4; python -m evaluate")])
def test_what_has_no_curve_is_refused_before_it_trains(known, more, why, capsys):
    for compared in (True, False):
        argv = ["--stage", "1", *more, *["--compare"] * compared]
        if not compared:                                # control
            parse(train.Stage, train.RECIPES, train.TOY, argv)
            continue
        with pytest.raises(SystemExit) as end:
            parse(train.Stage, train.RECIPES, train.TOY, argv)
        assert end.value.code == 2 and why in capsys.readouterr().err


def test_the_flag_does_not_keep_a_run_from_being_resumed():
    from trainer.run_folder import run_config
    with_it, without = copy.copy(flags()), flags()
    with_it.compare = True
    assert run_config(with_it) == run_config(without)


def test_the_shipped_curves_are_of_the_recipes_as_they_are():
    found = compare.read_curves()
    assert set(found) == set(train.RECIPES)
    for recipe, stages in found.items():
        assert set(stages) == set(curves.stages_of(recipe))
        for stage, (number, _) in curves.stages_of(recipe).items():
            assert stages[stage]["row"] == curves.recipe_row(recipe, number), (recipe, stage)
            assert len(stages[stage]["low"]) == compare.TENTHS
            assert all(a <= b for a, b in zip(stages[stage]["low"], stages[stage]["high"]))


def test_stage_2_of_blip2_has_two_curves(known):
    """One that starts from the shipped Q-Former, and one behind a stage 1 of its own."""
    known.write_text(json.dumps({"blip2": {"2": "own", "2 alone": "shipped"}}))
    args = train.parse_args(["--stage", "2", "--recipe", "blip2", "--compare"])
    for start, curve in ((None, "own"), ("runs/a/model", "own"), (SHIPPED_QFORMER, "shipped")):
        args.start = start
        assert compare.curve_for(args) == curve, start
    args.recipe = "llava"
    assert compare.curve_for(args) is None                  # the control: no curve of that recipe


def test_curves_are_made_of_finished_runs(tmp_path, monkeypatch, capsys):
    """All runs are there: nothing is trained, and the file is made and printed as a table."""
    monkeypatch.setattr(compare, "CURVES", tmp_path / "curves.json")
    compare.CURVES.write_text("{}")
    for seed in range(2):
        for stage in (1, 2):
            args = train.parse_args(["--stage", str(stage), "--recipe", "llava"])
            out = tmp_path / f"runs/seed{seed}/llava/stage{stage}"
            write_run(out, falling(1 + seed / 10), args)
            (out / "model").mkdir()
    words = ["--only", "llava", "--seeds", "2", "--runs", str(tmp_path / "runs")]
    curves.main(curves.parse(words))
    made = compare.read_curves()["llava"]
    assert set(made) == {"1", "2"} and made["1"]["high"][0] > made["1"]["low"][0] > 2
    assert "| llava, 1 | 40 | 2 |" in capsys.readouterr().out
    # a run of other settings is no reference
    path = Path(tmp_path / "runs/seed1/llava/stage2/config.json")
    config = json.loads(path.read_text())
    config["stage_row"]["lr"] = 1.0
    path.write_text(json.dumps(config))
    with pytest.raises(curves.UsageError, match="other settings"):
        curves.main(curves.parse(words))


@pytest.mark.parametrize("words", [["--only", "blip"], ["--seeds", "1"]])
def test_a_wrong_command_line_of_curves_is_refused(words):
    with pytest.raises(SystemExit) as end:
        curves.parse(words)
    assert end.value.code == 2
