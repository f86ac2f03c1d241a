"""What of a sample has loss, and whether it can be trained on.

The trainer and the dataset doctor both call `sample_pieces` and `encode_sample`: what one refuses
the other refuses, in the same words.

    lesson          the turns that a sample has under a template
    sample_pieces   its segments; refuses what cannot be trained on, without counting tokens
    encode_sample   its ids and labels, cut at --max-length

`official_would_mask` is for --official-quirks: the official trainer (haotian-liu/LLaVA c121f04,
llava/train/train.py) counts the tokens twice, and where the counts differ it prints "tokenization
mismatch" and gives the whole sample no loss."""
import random
import re

from data import (
    encode,
    IGNORE,
    IMAGE,
    Segment,
    Template,
    tokenize_segments,
    training_segments,
)
from formats.conversations import (
    at_an_edge,
    blip_caption,
    IMAGE_TOKEN,
    images_of,
    MINIGPT4_INSTRUCTIONS,
    ROLES,
)
from formats.errors import BadData, NothingToLearn

# templates whose captions of a file are cleaned
CAPTION = "blip2", "blip2_opt", "blip2_t5", "minigpt4_caption"


def joined(segments) -> str:
    return "".join(segment.text for segment in segments)


def official_would_mask(segments, t: Template, tokenizer, pictures, ids) -> bool:
    """Would the official code print "tokenization mismatch" and learn nothing from this text?

    It counts tokens round by round on a second tokenization; special tokens in the text, empty
    answers or a tokenizer it does not know make the sum differ from the length."""
    if t.style not in ("two", "llama2"):
        return False

    def size(text):
        parts = [Segment("", start="bos"), Segment(text)]
        return len(tokenize_segments(parts, tokenizer, pictures)[0])

    split = f"{t.sep}{t.roles[1]}: " if t.style == "two" else "[/INST] "
    count = 1
    for number, text in enumerate(joined(segments).split(t.end)):       # a question and its answer
        if not text or len(text.split(split)) != 2:
            break
        count += size(text)
        if number > 0 and t.style == "two" and not tokenizer.legacy:
            count -= 1
    total = sum(token != tokenizer.pad for token in ids)
    return count < tokenizer.max_length and count != total


def lesson(sample, template: str, asked: str = "") -> list:
    """The turns that a sample has under a template, its system text first.

    The recipes of BLIP-2 and MiniGPT-4 learn one question and one answer: web captions cleaned
    (of a file's samples, which have an id; the toy world's are learned as they are), and in
    `minigpt4` an instruction instead of the question. asked: that one; the longest if not given. In
    `blip2_t5` asked is what the split of a caption is drawn from."""
    turns, system = sample["conversations"], sample.get("system")
    if template in (*CAPTION, "minigpt4") and len(turns) != 2:
        raise BadData(f"template {template} is learned from one question and one answer, not from "
                      f"{len(turns)} turns: split the sample")
    if template in CAPTION and "id" in sample:
        question, answer = turns
        turns = [question, {**answer, "value": blip_caption(answer["value"])}]
    if template == "blip2_t5":
        prefix, rest = split_caption(turns[1]["value"], asked)
        mark = IMAGE_TOKEN if IMAGE_TOKEN in turns[0]["value"] else ""
        turns = [{"from": "human", "value": f"{mark}\n{prefix}"}, {"from": "gpt", "value": rest}]
    if template == "minigpt4":
        asked = asked or max(MINIGPT4_INSTRUCTIONS, key=len)
        asked = asked.replace(IMAGE_TOKEN, "").strip()
        turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{asked}"}, turns[1]]
    if system:
        turns = [{"from": "system", "value": system}, *turns]
    return turns


