"""How model families write a conversation: the rows of a table, and the styles they are written in.

A row gives the fields of data.Template. A style is a generator: it takes the turns
[(is it an answer?, text)] and yields segments (text, learn, typed, start), whose texts join to the
whole conversation. data.py has the two styles that LLaVA-1.5 is trained in, plain and two.

    learn   do its tokens have loss?
    typed   did a person type it?  Then no control token can come out of it in a prompt.
    start   "bos": BOS stands before it;  "text": it is tokenized as a text of its own;  "": neither

`write_jinja` says the same in Jinja, for other tools.

Source: haotian-liu/LLaVA c121f04, llava/conversation.py, and train/train.py for what has loss;
LLaVA-VL/LLaVA-NeXT; Vision-CAIR/MiniGPT-4; salesforce/LAVIS. A "quirk" is copied from there."""
import json

from formats.conversations import IMAGE_TOKEN

BLIP2 = "continued", "prefixed"                 # styles of BLIP-2 with an OPT and with a FlanT5

# ---------------------------------------------------------------- texts of the rows

CHAT = ("A chat between a curious {0} and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the {0}'s questions.")
SEES = ("able to understand the visual content that the user provides, and assist the user with "
        "a variety of tasks using natural language.")
# quirk: no space before "The visual content"; the models were trained on it.
TAGGED = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          f"is {SEES}The visual content will be provided with the following format: "
          "<Image>visual content</Image>.")
# quirk: two spaces after "while being safe."
LLAMA_2 = ("You are a helpful, respectful and honest assistant. Always answer as helpfully as "
           "possible, while being safe.  Your answers should not include any harmful, unethical, "
           "racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
           "responses are socially unbiased and positive in nature.\n\nIf a question does not "
           "make any sense, or is not factually coherent, explain why instead of answering "
           "something not correct. If you don't know the answer to a question, please don't share "
           "false information.")
MPT = ("A conversation between a user and an LLM-based AI assistant. The assistant gives helpful "
       "and honest answers.")
HELPFUL = f"You are a helpful language and vision assistant. You are {SEES}"
MINIGPT4 = ("Give the following image: <Img>ImageContent</Img>. You will be able to see the image "
            "once I provide it to you. Please answer my questions.")

# ---------------------------------------------------------------- rows: fields of data.Template

def row(style, system="", roles=("USER", "ASSISTANT"), sep=" ", end="</s>", **more) -> dict:
    stop = end.rstrip("\n") or end              # without a newline that only follows it
    return dict(style=style, system=system, roles=roles, sep=sep, end=end, stop=stop, **more)


V0 = dict(style="single", roles=("Human", "Assistant"), sep="###", end="###")
MMTAG = dict(system=TAGGED, image_text=f"<Image>{IMAGE_TOKEN}</Image>")
CHATML = dict(style="chat", header="<|im_start|>system\n",
              roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
              sep="<|im_end|>", end="<|im_end|>")
LLAMA_3 = dict(style="chat", header="<|start_header_id|>system<|end_header_id|>\n\n",
               roles=("<|start_header_id|>user<|end_header_id|>\n\n",
                      "<|start_header_id|>assistant<|end_header_id|>\n\n"),
               sep="<|eot_id|>", end="<|eot_id|>")
QWEN = {**CHATML, "sep": "<|im_end|>\n", "end": "<|im_end|>\n"}

ROWS = {
    "plain": row("plain", end="\n"),            # a newline and no </s>   [LLaVA15] stage 1
    "v1": row("two", CHAT.format("user")),
    # quirk: official command lines pick this "human" text for models trained on v1's "user".
    "llava_v1": row("two", CHAT.format("human")),
    "v1_mmtag": row("two", **MMTAG),
    # quirk: what the official code calls v0 (Vicuna v0) has this system text and, behind it, a long
    # question and answer about renewable energy, at inference only. LLaVA's own v0 prompts, these
    # two, have no example; LLaVA was not trained with one, so ours named v0 is llava_v0 too.
    "llava_v0": row(system=CHAT.format("human"), **V0),
    "v0_mmtag": row(**V0, **MMTAG),
    "llava_llama_2": row("llama2", HELPFUL, sep="<s>"),
    "llama_2": row("llama2", LLAMA_2, sep="<s>"),
    "mistral_instruct": row("llama2", sep=""),
    "chatml_direct": row(system="Answer the questions.", **CHATML),
    "mpt": row(system=MPT, **CHATML),
    # Of LLaVA-NeXT's second release. There the headers of answers have loss too; here, as in the
    # other templates, the answers with their end.
    "llama_3": row(system=HELPFUL, **LLAMA_3),
    "qwen_1_5": row(system="You are a helpful assistant.", **QWEN),
    "smollm2": row(system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
                   **QWEN),
    "blip2": row("plain", end="\n", image_first=True),
    "blip2_opt": row("continued", end="\n", image_first=True),
    "blip2_t5": row("prefixed", image_first=True),
    "instructblip": row("instruct", image_first=True),
    "minigpt4_caption": row("plain", end="\n"),
    "minigpt4": row("minigpt4", MINIGPT4, ("Human", "Assistant"), sep="###", end="###"),
}
ROWS["vicuna_v1"] = ROWS["v1"]                  # other names of the same
ROWS["v0"] = ROWS["llava_v0"]
ROWS["mistral_direct"] = ROWS["chatml_direct"]
ROWS["llava_llama_3"] = ROWS["llama_3"]


