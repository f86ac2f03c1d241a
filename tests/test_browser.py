"""decoding/page.html in headless Chromium: what a person does with it, by mouse, finger and keys.

What the tests need, and where they are skipped: tests/browser.py."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import generate as g
from browser import chromium, page                          # noqa: F401 (fixtures)
from browser import ask, open_page, put, SCENE, shoot, until
from clip import ViT
from data import Tokenizer
from llama import Llama
from projector import VLM
from test_generate import model, words                      # noqa: F401 (fixtures)
from test_page import Slow, Visitor
from toy.texts import description
from toy.world import COLOURS, make_scene, SHAPES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def toy():
    """The shipped parts with a projector that nobody trained: it answers, and wrongly."""
    parts = ROOT / "toy/weights"
    torch.manual_seed(0)
    return VLM(ViT.from_pretrained(parts / "clip"), "mlp", Llama.from_pretrained(parts / "llama"),
               Tokenizer(parts / "llama")).eval()


@pytest.fixture(scope="module")
def visitor(toy):
    return Visitor(toy, Slow, "--max-new-tokens", "60")


def test_upload_ask_and_the_answer_streams_in(page, visitor, toy, monkeypatch):
    monkeypatch.setattr(Slow, "pause", .1)
    put(page, SCENE)
    article = ask(page, "Describe this image", wait=False)
    until(page, "document.querySelector('.answer').textContent.length > 20")
    part = article.locator(".answer").inner_text()
    assert article.locator("details").count() == 0 and page.is_disabled("#ask")
    article.locator("details").wait_for(state="attached")
    pixels = toy.pixels(Image.open(SCENE))
    ids = g.build_prompt(["Describe this image"], "v1", toy.tokenizer)
    whole = "".join(g.stream(toy, ids, pixels, max_new_tokens=60)).strip()
    assert article.locator(".answer").inner_text() == whole and whole.startswith(part.strip())
    numbers = article.locator("summary").inner_text()
    assert "64 of pictures" in numbers and "prefill" in numbers and "decode" in numbers
    article.locator("summary").click()
    prompt = article.locator(".prompt")
    assert prompt.locator("mark").inner_text() == "picture: 64 tokens"
    assert prompt.inner_text().startswith("<s> A chat") and "ASSISTANT:" in prompt.inner_text()


def test_a_second_turn_and_a_second_picture(page, request, tmp_path):
    put(page, SCENE)
    ask(page, "What do you see?")
    second = ask(page, "Is there a red star?")
    second.locator("summary").click()
    assert second.locator("mark").count() == 1 and "USER" in second.locator(".prompt").inner_text()
    put(page, SCENE)
    assert page.locator("#pending a").inner_text() == "scene-2.png"     # the name is taken
    third = ask(page, "And in this one?")
    third.locator("summary").click()
    assert third.locator("mark").all_inner_texts() == ["picture: 64 tokens"] * 2
    assert page.locator("#pending figure").count() == 0
    shoot(page, request.node.name, tmp_path)
    with page.expect_download() as saved:
        page.click("#save")
    (row,) = json.loads(Path(saved.value.path()).read_text())
    assert row["image"] == ["scene.png", "scene-2.png"] and len(row["conversations"]) == 6
    assert row["conversations"][4]["value"] == "<image>\nAnd in this one?"
    page.click("#new")
    assert page.locator("article").count() == 0 and page.is_disabled("#save")


def test_stop(page, monkeypatch):
    monkeypatch.setattr(Slow, "pause", .3)
    put(page, SCENE)
    article = ask(page, "Describe this image", wait=False)
    until(page, "document.querySelector('.answer').textContent.length > 20")
    page.click("#stop")
    article.locator("details").wait_for(state="attached")
    assert "stopped" in article.inner_text()
    kept = article.locator(".answer").inner_text()
    second = ask(page, "And?", wait=False)
    page.click("#stop")
    second.locator("details").wait_for(state="attached")
    second.locator("summary").click()
    assert kept in second.locator(".prompt").inner_text()


def dark(article):
    """The overlay's darkness, patch by patch."""
    return article.evaluate("""box => { const map = box.querySelector("canvas");
        const {data} = map.getContext("2d").getImageData(0, 0, map.width, map.height);
        return [map.width, ...data.filter((_, i) => i % 4 === 3)]; }""")


def test_where_it_looked(page, visitor):
    """By mouse, by finger and by keys; the map is the server's."""
    put(page, SCENE)
    article = ask(page, "Describe this image")
    assert article.locator("canvas").count() == 0           # computed when asked for
    article.locator(".answer span").nth(3).hover()
    article.locator("canvas").wait_for()
    width, *first = dark(article)
    assert width == 8 and min(first) == 0 and max(first) > 150
    assert "attention is on pictures" in article.inner_text()
    page.mouse.move(5, 5)
    article.locator(".answer span").nth(6).tap()
    until(page, "document.querySelectorAll('.answer span')[6].classList.contains('at')")
    second = dark(article)[1:]
    article.locator(".answer").press("ArrowLeft")
    assert article.locator(".answer .at").inner_text() == (
        article.locator(".answer span").nth(5).inner_text())
    assert first != second != dark(article)[1:]
    assert article.locator(".answer").inner_text().split() == (
        article.locator(".answer span").all_inner_texts())


