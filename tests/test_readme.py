"""What README.md and docs/ say of the files, the commands and the figure is true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
ALL = "\n".join(TEXTS.values())
# as they are called: `python train.py`, `python -m evaluate`
PROGRAMS = ("train.py", "generate.py", "data.py check", "-m evaluate", "-m instruct", "-m bench",
            "-m exercises")
WRITTEN = ("loss.png", "learning.png", "contact-sheet.png")     # by commands: not in the repository


# ------------------------------------------------------------------------------ the pages

def test_all_pages_are_there():
    names = ("README", *(f"docs/{n}" for n in (
        "README.ko", "claims", "kernels", "questions", "results", "training", "weights")))
    assert set(TEXTS) >= {f"{name}.md" for name in names}


def test_the_readme_is_short_and_opens_with_what_a_newcomer_needs():
    lines = README.splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:100])
    for needed in ("tests/scene.png", "make demo", "## The whole path", "The star is red . </s>",
                   "| file | lines |", "| recipe | stage |", "| majority |", "Not run by us"):
        assert needed in first, needed


@pytest.mark.parametrize("page", TEXTS)
def test_lines_fit(page):
    for number, line in enumerate(TEXTS[page].splitlines(), 1):
        assert len(line) <= 110, f"{page}:{number}"


def test_no_file_is_longer_than_a_line_of_100_columns():
    files = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
    assert len(files) > 30
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path.relative_to(ROOT)}:{number}"


@pytest.mark.parametrize("page", TEXTS)
def test_no_page_holds_a_path_of_a_machine(page):
    assert not re.findall(r"(?<![\w.])/(?:work|tmp|home|root|Users|mnt|opt|usr|var)/", TEXTS[page])
    assert not re.findall(r"[A-Z]:\\", TEXTS[page])


# ------------------------------------------------------------------------------ files and links

def test_line_counts_are_true():
    counts = r"^\| `([\w/]+\.py)` \| ([\d,]+) \|"
    assert {name for name, _ in re.findall(counts, README, re.M)} >= {
        path.name for path in ROOT.glob("*.py")}
    for name, lines in re.findall(counts, ALL, re.M):
        found = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert found == int(lines.replace(",", "")), f"{name} has {found} lines"


def test_named_files_exist():
    named = set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|png|txt|md))`", ALL))
    assert len(named) > 15
    for name in named - set(WRITTEN):
        assert (ROOT / name).exists(), name


def test_named_folders_exist():
    """A name with a slash at its end is a folder of the repository, but for what a run makes."""
    named = set(re.findall(r"`((?:[\w-]+/)+)`", ALL)) - {"model/"}
    assert {"kernels/", "formats/", "trainer/", "decoding/", "toy/", "evaluate/"} <= named
    for name in named:
        assert (ROOT / name).is_dir(), name


def anchors(page):
    """The ids that GitHub gives to a page's headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", TEXTS[page], flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_images_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", TEXTS[page], flags=re.S))
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), link
        if target.suffix == ".py":      # a line of code: tests/test_book.py looks at it
            continue
        assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), link


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w.]+\.md)", README))
    assert linked == set(TEXTS) - {"README.md"}


def test_the_pictures_are_shown():
    shown = set(re.findall(r"!\[[^\]]+\]\((?:\.\./)?(tests/\w+\.png)\)", ALL))
    assert shown == {"tests/scene.png", "tests/attention.png", "tests/binding.png",
                     "tests/claims.png", "tests/queries.png"}


# ------------------------------------------------------------------------------ commands

def commands():
    """Every `python ...` and `torchrun ...` line of the code blocks, without a comment."""
    blocks = re.findall(r"```\w*\n(.*?)```", ALL, re.S)
    lines = [line.lstrip("$ ").split("  #")[0].strip() for b in blocks for line in b.splitlines()]
    inline = re.findall(r"`(python [^`]+)`", ALL)
    found = [line for line in lines + inline if line.startswith(("python ", "torchrun "))]
    return list(dict.fromkeys(found))


def program_and_flags(line):
    """("train.py", ["--stage", "1"]), or ("-m evaluate", ["toy", ...])."""
    words = shlex.split(line.replace("[...]", ""), comments=True)[1:]
    if line.startswith("torchrun"):
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
    split = 2 if words[0] == "-m" else 1
    return " ".join(words[:split]), words[split:]


