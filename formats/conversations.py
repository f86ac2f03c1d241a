"""Training rows of other people's files, read into one kind of sample.

    {"id": "7", "where": "x.json: row 3", "field": "messages",     where it stands, and its turns
     "image": "a.png",                   no key: text alone; a list of names: two pictures or more
     "system": "You are terse.",         no key: the template's own system text
     "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                       {"from": "gpt", "value": "A cat."}]}

Rows that are read:

    LLaVA, ShareGPT4V   id, image, conversations: [{from: human|gpt, value}]
    LLaMA-Factory       messages or conversations, images: [names], system
    OpenAI              messages: [{role: system|user|assistant, content: text or a list of parts}]
    LAVIS               image, caption: a text, or a list of texts, each a sample of its own
    cc_sbu_align        {"annotations": [{image_id, caption}]}, pictures image_id.jpg

What looks like a picture and is not read is refused: it would be passed over in silence, and the
model would learn answers about something that it has not seen.
Behind them: the captions that BLIP-2 and MiniGPT-4 learn. formats/llava_rows.py writes a row."""
import re
import sys
from functools import lru_cache

from formats.errors import BadData
from formats.strict_json import iter_rows, read_text

IMAGE_TOKEN = "<image>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt",
         "system": "system", "developer": "system"}
PICTURES = "image", "images", "image_path"          # keys of a row that name its pictures
TURNS = "conversations", "messages", "caption"      # keys of a row that hold its words


# ---------------------------------------------------------------- what looks like a picture

_LOOKS = re.compile(r"image|img|picture|photo|pixel|video|audio|screenshot|thumbnail")
_WORDS = {"pic", "pics", "frame", "frames", "visual", "visuals", "media"}
# Keys that tell about a picture without being one: image_width, has_image, video_fps.
_ABOUT = set("""size sizes width height w h count counts num n number hash md5 sha256 license source
    caption captions description descriptions type format mode ratio aspect tag tags label labels
    class classes token tokens title category categories index idx domain quality score date
    author credit shape dataset split length duration fps""".split())
_NUMBERS = {"has", "num", "n", "is", "with", "no", "total"}
_FILE = re.compile(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mov|mkv|webm)|data:image/\S+", re.I)


@lru_cache(10_000)
def _names_a_picture(key: str) -> bool:
    """Does a key of this name hold a picture, a video or a sound, by the look of it?"""
    words = re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", key).lower())
    if not words or words[-1] in _ABOUT or words[0] in _NUMBERS:
        return False
    return bool(_WORDS & set(words)) or bool(_LOOKS.search("".join(words)))


def _are_files(value) -> bool:
    """Is the value a picture's file name, or are all its values?"""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, str) and _FILE.fullmatch(v) for v in values)


def _refuse_unknown_pictures(row: dict, known, pictures: bool, place: str):
    """Raise BadData for a key of `row` that looks like a picture and is not read.

    pictures: the row has some that are read, beside which file names and numbers are notes."""
    for key, value in row.items():
        number = key.lower().endswith("id")         # image_id: no picture itself, but it means one
        nothing = not value or type(value) in (bool, int, float) and not number
        if key in known or nothing or number and pictures:
            continue
        if _names_a_picture(key) or not pictures and _are_files(value):
            shown = key if key.isprintable() else repr(key)
            raise BadData(f"{place}{shown[:80]}: looks like a picture, and pictures are read from "
                          "the row's image or images: move it there, or take the key out")


# Nobody types these: the marks of other models.
_KIND = "(?:image|img|video|vision|picture|photo|audio|frame)s?"
_PART = r"(?:here|placeholder|pad|patch|tokens?|soft[_-]?token|start|end|newline|context|\d+)"
_FOREIGN = re.compile(
    rf"<\|[\w-]{{0,40}}{_KIND}[\w-]{{0,40}}\|>"               # <|image_pad|> <|vision_start|>
    rf"|</?{_KIND}[_-]?{_PART}(?:[_-]?\d+)?>"                 # <image_1> <ImageHere>
    r"|</?im_(?:patch|start|end)>|<(?:start|end)_of_(?:image|video|audio)>"
    r"|<fake_token_around_image>|\[IMG_(?:BREAK|END)\]"
    r"|<img>[^<>]*</img>|<(video|audio)>[^<>\s]+</\1>", re.I)
# HTML has these too: a mark where one stands at an end of a turn, or alone on a line.
_HTML = re.compile(r"<\s*(image|img|video|picture|photo|audio|frame|vision)\s*/?>|\[IMG\]", re.I)


