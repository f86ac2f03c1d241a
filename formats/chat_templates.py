"""The chat template that a model folder brings: found, rendered, recognised, and asked with.

    chat_template.json, .jinja, tokenizer_config.json ... -- find -- ChatTemplate -- segments, ids
                                                                        |
                                                        render, in a process of its own

A chat template is a program in Jinja. Rendering it answers two questions. Which of our templates is
this? `recognise` compares what both write of small conversations. And where it is none of ours,
what is the prompt? `segments` gives its text, cut into what people typed and what the template
wrote: only the latter may hold control tokens and pictures.

To find a typed text again it is put between two characters that occur nowhere else:

    typed          What is</s> this?
    given          ⟦What is</s> this?⟧
    rendered       USER: <image>⏎⟦What is</s> this?⟧ ASSISTANT:
    segments       (USER: <image>⏎, template)  (What is</s> this?, person)  ( ASSISTANT:, template)

Source: transformers 5.23, utils/chat_template_utils.py; tests compare with its rendering and ids.
"""
import re
from pathlib import Path

from formats.conversations import IMAGE_TOKEN
from formats.errors import BadData, BadModel
from formats.files import read_text
from formats.jinja_process import render
from formats.strict_json import read_config
from formats.templates import chat_template, opening

LARGEST = 1_000_000             # bytes of a template file


# ---------------------------------------------------------------- where a folder keeps it

def _default_template(folder, file, value):
    """The template of {name: template}, of a list of them, or of a text; None if there is none."""
    if isinstance(value, list):
        value = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
    if isinstance(value, dict):
        if "default" not in value:
            raise BadModel(f"{Path(folder) / file}: several chat templates, none named 'default': "
                           "name one so")
        value = value["default"]
    if value is not None and not isinstance(value, str):
        raise BadModel(f"{Path(folder) / file}: chat_template must be text: replace the file")
    return value


def find(folder) -> tuple[str, str] | None:
    """(template, the file it is in), or None if the folder has none.

    The order is that of transformers: its processor takes the key of processor_config.json, else
    chat_template.json, else chat_template.jinja; its tokenizer takes chat_template.jinja, else the
    key of tokenizer_config.json. Raises BadModel for a file that cannot be read."""
    def template_in(file):
        config = read_config(folder, file, missing_ok=True)
        return _default_template(folder, file, config.get("chat_template"))

    for file in ("processor_config.json", "chat_template.json"):
        if template := template_in(file):
            return template, file
    path = Path(folder) / "chat_template.jinja"
    if path.exists():
        try:
            return read_text(path, LARGEST), path.name
        except (OSError, ValueError) as error:
            raise BadModel(f"{path}: cannot be read ({error}): replace the file") from None
    template = template_in("tokenizer_config.json")
    return (template, "tokenizer_config.json") if template else None


def special_tokens(folder) -> dict:
    """{"bos_token": "<s>", ...} of tokenizer_config.json: a template may write them."""
    config = read_config(folder, "tokenizer_config.json", missing_ok=True)
    found = {}
    for name, token in config.items():
        if name.endswith("_token"):
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found[name] = text
    return found


# ---------------------------------------------------------------- a folder's own prompt

# What both sides write when they are compared: [(role, [a text, or None for a picture])].
PROBES = ([("user", [None, "What is it?"])],
          [("user", [None, "What is it?"]), ("assistant", ["A cat."]), ("user", ["Sure?"])],
          [("user", ["Why?"]), ("assistant", ["No."]), ("user", ["Oh?"])])
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}


def parts_as_text(parts) -> str:
    """Parts in one text: each picture is <image> on a line of its own."""
    text = ""
    for part in parts:
        text += f"{IMAGE_TOKEN}\n" if part is None else part
    return text


def turns_of(conversation, pictures: int) -> list:
    """[(role, parts)] of [{from, value}]; a part is a text, or None for a picture.

    The first `pictures` of the <image> in questions are pictures (-1: all), the rest letters."""
    turns = []
    for turn in conversation:
        try:
            role, text = ROLES[turn["from"]], turn["value"] or ""
        except (KeyError, TypeError) as error:
            raise BadData(f"a turn needs from (human or gpt) and value: {error!r}") from None
        texts = [text]
        if role == "user" and pictures:
            texts = text.split(IMAGE_TOKEN, pictures)
        if pictures > 0:
            pictures -= len(texts) - 1
        parts = texts[:1]
        for part in texts[1:]:              # the template itself writes a newline behind a picture
            parts += [None, part.removeprefix("\n")]
        turns.append((role, [part for part in parts if part != ""]))
    if turns and turns[-1] == ("assistant", []):        # the answer that is wanted
        turns.pop()
    if not turns or turns[-1][0] != "user":
        raise BadData("a conversation must end with something a human says")
    return turns