# ---------------------------------------------------------------- texts of a template, by its name

def row_of(name: str) -> dict:
    """The row of a name. Of a folder's own chat template that is none of ours, one with
    its end and a style of its own."""
    return ROWS.get(name) or row("own", end=getattr(name, "end", ""))


def texts_of(name: str) -> str:
    """All texts that a template can write, joined: to look for tokens in."""
    r = row_of(name)
    texts = (r.get("header", ""), r["system"], *r["roles"], r["sep"], r["end"])
    return "".join(texts) + getattr(name, "source", "")


def end_ids(name: str, tokenizer) -> set[int]:
    """Ids that end an answer: the tokenizer's EOS, and the end of the template if it is a token.
    None of BLIP-2's with an OPT or a FlanT5, whose files name them: see caption_end."""
    if row_of(name)["style"] in BLIP2:
        return set()
    last = template_end(name, tokenizer)
    return {tokenizer.eos, last, tokenizer.added(getattr(name, "end", ""))} - {None}


def template_end(name: str, tokenizer) -> int | None:
    """Id of the text that ends an answer, if it is a token."""
    stop = row_of(name)["stop"]
    if stop == "\n":                            # a caption's end is a byte token behind a prefix
        return (tokenizer.encode("\n", bos=False) or [None])[-1]
    return tokenizer.added(stop)


def caption_end(name: str, tokenizer) -> set[int]:
    """Ids that end a caption of a BLIP-2 that was trained here, or whose files name none: OPT's
    newline, FlanT5's EOS. quirk: OPT's EOS is its BOS, and ends no caption."""
    return {template_end(name, tokenizer)} - {None}


def stop_text(name: str, tokenizer) -> str | None:
    """The text that ends an answer, where the template has an end that is no token."""
    stop = row_of(name)["stop"]
    if stop in ("", "\n") or tokenizer.added(stop) is not None:
        return None
    return stop


def opening(t) -> str:
    """The system text of a data.Template with all that stands around it."""
    if t.style != "llama2":
        return t.header + t.system + t.sep
    return f"<<SYS>>\n{t.system}\n<</SYS>>\n\n" if t.system else ""


# ---------------------------------------------------------------- styles

def chat(turns, t, training):
    """ChatML, LLaMA-3: every turn has a header of control tokens and an end."""
    yield t.header, False, False
    yield t.system, False, t.typed_system
    yield t.sep, False, False
    for is_answer, text in turns:
        yield t.roles[is_answer], False, False
        if text:                                # quirk: an empty turn has no end token
            yield text, is_answer, True
            yield t.end if is_answer else t.sep, is_answer, False


def llama2(turns, t, training):
    """LLaMA-2, Mistral: [INST] question [/INST] answer; the system text in the first question."""
    for number, (is_answer, text) in enumerate(turns):
        if not text:
            continue
        if is_answer:
            yield " ", True, False
            yield text, True, True
            yield f" {t.end}", True, False
            continue
        yield f"{t.sep}[INST] " if number else "[INST] ", False, False
        if t.system and number == 0:
            yield "<<SYS>>\n", False, False
            yield t.system, False, t.typed_system
            yield "\n<</SYS>>\n\n", False, False
        yield text, False, True
        yield " [/INST]", False, False


