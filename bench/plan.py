"""bench.plan: the tables in their order, each in a process of its own, within a budget.

A process is killed when it says nothing for `stall` seconds (a kernel that never returns) or when
the budget is used up. If it ends before its table does, another process goes on behind the rows
that are made, and leaves out the candidate at which the first one ended; the cell says why. So one
failure costs one cell, whatever it does to the GPU.

Every row is written when it is made, to <table>.json in the output folder; report.json says at the
end what failed, what was not run and why. Nothing here imports torch.
"""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from formats.files import atomic_write

ROOT = Path(__file__).parents[1]
STALL = 90                              # seconds without a word after which a process is killed
RESTARTS = 30                           # of one table


class Table(NamedTuple):
    """One table. seconds: its part of a whole call of BUDGET; least: the smallest budget in which
    it has a place. `correctness` alone is never cut by its own part, only by the whole budget."""
    name: str
    file: str
    seconds: int
    least: int


BUDGET = 540
# the seconds are guesses until the first call on a GPU; time that one table leaves, later ones get
ON_GPU = (Table("preflight", "preflight", 30, 0), Table("correctness", "correctness", 100, 0),
          Table("step", "models", 120, 100), Table("generate", "models", 90, 280),
          Table("attention", "kernels", 80, 340), Table("elementwise", "kernels", 30, 400),
          Table("head", "kernels", 20, 400), Table("optimizer", "kernels", 20, 400),
          Table("decode", "kernels", 20, 460), Table("curves", "kernels", 20, 500))
ON_CPU = (Table("cpu_machine", "preflight", 10, 0), Table("cpu_step", "cpu", 600, 0),
          Table("cpu_tricks", "tricks", 120, 0), Table("cpu_qlora", "qlora", 600, 0),
          Table("cpu_sums", "cpu", 60, 0), Table("cpu_quantize", "cpu", 60, 0),
          Table("cpu_generate", "cpu", 3000, 0))
UNCUT = ("preflight", "correctness")


class Setting(NamedTuple):
    """How the workers run. mode: gpu, toy, dry or cpu; sm: of the GPU that `dry` stands for.
    planted: [(table, row, candidate, kind)], the failures of a rehearsal."""
    mode: str
    out: Path
    stall: float = STALL
    sm: int = 0
    planted: tuple = ()


def is_failure(cell):
    """A candidate's cell is a number, or why there is none; of a rehearsal: "ran"."""
    return isinstance(cell, str) and cell != "ran"


def failed(row):
    """Why a row of ours is no good, or None. What failed in a baseline is none of ours."""
    if not row.get("ok", True):
        return row.get("error", "wrong")
    for name, cell in row.items():
        if name.startswith("ours") and is_failure(cell):
            return f"{name}: {cell}"
    return None


def line_of(row):
    """A row as it is printed."""
    cells = []
    for name, value in row.items():
        if name != "losses":
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells.append(text if name == "what" else f"{name} {text}")
    return "  ".join(cells)


