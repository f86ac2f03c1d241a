"""What a run writes down, damaged on the disk: trainer/logs.py, the numbers of trainer/rows.py."""

import json
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from formats import checkpoints
from formats.errors import BadData, TrainingFailed
from toy import texts
from trainer import learning, model_card
from trainer.compare import losses_of
from trainer.learning import plot_loss
from trainer.logs import truncate_log
from trainer.rows import Journal, save_numbers

LINES = [b'{"step": 1, "loss": 6.5}', b'{"step": 2, "loss": null}', b'{"step": 3, "loss": 5.5}']
DAMAGE = {"no JSON": b'{"step": 2, "loss": 6.5]', "no UTF-8": b'{"step": 2, "lo\xffs": 6.5}',
          "no step": b'{"stup": 2, "loss": 6.5}',
          "a step of text": b'{"step": "2"}', "a list": b"[]",
          "empty": b"", "NaN": b'{"step": 2, "loss": NaN}', "true": b'{"step": true}'}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_left_out_and_said(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([LINES[0], damage, LINES[2], b'{"step": 4']))
    truncate_log(path, 9)
    assert path.read_bytes() == LINES[0] + b"\n" + LINES[2] + b"\n"     # the last was cut short
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "line 2 is damaged" in said[0]
    plot_loss(tmp_path)
    assert (tmp_path / "loss.png").exists() and not capsys.readouterr().err


def test_whole_lines_stay_as_they_are(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*LINES, b""]))
    truncate_log(path, 2)
    assert path.read_bytes() == LINES[0] + b"\n" + LINES[1] + b"\n"
    truncate_log(tmp_path / "missing.jsonl", 2)
    assert not (tmp_path / "missing.jsonl").exists() and not capsys.readouterr().err


def test_a_loss_that_is_no_number_is_a_gap_in_the_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 6.5}\n{"step": 2}\n'
                                            '{"step": 3, "loss": "5"}\n{"step": 4, "loss": 4.5}\n')
    plot_loss(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_list_of_bad_samples_needs_all_its_keys(tmp_path, capsys):
    good = {"step": 1, "sample": 4, "where": "row 5", "why": "no picture"}
    lines = [good, {**good, "sample": "4"}, {"step": 1, "sample": 5}]
    (tmp_path / "bad_samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    journal = Journal(SimpleNamespace(rows=None), tmp_path, 100)
    assert journal.read("bad_samples.jsonl", 9) == [good]
    assert capsys.readouterr().err.count("damaged") == 2


@pytest.fixture
def numbers(tmp_path):
    save_numbers(tmp_path / "rows.safetensors", digest=array("q", [7, 8, 9]),
                 words=array("i", [3, -4, 5]))
    return Journal(SimpleNamespace(rows=None), tmp_path, 100), tmp_path / "rows.safetensors"


def test_numbers_come_back(numbers):
    digests, words = numbers[0].load_digests()
    assert digests.tolist() == [7, 8, 9] and words.tolist() == [3, -4, 5]


def test_every_flipped_bit_of_the_numbers_is_refused(numbers):
    """The order of the samples follows from `words`: one wrong bit would be another run."""
    journal, path = numbers
    content = path.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - first == 3 * 8 + 3 * 4
    for bit in range(8 * first, 8 * len(content), 5):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(BadData, match="checksum"):
            journal.load_digests()


def test_numbers_of_an_older_version_have_no_checksum_and_are_read(numbers):
    """Control of the test above: without the checksum the flipped bit comes through."""
    journal, path = numbers
    tensors = load_file(path)
    tensors["words"][0] = 1027
    save_file(tensors, path)
    assert torch.equal(journal.load_digests()[1], tensors["words"])


def test_a_worker_says_nothing_of_a_process_that_was_killed(capsys):
    """Control: of anything else it prints the traceback."""
    from trainer.workers import say_nothing_of_a_lost_process as say
    for error in (ConnectionResetError(104, "reset"), EOFError()):
        say(type(error), error, None)
    assert not capsys.readouterr().err
    say(ValueError, ValueError("a fault"), None)
    assert "a fault" in capsys.readouterr().err


def test_keys_that_a_flipped_bit_has_renamed(tmp_path):
    """Of any line of both logs, every key in turn: the pictures are drawn, the card and the curve
    are read. Control: without the damage the loss is there."""
    shown = texts.description(learning.shown_scenes()[learning.SHOWN - 1])
    metrics = [{"step": i, "loss": 2. - i / 9, "itc": 1., "eval_loss": 1.5} for i in range(1, 4)]
    samples = [{"step": i, "truth": shown, "says": "a red star"} for i in (1, 3)]
    run = SimpleNamespace(args=SimpleNamespace(keep_best=False))

    def read():
        learning.plot_loss(tmp_path)
        learning.draw_learning(tmp_path)
        return list(model_card.losses(tmp_path / "metrics.jsonl", run)), losses_of(tmp_path)

    for name, lines in (("metrics", metrics), ("samples", samples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    whole = read()
    assert "1.7778" in whole[0][0] and len(whole[1]) == 3
    for name, lines in (("metrics", metrics), ("samples", samples)):
        for number, line in enumerate(lines):
            for key in line:
                other = {("x" + k if k == key else k): v for k, v in line.items()}
                text = [json.dumps(other if i == number else x) + "\n"
                        for i, x in enumerate(lines)]
                (tmp_path / f"{name}.jsonl").write_text("".join(text))
                found = read()
                if key != "eval_loss":                  # which is one of several, or the last
                    told = name == "metrics" and key in ("loss", "step")
                    assert (found != whole) == told
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_a_full_disk_is_one_line_wherever_tensors_are_written(tmp_path, monkeypatch):
    """The library makes an error of its own of it. Every file that writes tensors takes the call
    that knows, or says what to do by itself; control: the call without a full disk."""
    checkpoints.save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")

    def full(*args, **more):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(TrainingFailed, match="a.safetensors: cannot be written .*free some space"):
        checkpoints.save_tensors({}, tmp_path / "a.safetensors")
    with pytest.raises(TrainingFailed, match="free some space"):
        save_numbers(tmp_path / "rows.safetensors", words=array("i", [1, 2]))
    root = Path(__file__).parents[1]
    for path in (*root.glob("formats/*.py"), *root.glob("trainer/*.py")):
        text = path.read_text(encoding="utf-8")
        assert " save_file(" not in text or "SafetensorError" in text, path
