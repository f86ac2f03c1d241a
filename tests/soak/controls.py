"""Controls: each planted fault must be found by the trial that is there for it."""

from soak import memory, trials
from soak.room import different, snapshot, Tally

PLANTS = ("non_atomic_model", "checkpoint_in_place", "unseeded_step", "leak")


class WithPlant:
    """A room whose disturbed runs have a fault of the program in them."""

    def __init__(self, room, plant):
        self.room, self.plant = room, plant

    def __getattr__(self, name):
        return getattr(self.room, name)

    def run(self, kind, out, *more, fault=None, **order):
        return self.room.run(kind, out, *more, fault={**(fault or {}), "plant": self.plant},
                             **order)

    def reference(self, kind, ranks=None):
        """Undisturbed, with the fault in it."""
        key = kind.name, self.plant
        if key not in self.room.references:
            out = self.room.folder / f"planted-{self.plant}"
            result = self.run(kind, out)
            assert result.ended(0), result.errors
            self.room.references[key] = out, snapshot(out), result.seconds
        return self.room.references[key]

    def differences(self, kind, out):
        return different(snapshot(out), self.reference(kind)[1])


def found_by_trial(room, plant, steps=1000):
    """How often the trial that is there for it found the fault."""
    stage2 = room.kinds["stage 2"]
    if plant == "leak":
        return memory.long_run(room, stage2, 0, steps=steps, plant=plant)
    return trials.kill_in_save(WithPlant(room, plant), stage2, 0, points=slice(None))


def run(room, plant, seed):
    """Held: the fault was found."""
    found, tally, faults = found_by_trial(room, plant), Tally(), []
    if not found["failures"]:
        faults = ["it was not found"]
    tally.add(1, faults, plant)
    first = (found["failures"] or ["nothing"])[0]
    return tally.record(note=f"{len(found['failures'])} times, first: {first[:160]}")
