"""trainer/model_card.py: its calls say what they promise, and it names what a run began with."""

import re
import shlex

import pytest

import generate
import train
from decoding.flags import parse
from test_own_llm import language_model, smol                       # noqa: F401  fixtures
from test_train import flags, HERE, here, parts, server, unchanged_process    # noqa: F401  fixtures
from trainer import model_card

TOY = "a vocabulary of a few hundred words"


@pytest.fixture(scope="module")
def models(parts, tmp_path_factory):                                # noqa: F811
    """{template: the folder of a model that a run has written}. They write letters: of bytes that
    are no character two libraries make other marks."""
    top, found = tmp_path_factory.mktemp("cards"), {}
    letters = language_model(top / "letters", None, ())
    for template, argv in {
            "plain": ["--stage", 1], "v1": ["--stage", 2, "--from", "none", "--lr", "1e-2"],
            "llava_v0": ["--stage", 2, "--from", "none", "--template", "llava_v0"],
            "minigpt4": ["--stage", 2, "--from", "none", "--template", "minigpt4",
                         "--caption-style", "details"]}.items():
        out = top / template
        assert here([str(word) for word in (
            *argv, "--vision", parts / "clip", "--llm", letters, "--steps", 2, "--batch", 2,
            "--sample-every", 0, "--threads", 1, "--output-dir", out)]) == 0
        found[template] = out / "model"
    return found


def card_of(folder):
    return (folder / "README.md").read_text()


def said_here(folder, picture, capsys):
    """What the card's command line prints."""
    (line,) = re.findall(r"^python generate.py (.*)$", card_of(folder), re.M)
    argv = line.replace("FOLDER", str(folder)).replace("img.jpg", str(picture))
    capsys.readouterr()
    generate.main(parse([*shlex.split(argv), "--device", "cpu"]))
    return capsys.readouterr().out.strip()


def said_there(code, folder, picture):
    """What transformers writes by a card's Python."""
    code, found = code.replace("FOLDER", str(folder)).replace("img.jpg", str(picture)), []
    exec(code, {"print": found.append})
    return found[0][0]["generated_text"].strip()


def python_of(folder):
    return re.search(r"```python\n(.*?)```", card_of(folder), re.S)[1]


