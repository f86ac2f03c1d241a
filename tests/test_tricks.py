"""bench/tricks.py: what it counts as live memory, and what its rows switch on."""

import torch

import train
from bench import tricks
from bench.plan import ON_CPU
from bench.tricks import LiveBytes, storages, TRICKS


def test_the_peak_is_of_what_lives_at_once():
    known = torch.ones(1000)
    with LiveBytes(storages([known])) as live:
        a = known + 1                           # 4,000 bytes
        b = a.view(10, 100)[3:]                 # no memory of its own
        c = a + b[0, 0]                         # 8,000
        del a, b
        d = c + 1                               # 8,000: the first is gone
        known.add_(1)
    assert live.most == 8000
    with LiveBytes({}) as live:
        kept = [torch.ones(1000) + i for i in range(5)]
        e = kept[0] * d
    # what ones() made goes each time, after its sum is there; then the product is the sixth
    assert live.most == 6 * 4000 and len(e) == 1000


def test_backward_is_seen():
    """Five products keep their inputs until backward, which makes gradients of as many bytes."""
    def most(recompute):
        x, w = torch.ones(10, 100), torch.ones(100, 100, requires_grad=True)

        def chain(x):
            for _ in range(5):
                x = (x @ w).exp()
            return x
        with LiveBytes(storages([x, w])) as live:
            if recompute:
                y = torch.utils.checkpoint.checkpoint(chain, x, use_reentrant=False)
            else:
                y = chain(x)
            at_forward = live.most
            y.sum().backward()
        return at_forward, live.most
    plain, again = most(False), most(True)
    assert plain[0] >= 5 * 4000 > again[0] and plain[1] > plain[0] + 40000      # w's gradient
    assert again[1] > 40000


def test_each_row_is_a_row_before_and_one_change():
    base = None
    for what, argv in TRICKS.items():
        args = train.parse_args(["--stage", "2", "--from", "none", "--batch", "12", *argv])
        if not what.startswith("+"):
            base = argv
        assert argv[:len(base)] == base and (argv != base) == what.startswith("+"), what
        assert args.row.batch == 12
    assert sum(what.startswith("+") for what in TRICKS) >= 10


def test_the_tables_of_the_cpu_are_there():
    import importlib
    for table in ON_CPU:
        assert callable(getattr(importlib.import_module(f"bench.{table.file}"), table.name))
    assert {"cpu_tricks", "cpu_qlora"} <= {table.name for table in ON_CPU}


def test_a_row_is_measured(monkeypatch):
    """Gradients and states on the host are not counted as held; the same tokens pass."""
    keep = ("the same inside backward, 4 micro-batches", "+ both")
    monkeypatch.setattr(tricks, "TRICKS", {what: TRICKS[what] for what in keep})
    monkeypatch.setattr(tricks, "TIMED", 1)
    monkeypatch.setattr(tricks, "WARM", 1)
    plain, both = tricks.cpu_tricks()
    assert plain["micro-batches"] == both["micro-batches"] == 4 and plain["host MB"] == 0
    sums = both["held MB"] + both["host MB"] - plain["held MB"]
    assert 2.3 < sums < 2.7                     # bf16, of 1.24 M weights that train
    assert both["held MB"] < plain["held MB"] and both["peak MB"] < plain["peak MB"]