def foreign_mark(text: str) -> str:
    """A mark of another model's pictures in a human's text, or "".

    "What does <video> do in HTML?" has none: in a sentence it is a word like others."""
    if "<" not in text and "[" not in text:
        return ""
    if found := _FOREIGN.search(text):
        return found.group()
    for found in _HTML.finditer(text):
        if found.group() != IMAGE_TOKEN and at_an_edge(text, *found.span()):
            return found.group()
    return ""


def at_an_edge(text: str, start: int, end: int) -> bool:
    """Does text[start:end] open or close the text, or stand alone on a line, and is no HTML?"""
    before, behind = text[:start], text[end:]
    alone = (not before.strip() or not behind.strip()
             or not before.rpartition("\n")[2].strip() and not behind.partition("\n")[0].strip())
    name = re.sub(r"\W", "", text[start:end])
    return alone and not re.search(rf"[<\[]/\s*{name}\s*[>\]]", behind, re.I)


# ---------------------------------------------------------------- one row

def _text(field: str, value) -> str:
    """The value, if it is text that can be written down."""
    if not isinstance(value, str):
        null = " and is null" if value is None else ""
        raise BadData(f"{field}: must be text{null}: correct the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadData(f"{field}: half a surrogate pair: save the file as valid UTF-8") from None
    return value


def _picture_name(field: str, value) -> str:
    """A picture's file name. An address is refused: nothing is fetched here."""
    if not isinstance(value, str) or not _text(field, value):
        raise BadData(f"{field}: must be a file name: leave the key out for text alone")
    if found := re.match(r"data:|[a-z][a-z0-9+.-]+://", value, re.I):
        shown = value if len(value) < 80 else f"{value[:60]}..."
        what = "holds the picture itself" if found.group().lower() == "data:" else "is an address"
        raise BadData(f"{field}: {shown!r} {what}, and only files are read: save the picture in "
                      "the folder of --images and give its file name")
    return value


def _row_pictures(row: dict) -> list[str]:
    """File names of a row's pictures, in order."""
    found = {}
    for key in PICTURES:
        if key not in row:
            continue
        value = row[key]
        if isinstance(value, list):
            found[key] = [_picture_name(f"{key}[{i}]", name) for i, name in enumerate(value)]
        else:
            found[key] = [_picture_name(key, value)]
    named = {key: names for key, names in found.items() if names}
    if len({tuple(names) for names in named.values()}) > 1:
        raise BadData(f"{' and '.join(named)}: name different pictures: leave one of the keys")
    return next(iter(named.values()), [])


def _image_part(field: str, part: dict) -> str | None:
    """The file name in a picture's part of a message; None where the row names it."""
    for key in ("image_url", "image", "url", "path"):
        value = part.get(key)
        if isinstance(value, dict):
            key, value = f"{key}.url", value.get("url")
        if value is not None:
            return _picture_name(f"{field}.{key}", value)
    if part.get("type") == "image":
        return None
    raise BadData(f"{field}.image_url: has no url: give the picture's file name")


def _parts(field: str, parts: list, answer: bool) -> tuple[str, list]:
    """(text, names of its pictures, None for the row's) of a list of parts of a message.

    Texts are joined as they are. A picture is a mark in its place; where it opens the turn it
    stands on a line of its own, as LLaVA writes it."""
    text, names = "", []
    for i, part in enumerate(parts):
        here = f"{field}[{i}]"
        if not isinstance(part, dict):
            raise BadData(f"{here}: must be an object with type: correct the row")
        kind = part.get("type")
        opens = not text.replace(IMAGE_TOKEN, "").strip()
        if kind in ("text", "input_text", "output_text"):
            words = _text(f"{here}.text", part.get("text"))
            text += words.removeprefix("\n") if opens and names else words
        elif kind in ("image", "image_url", "input_image"):
            if answer:
                raise BadData(f"{here}: a picture in an answer or a system text cannot be read: "
                              "move it into a question")
            names.append(_image_part(here, part))
            text += f"{IMAGE_TOKEN}\n" if opens else IMAGE_TOKEN
        else:
            raise BadData(f"{here}.type: {kind!r} is not read, only text and image: take the part "
                          "out, or leave the row out")
    return text, names


def _turn(field: str, turn, chat: bool) -> tuple[str, str, list]:
    """(human, gpt or system; text; names of its pictures) of one turn.

    chat: the turns are `messages`, where keys are role and content unless they are there."""
    if not isinstance(turn, dict):
        keys = "role and content" if chat else "from and value"
        raise BadData(f"{field}: must be an object with {keys}: correct the row")
    who, what = "from", "value"                 # LLaVA's keys, or OpenAI's
    if "from" not in turn and ("role" in turn or chat):
        who = "role"
    if "value" not in turn and ("content" in turn or who == "role"):
        what = "content"
    role = turn.get(who)
    if not (isinstance(role, str) and role in ROLES):
        names = ["human or gpt", "user or assistant"]
        if who == "role":
            names.reverse()
        raise BadData(f"{field}.{who}: must be {names[0]} ({names[1]}), or system in the first "
                      "turn: correct it")
    role, value = ROLES[role], turn.get(what)
    if isinstance(value, list) and what == "content":
        value, names = _parts(f"{field}.{what}", value, role != "human")
    else:
        value, names = _text(f"{field}.{what}", value), []
    _refuse_unknown_pictures(turn, (who, what), False, f"{field}.")
    mark = foreign_mark(value) if role != "gpt" else ""
    if mark:
        raise BadData(f"{field}.{what}: {mark!r} marks a picture for another model, here it would "
                      f"be letters: write {IMAGE_TOKEN} for each picture of the row's images")
    return role, value, names


def _system(row: dict, turns: list, field: str) -> str:
    """The system text of a row: its key `system`, or its first turn, which is taken out."""
    text = "" if row.get("system") is None else _text("system", row["system"])
    if turns and turns[0][0] == "system":
        first = turns.pop(0)[1]
        if text.strip() and first.strip():
            raise BadData(f"system: is there twice, as a key and as a turn of {field}: leave one")
        if not text.strip():
            text = first
    for i, (role, _, _) in enumerate(turns):
        if role == "system":
            raise BadData(f"{field}: a system turn behind others (turn {i + 1}): put it first, or "
                          "take it out")
    return text if text.strip() else ""


def _all_pictures(row: list, parts: list, field: str) -> list[str]:
    """The pictures of a row, some named by it and some by parts of its messages."""
    named = [name for name in parts if name is not None]
    if not named:
        return row
    if row and row != named or len(named) != len(parts):
        raise BadData(f"{field}: some pictures are named there and some by the row: name all of "
                      "them in one place")
    return named


def chat_row(row: dict, field: str, pictures: list) -> tuple[list, list]:
    """([(role, text, pictures of the turn)], pictures of the row) of its list of turns."""
    value = row.get(field)
    if not isinstance(value, list) or not value:
        raise BadData(f"{field}: must be a list of turns, and is missing or empty: correct "
                      "the row")
    turns, names = [], []
    for i, turn in enumerate(value):
        turns.append(_turn(f"{field}[{i}]", turn, chat=field == "messages"))
        names += turns[-1][2]
    return turns, _all_pictures(pictures, names, field)


def _check_list_of_one(row: dict, turns: list, pictures: list):
    """Raise BadData where a list names one picture and a turn has places for more: a name is
    missing. Of a name that is no list the marks of a turn are one picture, as in LLaVA's data.
    Marks of several turns, and longer lists, are counted for all rows in trainer/samples.py."""
    marks = [text.count(IMAGE_TOKEN) for _, text, _ in turns if IMAGE_TOKEN in text]
    lists = [key for key in PICTURES if isinstance(row.get(key), list) and row[key]]
    if lists and len(pictures) == len(marks) == 1 and marks[0] > 1:
        raise BadData(f"{lists[0]}: is a list of one picture, but {marks[0]} {IMAGE_TOKEN} places "
                      "in the text: give a name for each of them, or correct the text")


def caption_row(rest: dict, captions, pictures: list) -> list[dict]:
    """A sample for each caption: the answer to nothing but the picture."""
    if not isinstance(captions, list):
        captions = [captions]
    if not pictures:
        raise BadData("image: is missing: a caption needs its picture")
    if not captions or not all(_text("caption", line).strip() for line in captions):
        raise BadData("caption: must be text, or a list of texts, and is empty: correct it")
    question = {"from": "human", "value": "\n".join([IMAGE_TOKEN] * len(pictures))}
    samples = []
    for i, line in enumerate(captions, 1):
        sample = {**rest, "conversations": [question, {"from": "gpt", "value": line}]}
        if len(captions) > 1:
            sample["id"] = f"{rest['id']}, caption {i}"
        samples.append(sample)
    return samples


def parse_row(row, where: str) -> list[dict]:
    """The samples of one row: one, or one for each caption of a list of them. Raises BadData."""
    if not isinstance(row, dict):
        raise BadData("a sample must be an object with conversations, or with image and caption")
    field = next((key for key in TURNS if key in row), "conversations")
    dropped = {field, "system", *PICTURES}              # keys that are read, and written anew
    kept = {sys.intern(key): value for key, value in row.items() if key not in dropped}
    rest = {"id": where, **kept, "where": where, "field": field}
    pictures, turns = _row_pictures(row), []
    no_key = not any(key in row for key in PICTURES)
    if field == "caption" and no_key and type(row.get("image_id")) in (int, str):
        pictures = [f"{row['image_id']}.jpg"]           # so cc_sbu_align names its pictures
    if type(rest["id"]) not in (int, str):
        raise BadData("id: must be text or a number: correct the row, or leave the key out")
    _text("id", str(rest["id"]))
    if field != "caption":
        turns, pictures = chat_row(row, field, pictures)
        _check_list_of_one(row, turns, pictures)
    system = _system(row, turns, field)
    _refuse_unknown_pictures(row, {*dropped, *TURNS, "id"}, bool(pictures), "")
    if pictures:
        rest["image"] = pictures[0] if len(pictures) == 1 else pictures
    if system:
        rest["system"] = system
    if field == "caption":
        return caption_row(rest, row["caption"], pictures)
    # Turns are written anew: parsed rows would hold a copy of every key, which fills memories.
    rest["conversations"] = [{"from": role, "value": text} for role, text, _ in turns]
    return [rest]


def images_of(sample) -> list:
    """The pictures of a sample, in order; none for text alone."""
    image = sample.get("image")
    if image is None:
        return []
    return image if isinstance(image, list) else [image]


# ---------------------------------------------------------------- a file of them

def read_rows(path):
    """Yield (row number, "FILE: row 3", its samples or a BadData with field and reason).

    Raises BadData only for a file that cannot be read at all."""
    try:
        # Bytes that are no UTF-8 become half surrogates, so that they are found in their row.
        text = read_text(path, 4_000_000_000, "surrogateescape")
    except (OSError, ValueError) as error:
        raise BadData(f"{path}: cannot be read ({error}): give a file of JSON or JSON "
                      "lines") from None
    except BadData as error:                    # UTF-16: its rows cannot be separated
        why = str(error).removeprefix(f"{path}: ")
        yield 1, f"{path}: line 1, row 1", BadData(f"cannot be read as JSON ({why}); what follows "
                                                   "was not read")
        return
    for row, place, value in iter_rows(text):
        where = f"{path}: {place}"
        try:
            yield row, where, value if isinstance(value, BadData) else parse_row(value, where)
        except BadData as error:
            yield row, where, error


def read_conversations(path) -> list[dict]:
    """All samples of a JSON list or of JSON lines, at most 4 GB, without `where` and `field`.

    Other keys of a row are kept. Raises BadData naming file, row and field for whatever is
    malformed."""
    samples = []
    for _, where, got in read_rows(path):
        if isinstance(got, BadData):
            raise BadData(f"{where}: {got}")
        for sample in got:
            del sample["where"], sample["field"]
        samples += got
    if not samples:
        raise BadData(f"{path}: holds no samples: expected a list of conversations")
    return samples


def question(conversation) -> str:
    """What a person says last, as it was typed: what an InstructBLIP's Q-Former reads."""
    text = ""
    for turn in conversation:
        if ROLES[turn["from"]] == "human":
            text = turn["value"] or ""
    return text.replace(IMAGE_TOKEN, "").strip()


# What stage 2 of MiniGPT-4 asks about its pictures.                     [MiniGPT4] 2304.10592
MINIGPT4_INSTRUCTIONS = ("Describe this image in detail.",
                         "Take a look at this image and describe what you notice.",
                         "Please provide a detailed description of the picture.",
                         "Could you describe the contents of this image for me?")


def blip_caption(text: str, words: int = 50) -> str:
    """A web caption as BLIP-2 and MiniGPT-4 learn it in stage 1 (LAVIS, blip_caption): small
    letters, . ! " ( ) * # : ; ~ as spaces, at most so many words."""
    text = re.sub(r"\s{2,}", " ", re.sub(r'[.!"()*#:;~]', " ", text.lower()))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:words])