def test_a_new_scene_and_its_truth(page, visitor):
    page.click("#scene")
    page.wait_for_selector("#try button:nth-of-type(2)")
    name = page.locator("#pending a").inner_text()
    scene = make_scene(int(name.removeprefix("scene-").removesuffix(".png")), "test")
    page.click("#try button:nth-of-type(1)")
    page.press("#question", "Enter")
    article = page.locator("article")
    article.locator("details").wait_for(state="attached")
    assert article.locator(".truth").inner_text() == f"Truth: {description(scene)}"
    page.click("#scene")                # another scene is another talk
    until(page, "!document.querySelector('article')")
    page.click("#try button:nth-of-type(3)")
    question = page.input_value("#question")
    page.click("#ask")
    page.wait_for_selector("article details", state="attached")
    truth = page.locator(".truth").inner_text()
    assert truth.startswith("Truth: ") and "background." not in truth.replace("The background", "")
    assert page.locator(".question").inner_text() == question


def labels(page, name):
    return [text.strip() for text in page.locator(f"#{name} label").all_inner_texts()]


def test_drawing_pad(page, visitor, request, tmp_path):
    """Shapes by mouse and by keys, a free line, its six colours; what is drawn is what is sent."""
    assert page.is_visible("#pad") and labels(page, "colours") == [*COLOURS]
    assert labels(page, "shapes") == [*SHAPES, "free hand"]
    for n, (colour, shape) in enumerate(zip(COLOURS, (*SHAPES, "circle"))):
        page.check(f"input[value={colour}]")
        page.check(f"input[value={shape}]")
        page.click("#pad", position={"x": 50 + 75 * (n % 3), "y": 50 + 75 * (n // 3)})
    page.check("input[value='free hand']")
    page.check("input[value=small]")
    page.check("input[value=blue]")
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 220)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 200, steps=5)
    page.mouse.up()
    page.check("input[value=green]")
    page.focus("#pad")
    for key in ["ArrowRight"] * 9 + ["ArrowDown"] * 2 + ["Enter"]:      # into the corner
        page.keyboard.press(key)
    page.click("#use")
    page.wait_for_selector("#pending figure")
    shoot(page, request.node.name, tmp_path)
    with page.expect_download() as saved:
        page.click("#pending a")
    drawn = Image.open(saved.value.path()).convert("RGB")
    assert drawn.size == (256, 256) and saved.value.suggested_filename == "drawing.png"
    pixels = visitor.page.pixels[next(reversed(visitor.page.pixels))][0]
    assert torch.equal(pixels, visitor.page.model.pixels(drawn))
    hexes = ["#" + bytes(drawn.getpixel((x, y))).hex() for x, y in
             ((50, 50), (125, 50), (200, 50), (50, 125), (125, 125), (200, 125), (110, 210))]
    wanted = [visitor.page.about()["toy"]["colours"][name] for name in (*COLOURS, "blue")]
    assert hexes == wanted
    green = bytes.fromhex(wanted[3][1:])
    assert any(bytes(drawn.getpixel((254, y))) == green for y in range(200, 256))
    page.click("#clear")
    assert page.evaluate("document.querySelector('#pad').getContext('2d')"
                         ".getImageData(0, 0, 256, 256).data.every(x => x === 255)")


def test_a_phones_width(page):
    """Nothing is wider than the screen, and a tap is enough for all."""
    page.set_viewport_size({"width": 360, "height": 740})
    put(page, SCENE)
    page.fill("#question", "Describe this image")
    page.tap("#ask")
    page.wait_for_selector("article details", state="attached")
    page.tap("article summary")
    page.tap(".answer span:nth-of-type(4)")
    page.wait_for_selector("article canvas")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    wide = page.evaluate("""[...document.querySelectorAll("body *")].filter(element =>
        element.getBoundingClientRect().right > 361).map(element => element.outerHTML)""")
    assert wide == []


def test_the_keyboard_alone(page):
    """Every button is reached by Tab, and shows that it is."""
    reached = []
    for _ in range(25):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.name")
        reached.append(name)
    assert {"new", "question", "ask", "choose", "scene", "colours", "shapes", "pad", "use", "clear",
            "greedy", "seed", "max_new_tokens"} <= set(reached)
    page.focus("#scene")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("#pending figure")
    page.focus("#question")
    page.keyboard.type("What is it?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Say.")
    page.keyboard.press("Enter")
    page.wait_for_selector("article details", state="attached")
    assert page.locator(".question").inner_text() == "What is it?\nSay."
    page.focus(".answer")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("article canvas")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")            # a link to the picture, or what the model has read
    assert page.evaluate("document.activeElement.tagName") in ("A", "SUMMARY")


def test_a_picture_that_is_refused(page, request, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    page.set_input_files("#files", tmp_path / "notes.png")
    until(page, "document.querySelector('#trouble').textContent")
    said = page.locator("#trouble").inner_text()
    assert said.startswith("notes.png: ") and "PNG" in said and page.locator("figure").count() == 0
    shoot(page, request.node.name, tmp_path)
    page.set_input_files("#files", [tmp_path / "notes.png", SCENE])     # one of two is good
    page.wait_for_selector("#pending figure")
    assert page.locator("#trouble").inner_text() == said
    assert ask(page, "What?").locator(".answer").inner_text()       # and the page goes on
    assert page.locator("#trouble").inner_text() == ""


def test_wrong_settings_are_said_and_the_question_stays(page):
    put(page, SCENE)
    page.uncheck("#greedy")
    page.fill("#top_p", "7")
    page.fill("#question", "What?")
    page.click("#ask")
    until(page, "document.querySelector('#trouble').textContent")
    assert "top-p" in page.locator("#trouble").inner_text()
    assert page.input_value("#question") == "What?" and page.locator("#pending figure").count() == 1
    page.fill("#top_p", "0.99")
    page.fill("#temperature", "4")
    one = ask(page, "What?").locator(".answer").inner_text()
    page.click("#new")
    page.fill("#seed", "1")
    put(page, SCENE)
    assert ask(page, "What?").locator(".answer").inner_text() != one


def test_a_picture_that_the_server_forgot_is_sent_again(page, visitor):
    put(page, SCENE)
    first = ask(page, "What?").locator(".answer").inner_text()
    visitor.page.pixels.clear()             # as after a restart, or 32 pictures of others
    page.locator(".answer span").nth(1).hover()
    page.wait_for_selector("article canvas")
    visitor.page.pixels.clear()
    assert ask(page, "And?").locator(".answer").inner_text() and first


def test_drop_and_paste(page):
    """A file that is dropped, and one from the clipboard, as the browser hands them over."""
    page.evaluate("""async () => {
        const file = await new Promise(done => document.querySelector("#pad").toBlob(done));
        for (const [kind, name, where] of [["drop", "a.png", "dataTransfer"],
                                           ["paste", "image.png", "clipboardData"],
                                           ["paste", "image.png", "clipboardData"]]) {
            const data = new DataTransfer();
            data.items.add(new File([file], name));
            const event = new Event(kind, {bubbles: true, cancelable: true});
            event[where] = data;
            document.querySelector("#question").dispatchEvent(event);
        }
    }""")
    until(page, "document.querySelectorAll('#pending figure').length === 3")
    assert sorted(page.locator("#pending a").all_inner_texts()) == [
        "a.png", "image-2.png", "image.png"]
    page.click("#pending button >> nth=0")
    assert page.locator("#pending figure").count() == 2


def test_a_second_visitor_sees_that_he_waits(page, chromium, visitor, tmp_path, monkeypatch):
    monkeypatch.setattr(Slow, "pause", .5)
    put(page, SCENE)
    ask(page, "Describe this image", wait=False)
    until(page, "document.querySelector('.answer').textContent.length > 5")
    other = chromium.new_context().new_page()
    open_page(other, visitor)
    put(other, SCENE)
    article = ask(other, "What?", wait=False)
    article.get_by_text("waiting: 1 before you").wait_for()
    shoot(other, "waiting", tmp_path)
    page.reload()                           # the first visitor goes away
    monkeypatch.undo()
    article.locator("details").wait_for(state="attached")
    other.context.close()


class Markup:
    """An answer that a model could give."""
    finish_reason, rest = "end", ""

    def __init__(self, model, *_, **__):
        text = "<img src=x onerror=document.title='bad'> <script>document.title='bad'</script> &lt;"
        self.tokens, self.times = model.tokenizer.encode(text, bos=False), [1.0, 2.0]
        self.text = text

    def __iter__(self):
        return iter(self.tokens)


def test_markup_stays_text(page, model, chromium):
    other = Visitor(model, Markup)
    open_page(page, other)
    put(page, SCENE)
    typed = "<b onclick=alert(1)>bold</b> <image> </s> <script>document.title='bad'</script>"
    article = ask(page, typed)
    assert article.locator(".question").inner_text() == typed
    assert article.locator(".answer").inner_text() == Markup(model).text
    article.locator("summary").click()
    assert "</s>" in article.locator(".prompt").inner_text()
    assert article.locator("mark").count() == 1
    assert page.locator("article b, article script, article img[src=x]").count() == 0
    assert page.title() == "Talk about a picture"
    assert page.is_hidden("#pad") and page.is_hidden("#scene")      # this model is no toy
