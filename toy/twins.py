"""toy.twins: a scene and its twin, which differs in one thing, with captions that tell them apart.

    Scene --draw_fact--> what a caption says of it, as data
          --pair_of----> the scene and its twin, each with a fact that is false of the other
    fact  --caption_of-> its words
          --is_true----> is it true of a scene, whichever it was written for?

The toy's Q-Former learns from such pairs (trainer/qformer_job.py). Where a batch holds other scenes
drawn at random, colours alone find the right caption, and nothing asks which object is left of
which. A twin has the same colours and shapes, so only a caption's last detail tells the two apart.
"""
import random
from dataclasses import replace

from toy.texts import article, listed, objects
from toy.world import (
    BACKGROUNDS,
    COLOURS,
    hard_negative_scene,
    make_object,
    PLACES,
    SHAPES,
    SIZES,
    split_of,
)

# what a caption may say, and how often: where one object is, where all are (as retrieval asks),
# some of the objects, how two of them lie, and how many there are on which background
KINDS = {"one": 1, "where": 14, "some": 3, "relation": 4, "count": 1}
# "below" is not said: no caption of toy.texts has it
RELATIONS = {"left of": lambda a, b: a.column < b.column,
             "right of": lambda a, b: a.column > b.column,
             "above": lambda a, b: a.row < b.row}


# ------------------------------------------------------------------------------------ the twins

def in_reading_order(scene, things):
    return replace(scene, things=tuple(sorted(things, key=lambda t: t.place)))


def free_places(scene):
    """The places where another object could stand: in a wide picture only its middle row."""
    high, wide = scene.padding
    cells = range(9)
    if high:
        cells = (3, 4, 5)
    if wide:
        cells = (1, 4, 7)
    taken = {t.place for t in scene.things}
    return [place for place in cells if place not in taken]


def change_one(scene, rng):
    """One object gets another colour, shape, size or place."""
    things, at = list(scene.things), rng.randrange(len(scene.things))
    old = things[at]
    shape, colour, size, place = old.shape, old.colour, old.size, old.place
    what = rng.choice(("shape", "shape", "colour", "colour", "place", "place", "size"))
    if what == "shape":
        shape = rng.choice([s for s in SHAPES if s != shape])
    if what == "colour":
        colour = rng.choice([c for c in COLOURS if c != colour])
    if what == "size":
        size = rng.choice([s for s in SIZES if s != size])
    if what == "place":
        place = rng.choice(free_places(scene) or [place])
    new = make_object(rng, shape, colour, size, place)
    if what in ("shape", "colour"):         # it stays exactly where it was
        new = replace(new, centre=old.centre, radius=old.radius)
    things[at] = new
    return in_reading_order(scene, things)


def exchange_places(scene, rng, names=()):
    """Two objects change places. names: of which two; without them any two."""
    pair = [t for t in scene.things if not names or t.name in names]
    if len(pair) < 2:
        return scene
    a, b = rng.sample(pair, 2)
    rest = [t for t in scene.things if t is not a and t is not b]
    return in_reading_order(scene, [*rest, replace(a, place=b.place, centre=b.centre),
                                    replace(b, place=a.place, centre=a.centre)])


def exchange_colours(scene, rng):
    """Two objects change colours: the same colours and shapes, paired otherwise."""
    if len(scene.things) < 2:
        return scene
    a, b = rng.sample(scene.things, 2)
    rest = [t for t in scene.things if t is not a and t is not b]
    return in_reading_order(scene, [*rest, replace(a, colour=b.colour, rgb=b.rgb),
                                    replace(b, colour=a.colour, rgb=a.rgb)])


def change_count(scene, rng):
    """Another background, or one object fewer."""
    if len(scene.things) > 1 and rng.random() < .5:
        gone = rng.choice(scene.things)
        return in_reading_order(scene, [t for t in scene.things if t is not gone])
    return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))


CHANGES = {"where": (exchange_places, exchange_places, exchange_colours, change_one, change_one),
           "one": (exchange_places, exchange_colours, change_one, change_one),
           "some": (exchange_colours, change_one), "relation": (exchange_places,),
           "single": (change_one,), "count": (change_count,)}


def may_be_shown(scene):
    """Is it of the training split, with no name twice?"""
    names = {t.name for t in scene.things}
    return len(names) == len(scene.things) and split_of(scene) == "train"


