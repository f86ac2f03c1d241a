"""learning.png: at which steps a run asks, and what is drawn of the answers."""
import json

import pytest
from PIL import Image, ImageChops

from toy.texts import description
from trainer.learning import (
    draw_learning,
    GREEN,
    INK,
    is_sampled,
    judged_words,
    lay_out,
    plot_loss,
    RED,
    score_line,
    shown_scenes,
)

TRUTH = description(shown_scenes()[2])          # a green circle, a red star, a green triangle


@pytest.mark.parametrize("steps, asked", [
    (340, [0, 50, 100, 200, 340]), (520, [0, 50, 100, 200, 400, 520]), (100, [0, 50, 100]),
    (400, [0, 50, 100, 200, 400]), (6, [0, 1, 2, 4, 6]), (40, [0, 5, 10, 20, 40]), (1, [0, 1])])
def test_a_run_is_asked_most_often_at_its_beginning(steps, asked):
    assert [step for step in range(steps + 1) if is_sampled(step, steps)] == asked


def test_objects_that_are_there_are_green_and_others_are_red():
    text = "a large green circle, a blue star and a red star. The red circle"
    found = dict.fromkeys((GREEN, RED, INK), "")
    for word, colour in judged_words(text, TRUTH):
        found[colour] += f"{word} "
    assert found[GREEN] == "green circle, red star. "
    assert found[RED] == "blue star red circle "
    assert "green" not in found[INK] and "star" not in found[INK]
    assert score_line(text, TRUTH) == "2 of 3" and score_line("", TRUTH) == "0 of 3"


def test_a_long_answer_ends_in_dots_and_no_line_is_too_wide():
    lines = lay_out([("background", INK)] * 60, 500)
    assert len(lines) == 3 and lines[-1][-1][1] == "…"
    assert all(x <= 500 for line in lines for x, _, _ in line)
    assert lay_out([("red", INK)], 500) == [[(0, "red", INK)]]


def write(folder, samples):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "loss": 3 / step, "itc": 1 / step}) + "\n"
        for step in range(1, 61)))
    if samples:
        (folder / "samples.jsonl").write_text("".join(
            json.dumps({"step": step, "truth": truth, "says": says}) + "\n"
            for step, says in samples for truth in ("another", TRUTH)))
    draw_learning(folder)
    return Image.open(folder / "learning.png")


def test_the_picture_grows_with_the_answers_and_shows_them(tmp_path):
    right, wrong = "a green circle", "a blue circle"
    one = write(tmp_path / "one", [(0, right)])
    two = write(tmp_path / "two", [(0, right), (60, wrong)])
    same = write(tmp_path / "same", [(0, right), (60, right)])
    assert one.width == two.width == 960 and two.height > one.height
    assert two.size == same.size and ImageChops.difference(two, same).getbbox()


def test_a_run_without_samples_has_the_curve_alone(tmp_path):
    assert write(tmp_path / "run", []).size == (960, 560)
    plot_loss(tmp_path / "run")
    assert Image.open(tmp_path / "run/loss.png").size == (600, 300)
