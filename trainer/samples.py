"""trainer/samples.py: what a sample teaches, and whether it can be trained on.

The trainer and the dataset doctor both ask here: what one refuses the other refuses, in the same words."""
import re

from data import BOS, IGNORE, IMAGE, label_segments, Template, tokenize_segments, training_segments
from formats.conversations import (
    at_an_edge,
    blip_caption,
    IMAGE_TOKEN,
    images_of,
    MINIGPT4_INSTRUCTIONS,
    ROLES,
)
from formats.errors import BadData, NothingToLearn


def official_would_mask(text, t: Template, tokenizer, pictures, ids) -> bool:
    """Would the official code print "tokenization mismatch" and learn nothing from this text?

    It counts tokens round by round on a second tokenisation; special tokens in the text, empty
    answers or a tokeniser it does not know make the sum differ from the length."""
    if t.style not in ("two", "llama2"):
        return False
    count, begin = 1, (BOS, False, False)
    size = lambda s: len(tokenize_segments([begin, (s, False, False)], tokenizer, pictures)[0])
    split = "[/INST] " if t.style == "llama2" else f"{t.sep}{t.roles[1]}: "
    for i, part in enumerate(text.split(t.end)):
        if not part or len(part.split(split)) != 2:
            break
        count += size(part) - (i > 0 and t.style == "two" and not tokenizer.legacy)
    total = sum(i != tokenizer.pad for i in ids)
    return count < tokenizer.max_length and count != total


def lesson(sample, template: str, asked: str = "") -> list:
    """The turns that a sample teaches under a template, its system text first.

    The recipes of BLIP-2 and MiniGPT-4 learn one question and one answer: web captions cleaned
    (of a file's samples, which have an id; the toy world's are learned as they are), and in
    `minigpt4` an instruction instead of the question. asked: that one; the longest if not given."""
    talk, system = sample["conversations"], sample.get("system")
    if template in ("blip2", "minigpt4_caption", "minigpt4") and len(talk) != 2:
        raise BadData(f"template {template} is learned from one question and one answer, not from "
                      f"{len(talk)} turns: split the sample")
    if template in ("blip2", "minigpt4_caption") and "id" in sample:
        talk = [talk[0], {**talk[1], "value": blip_caption(talk[1]["value"])}]
    if template == "minigpt4":
        asked = asked or max(MINIGPT4_INSTRUCTIONS, key=len)
        talk = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{asked.replace(IMAGE_TOKEN, '').strip()}"}, talk[1]]
    return [{"from": "system", "value": system}, *talk] if system else talk


def sample_pieces(sample, template: str, asked: str = "") -> tuple[Template, list, int]:
    """(template, `_pieces`, pictures) of a sample: the one judge of what can be trained on.

    Training and the doctor both ask here, so that one refuses what the other does, in the same
    words. Raises BadData, or NothingToLearn where all answers are blank."""
    talk, pictures = lesson(sample, template, asked), len(images_of(sample))
    if not pictures:
        _refuse_stray_marks(talk)
    t, pieces = training_segments(talk, template, pictures)
    marks = sum(piece.count(IMAGE_TOKEN) for piece, _, _ in pieces)
    if pictures and marks != pictures:
        what = "one picture" if pictures == 1 else f"{pictures} pictures"
        raise BadData(f"{what}, but {marks} <image> places in the text: correct the row")
    if not any(learned and person and piece.strip() for piece, learned, person in pieces):
        raise NothingToLearn("nothing to learn, no answer has words: take the row out")
    return t, pieces, pictures


def _refuse_stray_marks(talk):
    """Raise BadData for <image> without a picture. In the middle of a sentence it may be meant as
    text, and is read as such."""
    for turn in talk:
        text = turn["value"] or ""
        if ROLES.get(turn["from"]) == "human" and any(
                at_an_edge(text, *found.span()) for found in re.finditer(IMAGE_TOKEN, text)):
            raise BadData("<image> in the text, but no picture: give the row an image")


def check_size(size: int, pack: int, about: str = ""):
    """Raise BadData for a sample of so many tokens that no row of --pack can hold."""
    if pack and size > pack:
        raise BadData(f"{about}{size:,} tokens are over --pack {pack:,}: a sample must fit into a "
                      f"row of --pack {pack:,} with its pictures; shorten or split it")


def encode_sample(sample, template: str, tokenizer, image_tokens: int, pack: int = 0,
                  max_length: int = 0, official_quirks: bool = False, asked: str = ""):
    """(ids, labels) of a sample {conversations, image?, system?}, if it can be trained on.

    image_tokens: places of a picture. max_length: tokens behind it are cut off, 0: none are. pack:
    most tokens of a sample, 0: any. asked: `minigpt4`'s instruction. Raises BadData, or
    NothingToLearn for a sample without a learned token."""
    t, pieces, pictures = sample_pieces(sample, template, asked)
    ids, labels = label_segments(t, pieces, tokenizer, pictures)
    text = "".join(piece for piece, _, _ in pieces)
    if official_quirks and official_would_mask(text, t, tokenizer, -1 if pictures else 0, ids):
        labels = [IGNORE] * len(ids)
    labels = [IGNORE, *labels[1:]]              # no text stands before the first
    learned = any(label != IGNORE for label in labels)
    size = len(ids) + (image_tokens - 1) * ids.count(IMAGE)
    if max_length and size > max_length:
        room = max_length - (size - len(ids))   # quirk: what follows is lost, answers too
        if IMAGE in ids[max(room, 0):]:
            raise BadData(f"its picture ends behind --max-length {max_length:,}")
        ids, labels, size = ids[:room], labels[:room], max_length
    check_size(size, pack)
    if not learned:
        raise NothingToLearn("nothing to learn: the official code would print a tokenization "
                             "mismatch and leave it out; so does --official-quirks")
    if all(label == IGNORE for label in labels):
        raise NothingToLearn(f"nothing to learn: its answers stand behind --max-length "
                             f"{max_length:,}: give more, or shorten the question")
    return ids, labels


def encode_as_official(conversation, template: str, tokenizer, has_image=True):
    """`data.encode`, with nothing learned where the official code warns of a mismatch."""
    t, pieces = training_segments(conversation, template, has_image)
    ids, labels = label_segments(t, pieces, tokenizer, int(has_image))
    text = "".join(piece for piece, _, _ in pieces)
    if official_would_mask(text, t, tokenizer, -1 if has_image else 0, ids):
        labels = [IGNORE] * len(ids)
    return ids, labels
