"""trainer/golden.py: a change of arithmetic is seen, and nothing else is taken for one."""

import json
import signal

import pytest
import torch

import train
from formats.errors import BadData, TrainingFailed
from trainer import golden
from trainer.flags import GOLDEN

PROGRAM = {name: getattr(train, name)
           for name in ("parse_args", "set_trainable", "make_job", "train_loop")}


@pytest.fixture(autouse=True)
def unchanged_process():
    """A run sets threads, signals and determinism: put them back."""
    threads = torch.get_num_threads()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def written():
    return golden.read_golden(GOLDEN)


def test_the_first_losses_of_every_stage_are_those_of_the_file(written):
    assert set(written["losses"]) == {f"{recipe} stage {n}" for recipe in train.RECIPES
                                      for n in (1, 2)}
    assert {len(values) for values in written["losses"].values()} == {golden.STEPS}
    losses = golden.golden_losses(PROGRAM, train.RECIPES, golden.HANDED_ON)
    said = list(golden.compare(written, losses))
    assert len(said) == len(written["losses"]) + 1


def test_a_change_of_arithmetic_is_found_with_its_step(monkeypatch):
    """Control: a rate that is a thousandth higher. The first rate of the stage is 0, so step 3 is
    the first whose weights differ. And the same run twice has the same losses."""
    real = train.lr_schedule

    def higher(row, steps):
        scale = real(row, steps)
        return lambda step: 1.001 * scale(step)

    def losses():
        return golden.golden_losses(PROGRAM, ["llava"], steps=3)

    before = losses()
    file = {"losses": before, "processor": golden.processor(), "torch": torch.__version__}
    assert "to the bit" in list(golden.compare(file, losses()))[-1]
    monkeypatch.setattr(train, "lr_schedule", higher)
    with pytest.raises(TrainingFailed, match="llava stage 1, step 3: .*--write-golden"):
        list(golden.compare(file, losses()))


def test_another_processor_is_compared_within_what_was_measured():
    file = {"processor": "another", "torch": torch.__version__, "losses": {"a": [2.0, 3.0]},
            "allowed": {"a": [1e-6, 1e-4]}}
    said = list(golden.compare(file, {"a": [2.0, 3.0002]}))
    assert "within what was measured" in said[-1] and "another" in said[-1]
    with pytest.raises(TrainingFailed, match="step 2: loss 3.0004"):
        list(golden.compare(file, {"a": [2.0, 3.0004]}))
    # step 1 is before anything was learned: what step 2 may differ by is not allowed there
    with pytest.raises(TrainingFailed, match="step 1: loss 2.0001.*1.0e-06 are allowed"):
        list(golden.compare(file, {"a": [2.0001, 3.0]}))
    here = {**file, "processor": golden.processor()}
    assert "to the bit" in list(golden.compare(here, {"a": [2.0, 3.0]}))[-1]
    with pytest.raises(TrainingFailed, match="0.0e.00 are allowed"):
        list(golden.compare(here, {"a": [2.0, 3.0000000000000004]}))
    with pytest.raises(TrainingFailed, match="other stages"):
        list(golden.compare(file, {"a": [2.0, 3.0], "b": [1.0]}))
    with pytest.raises(TrainingFailed, match="step 2"):
        list(golden.compare({**file, "torch": "2.0", "processor": golden.processor()},
                            {"a": [2.0, 4.0]}))


def test_every_difference_between_instruction_sets_is_allowed_four_times(written):
    for name, gaps in written["measured"].items():
        assert written["allowed"][name] == [golden.MARGIN * gap for gap in gaps]
        assert gaps == sorted(gaps) and gaps[0] >= golden.ROUNDING
    assert golden.largest_so_far([.1, .5, .2], [.3, .0, .0]) == [.3, .5, .5]
    assert golden.largest_so_far([0, 2], [0, 1]) == [golden.ROUNDING, 2]


def test_an_early_difference_is_seen_on_any_processor(written):
    """In the first two steps of every stage less than a thousandth is allowed."""
    assert max(gaps[1] for gaps in written["allowed"].values()) < 1e-3


@pytest.mark.parametrize("content, words", [
    ("[]", "holds no golden losses"), ("{", "unreadable JSON"),
    (json.dumps({"losses": {}, "allowed": {}, "weights": {"clip": "0"}}),
     "other toy/weights .clip, llama.*--write-golden"), (None, "is missing.*--write-golden")])
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "golden.json").write_text(content)
    with pytest.raises(BadData, match=words):
        golden.read_golden(tmp_path / "golden.json")


@pytest.mark.parametrize("argv", [["--compare-golden", "--lr", "1"], ["--write-golden", "--stage",
                                  "1"], ["--compare-golden", "--write-golden"]])
def test_it_takes_no_other_flag(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        train.parse_args(argv)
    assert leaving.value.code == 2 and "no other flag" in capsys.readouterr().err


def test_a_stage_is_still_required(capsys):
    with pytest.raises(SystemExit) as leaving:
        train.parse_args(["--lr", "1"])
    assert leaving.value.code == 2 and "--stage" in capsys.readouterr().err