def source(program):
    """The file that a program begins in."""
    if not program.startswith("-m "):
        return ROOT / program
    path = ROOT / program.removeprefix("-m ").replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


# Runs a program until the function that read its command line returns: then its flags, their
# values and what that function checks were accepted. Exit status 0 then, 2 where it refuses.
READ = """
import argparse, os, runpy, sys
inside = []

def watched(read):
    def call(self, *args, **kwargs):
        inside.append(read)
        result, caller = read(self, *args, **kwargs), sys._getframe(1)
        inside.pop()
        if not inside and caller.f_code.co_name in ("<module>", "main"):
            os._exit(0)

        def returned(frame, event, value):
            if event == "return" and frame is caller and value is not None:
                os._exit(0)
        if not inside:
            sys.setprofile(returned)
        return result
    return call

for name in ("parse_args", "parse_known_args"):         # the first calls the second
    setattr(argparse.ArgumentParser, name, watched(getattr(argparse.ArgumentParser, name)))
sys.path.insert(0, os.getcwd())
if sys.argv[1] == "-m":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
print("the program ended and never read its command line")
"""


def read_by_its_program(program, flags):
    return subprocess.run([sys.executable, "-c", READ, *program.split(), *flags], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    """Each command's flags are accepted by its program's own parser."""
    program, flags = program_and_flags(line)
    assert source(program).exists(), line
    if program in {p.removesuffix(" check") for p in PROGRAMS} and "..." not in flags:
        done = read_by_its_program(program, flags)
        assert done.returncode == 0 and not done.stdout, f"{line}: {done.stdout}{done.stderr}"


# what each program needs before it looks at the flag that is wrong
NEEDED = {"train.py": ["--stage", "1"], "generate.py": ["img.jpg"], "data.py check": ["x.json"],
          "-m evaluate": ["toy"], "-m instruct": ["detail", "--images", "x", "--out", "y",
                                                  "--toy", "1"], "-m bench": [], "-m exercises": []}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_command_with_a_wrong_flag_would_be_noticed(program):
    assert read_by_its_program(program, NEEDED[program]).returncode == 0
    assert read_by_its_program(program, [*NEEDED[program], "--no-such-flag"]).returncode == 2


def test_there_are_commands():
    assert len(commands()) >= 30
    for program in PROGRAMS:
        assert any(line.startswith(f"python {program}") for line in commands()), program


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", ALL, re.M)
    made = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{t}:", made, re.M) for t in targets)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers_at_once(program):
    """Under half a second of one core, which it can only be if torch is not imported first."""
    code = ("import runpy, sys, time; t = time.process_time(); sys.argv += ['--help']\n"
            "module = sys.argv[1] == '-m'; sys.argv = sys.argv[1 + module:]; sys.path[0] = '.'\n"
            "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True) if module "
            "else runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules; print(time.process_time() - t)")
    out = subprocess.run([sys.executable, "-c", code, *program.split()], cwd=ROOT,
                         capture_output=True, text=True, check=True).stdout
    assert "usage:" in out
    assert float(out.splitlines()[-1]) < .5


# ------------------------------------------------------------------------------ the figure

def test_the_figure_of_the_labels_is_what_encode_makes():
    """The row under the spliced sequence: only the answer and its end have loss."""
    import data
    tokenizer = data.Tokenizer(ROOT / "toy/weights/llama")
    talk = [{"from": "human", "value": "<image>\nWhat colour is the star?"},
            {"from": "gpt", "value": "The star is red."}]
    ids, labels = data.encode(talk, "v1", tokenizer)
    answer = [i for i, x in zip(ids, labels) if x != data.IGNORE]
    assert tokenizer.decode(answer, skip_special=False).strip() == "The star is red.</s>"
    assert "The star is red . </s>" in README
    row, marks = re.search(r"^(<s> A chat .*)\n(.*)$", README, re.M).groups()
    drawn = [word[0] for word in re.finditer(r"\S+", row)
             if "x" in marks[word.start():word.end()]]
    assert drawn == [tokenizer.decode([i], skip_special=False).strip() for i in answer]


def test_the_picture_of_the_exchange_is_held_out():
    """tests/scene.png is the scene the README names, of the split that training never draws."""
    import data
    from toy import world
    scene = world.make_scene(111, "test", 3)
    assert world.split_of(scene) == "test"
    picture = data.load_image(ROOT / "tests/scene.png")
    assert picture.tobytes() == world.draw(scene, 256).tobytes()
