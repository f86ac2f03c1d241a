"""bench.worker: one table in a process of its own, started by bench/plan.py.

    python -m bench.worker ORDER        JSON: table, file, seconds, done, excused, ceiling, events

A table is a generator of (name of a row, function that makes the row, a dict). What happens goes,
a line of JSON each, into the pipe `events`, whose other end the plan reads:

    {"row": name}               this row is begun
    {"candidate": name}         this candidate of it runs; null: it has returned
    {"result": {...}}           the row is made
    {"dead": why}               the GPU does not answer any more: the process ends
    {"cut": name}               its seconds are used up: this row and the later ones are not run
    {"end": true}               all rows are through

What is printed goes into the log of the table.
"""

import importlib
import json
import os
import sys
import time


def run_rows(table, order, measure):
    """The table's rows, one after the other, but those that are done."""
    worker = measure.worker
    start, (part, parts) = time.monotonic(), order.get("share", (0, 1))
    for number, item in enumerate(table()):
        if isinstance(item, dict):      # a row that is made already, of a table of the CPU
            worker.say({"result": item})
            continue
        name, make = item
        if name in order["done"] or number % parts != part:
            continue
        if order["seconds"] is not None and time.monotonic() - start > order["seconds"]:
            worker.say({"cut": name})
            return
        worker.row = name
        worker.say({"row": name})
        try:
            row = make()
        except measure.Failed as why:
            row = {"ok": False, "error": str(why)}
        except measure.FAILURES as error:
            row = {"ok": False, "error": measure.short(error)}
            error.__traceback__ = None
            measure.recover(row["error"])
        worker.say({"result": {"what": name, **row}})
    worker.say({"end": True})


def main(order):
    """One table."""
    if os.environ.get("BENCH_MODE") == "dry":
        from bench import dry           # before anything of kernels/ is imported
        dry.install(order["sm"])
    import torch
    if os.environ.get("BENCH_MODE") == "cpu":
        torch.set_num_threads(1)

    from bench import measure
    worker = measure.worker
    pipe = os.fdopen(order["events"], "w", buffering=1)
    worker.say = lambda line: print(json.dumps(line), file=pipe, flush=True)
    worker.excused = {(row, candidate): why for row, candidate, why in order["excused"]}
    measure.CEILING.update(order["ceiling"])
    if order.get("planted"):
        worker.planted = dry.failing(order["planted"])
    torch.manual_seed(0)
    table = getattr(importlib.import_module(f"bench.{order['file']}"), order["table"])
    run_rows(table, order, measure)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
