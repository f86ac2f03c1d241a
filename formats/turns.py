"""The turns of a conversation, checked against what its template can hold.

    [{"from": "human", "value": "Q?"}, ...]  ->  the template, [(is it an answer?, text)]

A first turn from "system" replaces the template's own system text. Everything that a template
cannot hold is refused with BadData: one line that says what to do."""
from dataclasses import replace

from formats.conversations import IMAGE_TOKEN, ROLES
from formats.errors import BadData
from formats.templates import BLIP2

ONE_PICTURE = "plain", "minigpt4", "instruct", *BLIP2   # styles that hold one picture
WITH_SYSTEM = "two", "single", "chat", "llama2"         # styles whose system text can be replaced


def parse_turns(conversation, name, templates) -> tuple:
    """The template of this name, and the conversation's turns."""
    if name not in templates:
        raise BadData(f"template {name!r} is unknown: choose one of {', '.join(templates)}")
    try:
        turns = [(ROLES[turn["from"]], turn["value"] or "") for turn in conversation]
    except (KeyError, TypeError) as error:
        raise BadData(f"a turn needs from (human or gpt) and value: {error!r}") from None
    t = templates[name]
    if turns and turns[0][0] == "system":
        _, text = turns.pop(0)
        if text.strip():
            t = with_system(name, t, text)
    if any(role == "system" for role, _ in turns):
        raise BadData("a system turn behind others: put it first")
    return t, [(role == "gpt", text) for role, text in turns]


def with_system(name, t, text):
    """The template with another system text, which a person typed."""
    if t.style not in WITH_SYSTEM or not t.system:
        raise BadData(f"template {name} has no system text, but the sample has one: take it out, "
                      "put it into the first question, or train with --template v1")
    return replace(t, system=text, typed_system=True)


def check_order(turns) -> list:
    """The turns, which must alternate. quirk: an answer before the first question is dropped."""
    if turns and turns[0][0]:
        turns = turns[1:]
    for i, (is_answer, _) in enumerate(turns):
        if is_answer != bool(i % 2):
            raise BadData(f"turn {i + 1} has the wrong speaker: questions and answers must take "
                          "turns")
    return turns


def check_system(t):
    if IMAGE_TOKEN in t.system:
        raise BadData(f"{IMAGE_TOKEN} in the system text: move it into a question")


def prompt_turns(conversation, name, templates) -> tuple:
    """(template, turns) of a generation prompt; the last turn is the empty answer."""
    t, turns = parse_turns(conversation, name, templates)
    if turns and not turns[-1][0]:
        turns = [*turns, (True, "")]
    if t.style != "plain":
        turns = check_order(turns)
    if not turns or t.style == "llama2" and not turns[0][1]:
        raise BadData("a conversation must open with something a human says")
    check_system(t)
    return t, turns


def place_images(turns, image_text, pictures: int) -> list:
    """The turns with <image> where training has it (LLaVA's preprocess_multimodal).

    A single picture comes first in its turn, and twice in one turn is once; several stay where they
    stand."""
    placed = []
    for is_answer, text in turns:
        if pictures == 1 and IMAGE_TOKEN in text:
            text = f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
        placed.append((is_answer, text.replace(IMAGE_TOKEN, image_text)))
    return placed


def training_turns(conversation, name, templates, pictures: int) -> tuple:
    """(template, turns) of a training sample with so many pictures."""
    t, turns = parse_turns(conversation, name, templates)
    if t.style not in ("single", "plain"):
        turns = check_order(turns)
    if pictures > 1 and t.style in ONE_PICTURE:
        raise BadData(f"template {name} holds one picture, not {pictures}: split the sample, "
                      "or train with --template v1")
    if t.style in ("plain", *BLIP2):
        roles = [is_answer for is_answer, _ in turns]
        if not pictures:
            raise BadData(f"template {name} needs <image> and its picture in every row, and this "
                          "one has no picture: give it an image, or leave it out")
        if roles != [False, True] or IMAGE_TOKEN not in turns[0][1]:
            raise BadData(f"template {name} needs <image> in one human turn, and one gpt turn: a "
                          "caption")
    if t.style in ("instruct", "minigpt4"):
        if len(turns) != 2 or IMAGE_TOKEN in turns[0][1] and not pictures:
            raise BadData(f"template {name} is learned from one question and one answer, and "
                          "<image> in it needs a picture; split or correct the sample")
    if t.style == "llama2" and not (turns and turns[0][1]):
        raise BadData("the first human turn is empty: give the question")
    if pictures:
        check_system(t)
        turns = place_images(turns, t.image_text, pictures)
    return t, turns