class ChatTemplate(str):
    """The chat template of a folder. As a text it is a name: that of the template of ours which
    writes almost the same, or, if there is none (`known` False), of the file that holds it.

    source: Jinja. special: {"bos_token": "<s>", ...}. parts: content goes in as a list of parts,
    not as a text with <image> in it. end: what it writes behind an answer, if that ends it."""

    @classmethod
    def of(cls, source, file, special):
        template = cls(file)
        template.source, template.file, template.special = source, file, special
        template.known, template.parts, template.end = False, True, ""
        return template

    def named(self, name):
        """The same, under the name of one of ours."""
        template = type(self)(name)
        template.__dict__.update(self.__dict__, known=True)
        return template

    def _content(self, parts):
        if not self.parts:
            return parts_as_text(parts)
        content = []
        for part in parts:
            content.append({"type": "image"} if part is None else {"type": "text", "text": part})
        return content

    def write(self, turns) -> str:
        """The prompt of [(role, parts)], ending where the model starts to write. ValueError,
        TimeoutError: as `render`."""
        messages = [{"role": role, "content": self._content(parts)} for role, parts in turns]
        return render(self.source, {"messages": messages, "add_generation_prompt": True,
                                    "tools": None, "documents": None, **self.special})

    def attempt(self, turns) -> str:
        """`write`, or "" where the template refuses these turns."""
        try:
            return self.write(turns)
        except TimeoutError:
            raise
        except ValueError:
            return ""

    def find_content_form(self) -> str:
        """The text of the first probe. Finds out whether content is a list of parts or a text."""
        text = self.attempt(PROBES[0])
        if IMAGE_TOKEN in text and "What is it?" in text and "'type'" not in text:
            return text
        self.parts = False                  # it adds texts to what was a list, or prints the list
        return self.write(PROBES[0])

    def segments(self, conversation, pictures: int = -1) -> list[tuple[str, bool]]:
        """[(text, did a person type it?)] of the prompt. Raises BadData, BadModel."""
        turns = turns_of(conversation, pictures)
        typed = {letter for _, parts in turns for part in parts if part for letter in part}
        unused = [chr(i) for i in range(0xE000, 0xF900) if chr(i) not in typed]
        if len(unused) < 2:
            raise BadData("the turns use every private-use character (U+E000 to U+F8FF), of which "
                          "two are needed to mark what was typed: leave some out")
        left, right = unused[:2]

        def marked(part):
            """What a template strips stays outside the marks."""
            core = part.strip() if part else ""
            return part.replace(core, left + core + right, 1) if core else part

        try:
            plain = self.write(turns)
            text = self.write([(role, list(map(marked, parts))) for role, parts in turns])
        except (ValueError, TimeoutError) as error:
            raise BadModel(f"{self.file}: the chat template fails ({error}): ask with --template "
                           "NAME") from None
        found = re.split(f"{left}([^{left}{right}]*){right}", text)     # every second one was typed
        if "".join(found) != plain:
            raise BadModel(f"{self.file}: the chat template takes questions apart, and what was "
                           "typed cannot be told from control tokens: ask with --template NAME")
        return [(piece, bool(i % 2)) for i, piece in enumerate(found) if piece]

    def prompt(self, conversation) -> str:
        return "".join(text for text, _ in self.segments(conversation))

    def prompt_tokens(self, conversation, tokenizer, pictures: int, image_id: int) -> list[int]:
        return prompt_tokens(self.segments(conversation, pictures), tokenizer, image_id)

    def after_an_answer(self) -> str:
        """What stands between an answer and the next question."""
        _, answer, question = PROBES[2]
        text = self.attempt(PROBES[2])
        return text.rpartition(answer[1][0])[2].partition(question[1][0])[0]


# Lists of parts become texts, each picture a line of its own, as `parts_as_text` writes them.
FLATTEN = ("{% set flat = namespace(turns=[]) %}{% for m in messages %}{% set said %}"
           "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
           "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}"
           "{% endfor %}{% endif %}{% endset %}{% set flat.turns = flat.turns + "
           "[{'role': m['role'], 'content': said}] %}{% endfor %}{% set messages = flat.turns %}")


def for_processor(chat: ChatTemplate) -> str | None:
    """A chat template of texts as a processor needs it, which hands on lists of parts; None where
    it takes parts already. (A language model's ChatML would print the list.)"""
    return None if chat.parts else FLATTEN + chat.source


