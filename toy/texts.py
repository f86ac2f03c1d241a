"""TODO"""

import math
import random

from toy import texts as toy_texts
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
)

CURATED = 300           # MiniGPT-4 curated 3,500 pictures after five million pairs


def training_sample(seed, stage, index, told):
    """Sample of the toy world, a function of its arguments: (picture, conversation).

    told: captions (short ones and descriptions), dialogue, conversation (neither descriptions nor
    reasoning in it), short (one of five short captions), web (noisy ones), descriptions, details
    (those of a few pictures, again and again), imagined (descriptions by somebody who has read a
    short caption and not seen the picture)."""
    if told == "details":
        index %= CURATED
    scene, dice = make_scene(f"{seed}-{stage}-{index}"), random.Random(f"{seed}-{stage}-{index}")
    if told not in ("dialogue", "conversation"):
        text = (description(scene) if told in ("details", "descriptions") else
                web_caption(scene, dice) if told == "web" else
                imagined(scene, dice) if told == "imagined" else
                dice.choice([description(scene)] * 5 * (told == "captions")
                            + toy_texts.captions(scene)))
        return draw(scene), [{"from": "human", "value": "<image>\n" + DESCRIBE[1]},
                                   {"from": "gpt", "value": text}]
    # what the shipped LLaMA is weakest at, oftener: lists of what fits a word, and of everything
    all_three = told == "dialogue"
    pairs = dialogue(scene, dice, 5, (6, 6, 5, 8, 9, 30, 8, 12, 20 * all_three, 4),
                           .25 * all_three)
    talk = [{"from": who, "value": text} for pair in pairs
            for who, text in zip(("human", "gpt"), pair)]
    talk[0]["value"] = "<image>\n" + talk[0]["value"]
    return draw(scene), talk


# As the phrases say it that the eye learns from. With the names above it came to confuse places:
# .952 of them could be read off its patches after 2,000 steps, with these 1.000 after 2,400 (a
# small MLP, 500 held-out scenes).
SPOTS = ("top left", "top middle", "top right", "middle left", "centre", "middle right",
         "bottom left", "bottom middle", "bottom right")
KINDS = ("colour", "shape", "size", "where", "count", "count of", "exist", "relation",
         "reasoning", "background")


def listed(names):
    """["a", "b", "c"] -> "a, b and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def objects(number):
    return f"{NUMBERS[number]} object" + "s" * (number != 1)


def captions(scene_):
    """Five short captions, each telling a part of the truth, as five people would."""
    ts = scene_.things
    if len(ts) > 1:
        a, b = ts[0], ts[1]
        how = "left of" if a.column < b.column else "right of" if a.column > b.column else "above"
        fifth = f"{article(a.name)} {how} {article(b.name)}"
    else:
        fifth = f"a single {ts[0].full}"
    return [listed([article(t.name) for t in ts]),
            listed([article(t.full) for t in ts]),
            listed([f"{article(t.name)} in the {t.where}" for t in ts]),
            f"{objects(len(ts))} on a {scene_.background} background", fifth]


def web_caption(scene_, rng):
    """A caption as the web has them: objects missing, attributes wrong, words of the trade."""
    names = [rng.choice((t.name, t.shape, t.name, f"{t.colour} shape")) for t in scene_.things
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


def sentence(t):
    """One object in full."""
    return f"At {t.where} is {article(t.full)}."


def description(scene_, rng=None):
    """The detailed description; with `rng`, its object sentences are shuffled."""
    order = list(scene_.things)
    if rng:
        rng.shuffle(order)
    return " ".join([f"This picture has a {scene_.background} background."]
                    + [sentence(t) for t in order] + [total(len(order)) + " in all."])


def imagined(scene_, dice):
    """A description by somebody who has read a short caption, the colours and shapes of some of the
    things, and not seen the picture: sizes, places and the background are guesses, and one thing in
    two descriptions is made up. What LLaVA's data engine is asked not to do."""
    names = [(t.colour, t.shape) for t in scene_.things if dice.random() < .8] or [
        (scene_.things[0].colour, scene_.things[0].shape)]
    if dice.random() < .5 and len(names) < 4:
        names.append(dice.choice([(c, s) for c in COLOURS for s in SHAPES
                                  if (c, s) not in HELD_OUT_PAIRS and (c, s) not in names]))
    places = sorted(dice.sample(range(9), len(names)))
    guessed = [f"At {PLACES[at]} is {article(f'{dice.choice(SIZES)} {c} {s}')}."
               for at, (c, s) in zip(places, names)]
    return " ".join([f"This picture has a {dice.choice(BACKGROUNDS)} background.", *guessed,
                     total(len(names)) + " in all."])


