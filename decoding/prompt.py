"""decoding/prompt.py: a talk about pictures becomes the ids that the model goes on from."""
import data
from formats.conversations import IMAGE_TOKEN
from formats.errors import UsageError


class Prompt(list):
    """Ids, and `typed`: the question as a person wrote it. An InstructBLIP's Q-Former reads that,
    for ids may have lost some of it."""

    def __init__(self, ids, typed):
        super().__init__(ids)
        self.typed = typed


def build_prompt(turns, template, words, shown=(0,)):
    """Prompt of a conversation about pictures, ending where the model starts to write.

    turns: texts of person and model alternately, the person's first and last. shown: numbers of
    turns, each for a picture at the front of that turn: (0, 0, 2) is two in the first and one in
    the third. A typed "<image>" is no picture (and gets spaces around it where a picture follows
    later). Raises data.Usage where the template has no place for so many."""
    counts = [list(shown).count(i) for i in range(len(turns))]
    style = data.TEMPLATES[template].style if template in data.TEMPLATES else None
    if style in ("plain", "instruct") and sum(counts) > 1:
        raise UsageError(f"a model with the template {template} takes one picture: give one")
    if style == "minigpt4" and max(counts) > 1:
        raise UsageError(f"a model with the template {template} takes one picture a turn: ask "
                         "about one after the other")
    talk = [{"from": ("human", "gpt")[i % 2], "value": f"{IMAGE_TOKEN}\n" * n + text}
            for i, (n, text) in enumerate(zip(counts, turns))]
    real = []                                           # of each mark: is it a picture?
    for n, text in zip(counts, turns):
        real += [True] * n + [False] * text.count(IMAGE_TOKEN)
    # marks behind the last picture are letters
    last = len(real) - real[::-1].index(True) if True in real else 0
    ids = data.prompt_tokens(talk, template, words, pictures=last)
    if all(real[:last]):
        return Prompt(ids, turns[-1])
    letters, real = words.encode(IMAGE_TOKEN, bos=False, special=False), iter(real)
    return Prompt([i for token in ids for i in
                   ([token] if token != data.IMAGE or next(real) else letters)], turns[-1])


def places(model, ids, sizes=None):
    """Places that the ids take in the model's context; sizes as for `generate`."""
    pictures = ids.count(data.IMAGE)
    if not pictures:
        return len(ids)
    return len(ids) - pictures + sum(map(model.num_image_tokens, sizes or [None] * pictures))
