"""What the soak does, and in which order: a piece of everything first, then the next of each."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from soak import controls, hostile, memory, records, trials

# the stages of the recipes; "two ranks" are forked as torchrun starts them
STAGES = ("stage 1", "stage 2", "LoRA", "packed", "two ranks", "own data", "blip2 stage 1",
          "blip2 stage 2", "minigpt4")
ONE_RANK = tuple(kind for kind in STAGES if kind != "two ranks")
NEEDS_MOUNT = ("full disk", "read-only folder")
# (what, function, kinds of stage, seeds): a seed is one piece of work
TRIALS = (
    ("SIGKILL at a random moment", trials.kill_at_random, STAGES, 8),
    ("SIGKILL in a save", trials.kill_in_save, STAGES, trials.PARTS),
    ("SIGKILL in a resume", trials.kill_in_resume, STAGES, 1),
    ("SIGKILL in --overwrite", trials.kill_in_overwrite, ("stage 2", "own data"), 1),
    ("SIGTERM", trials.sigterm, STAGES, 3),
    ("Ctrl-C", trials.ctrl_c, STAGES, 3),
    ("flipped bit", trials.flipped_bit, STAGES, 3),
    ("flipped bit in the model it starts from", trials.flipped_bit_in_start, ("stage 2",), 5),
    ("full disk", trials.full_disk, ("stage 1", "stage 2", "own data", "blip2 stage 1"),
     trials.PASSES),
    ("read-only folder", trials.read_only, STAGES, 1),
    ("clock set back", trials.clock_set_back, STAGES, 2),
    ("a rank dies", trials.rank_died, ("two ranks",), 4),
    ("2, 1, 2 ranks", trials.other_ranks, ("stage 1", "stage 2", "LoRA", "packed"), 5),
    ("memory of a long run", memory.long_run, ("stage 1", "stage 2"), 1),
    ("memory of answers", memory.many_answers, ("stage 2",), 1),
    ("control", controls.run, controls.PLANTS, 1),
    ("hostile input", hostile.piece, hostile.KINDS, hostile.SEEDS))


@dataclass
class Piece:
    """A row of TRIALS for one kind. first_seed: the next that is to be done."""
    what: str
    function: object
    kind: str
    seeds: int
    first_seed: int


def pieces(only, kind, done):
    """The plan, from the records of what is done."""
    found = []
    for what, function, kinds, seeds in TRIALS:
        for name in kinds:
            if only in (None, what) and kind in (None, name):
                found.append(Piece(what, function, name, seeds,
                                   records.next_seed(done, what, name)))
    return found


def next_piece(plan):
    """The piece of which the least is done; None at the end."""
    can_mount = os.environ.get("SOAK_NAMESPACE") == "yes"
    left = [p for p in plan if p.first_seed < p.seeds]
    left = [p for p in left if can_mount or p.what not in NEEDS_MOUNT]
    return min(left, key=lambda p: p.first_seed / p.seeds, default=None)


def open_room(folder):
    """Import everything, and make the very small models."""
    import faults
    train = faults.warm_up()
    import trainer.build
    from soak.kinds import tiny_stage1
    from soak.room import Room
    trainer.build.new_toy_stage1 = tiny_stage1
    return Room(train, Path(folder))


def do(room, piece):
    """The next piece of this row, as a record."""
    began, seed = time.monotonic(), piece.first_seed
    kind = room.kinds.get(piece.kind, piece.kind)
    found = piece.function(room, kind, seed)
    piece.first_seed += 1
    text = json.dumps(found).replace(str(room.folder), "")      # no path of this machine
    return {"what": piece.what, "kind": piece.kind, "seed": seed, "commit": records.commit(),
            **json.loads(text), "seconds": round(time.monotonic() - began, 1)}