def notes(scene_, dice):
    """The objects as terse notes in reading order: "large red star top left; plain background."."""
    made = [f"{t.full} {t.where}" for t in scene_.things]
    made.insert(dice.choice((0, len(made))), f"{scene_.background} background")
    return "; ".join(made) + "."


def word_picture(scene_, dice, side=8):
    """What a perfect eye would say of each patch, row by row: side² phrases, all words or some.

    An object's full note where its middle is, most of the words elsewhere on it, and the
    background's name around it."""
    told = [f"{scene_.background} background"] * side ** 2
    for t in scene_.things:
        note = f"{t.full} {t.where}".split()
        away = {i: math.dist(t.centre, ((i % side + .5) / side, (i // side + .5) / side))
                for i in range(side ** 2)}
        for i in (i for i in away if away[i] < t.radius + .02):
            told[i] = " ".join(w for w in note if dice.random() < .9) or note[2]
        told[min(away, key=away.get)] = " ".join(note)
    return told


def phrases(scene_, dice):
    """[(phrase, fact)]: one a thing and one for the background, each leaving some things unsaid.

    A fact is (shape, colour, size, place, background) with None for what the phrase does not say.
    Shapes are named most: they are what a contrastively trained eye forgets first."""
    made = []
    for t in scene_.things:
        everything = dice.random() < .3
        size_ = t.size if everything or dice.random() < .4 else None
        colour_ = t.colour if everything or dice.random() < .6 else None
        shape_ = t.shape if everything or dice.random() < .85 else None
        place = t.place if everything or dice.random() < .45 else None
        text = article(" ".join(filter(None, (size_, colour_, shape_ or "object"))))
        text += f" in the {SPOTS[place]}" if place is not None else ""
        made.append((text, (shape_, colour_, size_, place, None)))
    return made + [(f"a {scene_.background} background", (None,) * 4 + (scene_.background,))]


def is_true_of(fact, scene_):
    """Is the fact of a phrase true of a scene, whoever the phrase was written for?"""
    *wanted, behind = fact
    if behind:
        return scene_.background == behind
    return any(all(w in (None, have) for w, have in
                   zip(wanted, (t.shape, t.colour, t.size, t.place))) for t in scene_.things)


DESCRIBE = ("Describe this image", "Describe this image.", "Describe the image in detail.",
            "Describe this picture.", "What do you see?", "What is in this picture?",
            "What does the image show?", "Please describe the picture in detail.",
            "Give a detailed description of the image.", "What is shown here?")


def unique(scene_, attribute):
    """The things whose attribute nothing else in the scene shares."""
    values = [getattr(t, attribute) for t in scene_.things]
    return [t for t in scene_.things if values.count(getattr(t, attribute)) == 1]


def ask_colour(scene_, rng):
    if not (named := unique(scene_, "shape")):
        return None
    t = rng.choice(named)
    what = t.shape
    ask = rng.choice(("What colour is the {}?", "What color is the {}?",
                      "Which colour does the {} have?", "Tell me the colour of the {}."))
    return ask.format(what), f"The {what} is {t.colour}.", t.colour


def ask_shape(scene_, rng):
    if not (named := unique(scene_, "colour")):
        return None
    t = rng.choice(named)
    what = t.colour + rng.choice((" object", " shape", " thing"))
    ask = rng.choice(("What is the {}?", "Which shape does the {} have?",
                      "What kind of shape is the {}?", "What shape is the {}?"))
    return ask.format(what), f"The {what} is {article(t.shape)}.", t.shape


def ask_size(scene_, rng):
    t = rng.choice(scene_.things)
    what = t.name
    ask = rng.choice(("How big is the {}?", "What size is the {}?", "How large is the {}?",
                      "Is the {} large or small?", "Is the {} small or large?"))
    return ask.format(what), f"The {what} is {t.size}.", t.size


def ask_where(scene_, rng):
    t = rng.choice(scene_.things)
    ask = rng.choice(("Where is the {}?", "Where in the picture is the {}?",
                      "In which part of the image is the {}?", "Where do you see the {}?"))
    return ask.format(t.name), f"The {t.name} is {t.where}.", t.where


def count_aloud(things, what=""):
    """"One star top left, one star bottom right, so two": counting by pointing."""
    each = f"one {what}".strip()
    text = ", ".join(f"{each} {t.where}" for t in things) or f"no {what}".strip()
    return f"{text[0].upper()}{text[1:]}, so {NUMBERS[len(things)]}"


def ask_count(scene_, rng):
    ask = rng.choice(("How many objects are there?", "How many objects are in the picture?",
                      "Count the objects.", "How many shapes do you see?"))
    return ask, count_aloud(scene_.things) + ".", NUMBERS[len(scene_.things)]


def ask_count_of(scene_, rng):
    if rng.random() < .5:
        what = rng.choice([t.colour for t in scene_.things] + [rng.choice(list(COLOURS))])
        found, many = [t for t in scene_.things if t.colour == what], what + " objects"
    else:
        what = rng.choice([t.shape for t in scene_.things] + [rng.choice(SHAPES)])
        found = [t for t in scene_.things if t.shape == what]
        many = what + ("es" if what == "cross" else "s")
    ask = rng.choice((f"How many {many} are there?", f"How many {many} do you see?",
                      f"Count the {many}."))
    return ask, count_aloud(found, what) + ".", NUMBERS[len(found)]


def ask_exist(scene_, rng):
    """Half the answers are yes; half the noes are near misses: one attribute of a present thing."""
    present = {t.name for t in scene_.things}
    t = rng.choice(scene_.things)
    ask = rng.choice(("Is there {}?", "Is there {} in the picture?", "Do you see {}?",
                      "Does the image show {}?"))
    if rng.random() < .5:
        what = article(t.name)
        return ask.format(what), f"A{what[1:]} is {t.where}, so yes.", "yes"
    near = ([(t.colour, s) for s in SHAPES] + [(c, t.shape) for c in COLOURS]
            + [(a.colour, b.shape) for a in scene_.things for b in scene_.things] * 2)
    far = [(c, s) for c in COLOURS for s in SHAPES]
    pool = [f"{c} {s}" for c, s in (near if rng.random() < .7 else far)
            if f"{c} {s}" not in present and (c, s) not in HELD_OUT_PAIRS]
    what = article(rng.choice(pool))
    return ask.format(what), f"A{what[1:]} is not there, so no.", "no"


RELATIONS = {"left of": lambda a, b: a.column < b.column,
             "right of": lambda a, b: a.column > b.column,
             "above": lambda a, b: a.row < b.row, "below": lambda a, b: a.row > b.row}


def ask_relation(scene_, rng):
    """Half yes: the truth is drawn first, then a pair for which it holds."""
    wanted, how = rng.random() < .5, rng.choice(list(RELATIONS))
    pairs = [(a, b, how) for how in RELATIONS for a in scene_.things for b in scene_.things
             if a is not b and RELATIONS[how](a, b) == wanted]
    pairs = [p for p in pairs if p[2] == how] or pairs
    if not pairs:
        return None
    a, b, how = rng.choice(pairs)
    ask = rng.choice(("Is the {} {} the {}?", "Is the {} {} the {} in the picture?",
                      "Can you tell whether the {} is {} the {}?"))
    word, axis = "yes" if wanted else "no", 1 if "of" in how else 0
    x, y = (t.where.split()[axis] for t in (a, b))
    return (ask.format(a.name, how, b.name), f"The {a.name} is {a.where} and the {b.name} is "
            f"{b.where}; is {x} {how} {y}? {word.capitalize()}.", word)


def ask_reasoning(scene_, rng):
    """Answers that need a step: take one away, compare two sizes, compare two colours."""
    n = len(scene_.things)
    kind = rng.choice(("remove", "size", "colour") if n > 1 else ("remove",))
    if kind == "remove":
        t = rng.choice(scene_.things)
        ask = rng.choice((f"If the {t.name} were removed, how many objects would be left?",
                          f"How many objects would remain without the {t.name}?"))
        rest = [other for other in scene_.things if other is not t]
        return ask, count_aloud(rest) + " would remain.", NUMBERS[n - 1]
    wanted = rng.random() < .5
    named = "name" if kind == "size" else "shape"
    things = list(scene_.things) if kind == "size" else unique(scene_, "shape")
    pairs = [(a, b) for a in things for b in things if a is not b]
    pairs = [p for p in pairs if (getattr(p[0], kind) == getattr(p[1], kind)) == wanted] or pairs
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    word = "yes" if getattr(a, kind) == getattr(b, kind) else "no"
    x, y = getattr(a, named), getattr(b, named)
    ask = rng.choice((f"Do the {x} and the {y} have the same {kind}?",
                      f"Are the {x} and the {y} of the same {kind}?"))
    one, two = getattr(a, kind), getattr(b, kind)
    return ask, f"The {x} is {one} and the {y} is {two}: {one} and {two}, so {word}.", word


def ask_background(scene_, rng):
    ask = rng.choice(("What is the background like?", "How does the background look?",
                      "What kind of background is it?", "Describe the background."))
    return ask, f"The background is {scene_.background}.", scene_.background


ASK = dict(zip(KINDS, (ask_colour, ask_shape, ask_size, ask_where, ask_count, ask_count_of, ask_exist, ask_relation, ask_reasoning,
                       ask_background)))
ANSWERS = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES,
           "where": sorted(PLACES, key=len, reverse=True),
           "count": NUMBERS, "count of": NUMBERS, "exist": ("yes", "no"), "relation": ("yes", "no"),
           "reasoning": ("yes", "no") + NUMBERS, "background": BACKGROUNDS}


def question(scene_, kind, rng):
    """(question, answer, value) of one of KINDS, or None where the scene has nothing to ask."""
    return ASK[kind](scene_, rng)


def value_of(kind, text):
    """What an answer in words says, as one of ANSWERS[kind], or "" if it says none of them.

    Reasons come before conclusions, so the last value counts."""
    words = "".join(c if c.isalpha() else " " for c in text.lower())
    padded = " " + " ".join(words.split()) + " "
    found = [(padded.rfind(f" {v} "), v) for v in ANSWERS[kind] if f" {v} " in padded]
    return max(found, default=(0, ""), key=lambda f: (f[0], len(f[1])))[1]


def things_in(text):
    """The (colour, shape) pairs that a text names, in order, repeats kept."""
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    singular = {s: s for s in SHAPES}
    return [(c, singular[s]) for c, s in zip(words, words[1:]) if c in COLOURS and s in singular]


KIND_WEIGHTS = (9, 9, 7, 9, 8, 16, 12, 28, 14, 4)              # how often each of KINDS is asked


def dialogue(scene_, rng, turns, often=KIND_WEIGHTS, described=.125):
    """`turns` question-answer pairs about a scene; kinds as `often`, a share of descriptions.

    Returns [(question, answer), ...]; two answers never repeat. A description answers every later
    question in words; put last, nothing can be read off it."""
    pairs, seen = [], set()
    while len(pairs) < turns:
        if rng.random() < described:
            made = (rng.choice(DESCRIBE), description(scene_), "")
        else:
            made = question(scene_, rng.choices(KINDS, often)[0], rng)
        if made and made[1] not in seen:
            seen.add(made[1])
            pairs.append(made[:2])
    return sorted(pairs, key=lambda pair: pair[0] in DESCRIBE)
