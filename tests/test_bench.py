"""python -m bench: its plan, without a GPU. Rows survive whatever fails; what fails is named."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import correctness, measure, plan, rehearsal
from bench.__main__ import parse
from bench.plan import ON_GPU, run_plan, Setting, TableRun

ROOT = Path(__file__).parents[1]
TABLE = {table.name: table for table in ON_GPU}


def bench(*words, **env):
    return subprocess.run([sys.executable, "-m", "bench", *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def rows_of(folder, table):
    return {row["what"]: row for row in json.loads((folder / f"{table}.json").read_text())["rows"]}


# --------------------------------------------------------------------------------- the plan

@pytest.mark.parametrize("budget, tables", [
    (120, "preflight correctness step"), (240, "preflight correctness step"),
    (300, "preflight correctness step generate"), (540, " ".join(TABLE))])
def test_the_budget_chooses_the_tables(budget, tables):
    assert [table.name for table in parse(["--gpu", "--budget", str(budget)]).plan] == (
        tables.split())


def test_correctness_has_no_share_and_time_that_is_left_goes_to_the_later_tables():
    tables = list(ON_GPU)
    assert plan.share(tables, 1, 500) is None                   # all there is
    shares = [plan.share(tables, i, 300) for i in (2, 3)]
    assert 0 < shares[0] < 300 and shares[1] > shares[0] * .75
    assert plan.share(tables, len(tables) - 1, 77) == 77


@pytest.mark.parametrize("words", [["--gpu", "--budget", "5"], ["--toy", "--rehearse"],
                                   ["--gpu", "no_such_table"], ["--rehearse", "--plant", "fire"]])
def test_a_command_that_makes_no_sense_is_refused(words, capsys):
    with pytest.raises(SystemExit) as error:
        parse(words)
    assert error.value.code == 2 and capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_pytorch_does_not_find_ends_the_call_in_one_line(tmp_path):
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho '525.60.13, NVIDIA A100-SXM4-80GB'\n")
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    for words in (["--gpu"], []):
        done = bench(*words, "--out", tmp_path / "out", PATH=path)
        assert done.returncode == 2 and not done.stdout.strip()
        assert len(done.stderr.strip().splitlines()) == 1
        assert "A100" in done.stderr and ("built without CUDA" in done.stderr
                                          or "525.60.13" in done.stderr)
    # control: where nvidia-smi finds nothing either, that is what is said
    tool.write_text("#!/bin/sh\nexit 9\n")
    done = bench("--gpu", "--out", tmp_path / "out", PATH=path)
    assert done.returncode == 2 and "neither PyTorch nor nvidia-smi" in done.stderr


# ------------------------------------------------------------------------------ correctness

def test_an_error_above_twice_the_specification_s_is_wrong():
    assert correctness.judged([1.9e-3], [1e-3])["ok"]
    assert not correctness.judged([2.1e-3], [1e-3])["ok"]
    assert not correctness.judged([1e-4, 2.1e-3], [1e-3, 1e-3])["ok"]
    for place in ([float("nan"), 1e-3], [1e-3, float("nan")]):          # max() loses one of them
        assert not correctness.judged(place, [1e-3, 1e-3])["ok"]


def test_a_wrong_kernel_is_found(monkeypatch):
    norm = correctness.kernel_file("norm")
    rows = dict(correctness.norm_rows(torch.float32))
    assert rows["rms_norm"]()["ok"]
    right = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda *a: right(*a) * 1.001)
    assert not rows["rms_norm"]()["ok"]


def test_correctness_that_is_cut_is_not_good(tmp_path, capsys):
    tmp_path.mkdir(exist_ok=True)
    run = TableRun(TABLE["correctness"], Setting("toy", tmp_path), {}, {})
    run.run(None, time.monotonic() + 1)
    assert run.missing == "the budget is used up" and "cut" in run.wrong
    # control: of a table of speeds it is no failure
    run = TableRun(TABLE["head"], Setting("toy", tmp_path), {}, {})
    run.run(None, time.monotonic() + 1)
    assert run.missing and not run.wrong


def test_every_kernel_s_every_way_has_a_row():
    names = [name for name, _ in correctness.correctness()]
    assert len(names) == len(set(names))
    for part in ("rms_norm, residual", "int8, 1 rows", "int4, 8 rows", "int4, written out",
                 "attention, itc", "attention, itg", "attention, itm", "32 queries, 257 keys",
                 "from 240 on", "decode, attention_mask and lengths", "loss, frozen head",
                 "weights", "smoothing",
                 "packed", "adamw, stochastic", "adamw, states on the host", "offloaded",
                 "recorded"):
        assert any(part.removeprefix("loss, ") in name for name in names), part


# -------------------------------------------------------------------------------- rehearsal

def test_every_table_runs_in_toy_sizes(tmp_path):
    done = bench("--toy", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for table in ON_GPU:
        found = json.loads((tmp_path / f"{table.name}.json").read_text())
        assert found["rows"] and not found["missing"], table.name
    steps = rows_of(tmp_path, "step")
    losses = [row["loss"] for name, row in steps.items() if name.startswith("stage 1")]
    assert len(steps) == 10 and max(losses) - min(losses) < 1e-3, steps
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["failed"] and not report["missing"]


# the five ways to fail, of ours and of a baseline, in the ten rows of one table
ROWS = [f"{what}, {way}" for what in ("add, RMSNorm", "SwiGLU", "RoPE, q and k", "LayerNorm",
                                      "QuickGELU") for way in ("forward", "both")]
PLANTED = [("elementwise", row, "ours" if i % 2 else "eager", rehearsal.KINDS[i // 2])
           for i, row in enumerate(ROWS)]


def test_each_failure_costs_one_cell(tmp_path, capsys):
    setting = Setting("dry", tmp_path, stall=12, sm=80, planted=tuple(PLANTED))
    report = run_plan([TABLE["elementwise"]], setting, 600)
    rows = rows_of(tmp_path, "elementwise")
    assert list(rows) == ROWS
    for _, row, candidate, kind in PLANTED:
        for name in ("ours", "eager", "compile"):
            if name == candidate:
                assert rehearsal.WORDS[kind] in rows[row][name], (row, name)
            else:
                assert rows[row][name] == "ran", (row, name)
    assert len(report.failed) == 5 and len(report.baselines) == 5 and not report.missing
    assert rehearsal.compare(PLANTED, report) == ([], [])
    # controls: one that nobody planted, one that nobody reported
    silent, strange = rehearsal.compare(PLANTED[1:], report)
    assert not silent and len(strange) == 1 and ROWS[0] in strange[0]
    report.failed.pop()
    silent, strange = rehearsal.compare(PLANTED, report)
    assert len(silent) == 1 and not strange


def test_a_rehearsal_without_failures_ends_well_and_with_one_it_does_not(tmp_path):
    words = ("--rehearse", "--sm", "90", "--out", tmp_path, "elementwise")
    done = bench(*words, "--plant", "none")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "0 others" in done.stdout and (tmp_path / "sm_90/elementwise.json").exists()
    done = bench(*words, "--plant", "resources", "ptxas")
    assert done.returncode == 1 and "2 of 2 planted failures reported, 0 others" in done.stdout


def test_the_planted_failures_of_a_rehearsal_stand_in_the_plan():
    kinds = [(kind, candidate.startswith("ours")) for *_, candidate, kind in rehearsal.PLANTED]
    assert sorted(kinds) == sorted((k, ours) for k in rehearsal.KINDS for ours in (True, False))
    assert {table for table, *_ in rehearsal.PLANTED} <= set(TABLE)


def test_triton_s_errors_are_failures_and_no_runtime_errors():
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    for error in (OutOfResources, PTXASError, CompilationError):
        assert issubclass(error, measure.FAILURES) and not issubclass(error, RuntimeError)
    assert not issubclass(KeyboardInterrupt, measure.FAILURES)


def test_a_failed_baseline_leaves_nothing_behind():
    x = torch.ones(3, requires_grad=True)

    def fails():
        (x * 2).sum().backward()
        raise torch.OutOfMemoryError("CUDA out of memory")

    def clean():
        x.grad = None
    found = measure.race({"theirs": fails, "ours": lambda: None}, clean=clean)
    assert found["theirs"] == "OOM" and isinstance(found["ours"], float) and x.grad is None
