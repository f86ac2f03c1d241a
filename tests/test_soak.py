"""The soak (tests/soak/) holds where nothing is wrong, finds what is planted, and counts rightly.

`python tests/test_soak.py FOLDER` is a warm process that forks the runs; pytest's own computes, and
cannot fork. It does a few trials and prints what they found."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def check(folder):
    from soak import memory, plan, trials
    from soak.controls import WithPlant
    room = plan.open_room(folder)
    one, two = room.kinds["stage 1"], room.kinds["stage 2"]
    late = slice(-6, None)
    found = {
        "held": [trials.kill_at_random(room, one, 0, amount=2),
                 trials.kill_in_save(room, one, 0, points=slice(3, 40, 9)),
                 trials.other_ranks(room, two, 0)],
        "found": [trials.kill_in_save(WithPlant(room, "non_atomic_model"), one, 0, points=late),
                  trials.kill_in_save(WithPlant(room, "checkpoint_in_place"), two, 0,
                                      points=slice(1, 6, 2)),
                  trials.kill_in_save(WithPlant(room, "unseeded_step"), one, 0,
                                      points=slice(0, 1)),
                  memory.long_run(room, one, 0, steps=200, plant="leak")]}
    print(json.dumps(found))


if __name__ == "__main__":
    check(sys.argv[1])
    sys.exit()

import pytest

from soak import page, plan, records


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = subprocess.run([sys.executable, __file__, str(tmp_path_factory.mktemp("soak"))],
                          capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kills_and_other_ranks_hold(found):
    for record in found["held"]:
        assert record["done"] == record["held"] > 0 and not record["failures"], record


def test_planted_faults_are_found(found):
    """A save that is not atomic (of the model, of a checkpoint), a step that no checkpoint can
    repeat, a leak."""
    model, checkpoint, step, leak = found["found"]
    assert "model/tokenizer_config.json differs" in str(model["failures"])
    for record in (checkpoint, step):
        assert "model/model.safetensors differs" in str(record["failures"]), record
    assert "memory grows by" in leak["failures"][0], leak


def record(what, kind, seed, done, held, **more):
    return {"what": what, "kind": kind, "seed": seed, "commit": "abc", "done": done, "held": held,
            "failures": [], "seconds": 1, **more}


def test_a_piece_that_is_done_is_not_done_again(tmp_path):
    path = tmp_path / "records.jsonl"
    what = "SIGKILL at a random moment"
    for seed in range(8):
        records.append(record(what, "stage 1", seed, 25, 25), path)
    records.append(record(what, "LoRA", 0, 25, 24), path)
    path.write_text(path.read_text() + '{"what": "SIGKILL at')      # killed in the middle
    done = records.read(path)
    assert len(done) == 9 and records.done_of(done)[what, "stage 1"] == 200
    pieces = plan.pieces(what, None, done)
    at = {piece.kind: piece.first_seed for piece in pieces}
    assert at["stage 1"] == 8 and at["LoRA"] == 1 and at["stage 2"] == 0
    first = plan.next_piece(pieces)
    assert first.first_seed == 0 and first.kind == "stage 2"
    assert plan.next_piece(plan.pieces(what, "stage 1", done)) is None


def test_a_small_disk_is_left_out_where_it_cannot_be_mounted(monkeypatch):
    monkeypatch.delenv("SOAK_NAMESPACE", raising=False)
    assert plan.next_piece(plan.pieces("full disk", None, [])) is None
    monkeypatch.setenv("SOAK_NAMESPACE", "yes")
    assert plan.next_piece(plan.pieces("full disk", None, [])).what == "full disk"


def test_the_page_says_what_did_not_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "reliability.md")
    monkeypatch.setattr(page, "FOUND", tmp_path / "none")
    page.write([record("SIGKILL in a save", "LoRA", 0, 60, 60),
                record("SIGKILL in a save", "stage 1", 0, 60, 58,
                       failures=["before operation 3: model differs"] * 2),
                record("hostile input", "gif picture", 0, 4000, 4000, ways=9),
                record("hostile input", "gif picture", 1, 4000, 3999, ways=9)])
    text = (tmp_path / "reliability.md").read_text()
    assert "| **58 of 60** |" in text and "| LoRA |  | 60 |" in text
    assert "| gif picture | **7,999 of 8,000** | 0 to 1 |" in text
    assert "- SIGKILL in a save, stage 1, 2 times; commit abc, the first: before operation" in text
    assert max(len(line) for line in text.splitlines()) <= 110


def test_the_committed_page_is_that_of_the_records(tmp_path, monkeypatch):
    committed = page.PAGE.read_text()
    monkeypatch.setattr(page, "PAGE", tmp_path / "reliability.md")
    page.write(records.read())
    assert (tmp_path / "reliability.md").read_text() == committed


def test_what_was_found_has_a_line_each():
    for line in records.read(page.FOUND):
        assert set(line) == {"what", "by", "mended"} and all(line.values())