class TableRun:
    """One table, from its first process to its last row.

    After `run`: rows; wrong, {row: why} of what is no good; missing, why rows are not there."""

    def __init__(self, table, setting, ceiling, head):
        self.table, self.setting, self.ceiling, self.head = table, setting, ceiling, head
        self.rows, self.wrong, self.missing, self.excused = [], {}, "", []
        self.row = self.candidate = None
        self.ended, self.stop = False, ""
        self.began = time.monotonic()

    def run(self, seconds, deadline):
        """seconds: of the table, or None; deadline: of time.monotonic, when all ends."""
        for _ in range(RESTARTS):
            left = None if seconds is None else seconds - (time.monotonic() - self.began)
            why = self.process(left, deadline)
            if self.ended:
                return self
            if self.stop:
                return self.cut(self.stop)
            if time.monotonic() >= deadline:
                return self.cut("the budget is used up")
            if self.row is None:
                self.wrong["the table"] = why
                return self.cut(f"its process ended: {why}")
            if self.candidate is None:          # not to be blamed on one: the row is lost
                self.keep({"what": self.row, "ok": False, "error": why})
            else:
                self.excused.append([self.row, self.candidate, why])
        return self.cut("too many processes ended")

    def cut(self, why):
        """Rows are missing: of correctness that is a failure, of another table a pity."""
        self.missing = why
        if self.table.name in UNCUT:
            self.wrong["cut"] = why
        self.write()
        return self

    def process(self, seconds, deadline):
        """One process of the table; why it ended before the table did."""
        read, write = os.pipe()
        order = {"table": self.table.name, "file": self.table.file, "seconds": seconds,
                 "done": [row["what"] for row in self.rows], "excused": self.excused,
                 "ceiling": self.ceiling, "events": write, "sm": self.setting.sm,
                 "planted": [row for name, *row in self.setting.planted if name == self.table.name]}
        self.row = self.candidate = None
        with open(self.setting.out / f"{self.table.name}.log", "a") as log:
            child = subprocess.Popen([sys.executable, "-m", "bench.worker", json.dumps(order)],
                                     cwd=ROOT, stdout=log, stderr=log, pass_fds=(write,),
                                     env={**os.environ, "BENCH_MODE": self.setting.mode})
        os.close(write)
        try:
            why = self.listen(read, deadline)
            if why:
                child.kill()
            status = child.wait()
        except BaseException:                   # Ctrl-C: no child stays behind
            child.kill()
            raise
        finally:
            os.close(read)
        return why or f"its process ended with status {status}: {self.last_words()}"

    def last_words(self):
        """The last line of the log."""
        text = (self.setting.out / f"{self.table.name}.log").read_text(errors="replace")
        return (text.strip().splitlines() or ["nothing printed"])[-1][:200]

    def listen(self, pipe, deadline):
        """Take in what the process says until it ends; why it has to be killed, or an empty text.

        A process that is dead for the GPU ends by itself and has said why."""
        text, why = b"", ""
        while True:
            patience = min(self.setting.stall, max(0., deadline - time.monotonic()))
            ready, _, _ = select.select([pipe], [], [], patience)
            if not ready:
                over = time.monotonic() >= deadline
                return "the budget is used up" if over else f"hang: silent for {patience:.0f} s"
            more = os.read(pipe, 65536)
            if not more:
                return why
            *lines, text = (text + more).split(b"\n")
            for line in lines:
                why = self.take(json.loads(line)) or why
            if self.stop:
                return self.stop

    def take(self, event):
        """One line of the process; why it is about to end, if it says so."""
        if "row" in event:
            self.row, self.candidate = event["row"], None
        if "candidate" in event:
            self.candidate = event["candidate"]
        if "result" in event:
            self.keep(event["result"])
            self.row = None
        if "cut" in event:
            self.ended = True
            self.cut(f"its seconds are used up before {event['cut']}")
        if "end" in event:
            self.ended = True
        if "stop" in event:
            self.stop = event["stop"]
        return event.get("dead", "")

    def keep(self, row):
        """Print and write a row. Where nothing was computed a figure says only that it ran."""
        if self.setting.mode == "dry":
            row = {name: "ran" if isinstance(value, float) else value for name, value in
                   row.items()}
        if not self.rows:
            print(f"\n{self.table.name}")
        self.rows.append(row)
        if why := failed(row):
            self.wrong[row["what"]] = why
        print(line_of(row), flush=True)
        self.write()

    def write(self):
        """The table as far as it is."""
        text = json.dumps({**self.head, "seconds": round(time.monotonic() - self.began, 1),
                           "missing": self.missing, "rows": self.rows}, indent=1)
        atomic_write(self.setting.out / f"{self.table.name}.json", text + "\n")