def single(turns, t, training):
    """LLaVA v0 in training: "### Role: text" and a newline. Prompts are in style `two`.

    quirk: the ### that opens a question has loss too: so the model learns to stop."""
    yield t.system, False, t.typed_system
    yield "\n\n", False, False
    for is_answer, text in turns:
        yield "###", True, False
        yield f" {t.roles[is_answer]}: ", is_answer, False
        yield text, is_answer, True
        yield "\n", is_answer, False
    yield "### ", True, False


def minigpt4(turns, t, training):
    """MiniGPT-4: <Img> and </Img> around the picture.

    quirk: training has no system text, but a space before ###Assistant. The answer is tokenized
    alone, so its prefix space comes behind the space that stands there already."""
    if not training:
        yield t.system, False, False
    for is_answer, text in turns:
        trained = training and is_answer
        yield " " if trained else "", False, False
        yield f"{t.sep}{t.roles[is_answer]}: ", False, False
        if IMAGE_TOKEN in text and not is_answer:
            yield f"<Img>{IMAGE_TOKEN}</Img> ", False, False
            text = text.replace(IMAGE_TOKEN, "", 1).strip()
        yield text, is_answer, True, "text" if trained else ""
    if training:
        yield t.end, True, False


def instruct(turns, t, training):
    """InstructBLIP: one instruction, one answer. In a chat only the last question is asked."""
    if IMAGE_TOKEN in next(text for is_answer, text in turns if not is_answer):
        yield IMAGE_TOKEN, False, False
    yield "", False, False, "bos"
    yield last_question(turns), False, True
    if training:
        yield turns[1][1], True, True, "text"
        yield t.end, True, False


def continued(turns, t, training):
    """BLIP-2 before an OPT: a caption, or a text that the answer goes on from, which may be empty.
    quirk: the human turn's words are thrown away in training; BOS has loss, as in `plain`."""
    yield IMAGE_TOKEN, False, False
    yield "", training, False, "bos"
    if training:
        yield turns[1][1], True, True
        yield t.end, True, False
    else:
        yield last_question(turns), False, True


def prefixed(turns, t, training):
    """BLIP-2 before a FlanT5: the encoder reads the question, or the first part of a caption, with
    an end of its own; the decoder writes the answer, or the rest."""
    yield IMAGE_TOKEN, False, False
    yield last_question(turns), False, True
    yield t.end, False, False
    if training:
        yield turns[1][1], True, True, "text"
        yield t.end, True, False


def last_question(turns):
    """The words of the last question. In a chat it alone is asked."""
    questions = [text for is_answer, text in turns if not is_answer]
    marks = 1 if len(questions) == 1 else 0     # the picture of an earlier question is not there
    return questions[-1].replace(IMAGE_TOKEN, "", marks).strip()


STYLES = {"chat": chat, "llama2": llama2, "single": single, "minigpt4": minigpt4,
          "instruct": instruct, "continued": continued, "prefixed": prefixed}


def shift_labels_over_pad(ids, labels, pad, ignore):
    """quirk: LLaVA v0's lengths of a sample without a picture leave out the pad token (= <unk>), so
    an <unk> typed in the text shifts every later label by one to the left."""
    has_loss = [label != ignore for token, label in zip(ids, labels) if token != pad]
    has_loss += [True] * (len(ids) - len(has_loss))
    return [token if loss else ignore for token, loss in zip(ids, has_loss)]


# ---------------------------------------------------------------- the same in Jinja

# What somebody said, of a text or of a list of parts. One picture stands in front, on a line of its
# own unless it is all, as in training; of several each stands in its place, and those that open the
# turn on lines of their own: formats/turns.py and formats/conversations.py do the same.
SAID = ("{% macro said(m) %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% set texts %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}"
        "{% endfor %}{% endset %}"
        "{% set count = m['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
        "{% if count == 1 and m['content'][0]['type'] != 'image' %}{{ '<image>' }}"
        "{% if texts | trim %}{{ '\n' + texts | trim }}{% endif %}"
        "{% else %}{% set at = namespace(front=true, done=0) %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{% set at.done = at.done + 1 %}{{ '<image>' }}"
        "{% if at.front and (texts or at.done < count) %}{{ '\n' }}{% endif %}"
        "{% elif c['type'] == 'text' %}{% set words = c['text'] %}"
        "{% if at.front and at.done and words[:1] == '\n' %}{% set words = words[1:] %}{% endif %}"
        "{% if words | trim %}{% set at.front = false %}{% endif %}{{ words }}"
        "{% endif %}{% endfor %}{% endif %}{% endif %}{% endmacro %}")
