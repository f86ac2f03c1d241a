"""docs/build.py's book: nothing of the code is lost, names lead to their definitions, no link is
dead, nothing is loaded; exercises, pictures and questions stand in the contents; docs/questions.md
quotes lines that are there; docs/README.ko.md keeps up.

In a browser at two widths only where there is one: see tests/browser.py."""

import ast
import html
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from browser import chromium                                # noqa: F401 (fixture)
from docs import beside, build, links, markup

ROOT = Path(__file__).parents[1]
QUESTIONS = (ROOT / "docs/questions.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def book():
    return build.book()


def lines_of(book, module):
    """{line number: (id, HTML of its code)} of a chapter."""
    row = (r'<div class="l[^"]*" id="(%s-(\d+))".*?</i><em>\d+</em><code>(.*?)</code></div>'
           % re.escape(module))
    return {int(number): (place, code) for place, number, code in re.findall(row, book)}


def bare(code):
    return html.unescape(re.sub(r"<[^>]+>", "", code))


# ------------------------------------------------------------------------------ the whole book

def test_the_book_has_no_fault(book):
    assert build.faults(book) == []
    assert len(book.encode()) < 3_000_000


def test_make_book_needs_python_alone():
    """-S: without site-packages, so without torch, which CI's `make book` has not installed yet."""
    done = subprocess.run([sys.executable, "-I", "-S", "docs/build.py"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (ROOT / "docs/book.html").read_text(encoding="utf-8") == build.book()
    assert "docs/book.html" in (ROOT / ".gitignore").read_text().split()


def test_the_chapters_are_the_seven_and_the_essay(book):
    assert [*build.CHAPTERS] == ["clip", "llama", "projector", "data", "train", "generate",
                                 "qformer", "kernels.attention"]
    contents = contents_of(book)
    korean = re.findall(r'<p lang="ko">(.*?)</p>', contents)
    assert len(korean) == len(re.findall("<li (value|class)", contents)) == 14
    assert all(re.search("[가-힣]{2,}", sentence) for sentence in korean)
    for n, module in enumerate(build.CHAPTERS, 1):
        assert f'<li value="{n}"><a href="#{module}">' in contents


def contents_of(book):
    return book[book.index("<ol>"):book.index("</ol>")]


def test_exercises_pictures_questions_and_rooms_stand_in_the_contents(book):
    contents = contents_of(book)
    for name, count in (("exercise", 12), ("question", 20)):
        wanted = [f"{name}-{n}" for n in range(1, count + 1)]
        assert re.findall(rf'<li><a href="#({name}-\d+)">', contents) == wanted
    assert re.findall(r'<a href="#picture-(\w+)">', contents) == [*beside.PICTURES]
    korean = re.findall(r'<a href="#question-\d+">\d+\. [^<]+\?</a><span lang="ko">(.*?)</span>',
                        contents)
    assert len(korean) == 20 and all(re.search("[가-힣]{2,}", line) for line in korean)
    assert '<a href="#formats.pictures">formats/pictures.py</a>' in contents
    assert contents.index('"#exercise-1"') < contents.index('"#clip"') < contents.index(
        '"#question-1"')


def test_each_chapter_leads_to_its_neighbours(book):
    heads = re.findall(r'<section[^>]* id="([^"]+)"><header><nav>(.*?)</nav>', book)
    places = [place for place, _ in heads]
    assert places == ["path", "words", "exercises", *build.CHAPTERS, "questions", "rooms"]
    for n, (_, nav) in enumerate(heads):
        wanted = [*places[max(n - 1, 0):n], "top", *places[n + 1:n + 2]]
        assert re.findall(r'href="#([^"]+)"', nav) == wanted
    assert re.findall(r'<p class="next">Next: <a href="#([^"]+)">', book) == places[1:]


def test_words_that_the_chapters_take_for_granted_are_explained(book):
    words = book[book.index("<dl>"):book.index("</dl>")]
    terms = " ".join(re.findall("<dt>(.*?)</dt>", words))
    for term in ("class token", "tower", "template", "KV cache", "BOS", "&lt;/s&gt;", "quirk",
                 "rank", "micro-batch", "tile", "hard negative", "logit", "room", "RoPE"):
        assert term in terms, term


def test_names_in_the_map_of_the_whole_path_are_links(book):
    path = book[book.index('<section id="path">'):book.index('<section id="words">')]
    for full in ("projector.splice", "clip.ViT", "llama.Llama", "generate.sample",
                 "qformer.QFormer", "data.preprocess", "data.prompt_ids"):
        assert f'>{full}</a>' in path, full
    assert '>scene.png</a>' not in path                     # control: no name of the project


@pytest.mark.parametrize("module", build.CHAPTERS)
def test_every_line_of_code_is_in_the_book_as_it_stands(book, module):
    """Without its comments and docstrings, which stand on the left: they are tested below."""
    here = links.source(module)
    end = len(here.lines)
    if module in build.ENDS:
        end = here.places[f"{module}.{build.ENDS[module]}"].lineno - 1
    wanted = {}
    for token in tokenize.generate_tokens(io.StringIO(here.text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
                              tokenize.DEDENT, tokenize.ENDMARKER):
            for row in range(token.start[0], min(token.end[0], end) + 1):
                text = here.lines[row - 1]
                wanted.setdefault(row, text)
                if token.type == tokenize.STRING and token.line.strip().startswith(('"""', 'r"""')):
                    wanted.pop(row)                         # of a docstring
    found = {row: bare(code) for row, (_, code) in lines_of(book, module).items()}
    assert len(found) > 100 and found.keys() >= {row for row in wanted if row <= end}
    for row, text in found.items():
        rest = here.lines[row - 1].removeprefix(text)
        assert rest != here.lines[row - 1] and re.match(r"\s*(#.*)?$", rest), (row, text)


@pytest.mark.parametrize("module", build.CHAPTERS)
def test_every_comment_and_docstring_is_in_the_book(book, module):
    here = links.source(module)
    chapter = book[book.index(f'<section id="{module}">'):]
    said = re.sub(r"\s+", " ", bare(chapter[:chapter.index("</section>")]))
    end = "\n".join(here.lines)
    if module in build.ENDS:
        end = end[:end.index(f"def {build.ENDS[module]}(")]
    words = []
    for token in tokenize.generate_tokens(io.StringIO(here.text).readline):
        if token.type == tokenize.COMMENT and "noqa" not in token.string and token.string in end:
            words.append(re.sub(r"^#( -{9,})? ?", "", token.string))
        elif token.string.startswith('"""') and token.string in end:
            words += ast.literal_eval(token.string).split("\n")
    assert len(words) > 50
    for text in words:
        plain = re.sub(markup.STRESS, r"\1", text).replace("`", "")
        assert re.sub(r"\s+", " ", plain).strip() in said, text


# ------------------------------------------------------------------------------ names

@pytest.mark.parametrize("module, code, name, target", [
    ("projector", "image_embeds = self.encode_images(pixels", "encode_images",
     "projector.VLM.encode_images"),
    ("projector", "return splice(ids, text_embeds", "splice", "projector.splice"),
    ("projector", "check_labels(has_loss)", "check_labels", "formats.batch_checks.check_labels"),
    ("projector", "hidden, targets = self.llm.predictions", "predictions",
     "llama.Llama.predictions"),
    ("projector", "return self.vision.config.image_size", "image_size", "clip.Config.image_size"),
    ("projector", "class LlavaNext(VLM)", "VLM", "projector.VLM"),
    ("projector", "side = self.image_size // self.vision", "image_size",
     "projector.VLM.image_size"),                           # a base class has it
    ("llama", "y = self_attention(q, k, v", "self_attention", "kernels.cached.self_attention"),
    ("qformer", "y = attention(q, k, v, allow", "attention", "kernels.attention.attention"),
    ("clip", "act = gelu if self.exact_gelu", "gelu", "kernels.swiglu.gelu"),
    ("train", "from generate import build_prompt", "build_prompt", "decoding.prompt.build_prompt"),
    ("train", "gradients.step()", "step", "trainer.step.GradientStep.step"),
    ("train", "group[\"lr\"] = group[\"base_lr\"] * job.lr_scale(step)", "lr_scale",
     "train.TrainJob.lr_scale"),
    ("train", "losses = model.losses(", "losses", "qformer.Blip2Stage1.losses"),
    ("train", "return {\"loss\": model.loss(batch.ids", "loss", "projector.VLM.loss"),
    ("qformer", "pixels = data.preprocess(data.load_image(args.image)", "image_size",
     "qformer.Blip2Stage1.image_size"),
    ("generate", "cache = KVCache(llm.config", "KVCache", "llama.KVCache")])
def test_a_name_leads_to_its_definition(book, module, code, name, target):
    rows = [row for _, row in lines_of(book, module).values() if bare(row).strip().startswith(code)]
    assert rows
    for row in rows:
        assert f'<a href="#{target}">{name}</a>' in row


@pytest.mark.parametrize("module, code, name", [
    ("data", "names, tokens = iter(image_names)", "names"),     # local; formats.names is another
    ("projector", "x, labels, mask = self.embed(", "labels"),
    ("train", "muon: float = 0.0", "muon"),                     # a field, not toy.parts.muon
    ("train", "groups.setdefault((lr, decay)", "setdefault"),
    ("llama", "self.length = 0", "length")])                    # itself
def test_a_name_that_is_no_such_definition_is_no_link(book, module, code, name):
    rows = [row for _, row in lines_of(book, module).values() if bare(row).strip().startswith(code)]
    assert rows and not any(f'">{name}</a>' in row for row in rows)


def test_what_the_tables_name_is_there():
    for full in [*links.TYPES.values(), *beside.EXERCISES, *beside.SOLUTIONS.values(),
                 *(place for place, _ in beside.PICTURES.values())]:
        assert links.resolve(full) == full, full
    assert len(beside.EXERCISES) == 12 and len(beside.PICTURES) == 10
    for module, name in build.ENDS.items():
        assert f"{module}.{name}" in links.source(module).places


def test_an_end_that_is_gone_shows_the_whole_file(monkeypatch):
    """A control of the test above: without ENDS the last functions are in the chapter."""
    assert "float_cases" not in build.chapter("kernels.attention")[0]
    monkeypatch.setattr(build, "ENDS", {})
    assert "float_cases" in build.chapter("kernels.attention")[0]


def test_resolve_knows_what_is_not_here():
    assert links.resolve("torch.nn.Linear") is None
    assert links.resolve("projector.no_such_name") is None
    assert links.resolve("projector.VLM.no_such_name") is None
    assert links.resolve("data.load_image") == "formats.pictures.load_image"


# ------------------------------------------------------------------------------ prose

def test_prose_tells_paragraphs_from_drawings():
    drawn = "Two lines\nof text.\n\n    a -> b\n      c -> d\n\nand `splice` <b>, 2304.08485."
    assert markup.prose(drawn, "projector") == (
        "<p>Two lines\nof text.</p><pre>a -&gt; b\n  c -&gt; d</pre>"
        '<p>and <a href="#projector.splice"><code>splice</code></a> &lt;b&gt;, '
        '<a href="https://arxiv.org/abs/2304.08485">2304.08485</a>.</p>')
    assert markup.prose("one   gap is\nno drawing") == "<p>one   gap is\nno drawing</p>"
    assert markup.prose("name    a\nlonger   b") == "<pre>name    a\nlonger   b</pre>"
    assert markup.linked("0.07 and 12345.678") == "0.07 and 12345.678"


def test_prose_has_italics_and_a_paragraph_for_each_label():
    assert markup.prose("a norm *before* it, *late interaction*") == (
        "<p>a norm <i>before</i> it, <i>late interaction</i></p>")
    for text in ("B*(T-1), C*D", "2 * x * y", "f(x, *args) and g(*more)", "a*b*c"):     # controls
        assert markup.prose(text) == f"<p>{text}</p>"
    assert markup.prose("One.\nLetters: B batch\nand T.\nAlone: run it.\nNext: more.") == (
        "<p>One.</p><p>Letters: B batch\nand T.</p><p>Alone: run it.</p><p>Next: more.</p>")
    assert markup.prose("One.\nNextdoor it goes on.") == "<p>One.\nNextdoor it goes on.</p>"
    assert '<a href="results.md">docs/results.md</a>' in markup.prose("see docs/results.md.")


def test_a_drawing_is_wide_by_its_longest_line():
    narrow, wide = ("\n".join(f"    {'x' * n}" for n in (3, most, 7))
                    for most in (markup.NARROW, markup.NARROW + 1))
    assert markup.is_wide(markup.prose(narrow)) == "" == markup.is_wide("<p>no drawing</p>")
    assert markup.is_wide(markup.prose(wide)) == " wide"
    assert markup.is_wide(f"<p>{'x' * 99}</p>") == ""           # a paragraph breaks its lines


def test_markdown_knows_what_our_pages_use():
    page = ("## 3. Why?\n왜요?\n\nA [page](x.md), **bold** and [`x[0] < [1]`](../clip.py#L3).\n\n"
            "| a | b |\n|---|---|\n| 1 | `splice` |\n")
    assert markup.markdown(page) == (
        '<h3 id="question-3">3. Why?</h3><p lang="ko">왜요?</p>'
        '<p>A <a href="x.md">page</a>, <b>bold</b> and '
        '<a href="../clip.py#L3"><code>x[0] &lt; [1]</code></a>.</p>'
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td><code>splice</code></td></tr>"
        "</table>")
    assert markup.markdown("# Words") == "<h3>Words</h3>"


# ------------------------------------------------------------------------------ faults

@pytest.mark.parametrize("part, fault", [
    ('<a href="#nowhere">', "a link to nowhere: #nowhere"),
    ('<a href="../no_such.py">', "a link to nowhere: ../no_such.py"),
    ('<a href="https://example.org/x">', "a link to nowhere: https://example.org/x"),
    ('<i id="a"></i>', "two places of the name a"),
    ('<img src="picture.png">', "would load"),
    ('<img src="https://example.org/x.png">', "would load"),
    ('<link rel="stylesheet">', "would load"),
    ("<style>p { background: url(x.png) }</style>", "would load"),
    ("x" * 3_000_000, "the most is 3,000,000")])
def test_a_fault_is_found(part, fault):
    good = ('<b id="a"></b><a href="#a"></a><a href="../README.md"></a><img src="data:image/png,">'
            '<a href="https://github.com/haotian-liu/LLaVA/issues/1106"></a>')
    assert build.faults(good) == []
    (found,) = build.faults(good + part)
    assert fault in found


def test_pictures_and_exercises_stand_at_their_definitions(monkeypatch, tmp_path, book):
    assert beside.tries("qformer.itc") == ('<p class="try"><a href="#exercise-8">Exercise 8: the '
                                           "three masks of the Q-Former</a></p>")
    assert beside.tries("clip.ViT.embed").count("<a ") == 2 and not beside.tries("clip.ViT")
    for name, (where, _) in beside.PICTURES.items():
        here = book[book.index(f'id="{where}"><div class="lead">'):]
        assert here.index(f'<figure id="picture-{name}">') < here.index('<div class="l"')
    monkeypatch.setattr(beside, "ROOT", tmp_path)
    (tmp_path / "docs/pictures").mkdir(parents=True)
    (tmp_path / "docs/pictures/splice.svg").write_text("<svg/>")
    assert 'src="data:image/svg+xml;base64,PHN2Zy8+"' in beside.figures("projector.splice")
    assert beside.figures("projector.merge_tiles") == ""
    with pytest.raises(SystemExit, match="no picture packed: python docs/figures.py packed"):
        beside.figures("data.pack")


def test_what_the_exercises_read_in_the_book_is_there(book):
    index = (ROOT / "exercises/README.md").read_text(encoding="utf-8")
    places = re.findall(r"book\.html#([\w.]+)", index)
    assert len(places) == 12 and places == [*beside.EXERCISES]
    assert all(f'id="{place}"' in book for place in places)


def test_the_book_has_the_text_of_each_exercise_and_hides_where_it_is_solved(book):
    chapter = book[book.index('<section id="exercises">'):book.index('<section id="clip">')]
    parts = re.split(r'<h3 id="exercise-(\d+)">', chapter)[1:]
    assert [int(n) for n in parts[::2]] == [*range(1, 13)]
    for n, part in zip(parts[::2], parts[1::2]):
        (path,) = ROOT.glob(f"exercises/ex{int(n):02}_*.py")
        text = path.read_text(encoding="utf-8")
        said = re.sub(r"\s+", " ", bare(part))
        for line in ast.get_docstring(ast.parse(text)).split("\n"):
            plain = line.removeprefix(f"Exercise {n}: ").rstrip(".").replace("`", "")
            assert re.sub(r"\s+", " ", plain).strip() in said, line
        for name in re.findall(r"^def (\w+\(.*\)):$", text, re.M):
            assert name in said
        assert "raise NotImplementedError" in said and f"python -m exercises {n}" in said
        open_part, closed = part.split("<details>")
        assert 'href="#' not in re.sub(r"<pre>.*?</pre>", "", open_part, flags=re.S)
        assert re.search(r'<a href="#[\w.]+">', closed)


# ------------------------------------------------------------------------------ the questions

def test_twenty_questions_each_with_its_line_and_its_thread():
    parts = re.split(r"^## ", QUESTIONS, flags=re.M)[1:]
    assert [int(part.split(".")[0]) for part in parts] == [*range(1, 21)]
    for part in parts:
        heading, answer, *rest = part.strip().split("\n\n")
        english, korean = heading.split("\n")
        assert english.endswith("?") and re.search("[가-힣]{2,}.*\\?$", korean), heading
        assert 2 <= len(answer.split("\n")) <= 6, heading
        if heading.startswith("7."):                        # the table of losses
            assert rest.pop(0).startswith(("|", "@@")) and answer.endswith(":")
        assert len(rest) == 2 and rest[0].startswith("[`") and rest[0].endswith(")"), heading
        assert re.match(r"Asked in(,?( and)?\s\[[\w-]+ \d+\]\(https://github\.com/[\w-]+/[\w-]+/"
                        r"issues/\d+\))+\.$", rest[1]), heading


def test_the_questions_name_all_five_systems():
    for system in ("LLaVA", "LLaVA-1.5", "BLIP-2", "MiniGPT-4", "ShareGPT4V"):
        assert system in QUESTIONS.split("## 1.", 1)[1], system


def test_the_lines_that_the_questions_quote_are_there():
    quotes = re.findall(r"\[`([^`]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)", QUESTIONS)
    assert len(quotes) == 20
    for code, path, line in quotes:
        lines = (ROOT / path).read_text(encoding="utf-8").split("\n")
        assert code in lines[int(line) - 1], (
            f"{path}:{line} is not `{code}`: run python docs/build.py --relink")


def test_relink_corrects_a_line_and_refuses_what_it_cannot_find():
    assert build.relink(QUESTIONS) == QUESTIONS
    assert build.relink(re.sub(r"#L\d+", "#L1", QUESTIONS)) == QUESTIONS
    for code, count in (("no such code", 0), ("import torch", 2)):
        with pytest.raises(SystemExit, match=f"'{code}' is in {count} lines of clip.py"):
            build.relink(f"[`{code}`](../clip.py#L1)")


def test_the_books_questions_lead_to_its_own_lines(book):
    asked = book[book.index('id="questions">'):book.index('id="rooms">')]
    assert len(re.findall(r'<p><a href="#[\w.]+-\d+"><code>', asked)) >= 18   # two are of rooms
    assert "](" not in asked
    code, line = re.search(r"\[`(return \(k < n\).*?)`\]\(\.\./qformer\.py#L(\d+)\)",
                           QUESTIONS).groups()
    assert f'<a href="#qformer-{line}"><code>{html.escape(code, quote=False)}</code></a>' in book
    assert bare(lines_of(book, "qformer")[int(line)][1]).strip() == code


# ------------------------------------------------------------------------------ Korean

def test_the_korean_readme_keeps_up_with_the_first_part_of_the_english_one():
    english = (ROOT / "README.md").read_text(encoding="utf-8").split("## Use it")[0]
    korean = (ROOT / "docs/README.ko.md").read_text(encoding="utf-8")
    for block in re.findall(r"```.*?```", english, re.S):
        assert block in korean, block
    rows = [re.findall(r"^\|.*\|$", text, re.M) for text in (english, korean)]
    assert len(rows[0]) == len(rows[1]) > 20
    for ours, theirs in zip(*rows):                         # figures, files, names of recipes
        kept = (r"\d[\d.]*(?: ± [\d.]+)?(?![A-Za-z\d])|`[^`]+`|"
                "llava|blip2|minigpt4|sharegpt4v|ITC|OPT")
        figures = [re.findall(kept, row.replace(",", "")) for row in (ours, theirs)]
        assert sorted(figures[0]) == sorted(figures[1]), f"\n{ours}\n{theirs}"
    for link in re.findall(r"\]\(([^)]+)\)", english):
        here = f"../{link}".replace("../docs/", "").replace("README.ko.md", "../README.md")
        assert f"]({here})" in korean, link
    assert len(re.findall("[가-힣]+", korean)) > 150


# ------------------------------------------------------------------------------ in a browser

@pytest.fixture(scope="module")
def page_file(book, tmp_path_factory):
    """The book in a folder of its own: whatever it loaded would be missing."""
    path = tmp_path_factory.mktemp("book") / "book.html"
    path.write_text(book, encoding="utf-8")
    return path


def boxes(tab, place, *parts):
    """Where parts of a definition are on the page."""
    return [tab.evaluate("""([place, part]) => document.getElementById(place).querySelector(part)
        .getBoundingClientRect().toJSON()""", [place, part]) for part in parts]


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1000, "light"), (1600, "dark"),
                                           (390, "dark")])
def test_the_book_in_a_browser(chromium, page_file, width, scheme):
    """Nothing is requested or wider than the screen; a name is followed to its definition."""
    context = chromium.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme)
    tab, asked, said = context.new_page(), [], []
    tab.set_default_timeout(120_000)
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda line: said.append(line.text))
    tab.goto(page_file.as_uri())
    assert asked == [page_file.as_uri()] and said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    paper = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", paper))) < 60) == (scheme == "dark")
    # prose on the left of the code, or above it
    text, code = boxes(tab, "projector.VLM.encode_images", "aside", ".l")
    if width >= 1000:
        assert text["right"] <= code["left"] and text["width"] < width / 2
        assert abs(text["top"] - code["top"]) < 20
    else:
        assert text["bottom"] <= code["top"]
    # a picture and a wide drawing stand above the code
    for place, part in (("projector.splice", "figure"), ("projector.merge_tiles", "aside pre")):
        above, code = boxes(tab, place, part, ".l")
        assert above["bottom"] <= code["top"]
    cut = tab.evaluate("""() => [...document.querySelectorAll(":is(.def, .ex, .open) pre")].filter(
        box => box.scrollWidth > box.clientWidth + 1).map(box => box.textContent.slice(0, 60))""")
    assert width < 1000 or cut == []                        # on a phone drawings scroll
    embed = "document.getElementById('projector.VLM.embed')"
    tab.evaluate(embed + """.querySelector('a[href="#projector.splice"]').click()""")
    assert tab.evaluate("document.querySelector(':target').id") == "projector.splice"
    top = tab.evaluate("document.querySelector(':target').getBoundingClientRect().top")
    assert 0 <= top < 120                                   # not under the chapter's title
    # back to a chapter that was left behind: its beginning, not its end
    tab.evaluate("document.querySelector('#qformer header a').click()")
    top = tab.evaluate("document.querySelector(':target').getBoundingClientRect().top")
    assert tab.evaluate("document.querySelector(':target').id") == "generate" and 0 <= top < 120
    (opening,) = boxes(tab, "generate", ".open")
    assert 0 <= opening["top"] < 200
    tab.emulate_media(media="print")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("getComputedStyle(document.querySelector('header')).position") == "static"
    context.close()
