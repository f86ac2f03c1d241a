"""Files that were changed at random: those that were a fault once, and a few new ones of each kind.

The search itself is tests/soak/hostile.py, hours of it `make soak`. Controls: readers with a fault
each, which `attempt` must name."""

import random
import shutil
import sys
import time

import pytest

from formats.errors import BadData, TrainingFailed, UsageError
from soak import hostile, kinds, mutate, targets

CASES = sorted(path for path in hostile.CASES.glob("*") if path.is_file())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the seeds, folder of the models) of all targets."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "world").mkdir()
    (root / "seeds").mkdir()
    kinds.write_world(root / "world")
    targets.write_seeds(root / "seeds", root / "world")
    return root / "seeds", root / "world"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def copy_of(made, target, folder):
    """What a target reads, in a folder that may be changed; two levels deep, as the soak's."""
    place = folder / "hostile" / target.name
    shutil.copytree(targets.seed_folder(*made, target), place)
    if not (folder / "seeds").exists():
        (folder / "seeds").symlink_to(made[0])
    return place


@pytest.mark.parametrize("name", targets.BY_NAME)
def test_what_is_not_changed_is_read(made, tmp_path, name):
    target = targets.BY_NAME[name]
    fault, said = hostile.attempt(target.read, copy_of(made, target, tmp_path))
    assert not fault and "error: " not in said


@pytest.mark.parametrize("case", CASES, ids=[path.name for path in CASES])
def test_what_was_a_fault_once_is_none(made, tmp_path, case):
    name, _, file = case.name.split("--")
    target = targets.BY_NAME[name.replace("_", " ")] if name not in targets.BY_NAME else (
        targets.BY_NAME[name])
    folder = copy_of(made, target, tmp_path)
    shutil.copyfile(case, folder / file)
    fault, _ = hostile.attempt(target.read, folder)
    assert not fault


@pytest.mark.parametrize("name", targets.BY_NAME)
def test_a_few_inputs_of_every_kind(made, tmp_path, name):
    target = targets.BY_NAME[name]
    (tmp_path / "seeds").symlink_to(made[0])
    search = hostile.Search(target, targets.seed_folder(*made, target),
                            tmp_path / "hostile" / "one", random.Random(f"suite:{name}"))
    for _ in range(max(4, target.amount // 200)):
        search.one()
    assert search.done >= 4 and not search.faults, search.faults[0][:2]


# ----------------------------------------------------------------------------- negative controls

def raises(error):
    def read(folder):
        raise error
    return read


def says(text):
    def read(folder):
        print(text, file=sys.stderr)
        raise BadData("x: correct it")
    return read


def computes(folder):
    end = time.process_time() + .2
    while time.process_time() < end:
        pass


def fills(folder):
    assert len(bytearray(b"x" * 40_000_000)) == 40_000_000


@pytest.mark.parametrize("read, named", [
    (raises(KeyError("a")), "KeyError at test_hostile.py"),
    (raises(RecursionError("deep")), "RecursionError"),
    (raises(TrainingFailed("x")), "exit code 1"), (raises(UsageError("x")), "exit code 2"),
    (raises(MemoryError()), "exit code 1"), (says("error: another"), "2 lines"),
    (says("error: \x1b[2J"), "2 lines"), (computes, "s of computing"), (fills, "MB of memory")])
def test_a_fault_is_named(tmp_path, monkeypatch, read, named):
    monkeypatch.setattr(hostile, "SECONDS", .1)
    monkeypatch.setattr(hostile, "BYTES", 20_000_000)
    assert named in hostile.attempt(read, tmp_path)[0]


@pytest.mark.parametrize("read", [raises(BadData("a.json: broken: replace it")), lambda f: None,
                                  raises(BadData("\x1b[2J\nsecond line")),
                                  raises(BadData("é" * 10 ** 6)), raises(OSError(2, "none", "x"))])
def test_a_result_and_a_refusal_are_none(tmp_path, read):
    assert hostile.attempt(read, tmp_path)[0] == ""


def test_a_message_that_could_command_a_terminal_is_found(tmp_path):
    def read(folder):
        raise BadData("x")
    assert hostile.attempt(read, tmp_path) == ("", "error: x\n")
    import formats.errors
    real = formats.errors.one_line
    try:
        formats.errors.one_line = lambda error: "error: \x1b[2J"
        assert "command a terminal" in hostile.attempt(read, tmp_path)[0]
        formats.errors.one_line = lambda error: "error: " + "a" * 2000
        assert "2,007 characters" in hostile.attempt(read, tmp_path)[0]
    finally:
        formats.errors.one_line = real


def test_a_case_becomes_small_and_stays_a_fault(tmp_path):
    path = tmp_path / "x"

    def read(folder):
        if b"!" in path.read_bytes():
            raise KeyError("!")
    content = b"a" * 500 + b"!" + b"b" * 500
    path.write_bytes(content)
    fault, _ = hostile.attempt(read, tmp_path)
    assert hostile.smaller(read, tmp_path, path, content, fault) == b"!" == path.read_bytes()


def test_changes_are_a_function_of_the_seed_and_do_change():
    content = (b'{"choices": [{"message": {"content": "A red star.", "n": 3}}], "a": [1, 2]}\n'
               * 3)
    for form in ("bytes", "json", "lines", "safetensors", "jinja", "text", "http"):
        some = [[mutate.change(random.Random(f"{form}{i}"), form, content) for i in range(40)]
                for _ in range(2)]
        assert some[0] == some[1] and len(set(some[0])) > 25, form
        assert sum(x != content for x in some[0]) > 30
