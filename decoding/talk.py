"""decoding/talk.py: a talk as a browser sends it, and what of it is believed.

    turns      ["What is it?", "A cat.", "And this?"]     person and model alternately
    pictures   [["id", 0], ["id", 2]]                     each in front of a turn of the person
    settings   {"temperature": 0.7, ...}                  in place of the command line's
    tokens     [319, 6635]                                of an answer, to look at
    names      ["a.png", "b.png"]                         of the pictures' files, to save

Anybody can send anything: each field has its type, each number its bounds, and other fields are
errors, because a setting that is passed over would be a lie about the answer."""

import data
from decoding.flags import prompt_error, settings_error
from decoding.pictures import join_pictures
from decoding.server import Refused
from formats.errors import UsageError
from formats.strict_json import is_broken_text

MOST_TURNS = 400
FIELDS = {"turns": list, "pictures": list, "settings": dict, "tokens": list, "names": list}
NUMBERS = {"temperature": (int, float), "top_p": (int, float), "max_new_tokens": (int,),
           "seed": (int,)}


def check_fields(request):
    """Raises UsageError for a field that no talk has, or one of another type."""
    for name, value in request.items():
        if type(value) is not FIELDS.get(name):
            raise UsageError(f"{name[:40]!r} is no field of a talk, or of another type")


def check_texts(texts):
    """Raises UsageError for what no person or model can have written."""
    for number, text in enumerate(texts):
        wrong = None
        if type(text) is not str or is_broken_text(text):
            wrong = "a text is missing, or holds a NUL byte or half a character: write it again"
        elif number % 2 == 0:                       # an answer may be empty, a question not
            wrong = prompt_error(text)
        if wrong:
            raise UsageError(wrong)


def read_groups(entries, turns, pixels):
    """{turn: picture group} of [[id, turn]]. pixels: {id: (pixels, sizes)}, the newest last.

    Raises UsageError, and Refused (410) for a picture that is not kept any more."""
    groups = {}
    for entry in entries:
        if type(entry) is not list or [*map(type, entry)] != [str, int]:
            raise UsageError("pictures must be pairs of an id and the number of a turn")
        name, turn = entry
        if not 0 <= turn < turns or turn % 2:
            raise UsageError("a picture must stand in front of a question of the talk")
        kept = pixels.pop(name, None)
        if kept is None:
            raise Refused(410, "a picture is not kept any more: send it again")
        pixels[name] = kept                         # now it is the newest
        before = {0: groups[turn]} if turn in groups else {}
        groups[turn] = *join_pictures({**before, 1: kept}), []
    return groups


def read_settings(asked, own):
    """Settings of `generate`: `own`, the command line's, with those of the page in their place."""
    for name, value in asked.items():
        # not isinstance: true is no number; a tensor takes no integer of more than 63 bits
        if type(value) not in NUMBERS.get(name, ()) or abs(value) >= 2 ** 63:
            raise UsageError(f"{name[:40]!r} is no setting of the page, or no number of its kind")
    settings = {**own, **asked}
    seed = settings.pop("seed")
    if settings["temperature"] == 0:                # nothing is drawn: --top-k means nothing
        settings["top_k"] = 0
    wrong = settings_error(**settings)
    if not 0 <= seed < 2 ** 62:
        wrong = "seed must be 0 or more (below 2^62)"
    if wrong:
        raise UsageError(wrong)
    return {**settings, "seed": seed}


class Talk:
    """A talk, checked: turns, names, tokens as above; groups {turn: picture group}; settings of
    `generate`. Raises UsageError and Refused."""

    def __init__(self, request, model, pixels, settings):
        """pixels: {id: (pixels, sizes)} that are kept; settings: the command line's, and seed."""
        check_fields(request)
        self.turns, self.names = request.get("turns", []), request.get("names", [])
        self.tokens = request.get("tokens", [])
        if not 0 < len(self.turns) <= MOST_TURNS:
            raise UsageError(f"a talk has 1 to {MOST_TURNS} turns: start a new one")
        check_texts(self.turns)
        check_texts([text for name in self.names for text in (name, "")])
        vocab = model.llm.config.vocab
        if not all(type(token) is int and 0 <= token < vocab for token in self.tokens):
            raise UsageError("tokens must be ids of the model's vocabulary")
        self.groups = read_groups(request.get("pictures", []), len(self.turns), pixels)
        self.settings = read_settings(request.get("settings", {}), settings)
        style = data.template_of(model.template).style
        if not self.groups and style in ("plain", "instruct"):
            raise UsageError("this model speaks about a picture only: choose one")