def compile_ahead(table, setting, sm, deadline):
    """Compile the kernels of a table into Triton's cache, in a process a core, before it runs:
    they go through its rows on a GPU that is not there (bench/dry.py).

    What is not compiled when the time is over, the table compiles itself."""
    cores = min(16, os.cpu_count() or 1)
    order = {"table": table.name, "file": table.file, "seconds": None, "done": [], "excused": [],
             "ceiling": {}, "sm": sm}
    with open(os.devnull, "w") as nobody, open(setting.out / "compile.log", "a") as log:
        children = []
        for part in range(cores):
            words = json.dumps({**order, "events": nobody.fileno(), "share": [part, cores]})
            children.append(subprocess.Popen(
                [sys.executable, "-m", "bench.worker", words], cwd=ROOT, stdout=log, stderr=log,
                pass_fds=(nobody.fileno(),), env={**os.environ, "BENCH_MODE": "dry"}))
        try:
            for child in children:
                child.wait(max(0., deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"{table.name}: not all kernels were compiled ahead")
        finally:
            for child in children:
                child.kill()                # those that have ended are left alone
                child.wait()


def share(tables, index, left):
    """Seconds that tables[index] may take of those that are left; None: until they are used up."""
    if tables[index].name in UNCUT:
        return None
    return left * tables[index].seconds / sum(table.seconds for table in tables[index:])


class Report:
    """What came of the tables so far."""

    def __init__(self):
        self.failed, self.missing, self.baselines, self.stop = [], [], [], ""

    def add(self, run):
        """A table is through."""
        name = run.table.name
        self.failed += [{"table": name, "row": row, "why": why} for row, why in run.wrong.items()]
        if run.missing:
            self.missing.append({"table": name, "why": run.missing})
        for row in run.rows:
            for cell, value in row.items():
                # a text among figures is a candidate that has none
                if is_failure(value) and cell not in TEXTS and not cell.startswith("ours"):
                    self.baselines.append({"table": name, "row": row["what"], "why":
                                           f"{cell}: {value}"})
        self.stop = self.stop or run.stop

    def show(self):
        for title, rows in (("failed", self.failed), ("not run", self.missing),
                            ("baselines without a figure", self.baselines)):
            for row in rows:
                print(f"{title}: {row['table']}{', ' + row['row'] if 'row' in row else ''}: "
                      f"{row['why']}")
        if not self.failed:
            print("nothing of ours failed")


# cells that are texts and no candidates
TEXTS = ("what", "error", "device", "torch", "triton", "transformers", "flash-attn", "liger-kernel")


def run_plan(tables, setting, budget, ahead=0):
    """Run the tables within `budget` seconds; kernels of `correctness` are compiled ahead in at
    most `ahead` seconds. Returns the Report."""
    setting.out.mkdir(parents=True, exist_ok=True)
    report, ceiling, head = Report(), {}, {"mode": setting.mode}
    deadline = time.monotonic() + budget
    for table in tables:                # nothing of an earlier call may pass for this one's
        for name in (f"{table.name}.log", f"{table.name}.json"):
            (setting.out / name).unlink(missing_ok=True)
    for index, table in enumerate(tables):
        left = deadline - time.monotonic()
        if left < 5:
            report.missing.append({"table": table.name, "why": "the budget is used up"})
            continue
        if ahead and table.name == "correctness" and "sm" in head:
            compile_ahead(table, setting, head["sm"], min(deadline, time.monotonic() + ahead))
        run = TableRun(table, setting, ceiling, head).run(share(tables, index, left), deadline)
        report.add(run)
        for row in run.rows:
            if row["what"] in ("machine", "ceilings"):      # stand in the files of all later tables
                head |= {name: value for name, value in row.items() if name not in ("what", "ok")}
        for short, name in (("copy", "copy GB/s"), ("GEMM", "GEMM TFLOP/s")):
            if isinstance(head.get(name), float):
                ceiling[short] = head[name]
        if report.stop:
            break
    atomic_write(setting.out / "report.json", json.dumps(vars(report), indent=1) + "\n")
    return report