def split_caption(text, draw):
    """(prefix, rest) of a caption for a FlanT5: the encoder reads the one and the decoder writes
    the other. The prefix has 1 word to half of the words, drawn from the text `draw`; a caption of
    one word has none. The paper says "randomly"; the range is that of the maintainers (LAVIS issue
    139), whose released code has no split."""
    words = text.split()
    if len(words) < 2:
        return "", text
    cut = random.Random(f"split:{draw}").randint(1, len(words) // 2)
    return " ".join(words[:cut]), " ".join(words[cut:])


def sample_pieces(sample, template: str, asked: str = "") -> tuple[Template, list, int]:
    """(template, segments, number of pictures) of a sample that can be trained on.

    Raises BadData, or NothingToLearn where all answers are blank."""
    turns, pictures = lesson(sample, template, asked), len(images_of(sample))
    if not pictures:
        _refuse_stray_marks(sample["conversations"])
        if template == "minigpt4":
            raise BadData("template minigpt4 is learned from one question about a picture in every "
                          "row, and this one has no picture: give it an image, or leave it out")
    t, segments = training_segments(turns, template, pictures)
    marks = sum(segment.text.count(IMAGE_TOKEN) for segment in segments)
    if pictures and marks != pictures:
        what = "one picture" if pictures == 1 else f"{pictures} pictures"
        raise BadData(f"{what}, but {marks} <image> places in the text: correct the row")
    answers = [segment.text for segment in segments if segment.learn and segment.typed]
    if not any(text.strip() for text in answers):
        raise NothingToLearn("nothing to learn, no answer has words: take the row out")
    return t, segments, pictures


def _refuse_stray_marks(turns):
    """Raise BadData for <image> without a picture. In the middle of a sentence it may be meant as
    text, and is read as such."""
    for turn in turns:
        if ROLES.get(turn["from"]) != "human":
            continue
        text = turn["value"] or ""
        for found in re.finditer(IMAGE_TOKEN, text):
            if at_an_edge(text, *found.span()):
                raise BadData("<image> in the text, but no picture: give the row an image")


def check_size(size: int, pack: int, about: str = ""):
    """Raise BadData for a sample of so many tokens that no row of --pack can hold."""
    if pack and size > pack:
        raise BadData(f"{about}{size:,} tokens are over --pack {pack:,}: a sample must fit into a "
                      f"row of --pack {pack:,} with its pictures; shorten or split it")


def encode_sample(sample, template: str, tokenizer, image_tokens: int, pack: int = 0,
                  max_length: int = 0, official_quirks: bool = False, asked: str = ""):
    """(ids, labels) of a sample {conversations, image?, system?}, if it can be trained on.

    image_tokens: tokens of a picture. max_length: tokens behind it are cut off, 0: none are. pack:
    most tokens of a sample, 0: any. asked: `minigpt4`'s instruction. Raises BadData, or
    NothingToLearn for a sample without a token that has loss."""
    t, segments, pictures = sample_pieces(sample, template, asked)
    ids, labels = encode(lesson(sample, template, asked), template, tokenizer, pictures)
    if official_quirks and official_would_mask(segments, t, tokenizer, -1 if pictures else 0, ids):
        labels = [IGNORE] * len(ids)
    labels = [IGNORE, *labels[1:]]              # nothing stands before the first: no loss
    has_loss = any(label != IGNORE for label in labels)
    size = len(ids) + (image_tokens - 1) * ids.count(IMAGE)
    if max_length and size > max_length:
        keep = max_length - (size - len(ids))   # quirk: what follows is lost, answers too
        if IMAGE in ids[max(keep, 0):]:         # an image span is never truncated
            shown = ids[:len(ids) - ids[::-1].index(IMAGE)]     # up to the last picture's end
            raise BadData(f"its picture ends behind --max-length {max_length:,}: give more than "
                          f"{len(shown) + (image_tokens - 1) * shown.count(IMAGE):,}, or leave the "
                          "sample out (--on-bad-sample skip)")
        ids, labels, size = ids[:keep], labels[:keep], max_length
    check_size(size, pack)
    if not has_loss:
        raise NothingToLearn("nothing to learn: the official code would print a tokenization "
                             "mismatch and leave it out; so does --official-quirks")
    if all(label == IGNORE for label in labels):
        raise NothingToLearn(f"nothing to learn: its answers stand behind --max-length "
                             f"{max_length:,}: give more, or shorten the question")
    return ids, labels


def encode_as_official(conversation, template: str, tokenizer, has_image=True):
    """`data.encode`, with no loss where the official code warns of a mismatch."""
    t, segments = training_segments(conversation, template, has_image)
    ids, labels = encode(conversation, template, tokenizer, has_image)
    if official_would_mask(segments, t, tokenizer, -1 if has_image else 0, ids):
        labels = [IGNORE] * len(ids)
    return ids, labels