@pytest.mark.parametrize("template", ["plain", "v1"])
def test_the_cards_two_calls_say_the_same(models, template, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(generate, "accept_any_bytes", lambda: None)
    folder, picture = models[template], HERE / "tests/scene.png"
    wanted = said_here(folder, picture, capsys)
    assert len(wanted) > 5
    assert said_there(python_of(folder), folder, picture) == wanted
    # control: with the other card's message, transformers writes something else
    other = {"plain": "v1", "v1": "plain"}[template]
    assert said_there(python_of(models[other]), folder, picture) != wanted


def test_a_captioners_card_asks_nothing(models):
    card = card_of(models["plain"])
    assert "Describe this image" not in card and "--caption" in card
    assert "It has learned captions and no questions" in card
    assert "no questions" not in card_of(models["v1"])


def test_no_call_is_shown_that_transformers_cannot_answer_alike(models):
    """MiniGPT-4's format is not in Jinja; LLaVA v0's answers end at ###, which is no token."""
    for template in ("llava_v0", "minigpt4"):
        card = card_of(models[template])
        assert "python generate.py" in card and "pipeline(" not in card
        assert "pipeline(" in card_of(models["v1"])                             # control


def test_before_a_q_former_only_this_program_is_called(tmp_path, capsys, monkeypatch):
    """transformers has no model of a CLIP with a Q-Former; MiniGPT-4's stage 1 writes captions."""
    monkeypatch.setattr(generate, "accept_any_bytes", lambda: None)
    argv = ["--recipe", "minigpt4", "--stage", 1, "--steps", 1, "--batch", 2, "--sample-every", 0,
            "--threads", 1, "--output-dir", tmp_path]
    assert here([str(word) for word in argv]) == 0
    card = card_of(tmp_path / "model")
    assert "pipeline" not in card and "img.jpg --caption --model" in card and TOY in card
    assert said_here(tmp_path / "model", HERE / "tests/scene.png", capsys)


# ------------------------------------------------------------------------------ what it began with

def row_of(folder, name):
    return re.search(rf"^\| {name} \| (.*) \|$", card_of(folder), re.M)[1]


def test_names_say_which_run_and_no_folder_of_this_machine(tmp_path, monkeypatch):
    for folder in ("mine/model", "mine/adapter", "plain"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mine/model/model.safetensors").touch()
    name = model_card.name_of
    assert name(str(tmp_path / "mine/model")) == "mine/model"
    assert name(f"{tmp_path}/mine/model/") == "mine/model"
    assert name(str(tmp_path / "mine/adapter")) == "mine/adapter"
    assert name(str(tmp_path / "mine/model/model.safetensors")) == "mine/model/model.safetensors"
    assert name(str(tmp_path / "plain")) == "plain"
    assert name(f"{tmp_path}/gone/model") == "gone/model"           # moved since it was loaded
    monkeypatch.chdir(tmp_path / "mine/model")
    assert name(".") == name("../model") == name("../../mine/model") == "mine/model"
    assert name("owner/model") == "owner/model"                     # control: on the hub
    cached = tmp_path / "hub/models--owner--llava/snapshots/0a1b"
    cached.mkdir(parents=True)
    assert name(str(cached)) == "owner/llava"


def two_stages(top, *new, data=()):
    """Stage 1 with --lora's stage 2 behind it and one more from its adapter: their folders."""
    calls = {"first": ["--stage", 1, *new],
             "second": ["--stage", 2, "--from", top / "first/model", "--lora", 2],
             "third": ["--stage", 2, "--from", top / "second/model"]}
    for name, argv in calls.items():
        assert here([str(word) for word in (
            *argv, *data, "--steps", 1, "--batch", 2, "--sample-every", 0, "--threads", 1,
            "--output-dir", top / name)]) == 0
    return [top / name / "model" for name in calls]


def test_a_real_language_model_is_never_called_the_toys(smol, parts, tmp_path):     # noqa: F811
    """Neither where --llm names it, nor in the stages behind, whose command lines do not."""
    for folder in two_stages(tmp_path, "--llm", smol, "--vision", parts / "clip"):
        card = card_of(folder)
        assert TOY not in card and "under the MIT licence" not in card
        assert "Its vocabulary has 128 rows" in card and "licences of their own" in card
        assert "pictures of a toy world" in card and str(tmp_path) not in card
        assert row_of(folder, "started from").endswith(
            "the parts of base toy, --vision clip, --llm smol")
    assert row_of(folder, "started from").startswith("--from second/model: --from first/model: ")


def test_a_toy_is_called_one_through_all_its_stages(tmp_path, monkeypatch):
    """As long as each run says so: a record that is gone, or data of one's own, is no toy."""
    folders = two_stages(tmp_path)
    for folder in folders:
        assert TOY in card_of(folder) and "under the MIT licence" in card_of(folder)
    args = train.parse_args(["--stage", "2", "--from", str(folders[1])])
    assert model_card.is_of_the_toy_world(args, tmp_path / "new")
    own = train.parse_args(["--stage", "2", "--from", str(folders[1]), "--data", "a.json"])
    assert not model_card.is_of_the_toy_world(own, tmp_path / "new")
    (tmp_path / "first/config.json").unlink()
    assert not model_card.is_of_the_toy_world(args, tmp_path / "new")
    # a folder that was used anew from a model that came from it: it ends
    (tmp_path / "first/config.json").write_text(
        (tmp_path / "third/config.json").read_text())
    assert len(model_card.history(args, tmp_path / "new")) == 3
    assert not model_card.is_of_the_toy_world(args, tmp_path / "new")
