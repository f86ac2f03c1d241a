"""The chat template that a model folder brings: found, rendered, and turned into pieces of text.

    chat_template.json, .jinja, tokenizer_config.json ... -- find -- ChatTemplate -- pieces
                                                                       |
                                                       render, in formats/sandbox.py's process

Rendering answers two questions. Which of our templates is this? `recognise` compares what both
write of small conversations. And where it is none of ours, what is the prompt? `pieces` gives its
text, with what people typed told apart from what the template wrote: only the latter may hold
control tokens and pictures.

A text is put between two characters that occur nowhere else, rendered, and found again:

    typed          What is</s> this?
    given          ⟦What is</s> this?⟧
    rendered       USER: <image>⏎⟦What is</s> this?⟧ ASSISTANT:
    pieces         (USER: <image>⏎, template)  (What is</s> this?, person)  ( ASSISTANT:, template)
"""
import atexit
import functools
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from formats.errors import BadModel
from formats.strict_json import read_config, read_text

SECONDS = 10.0                  # for one prompt; a template of the hub takes a millisecond
LARGEST = 1_000_000             # bytes of a template file
PICTURE = "<image>"


# ---------------------------------------------------------------- where a folder keeps it

def _named(folder, file, told):
    """The template of {name: template}, of a list of them, or of a text; None if there is none."""
    if isinstance(told, list):
        told = {one.get("name"): one.get("template") for one in told if isinstance(one, dict)}
    if isinstance(told, dict):
        if "default" not in told:
            raise BadModel(f"{Path(folder) / file}: several chat templates, none named 'default': "
                           "name one so")
        told = told["default"]
    if told is not None and not isinstance(told, str):
        raise BadModel(f"{Path(folder) / file}: chat_template must be text: replace the file")
    return told


def find(folder) -> tuple[str, str] | None:
    """(template, the file it is in), or None if the folder has none.

    The order is that of transformers 5.23: its processor takes the key of processor_config.json,
    else chat_template.json, else chat_template.jinja; its tokenizer takes chat_template.jinja, else
    the key of tokenizer_config.json. Raises BadModel for a file that cannot be read."""
    def key(file):
        return _named(folder, file, read_config(folder, file, missing_ok=True).get("chat_template"))

    for file in ("processor_config.json", "chat_template.json"):
        if told := key(file):
            return told, file
    path = Path(folder) / "chat_template.jinja"
    if path.exists():
        try:
            return read_text(path, LARGEST), path.name
        except (OSError, ValueError) as error:
            raise BadModel(f"{path}: cannot be read ({error}): replace the file") from None
    told = key("tokenizer_config.json")
    return (told, "tokenizer_config.json") if told else None


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


# ---------------------------------------------------------------- the process that renders

_LOCK = threading.Lock()