# ----------------------------------------------------------------------------------- the captions
# A fact is (kind, what is said): of "one", "where" and "some" a tuple of objects, of "relation"
# (name, how, name), of "count" (number, background), of "single" (size, name).

def draw_fact(kind, scene, rng):
    """A fact of this kind that is true of the scene. A lone object has no relation to others: what
    is said of it then is that it is the only one."""
    things = scene.things
    if kind == "where":
        return kind, tuple((t.name, t.place) for t in things)
    if kind == "one":
        chosen = rng.choice(things)
        return kind, ((chosen.name, chosen.place),)
    if kind == "some":
        chosen = sorted(rng.sample(range(len(things)), rng.randint(1, len(things))))
        with_size = rng.random() < .4
        return kind, tuple((things[i].size if with_size else "", things[i].name) for i in chosen)
    if kind == "count":
        return kind, (len(things), scene.background)
    found = [(a.name, how, b.name) for a in things for b in things
             for how, holds in RELATIONS.items() if holds(a, b)]
    if found:
        return kind, rng.choice(found)
    return "single", (things[0].size, things[0].name)


def caption_of(fact):
    """The words of a fact, as toy.texts.captions has them; "there is" says that there may be more.
    """
    kind, said = fact
    if kind == "one":
        return f"there is {article(said[0][0])} in the {PLACES[said[0][1]]}"
    if kind == "where":
        return listed([f"{article(name)} in the {PLACES[place]}" for name, place in said])
    if kind == "some":
        return listed([article(f"{size} {name}".strip()) for size, name in said])
    if kind == "count":
        return f"{objects(said[0])} on a {said[1]} background"
    if kind == "single":
        return f"a single {said[0]} {said[1]}"
    return f"{article(said[0])} {said[1]} {article(said[2])}"


def objects_are_true(fact, scene):
    """[is the n-th object of a fact in the scene, as it says?] of "one", "where" and "some"; of
    other facts []."""
    kind, said = fact
    if kind == "some":
        sizes = {t.name: ("", t.size) for t in scene.things}
        return [size in sizes.get(name, ()) for size, name in said]
    if kind in ("one", "where"):
        stand = {(t.name, t.place) for t in scene.things}
        return [item in stand for item in said]
    return []


def is_true(fact, scene):
    """Is a fact true of a scene? "where", "count" and "single" speak of the whole scene; "one",
    "some" and "relation" of objects that may stand among others."""
    kind, said = fact
    if kind in ("one", "where", "some"):
        is_all = kind != "where" or len(said) == len(scene.things)
        return is_all and all(objects_are_true(fact, scene))
    if kind == "count":
        return said == (len(scene.things), scene.background)
    if kind == "single":
        return said == (scene.things[0].size, scene.things[0].name) and len(scene.things) == 1
    named = {t.name: t for t in scene.things}
    a, how, b = said
    return a in named and b in named and RELATIONS[how](named[a], named[b])


def twin_of(scene, fact, rng):
    """(twin, a fact of the same kind about it), one try; the fact names the same objects if it is a
    relation, which the twin reverses."""
    kind, said = fact
    change = rng.choice(CHANGES[kind])
    if kind != "relation":
        twin = change(scene, rng)
        return twin, draw_fact(kind, twin, rng)
    twin = change(scene, rng, (said[0], said[2]))
    pair = [t for t in twin.things if t.name in (said[0], said[2])]
    return twin, draw_fact(kind, replace(twin, things=tuple(pair)), rng)


def draw_kind(rng):
    return rng.choices(list(KINDS), list(KINDS.values()))[0]


def pair_of(scene, seed, kind=None):
    """[(scene, fact), (its twin, fact)]: two facts of one kind, each false of the other scene.

    kind: one of KINDS; None: drawn. A scene without such a twin is paired with one in which every
    object has another attribute."""
    rng = random.Random(f"pair:{seed}")
    fact = draw_fact(kind or draw_kind(rng), scene, rng)
    for _ in range(20):
        twin, other = twin_of(scene, fact, rng)
        if may_be_shown(twin) and not is_true(fact, twin) and not is_true(other, scene):
            return [(scene, fact), (replace(twin, seed=f"pair:{scene.seed}"), other)]
    twin = hard_negative_scene(scene, seed)
    return [(scene, fact), (twin, draw_fact(fact[0], twin, rng))]
