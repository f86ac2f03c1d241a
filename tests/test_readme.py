"""What the README says of the files, the commands and the figure is true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data
import world

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("train.py", "generate.py", "evaluate.py")


def test_line_counts_are_true():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", TEXT, re.M)
    assert {name for name, _ in rows} >= {p.name for p in ROOT.glob("*.py")}
    for name, lines in rows:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(lines), name


def test_named_files_exist():
    for name in set(re.findall(r"`((?:tests/|kernels/|weights/)?[\w/-]+\.(?:py|png|txt))`", TEXT)):
        assert (ROOT / name).exists() or name in ("loss.png", "contact-sheet.png"), name


def commands():
    """Every `python program.py ...` line of the README's code blocks."""
    blocks = re.findall(r"```\w*\n(.*?)```", TEXT, re.S)
    lines = [line.lstrip("$ ").split("  #")[0].strip() for b in blocks for line in b.splitlines()]
    return [line for line in lines if line.startswith("python ")]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    """Each command's flags are accepted by its program's own parser."""
    words = shlex.split(line.replace("[...]", ""), comments=True)
    assert (ROOT / words[1]).exists(), line
    if words[1] in PROGRAMS:
        __import__(words[1].removesuffix(".py")).arguments(words[2:])


def test_a_command_with_a_wrong_flag_would_be_noticed():
    import train
    with pytest.raises(SystemExit):
        train.arguments(["--stage", "1", "--no-such-flag"])


def test_there_are_commands():
    assert len(commands()) >= 6


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", TEXT, re.M)
    made = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{t}:", made, re.M) for t in targets)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers_at_once(program):
    """Under half a second of one core, which it can only be if torch is not imported first."""
    code = ("import runpy, sys, time; t = time.process_time(); sys.argv = [sys.argv[1], '--help']\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules; print(time.process_time() - t)")
    out = subprocess.run([sys.executable, "-c", code, str(ROOT / program)], capture_output=True,
                         text=True, check=True).stdout
    assert float(out.splitlines()[-1]) < .5


def test_the_figure_of_the_labels_is_what_encode_makes():
    """The row under the spliced sequence: only the answer and its end are learned."""
    words = data.Tokenizer(ROOT / "weights/toy/llama")
    talk = [{"from": "human", "value": "<image>\nWhat colour is the star?"},
            {"from": "gpt", "value": "The star is red."}]
    ids, labels = data.encode(talk, "v1", words)
    learned = [i for i, x in zip(ids, labels) if x != data.IGNORE]
    assert words.decode(learned, skip_special=False).strip() == "The star is red.</s>"
    assert "The star is red . </s>" in TEXT


def test_no_file_is_longer_than_a_line_of_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"


def test_the_picture_of_the_exchange_is_held_out():
    """tests/scene.png is the scene the README names, of the split that training never draws."""
    scene = world.scene(111, "test", 3)
    assert world.split_of(scene) == "test"
    picture = data.load_image(ROOT / "tests/scene.png")
    assert picture.tobytes() == world.draw(scene, 256).tobytes()