# Of a captioner: texts and pictures in their order, and nothing between them.
CAPTIONED = ("{% macro said(m) %}{% if m['content'] is string %}"
             "{{ m['content'] | replace('<image>\n', '<image>') }}{% else %}"
             "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
             "{% endfor %}{% endif %}{% endmacro %}")
SPLIT_SYSTEM = ("{% if messages[0]['role'] == 'system' %}{% set system = said(messages[0]) %}"
                "{% set turns = messages[1:] %}{% else %}{% set system = '' %}"
                "{% set turns = messages %}{% endif %}")
NO_SYSTEM = ("{% if system | trim %}{{ raise_exception('this model knows no system turn: put "
             "it into the first question') }}{% endif %}")
LOOP = "{% for m in turns %}{% set text = said(m) %}{% if m['role'] == 'user' %}"


def _write(*texts) -> str:
    """Jinja that writes these: a str as it is, a one-element tuple as an expression."""
    parts = (text[0] if isinstance(text, tuple) else json.dumps(text) for text in texts if text)
    return "{{ " + " + ".join(parts) + " }}"


def _begin(t, bos, space) -> str:
    """BOS, and the space that LLaMA's tokenizers put before a text."""
    if not bos:
        return ""
    if not space:
        return "{{ bos_token }}"
    if t.style == "plain":                      # none before a picture: there no text begins
        return "{{ bos_token }}{% if said(messages[0])[:7] != '<image>' %}{{ ' ' }}{% endif %}"
    return "{{ bos_token }}{{ ' ' }}"


def _llama2_jinja(t) -> str:
    first = ""
    if t.system:
        first = _write("<<SYS>>\n", ("system",), "\n<</SYS>>\n\n")
    return (LOOP + "{% if loop.first %}{{ '[INST] ' }}" + first
            + "{% else %}" + _write(t.sep + "[INST] ") + "{% endif %}"
            + _write(("text",), " [/INST]")
            + "{% elif text %}" + _write(" ", ("text",), " " + t.end) + "{% endif %}{% endfor %}")


def _turns_jinja(t) -> str:
    """Styles two, single and chat: a role, a text, an end."""
    colon, blank = (":", " ") if t.style != "chat" else ("", "")
    turns = []
    for role, end in zip(t.roles, (t.sep, t.end)):
        text = _write(blank, ("text",), end)
        turns.append(_write(role + colon) + "{% if text %}" + text + "{% endif %}")
    return (_write(t.header, ("system",), t.sep) + LOOP
            + turns[0] + "{% else %}" + turns[1] + "{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}" + _write(t.roles[1] + colon) + "{% endif %}")


def write_jinja(t, bos: bool = False, space: bool = False) -> str:
    """Jinja that writes what data.prompt writes of the data.Template `t`, from texts and from lists
    of parts.

    bos: BOS before it, and, with `space`, the space that LLaMA's tokenizers put before a text."""
    begin = _begin(t, bos, space)
    if t.style == "plain":
        return (CAPTIONED + begin + "{% for m in messages %}{{ said(m) }}"
                "{% if m['role'] == 'assistant' %}" + _write(t.end) + "{% endif %}{% endfor %}")
    system = NO_SYSTEM
    if t.system:
        system = ("{% if not system | trim %}{% set system = " + json.dumps(t.system)
                  + " %}{% endif %}")
    if t.style == "llama2":
        return SAID + SPLIT_SYSTEM + system + begin + _llama2_jinja(t)
    return SAID + SPLIT_SYSTEM + system + begin + _turns_jinja(t)


def chat_template(t, tokenizer=None) -> str | None:
    """A data.Template in Jinja, as transformers' processor renders it: the same text as
    data.prompt, from texts and from lists of parts. In a text <image> is a picture; a first turn
    from "system" replaces the template's system text.

    tokenizer: for a tokenizer that renders alone and adds no BOS; then the text begins with it.
    None for the formats that are not written in Jinja here: transformers then asks for one."""
    if t.style not in ("two", "chat", "llama2", "single", "plain"):
        return None
    if tokenizer is None or not tokenizer.add_bos:
        return write_jinja(t)
    starts_special = False
    if t.style != "plain":
        start = "[INST]" if t.style == "llama2" else opening(t)
        starts_special = tokenizer.begins_special(start)
    space = tokenizer.prefix == "first" and not starts_special
    return write_jinja(t, bos=True, space=space)
