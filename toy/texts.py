"""toy.texts: what can be said and asked about a scene, and how an answer in words is read again.

    Scene --captions, description, web_caption, imagined--> a caption: true, noisy or guessed
          --question, dialogue----------------------------> (question, answer, value) of ten kinds
    words --value_of, things_in---------------------------> the value or the objects that they name

Everything is a function of the scene and a random.Random, so that a seed decides every word.
`training_sample` is what train.py reads when no data file is given.

Next: toy/phrases.py, the texts for the toy's own CLIP and LLaMA; evaluate/toy.py, scores.
"""
import random

from toy.world import (
    BACKGROUNDS,
    COLOURS,
    draw,
    HELD_OUT_PAIRS,
    make_scene,
    NUMBERS,
    PLACES,
    SHAPES,
    SIZES,
    training_scene,
)

CURATED = 1200          # MiniGPT-4 curated 3,500 pictures after five million pairs
KINDS = ("colour", "shape", "size", "where", "count", "count of", "exist", "relation",
         "reasoning", "background")
KIND_WEIGHTS = (9, 9, 7, 9, 8, 16, 12, 28, 14, 4)       # how often each of KINDS is asked
DESCRIBE = ("Describe this image", "Describe this image.", "Describe the image in detail.",
            "Describe this picture.", "What do you see?", "What is in this picture?",
            "What does the image show?", "Please describe the picture in detail.",
            "Give a detailed description of the image.", "What is shown here?")


# ---------------------------------------------------------------------------------- captions

