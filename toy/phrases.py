"""toy.phrases: the texts from which the toy's own CLIP and LLaMA are trained (stage 0).

    CLIP     phrases       "a red star in the top left": one for each object, matched to patches
    LLaMA    notes         the scene as one line of text, in front of questions about it
             word_picture  the scene as 64 phrases laid out as patches are, in place of a picture

`is_true_of` says of which other scenes a phrase is true, too: those are no negatives.

Next: toy/rows.py and toy/parts.py, which train the two models.
"""
import math

from toy.texts import article

# Names of the places in `phrases`, which CLIP learns from. With PLACES it confused places: a small
# MLP read .952 of them off its patches after 2,000 steps; with these 1.000 after 2,400 (500 scenes)
SPOTS = ("top left", "top middle", "top right", "middle left", "centre", "middle right",
         "bottom left", "bottom middle", "bottom right")


def notes(scene, rng):
    """The objects as terse notes in reading order: "top left large red star; plain background.".

    The words come in the order of `description`: what stands before a word there stands before it
    here, so that a lookup by the words before it finds the right object."""
    parts = [f"{t.where} {t.full}" for t in scene.things]
    parts.insert(rng.choice((0, len(parts))), f"{scene.background} background")
    return "; ".join(parts) + "."


def word_picture(scene, rng, side=8):
    """What perfect patch vectors would say, row by row: side * side phrases.

    At the patch nearest to an object's middle: its full note. On the rest of the object: most of
    the note's words. Around it: the background's name."""
    patches = [f"{scene.background} background"] * side ** 2
    for t in scene.things:
        note = f"{t.full} {t.where}".split()            # size colour shape row column
        distances = []
        for i in range(side ** 2):
            middle = ((i % side + .5) / side, (i // side + .5) / side)
            distances.append(math.dist(t.centre, middle))
        for i, distance in enumerate(distances):
            if distance < t.radius + .02:
                patches[i] = " ".join(w for w in note if rng.random() < .9) or note[2]
        patches[distances.index(min(distances))] = " ".join(note)
    return patches


def phrases(scene, rng):
    """[(phrase, fact)]: one for each object and one for the background.

    A fact is (shape, colour, size, place, background) with None for what the phrase does not say.
    Shapes are named most often, because contrastive training learns them last. A colour or a
    background without a name ("": toy/augment.py) is never said."""
    found = []
    for t in scene.things:
        everything = rng.random() < .3
        # `or` draws only if the phrase does not say everything: the order of draws is fixed
        size = t.size if everything or rng.random() < .4 else None
        colour = (t.colour if everything or rng.random() < .6 else None) or None
        shape = t.shape if everything or rng.random() < .85 or not t.colour else None
        place = t.place if everything or rng.random() < .45 else None
        text = article(" ".join(filter(None, (size, colour, shape or "object"))))
        if place is not None:
            text += f" in the {SPOTS[place]}"
        found.append((text, (shape, colour, size, place, None)))
    if scene.background:
        found.append((f"a {scene.background} background", (None,) * 4 + (scene.background,)))
    return found


def is_true_of(fact, scene):
    """Is a fact of `phrases` true of this scene, whichever scene the phrase was written for?"""
    *wanted, background = fact
    if background:
        return scene.background == background
    for t in scene.things:
        pairs = zip(wanted, (t.shape, t.colour, t.size, t.place))
        if all(value is None or value == has for value, has in pairs):
            return True
    return False
