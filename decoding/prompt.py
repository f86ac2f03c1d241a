r"""decoding/prompt.py: a conversation about pictures becomes the ids that the model continues.

    turns        "What is it?"  "A cat."  "And this?"        image_turns (0, 2): a picture in front
                                                             of the first and of the third turn
    as text      USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: <image>\nAnd this? ASSISTANT:
    as ids       1 3148 .. -200 .. 319 6635 .. 2 3148 .. -200 .. 319 ..         -200: data.IMAGE

What people type is never parsed: a typed <image> or </s> is letters, not a picture or an end. One
exception: a question with several pictures may have a mark for each, and they stand there. There
are never more pictures than were given."""

import data
from decoding.streaming import inner_decode
from formats.conversations import IMAGE_TOKEN
from formats.errors import UsageError, UserError
from formats.llava_rows import marks_its_pictures
from formats.templates import BLIP2


class Prompt(list):
    """Ids, and `typed`: the question as a person wrote it.

    InstructBLIP's Q-Former reads that text, and ids may have lost some of it."""

    def __init__(self, ids, typed):
        super().__init__(ids)
        self.typed = typed


def check_image_count(template, counts):
    """counts: pictures in each turn. Raises UsageError for more than the template allows."""
    style = data.template_of(template).style
    if style in ("plain", "instruct", *BLIP2) and sum(counts) > 1:
        raise UsageError(f"a model with the template {template} takes one picture: give one")
    if style == "minigpt4" and max(counts) > 1:
        raise UsageError(f"a model with the template {template} takes one picture a turn: ask "
                         "about one after the other")


def check_marks(text, count):
    """Raises UsageError for a question with several pictures and marks for some of them."""
    marks = text.count(IMAGE_TOKEN)
    if count > 1 and marks not in (0, count):
        raise UsageError(f"{count} pictures and {marks} {IMAGE_TOKEN} in the question: write one "
                         "for each, in the pictures' order, or none: then all stand before it")


def build_prompt(turns, template, tokenizer, image_turns=(0,)):
    """`Prompt` of a conversation, ending where the model starts to write.

    turns: texts of the person and the model in turn; the first and the last are the person's.
    image_turns: for each picture the number of the turn that it stands in front of; (0, 0, 2) is
    two pictures in the first turn and one in the third. Two and more stand where their marks do,
    if the turn has as many (formats/llava_rows.py).
    A typed "<image>" gets spaces around it where a picture follows later.
    Raises UsageError where the template has no place for so many pictures."""
    counts = [list(image_turns).count(turn) for turn in range(len(turns))]
    check_image_count(template, counts)
    conversation, is_picture = [], []               # is_picture: one entry for each <image>
    for turn, (text, count) in enumerate(zip(turns, counts)):
        check_marks(text, count)
        typed = text.count(IMAGE_TOKEN)
        if marks_its_pictures(text, count):
            typed = 0                               # its marks are its pictures
        else:
            text = f"{IMAGE_TOKEN}\n" * count + text
        conversation.append({"from": ("human", "gpt")[turn % 2], "value": text})
        is_picture += [True] * count + [False] * typed

    # `prompt_tokens` reads the first n <image> as pictures, and those behind them as letters
    n = len(is_picture)
    while n and not is_picture[n - 1]:
        n -= 1
    tokens = data.prompt_tokens(conversation, template, tokenizer, pictures=n)
    if all(is_picture[:n]):
        return Prompt(tokens, turns[-1])

    # a typed <image> in front of a picture is still an image id here: write it as letters
    letters = tokenizer.encode(IMAGE_TOKEN, bos=False, special=False)
    ids, marks = [], iter(is_picture)
    for token in tokens:
        if token == data.IMAGE and not next(marks):
            ids += letters
        else:
            ids.append(token)
    return Prompt(ids, turns[-1])


def prompt_length(model, ids, sizes=None):
    """Positions that the ids take in the model's context. An image id takes as many as the picture
    has vectors; sizes: [(width, height)] of the pictures, if the model cuts them into tiles."""
    images = ids.count(data.IMAGE)
    if not images:
        return len(ids)
    vectors = sum(map(model.num_image_tokens, sizes or [None] * images))
    return len(ids) - images + vectors


def answer_length(model, ids, pixels, sizes, max_new_tokens):
    """How many tokens may follow this prompt: max_new_tokens, or fewer if the context ends.

    Raises BadData if pictures and image ids differ, UserError for a prompt that is empty or fills
    the context."""
    llm = getattr(model, "llm", model)              # a bare llama.Llama is its own language model
    given = 0
    if pixels is not None:                          # with sizes, pixels are tiles
        given = len(pixels) if sizes is None else len(sizes)
    if ids.count(data.IMAGE) != given or given and llm is model:
        raise data.BadData(f"{ids.count(data.IMAGE)} <image> places in a prompt, {given} "
                           "pictures; give one for each place, to a model that can see")
    taken = prompt_length(model, ids, sizes)
    if not 0 < taken < llm.config.context:
        raise UserError(f"the prompt takes {taken} places, the model's context has "
                        f"{llm.config.context} and the answer needs some: shorten it")
    return min(max_new_tokens, llm.config.context - taken)


def typed_questions(prompts):
    """The typed question once for each picture of a batch, or None if a prompt is ids alone:
    then `VLM.embed` reads the questions from the ids."""
    questions = []
    for prompt in prompts:
        images = prompt.count(data.IMAGE)
        if images and not isinstance(prompt, Prompt):
            return None
        if images:
            questions += [prompt.typed] * images
    return questions


def prompt_pieces(model, ids, sizes=None):
    """The prompt token by token, as text: [text, id], and [places] for a picture.

    sizes: as for `prompt_length`."""
    decode, pieces = inner_decode(model.tokenizer, skip_special=False), []
    sizes = iter(sizes or [None] * len(ids))
    for token in ids:
        if token == data.IMAGE:
            pieces.append([model.num_image_tokens(next(sizes))])
            continue
        text = decode([token])
        if not text or "\ufffd" in text:            # part of a character: by its name
            text = model.tokenizer.token(token)
        pieces.append([text, token])
    return pieces