def listed(names):
    """["a", "b", "c"] -> "a, b and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def objects(number):
    return f"{NUMBERS[number]} object" if number == 1 else f"{NUMBERS[number]} objects"


def captions(scene):
    """Five short captions, each with a part of the truth, as five people would write them."""
    ts = scene.things
    fifth = f"a single {ts[0].full}"
    if len(ts) > 1:
        a, b, how = ts[0], ts[1], "above"       # reading order: a is never below b
        if a.column != b.column:
            how = "left of" if a.column < b.column else "right of"
        fifth = f"{article(a.name)} {how} {article(b.name)}"
    return [listed([article(t.name) for t in ts]),
            listed([article(t.full) for t in ts]),
            listed([f"{article(t.name)} in the {t.where}" for t in ts]),
            f"{objects(len(ts))} on a {scene.background} background", fifth]


def web_caption(scene, rng):
    """A caption as the web has them: objects missing, attributes wrong, words of the trade."""
    names = [rng.choice((t.name, t.shape, t.name, f"{t.colour} shape")) for t in scene.things
             if rng.random() < .6] or ["shapes"]
    if rng.random() < .15:
        names[0] = f"{rng.choice(list(COLOURS))} thing"
    tail = rng.sample(("free download", "stock photo", "wallpaper hd", "clipart", "vector",
                       "for sale", "best price", "new 2 0 1 8", "icon set"), rng.randint(1, 3))
    rng.shuffle(names)
    return " ".join(names + tail)


def total(number):
    """The sentence that counts: 2 -> "There are two objects"."""
    return f"There {'is' if number == 1 else 'are'} {objects(number)}"


def describe(background, sentences):
    """A detailed description from its parts."""
    return " ".join([f"This picture has a {background} background.", *sentences,
                     f"{total(len(sentences))} in all."])


def description(scene, rng=None):
    """The detailed description; with `rng`, its object sentences are shuffled."""
    order = list(scene.things)
    if rng:
        rng.shuffle(order)
    return describe(scene.background, [f"At {t.where} is {article(t.full)}." for t in order])


def imagined(scene, rng):
    """A description by an author who has read a short caption and has not seen the picture.

    The author knows the colours and shapes of some objects. Sizes, places and the background are
    guessed, and half of the descriptions contain one invented object. It is what LLaVA's data
    engine asks its language model not to write."""
    names = [(t.colour, t.shape) for t in scene.things if rng.random() < .8]
    names = names or [(scene.things[0].colour, scene.things[0].shape)]
    if rng.random() < .5 and len(names) < 4:
        names.append(rng.choice([(c, s) for c in COLOURS for s in SHAPES
                                 if (c, s) not in HELD_OUT_PAIRS and (c, s) not in names]))
    places = sorted(rng.sample(range(9), len(names)))
    guesses = []
    for place, (colour, shape) in zip(places, names):
        guesses.append(f"At {PLACES[place]} is {article(f'{rng.choice(SIZES)} {colour} {shape}')}.")
    return describe(rng.choice(BACKGROUNDS), guesses)       # after the sizes: the order of draws


# ------------------------------------------- questions: (question, answer, value) or None

def unique(scene, attribute):
    """The things whose attribute nothing else in the scene shares."""
    values = [getattr(t, attribute) for t in scene.things]
    return [t for t in scene.things if values.count(getattr(t, attribute)) == 1]


def ask_colour(scene, rng):
    candidates = unique(scene, "shape")
    if not candidates:
        return None
    t = rng.choice(candidates)
    ask = rng.choice(("What colour is the {}?", "What color is the {}?",
                      "Which colour does the {} have?", "Tell me the colour of the {}."))
    return ask.format(t.shape), f"The {t.shape} is {t.colour}.", t.colour


def ask_shape(scene, rng):
    candidates = unique(scene, "colour")
    if not candidates:
        return None
    t = rng.choice(candidates)
    what = t.colour + rng.choice((" object", " shape", " thing"))
    ask = rng.choice(("What is the {}?", "Which shape does the {} have?",
                      "What kind of shape is the {}?", "What shape is the {}?"))
    return ask.format(what), f"The {what} is {article(t.shape)}.", t.shape


def ask_size(scene, rng):
    t = rng.choice(scene.things)
    ask = rng.choice(("How big is the {}?", "What size is the {}?", "How large is the {}?",
                      "Is the {} large or small?", "Is the {} small or large?"))
    return ask.format(t.name), f"The {t.name} is {t.size}.", t.size


def ask_where(scene, rng):
    t = rng.choice(scene.things)
    ask = rng.choice(("Where is the {}?", "Where in the picture is the {}?",
                      "In which part of the image is the {}?", "Where do you see the {}?"))
    return ask.format(t.name), f"The {t.name} is {t.where}.", t.where


def count_aloud(things, removed=None):
    """"One top left, not middle left, one bottom right, so two": counting by pointing.

    The reason comes before the number, and it goes through all objects in reading order, so that
    each new token follows from the ones before it."""
    parts = [f"{'not' if t is removed else 'one'} {t.where}" for t in things]
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}, so {NUMBERS[len(things) - (removed is not None)]}"


def count_those(things, attribute, what):
    """"Top left star one, middle left circle, bottom right star two, so two": the stars."""
    number, parts = 0, []
    for t in things:
        text = f"{t.where} {getattr(t, attribute)}"
        if getattr(t, attribute) == what:
            number += 1
            text += f" {NUMBERS[number]}"
        parts.append(text)
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}, so {NUMBERS[number]}"


def compare(one, two):
    """"red and blue differ". Its words stand next to each other: a small model that had to compare
    colours six words apart answered yes to every pair, after 6,000 steps."""
    return f"{one} and {two} {'agree' if one == two else 'differ'}"


def ask_count(scene, rng):
    ask = rng.choice(("How many objects are there?", "How many objects are in the picture?",
                      "Count the objects.", "How many shapes do you see?"))
    return ask, count_aloud(scene.things) + ".", NUMBERS[len(scene.things)]


def ask_count_of(scene, rng):
    if rng.random() < .5:
        attribute, values, many = "colour", list(COLOURS), "{} objects"
    else:
        attribute, values, many = "shape", SHAPES, "{}s"
    what = rng.choice([getattr(t, attribute) for t in scene.things] + [rng.choice(values)])
    many = "crosses" if what == "cross" else many.format(what)
    ask = rng.choice((f"How many {many} are there?", f"How many {many} do you see?",
                      f"Count the {many}."))
    number = sum(getattr(t, attribute) == what for t in scene.things)
    return ask, count_those(scene.things, attribute, what) + ".", NUMBERS[number]


def ask_exist(scene, rng):
    """Half the answers are yes; most noes are near misses: one attribute of a present thing."""
    present = {t.name for t in scene.things}
    t = rng.choice(scene.things)
    ask = rng.choice(("Is there {}?", "Is there {} in the picture?", "Do you see {}?",
                      "Does the image show {}?"))
    if rng.random() < .5:
        what = article(t.name)
        return ask.format(what), f"A{what[1:]} is {t.where}, so yes.", "yes"
    mixed = [(a.colour, b.shape) for a in scene.things for b in scene.things]
    near = [(t.colour, s) for s in SHAPES] + [(c, t.shape) for c in COLOURS] + mixed * 2
    pairs = near if rng.random() < .7 else [(c, s) for c in COLOURS for s in SHAPES]
    pool = [f"{c} {s}" for c, s in pairs
            if f"{c} {s}" not in present and (c, s) not in HELD_OUT_PAIRS]
    what = article(rng.choice(pool))
    return ask.format(what), f"A{what[1:]} is not there, so no.", "no"


RELATIONS = {"left of": lambda a, b: a.column < b.column,
             "right of": lambda a, b: a.column > b.column,
             "above": lambda a, b: a.row < b.row, "below": lambda a, b: a.row > b.row}


def ask_relation(scene, rng):
    """Half yes: the truth is drawn first, then a pair for which it holds."""
    wanted, drawn = rng.random() < .5, rng.choice(list(RELATIONS))
    pairs = [(a, b, how) for how in RELATIONS for a in scene.things for b in scene.things
             if a is not b and RELATIONS[how](a, b) == wanted]
    pairs = [pair for pair in pairs if pair[2] == drawn] or pairs
    if not pairs:
        return None
    a, b, how = rng.choice(pairs)
    ask = rng.choice(("Is the {} {} the {}?", "Is the {} {} the {} in the picture?",
                      "Can you tell whether the {} is {} the {}?"))
    word = "yes" if wanted else "no"
    axis = 1 if "of" in how else 0                      # "top left": the row, then the column
    x, y = a.where.split()[axis], b.where.split()[axis]
    return (ask.format(a.name, how, b.name), f"The {a.name} is {a.where} and the {b.name} is "
            f"{b.where}; is {x} {how} {y}? {word.capitalize()}.", word)


def ask_reasoning(scene, rng):
    """Answers that need a step: take one away, compare two sizes, compare two colours."""
    n = len(scene.things)
    kind = rng.choice(("remove", "size", "colour") if n > 1 else ("remove",))
    if kind == "remove":
        t = rng.choice(scene.things)
        ask = rng.choice((f"If the {t.name} were removed, how many objects would be left?",
                          f"How many objects would remain without the {t.name}?"))
        return ask, count_aloud(scene.things, t) + " would remain.", NUMBERS[n - 1]
    wanted = rng.random() < .5
    # a question about a colour must not name the colour: it names the shape, if that is unique
    named, things = "name", list(scene.things)
    if kind == "colour":
        named, things = "shape", unique(scene, "shape")
    pairs = [(a, b) for a in things for b in things if a is not b]
    pairs = [(a, b) for a, b in pairs if (getattr(a, kind) == getattr(b, kind)) == wanted] or pairs
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    x, y, one, two = getattr(a, named), getattr(b, named), getattr(a, kind), getattr(b, kind)
    word = "yes" if one == two else "no"
    ask = rng.choice((f"Do the {x} and the {y} have the same {kind}?",
                      f"Are the {x} and the {y} of the same {kind}?"))
    return ask, f"The {x} is {one} and the {y} is {two}: {compare(one, two)}, so {word}.", word


def ask_background(scene, rng):
    ask = rng.choice(("What is the background like?", "How does the background look?",
                      "What kind of background is it?", "Describe the background."))
    return ask, f"The background is {scene.background}.", scene.background


ASK = dict(zip(KINDS, (ask_colour, ask_shape, ask_size, ask_where, ask_count, ask_count_of,
                       ask_exist, ask_relation, ask_reasoning, ask_background)))
ANSWERS = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES,
           "where": sorted(PLACES, key=len, reverse=True),
           "count": NUMBERS, "count of": NUMBERS, "exist": ("yes", "no"), "relation": ("yes", "no"),
           "reasoning": ("yes", "no") + NUMBERS, "background": BACKGROUNDS}


def question(scene, kind, rng):
    """(question, answer, value) of one of KINDS, or None where the scene has nothing to ask."""
    return ASK[kind](scene, rng)


def dialogue(scene, rng, turns, weights=KIND_WEIGHTS, described=.125):
    """[(question, answer)]: `turns` pairs; kinds by `weights`, a share `described` of descriptions.

    No answer comes twice. Descriptions come last: after one, the model could copy answers from
    its words instead of reading the picture."""
    pairs, known = [], set()
    while len(pairs) < turns:
        if rng.random() < described:
            pair = (rng.choice(DESCRIBE), description(scene))
        else:
            pair = question(scene, rng.choices(KINDS, weights)[0], rng)
        if pair and pair[1] not in known:
            known.add(pair[1])
            pairs.append(pair[:2])
    return sorted(pairs, key=lambda pair: pair[0] in DESCRIBE)


# --------------------------------------------------------------------------- reading answers

def value_of(kind, text):
    """The value of an answer in words, as one of ANSWERS[kind], or "" if it has none of them.

    Reasons come before conclusions, so the last value counts."""
    letters = "".join(c if c.isalpha() else " " for c in text.lower())
    padded = " " + " ".join(letters.split()) + " "
    found = [(padded.rfind(f" {v} "), v) for v in ANSWERS[kind] if f" {v} " in padded]
    return max(found, default=(0, ""), key=lambda f: (f[0], len(f[1])))[1]


def things_in(text):
    """The (colour, shape) pairs that a text names, in order, repeats kept."""
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    return [(c, s) for c, s in zip(words, words[1:]) if c in COLOURS and s in SHAPES]


# -------------------------------------------------------------------------- training samples

def talk_of(pairs):
    """[(question, answer)] -> a conversation in LLaVA's layout, the picture in its first turn."""
    talk = []
    for ask, answer in pairs:
        talk += [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
    talk[0]["value"] = "<image>\n" + talk[0]["value"]
    return talk


def captions_or_descriptions(scene, rng):
    return rng.choice([description(scene)] * 5 + captions(scene))


# What the toy world says of its pictures in training: (scene, rng) -> [(question, answer)].
# The weights ask most often what the shipped LLaMA does worst: "count of", and reasoning.
CAPTION_STYLES = {
    "captions": lambda scene, rng: [(DESCRIBE[1], captions_or_descriptions(scene, rng))],
    "short": lambda scene, rng: [(DESCRIBE[1], rng.choice(captions(scene)))],
    "web": lambda scene, rng: [(DESCRIBE[1], web_caption(scene, rng))],
    # pairs from the web: every second text says what is there. Of "web" alone the linear layer of a
    # MiniGPT-4 learned so little that its 200 steps of stage 2 named half of the objects
    "mixed": lambda scene, rng: [(DESCRIBE[1], web_caption(scene, rng) if rng.random() < .5
                                  else captions_or_descriptions(scene, rng))],
    "descriptions": lambda scene, rng: [(DESCRIBE[1], description(scene))],
    "details": lambda scene, rng: [(DESCRIBE[1], description(scene))],  # of CURATED pictures only
    "imagined": lambda scene, rng: [(DESCRIBE[1], imagined(scene, rng))],
    "dialogue": lambda scene, rng: dialogue(scene, rng, 5, (6, 6, 5, 8, 9, 30, 8, 12, 20, 4), .25),
    # neither descriptions nor reasoning
    "conversation": lambda scene, rng: dialogue(
        scene, rng, 5, (6, 6, 5, 8, 9, 30, 8, 12, 0, 4), 0)}


def training_sample(seed, stage, index, caption_style):
    """Sample of the toy world, a function of its arguments: (picture, conversation)."""
    if caption_style == "details":
        index %= CURATED                                # the same few pictures again and again
    name = f"{seed}-{stage}-{index}"
    scene, rng = training_scene(name), random.Random(name)
    return draw(scene), talk_of(CAPTION_STYLES[caption_style](scene, rng))


if __name__ == "__main__":                              # python -m toy.world comes here, too
    shown, rng = make_scene(3, count=3), random.Random(0)
    print("object set   ", shown.key)
    for t in shown.things:
        print(f"box          {t.name}: {list(t.box)}")
    for text in captions(shown):
        print("caption      ", text)
    print("web caption  ", web_caption(shown, rng))
    print("description  ", description(shown))
    for kind in KINDS:
        print(f"{kind:<12} ", " -> ".join(question(shown, kind, rng)[:2]))