@functools.cache
def _process(pid):
    """formats/sandbox.py, started when it is first needed; it ends when the program `pid` does."""
    worker = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("sandbox.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(worker.kill)
    return worker


def _line(stream, deadline) -> bytes:
    """The next line of a pipe; cut short where the pipe ends or the time is over."""
    line = b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            return line
        if not (more := os.read(stream.fileno(), 1 << 16)):
            return line
        line += more
    return line


def render(source: str, variables: dict) -> str:
    """What the template writes. Raises ValueError with the reason why it does not, TimeoutError
    where it takes too long."""
    asked = json.dumps({"source": source, "variables": variables}) + "\n"
    with _LOCK:
        deadline, worker, line = time.monotonic() + SECONDS, _process(os.getpid()), b""
        try:
            worker.stdin.write(asked.encode())
            worker.stdin.flush()
            line = _line(worker.stdout, deadline)
        except BrokenPipeError:             # it has ended: told below
            pass
        if not line.endswith(b"\n"):
            late = time.monotonic() >= deadline
            worker.kill()
            worker.communicate()
            _process.cache_clear()
            if late:
                raise TimeoutError(f"it takes over {SECONDS:.0f} s")
            raise ValueError("the process that renders it came to an end")
    told = json.loads(line)
    if "fault" in told:
        raise ValueError(told["fault"])
    return told["text"]


# ---------------------------------------------------------------- a folder's own prompt

# What both are asked to write: [(role, [a text, or None for a picture])].
PROBES = ([("user", [None, "What is it?"])],
          [("user", [None, "What is it?"]), ("assistant", ["A cat."]), ("user", ["Sure?"])],
          [("user", ["Why?"]), ("assistant", ["No."]), ("user", ["Oh?"])])


class ChatTemplate(str):
    """The chat template of a folder. As a text it is a name: that of the template of ours which
    writes almost the same, or, if there is none (`known` False), of the file that holds it.

    source: Jinja. special: {"bos_token": "<s>", ...}. parts: content goes in as a list of parts,
    not as a text with <image> in it. end: what it writes behind an answer, if that ends it."""

    @classmethod
    def of(cls, source, file, special):
        made = cls(file)
        made.source, made.file, made.special = source, file, special
        made.known, made.parts, made.end = False, True, ""
        return made

    def named(self, name):
        """The same, under the name of one of ours."""
        made = type(self)(name)
        made.__dict__.update(self.__dict__, known=True)
        return made

    def _content(self, parts):
        if self.parts:
            return [{"type": "image"} if part is None else {"type": "text", "text": part}
                    for part in parts]
        return "".join(f"{PICTURE}\n" if part is None else part for part in parts)

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

    def settle(self) -> str:
        """The text of the first probe. Finds out whether content is a list of parts or a text."""
        text = self.attempt(PROBES[0])
        if PICTURE in text and "What is it?" in text and "'type'" not in text:
            return text
        self.parts = False                  # it adds texts to what was a list, or prints the list
        return self.write(PROBES[0])

    def pieces(self, turns) -> list[tuple[str, bool]]:
        """[(text, did a person type it?)] of the prompt. Raises BadModel."""
        texts = "".join(part for _, parts in turns for part in parts if part)
        unused = (chr(i) for i in range(0xE000, 0xF900) if chr(i) not in texts)
        left, right = next(unused), next(unused)

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
        found = re.split(f"{left}([^{left}{right}]*){right}", text)
        if "".join(found) != plain:
            raise BadModel(f"{self.file}: the chat template takes questions apart, and what was "
                           "typed cannot be told from control tokens: ask with --template NAME")
        return [(piece, bool(i % 2)) for i, piece in enumerate(found) if piece]

    def after_an_answer(self) -> str:
        """What stands between an answer and the next question."""
        _, answer, question = PROBES[2]
        text = self.attempt(PROBES[2])
        return text.rpartition(answer[1][0])[2].partition(question[1][0])[0]


def recognise(chat: ChatTemplate, ours: dict, bos: str) -> str:
    """The name of ours that a chat template is, or the chat template itself. Raises ValueError.

    ours: {name: (system text as it is written, [prompt of each probe])}; bos: what a tokenizer
    that adds BOS writes before every text. Exact is what writes the same of all probes. A template
    that differs by its system text, or in later turns only, keeps its own words under our name."""
    first = chat.settle().removeprefix(bos)
    exact = [name for name, (_, texts) in ours.items() if first == texts[0]]
    if exact:
        later = [chat.attempt(turns).removeprefix(bos) for turns in PROBES[1:]]
        for name in exact:
            if later == ours[name][1][1:]:
                return name
    for system in (False, True):
        for name, (opening, texts) in ours.items():
            if first == (texts[0].replace(opening, "", 1) if system else texts[0]):
                return chat.named(name)
    return chat


# ---------------------------------------------------------------- our own, for others

# What somebody said, of a text or of a list of parts, in which pictures come first. A picture
# stands on a line of its own, unless it is all.
_SAID = ("{% macro said(m) %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
         "{% set texts %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}"
         "{% endfor %}{% endset %}"
         "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>' }}"
         "{% if texts or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{{ texts }}"
         "{% endif %}{% endmacro %}")
# Of a captioner: texts and pictures in their order, and nothing between them.
_CAPTIONED = ("{% macro said(m) %}{% if m['content'] is string %}"
              "{{ m['content'] | replace('<image>\n', '<image>') }}{% else %}"
              "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
              "{% endfor %}{% endif %}{% endmacro %}")
_TURNS = ("{% if messages[0]['role'] == 'system' %}{% set system = said(messages[0]) %}"
          "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}"
          "{% endif %}")


def _write(*texts) -> str:
    """Jinja that writes these: a str as it is, a one-element tuple as an expression."""
    parts = (text[0] if isinstance(text, tuple) else json.dumps(text) for text in texts if text)
    return "{{ " + " + ".join(parts) + " }}"


def write_jinja(t, bos: bool = False, space: bool = False) -> str:
    """Jinja that writes what data.prompt writes of the data.Template `t`, from texts and from lists
    of parts.

    bos: BOS before it, and, with `space`, the space that LLaMA's tokenizers put before a text."""
    text, begin = ("text",), ""
    if bos:
        begin = "{{ bos_token }}"
    if bos and space and t.style == "plain":    # none before a picture: there no text begins
        begin += "{% if said(messages[0])[:7] != '<image>' %}{{ ' ' }}{% endif %}"
    elif bos and space:
        begin += "{{ ' ' }}"
    if t.style == "plain":
        return (_CAPTIONED + begin + "{% for m in messages %}{{ said(m) }}"
                "{% if m['role'] == 'assistant' %}" + _write(t.end) + "{% endif %}{% endfor %}")
    wanted = "{% if not system | trim %}{% set system = " + json.dumps(t.text) + " %}{% endif %}"
    if not t.system:
        wanted = ("{% if system | trim %}{{ raise_exception('this model knows no system turn: put "
                  "it into the first question') }}{% endif %}")
    loop = "{% for m in turns %}{% set text = said(m) %}{% if m['role'] == 'user' %}"
    if t.style == "llama2":
        first = _write("<<SYS>>\n", ("system",), "\n<</SYS>>\n\n") if t.system else ""
        return (_SAID + _TURNS + wanted + begin + loop
                + "{% if loop.first %}{{ '[INST] ' }}" + first
                + "{% else %}" + _write(t.sep + "[INST] ") + "{% endif %}"
                + _write(text, " [/INST]") + "{% elif text %}" + _write(" ", text, " " + t.end)
                + "{% endif %}{% endfor %}")
    colon, blank = ("", "") if t.style == "chat" else (":", " ")
    asked, said = (_write(role + colon) + "{% if text %}" + _write(blank, text, end) + "{% endif %}"
                   for role, end in zip(t.roles, (t.sep, t.end)))
    return (_SAID + _TURNS + wanted + begin + _write(t.header, ("system",), t.sep) + loop
            + asked + "{% else %}" + said + "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}" + _write(t.roles[1] + colon) + "{% endif %}")


# ---------------------------------------------------------------- where an answer ends

def end_ids(folder, c) -> set[int]:
    """The ids in generation_config.json's eos_token_id. Without that file transformers takes those
    of config.json `c`, or of its text_config. Raises BadModel."""
    name = "generation_config.json"
    told = read_config(folder, name, missing_ok=True)
    if not (Path(folder) / name).exists():
        name, text = "config.json", c.get("text_config")
        told = c if c.get("eos_token_id") is not None else text if isinstance(text, dict) else {}
    ends = told.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int for i in ends):
        raise BadModel(f"{Path(folder) / name}: eos_token_id must be an id or a list of ids: "
                       "correct it")
    return set(ends)