def _plain_tokens(segments, tokenizer) -> list[int]:
    """Ids of the joined segments. In what people typed no control token is looked for."""
    text, typed = "", bytearray()           # typed: a flag for each character
    for piece, by_person in segments:
        text += piece
        typed += bytes([by_person]) * len(piece)

    def may_be_control(match):
        return not any(typed[match.start():match.end()])

    # transformers obeys the prefix rule of tokenizer.json, not that of the config
    pairs = tokenizer.encode_with_offsets(text, may_be_control, tokenizer.prefix_in_file)
    return [token for token, _ in pairs]


def prompt_tokens(segments, tokenizer, image_id: int) -> list[int]:
    """Ids as transformers' processor gives them: <image> is a token among the others, and BOS comes
    first where the text does not begin with it already."""
    mark, ids = tokenizer.added(IMAGE_TOKEN), []
    if mark is not None:
        ids = [image_id if i == mark else i for i in _plain_tokens(segments, tokenizer)]
    else:                                   # a tokenizer without the token: cut there ourselves
        rest = []
        for text, typed in segments:
            texts = [text] if typed else text.split(IMAGE_TOKEN)
            rest.append((texts[0], typed))
            for after_picture in texts[1:]:
                ids += [*_plain_tokens(rest, tokenizer), image_id]
                rest = [(after_picture, False)]
        ids += _plain_tokens(rest, tokenizer)
    if tokenizer.add_bos and ids[:1] != [tokenizer.bos]:
        ids = [tokenizer.bos, *ids]
    return ids


# ---------------------------------------------------------------- which of ours is it?

def recognise(chat: ChatTemplate, ours: dict, bos: str) -> str:
    """The name of ours that a chat template is, or the chat template itself. Raises ValueError.

    ours: {name: (system text as it is written, [prompt of each probe])}; bos: what a tokenizer
    that adds BOS writes before every text. Exact is what writes the same of all probes. A template
    that differs by its system text, or in later turns only, keeps its own words under our name."""
    first = chat.find_content_form().removeprefix(bos)
    exact = [name for name, (_, texts) in ours.items() if first == texts[0]]
    if exact:
        later = [chat.attempt(turns).removeprefix(bos) for turns in PROBES[1:]]
        for name in exact:
            if later == ours[name][1][1:]:
                return name
    for without_system in (False, True):
        for name, (system, texts) in ours.items():
            wanted = texts[0].replace(system, "", 1) if without_system else texts[0]
            if first == wanted:
                return chat.named(name)
    return chat


def folder_template(folder, tokenizer, templates: dict, prompt) -> str | None:
    """The template in which a folder's own chat template asks: a name of ours, or a ChatTemplate;
    None if the folder has none. One that cannot be rendered raises only when it is used.

    templates: data.TEMPLATES; prompt: data.prompt."""
    found = find(folder)
    if not found:
        return None
    source, file = found
    for name, t in templates.items():
        if source in (chat_template(t), chat_template(t, tokenizer)):       # to the letter
            return name
    special = {"bos_token": tokenizer.token(tokenizer.bos),
               "eos_token": tokenizer.token(tokenizer.eos)}
    special = {name: token for name, token in special.items() if token is not None}
    chat = ChatTemplate.of(source, file, special | special_tokens(folder))
    ours = {}
    for name, t in templates.items():
        if t.style in ("two", "chat", "llama2", "single"):
            texts = []
            for turns in PROBES:
                texts.append(prompt([{"from": role, "value": parts_as_text(parts)}
                                     for role, parts in turns], name))
            ours[name] = opening(t), texts
    try:
        bos = special.get("bos_token", "") if tokenizer.add_bos else ""
        chat = recognise(chat, ours, bos)
        if isinstance(chat, ChatTemplate):
            chat.end = tokenizer.first_end(chat.after_an_answer(), chat.known)
    except (ValueError, TimeoutError):      # raised when it is used: --template may be given
        pass
    return chat


# ---------------------------------------------------------------- where an answer ends

def end_ids(folder, c) -> set[int]:
    """The ids in generation_config.json's eos_token_id. Without that file transformers takes those
    of config.json `c`, or of its text_config. Raises BadModel."""
    name = "generation_config.json"
    config = read_config(folder, name, missing_ok=True)
    if not (Path(folder) / name).exists():
        name, config = "config.json", c
        if c.get("eos_token_id") is None:
            text_config = c.get("text_config")
            config = text_config if isinstance(text_config, dict) else {}
    ends = config.get("eos_token_id")
    if ends is None:
        ends = []
    elif not isinstance(ends, list):
        ends = [ends]
    if not all(type(i) is int for i in ends):
        raise BadModel(f"{Path(folder) / name}: eos_token_id must be an id or a list of ids: "
                       "correct it")
    return set(ends)
