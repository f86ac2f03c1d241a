"""train.py: what learns, what is saved, what a kill, a full disk or a wrong flag can do to a run.

Runs that end in a kill or in an exit code are children of one server process, which has imported
torch once and forks: a fraction of a second each (tests/faults.py).
"""
import errno
import fcntl
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import faults
import projector
import train
from formats.checkpoints import save_weights
from formats.errors import UsageError
from toy.texts import training_sample
from train import parse_args as parse
from trainer import loader
from trainer.build import new_vlm
from trainer.loader import Samples
from trainer.run_folder import Run
from trainer.schedules import cosine
from tiny import write_parts

HERE = Path(__file__).resolve().parents[1]
STEPS = 6


# ------------------------------------------------------------------------------ the tests' side

@pytest.fixture(scope="session")
def server():
    process = subprocess.Popen([sys.executable, faults.__file__], stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folder of a CLIP and a LLaMA that know nothing and are very small."""
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def flags(parts):
    """Flags of a short run; stage 2 from nothing, because it trains the most."""
    def make(out, *more, stage=2, steps=STEPS, lone=True):
        start = ["--from", "none"] if stage == 2 and lone else []
        place = ["--output-dir", str(out)] if out else []
        new = ["--vision", str(parts / "clip"), "--llm", str(parts / "llama")]
        return ["--stage", str(stage), *new * (stage == 1 or lone), "--threads", "1",
                "--batch", "2", "--steps", str(steps), "--save-every", "2", *start, *place,
                *map(str, more)]
    return make


@pytest.fixture
def run(server, tmp_path):
    """A run in a child: .code (negative: killed by that signal), .out and .err, its texts."""
    def go(argv, kill_after=0, cwd=tmp_path, **fault):
        log = str(tmp_path / "child")
        server.stdin.write(json.dumps({"argv": argv, "fault": fault, "log": log, "cwd": str(cwd),
                                       "kill_after": kill_after}) + "\n")
        server.stdin.flush()
        (code,) = json.loads(server.stdout.readline())
        out, err = (Path(f"{log}.{name}").read_text() for name in ("out", "err"))
        assert "Traceback" not in err, err
        return SimpleNamespace(code=code, out=out, err=err)
    return go


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch):
    """Runs inside this process set threads, signals and determinism: put them back."""
    monkeypatch.setattr(train, "generate", lambda *a, **more: iter((5, 6, 7)))
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in
                                                  (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def here(argv):
    """A run inside this process."""
    return train.main(parse(argv))


def sha(out):
    return hashlib.sha256((out / "model/model.safetensors").read_bytes()).hexdigest()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(result, code, *words):
    """The run ended with this code and one line that says these words."""
    assert result.code == code, (result.code, result.err)
    errors = [x for x in result.err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and errors == result.err.splitlines()[-1:], result.err
    for word in words:
        assert word in errors[0], errors[0]


_kept = {}


@pytest.fixture
def undisturbed(flags, run, tmp_path_factory):
    """sha256 of the finished weights of a run that nothing disturbed, by stage and steps."""
    def of(stage=2, steps=STEPS):
        if (stage, steps) not in _kept:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            assert run(flags(out, stage=stage, steps=steps)).code == 0
            _kept[stage, steps] = sha(out)
        return _kept[stage, steps]
    return of


@pytest.fixture
def interrupted(flags, run, tmp_path_factory, tmp_path):
    """A copy of a run that was stopped after step 4 of 6; it has checkpoints 2 and 4."""
    if "interrupted" not in _kept:
        out = tmp_path_factory.mktemp("interrupted") / "run"
        assert run(flags(out), signal=(3, signal.SIGTERM)).code == 143
        _kept["interrupted"] = out
    shutil.copytree(_kept["interrupted"], tmp_path / "run")
    assert [p.name for p in sorted((tmp_path / "run").glob("step-*"))] == ["step-000002",
                                                                          "step-000004"]
    return tmp_path / "run"


# ----------------------------------------------------------------------------------- what learns

@pytest.mark.parametrize("stage, learns", [(1, ("projector.",)), (2, ("projector.", "llm."))])
def test_frozen_stays_frozen_and_the_rest_moves(flags, tmp_path, stage, learns):
    args = parse(flags(tmp_path, "--warmup", 0, stage=stage, steps=1))
    job = train.vlm_job(args, tmp_path, "cpu")
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    assert train.train_loop(job, Run(tmp_path, args)) == 0
    for name, p in job.model.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith(learns)), name


def test_the_finished_model_has_the_towers_own_bits(flags, parts, tmp_path):
    assert here(flags(tmp_path / "run", steps=2)) == 0
    made = data.load_weights(tmp_path / "run/model")
    tower = data.load_weights(parts / "clip")
    names = [n for n in tower if n.startswith("vision_model.")]
    assert names and all(torch.equal(made["vision_tower." + n], tower[n]) for n in names)
    assert not torch.equal(made["language_model.model.norm.weight"],
                           data.load_weights(parts / "llama")["model.norm.weight"])


def test_only_supervised_rows_reach_the_output_head(flags, tmp_path, monkeypatch):
    rows = []

    def counted(x, head, labels, *rest):
        rows.append(len(x))
        assert (labels != data.IGNORE).all()
        return real(x, head, labels, *rest)
    real = projector.linear_cross_entropy
    monkeypatch.setattr(projector, "linear_cross_entropy", counted)
    args = parse(flags(tmp_path, "--dtype", "fp32"))
    job = train.vlm_job(args, tmp_path, "cpu")
    (micro,) = job.batches(0)
    job.loss(micro)
    supervised = int((micro[1] != data.IGNORE).sum())
    assert rows == [supervised] and 0 < supervised < micro[1].numel() / 2


def follows_the_recipe(factor, steps, warmup):
    """From 0 in a line to 1 at ceil(warmup · steps), then half a cosine to 0, points of which are
    known without a cosine: .75 after a third, .5 after a half, .25 after two thirds."""
    warm = math.ceil(warmup * steps)
    left = steps - warm
    known = {0: 0, 1: 1 / warm, warm: 1, warm + left / 3: .75, warm + left / 2: .5,
             warm + left * 2 / 3: .25, steps: 0}
    return all(abs(factor(step) - value) < 1e-6 for step, value in known.items())


def test_the_learning_rate_warms_up_and_falls_to_zero():
    assert follows_the_recipe(lambda s: cosine(s, 100, .03), 100, .03)
    assert follows_the_recipe(lambda s: cosine(s, 7, .5), 7, .5)      # 3.5 steps are 4
    assert cosine(0, 10, 0) == 1
    for wrong in (lambda s: cosine(s + 1, 100, .03),                  # off by one
                  lambda s: cosine(s, 100, .04),                      # another warm-up
                  lambda s: min(s / 3, (100 - s) / 97)):                    # a line down
        assert not follows_the_recipe(wrong, 100, .03)


def test_the_schedule_reaches_the_optimizer(flags, tmp_path):
    assert here(flags(tmp_path / "run", "--lr", .01, "--warmup", .3, stage=1)) == 0
    rates = [x["lr"] for x in lines(tmp_path / "run/metrics.jsonl")]
    assert rates == [.01 * cosine(s, STEPS, .3) for s in range(STEPS)]
    assert rates[0] == 0 and rates[2] == .01            # ceil(.3 · 6) = 2


def losses(flags, out, *more):
    argv = flags(out, "--dtype", "fp32", "--batch", 4, *more, stage=1, steps=3)
    assert here(argv) == 0
    return [(x["loss"], x["grad_norm"]) for x in lines(out / "metrics.jsonl")]


def test_accumulation_and_packing_change_nothing_and_groups_do(flags, tmp_path, monkeypatch):
    """The loss is a mean of groups' means, whatever micro-batches they are cut into: equal to the
    mean over all tokens where every group has as many of them, and only there (the control)."""
    real = training_sample

    def of_length(length):
        def sample(*a):
            picture, talk = real(*a)
            return picture, [talk[0], {"from": "gpt", "value": "red " * length(a[2])}]
        return sample
    for length, same in ((lambda index: 9, True), (lambda index: 2 + 9 * (index % 4 > 1), False)):
        monkeypatch.setattr(loader, "training_sample", of_length(length))
        ways = {f"{same}{i}": losses(flags, tmp_path / f"{same}{i}", *way) for i, way in enumerate(
            ((), ("--accum", 2), ("--accum", 4), ("--pack", 64), ("--loss-groups", 2)))}
        first, *rest = ways.values()
        equal = [first == [(pytest.approx(a, rel=1e-5), pytest.approx(b, abs=2e-4))
                           for a, b in other] for other in rest]
        assert equal == [True, True, True, same], ways


# -------------------------------------------------------------------------- files that a run leaves

def test_a_run_leaves_all_its_files(flags, run, tmp_path):
    out = tmp_path / "run"
    assert run(flags(out)).code == 0
    assert [x["step"] for x in lines(out / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert {"step", "loss", "grad_norm", "lr"} <= set(lines(out / "metrics.jsonl")[0])
    told = lines(out / "samples.jsonl")
    assert {x["step"] for x in told} == {0, 1, 2, 4, STEPS} and len(told) == 4 * 5
    assert all(x["truth"].startswith("This picture") and "says" in x for x in told)
    config, machine = (json.loads((out / f"{n}.json").read_text()) for n in ("config", "run"))
    assert config["seed"] == 0 and config["stage_row"]["batch"] == 2
    assert machine["torch"] == torch.__version__ and machine["threads"] == 1
    assert machine["trained"] > 0 < machine["frozen"] and machine["steps"] == STEPS
    assert Image.open(out / "loss.png").size == (600, 300)
    assert Image.open(out / "learning.png").width == 960
    assert not list(out.glob("*.tmp"))
    projector.VLM.from_pretrained(out / "model")


def test_after_a_kill_metrics_have_each_step_once(flags, run, interrupted, undisturbed):
    with open(interrupted / "metrics.jsonl", "a") as f:     # as if killed while writing step 6
        f.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    assert run(flags(interrupted, "--resume", "auto")).code == 0
    assert [x["step"] for x in lines(interrupted / "metrics.jsonl")] == list(range(1, STEPS + 1))
    told = [x["step"] for x in lines(interrupted / "samples.jsonl")]
    assert told == [step for step in (0, 1, 2, 4, STEPS) for _ in range(4)]
    assert sha(interrupted) == undisturbed()


# ---------------------------------------------------------------------------------------- kills

def killed_everywhere(run, flags, tmp_path, fault, fresh, first):
    """SIGKILL before each operation in turn; returns the operations, and yields finished runs."""
    log = tmp_path / "operations"
    out = fresh("counted")
    assert run(first(out), **{fault: (0, str(log))}).code == 0
    operations, finished = log.read_text().splitlines(), [out]
    for k in range(1, len(operations) + 1):
        out = fresh(f"kill-{k}")
        assert run(first(out), **{fault: (k, str(log))}).code == -signal.SIGKILL, operations[k - 1]
        assert len(log.read_text().splitlines()) == k       # it died where it should have
        again = run(flags(out, "--resume", "auto", "--keep-last", 1))
        assert again.code == 0, (operations[k - 1], again.err)
        assert [x["step"] for x in lines(out / "metrics.jsonl")] == list(range(1, STEPS + 1))
        assert (out / "loss.png").exists() and not list(out.glob("*.tmp")), operations[k - 1]
        finished.append(out)
    return operations, finished


def test_killed_before_each_file_operation_of_a_save_and_of_the_finish(flags, run, tmp_path,
                                                                       undisturbed):
    operations, finished = killed_everywhere(
        run, flags, tmp_path, "kill_save", lambda name: tmp_path / name,
        lambda out: flags(out, "--keep-last", 1, "--save-every", 3))
    kinds = " ".join(operations)
    for kind in ("mkdir", "save_file", "half of", "trainer.json", "fsync", "rename", "rmdir",
                 "unlink", "loss.png", "model.tmp/config.json", "chat_template.jinja", "replace"):
        assert kind in kinds, kind                  # the shim sees what it should
    assert len(operations) > 45
    assert {sha(out) for out in finished} == {undisturbed()}


def test_killed_before_each_file_operation_of_a_resume(flags, run, tmp_path, interrupted,
                                                       undisturbed):
    operations, finished = killed_everywhere(
        run, flags, tmp_path, "kill_start",
        lambda name: Path(shutil.copytree(interrupted, tmp_path / name)),
        lambda out: flags(out, "--resume", "auto"))
    assert len(operations) > 5
    assert {sha(out) for out in finished} == {undisturbed()}


@pytest.mark.parametrize("stage, more", [(1, ()), (2, ()), (2, ("--lora", 2))],
                         ids=["stage 1", "stage 2", "LoRA"])
def test_killed_at_seven_random_times(flags, run, tmp_path, stage, more):
    dice, steps = random.Random(5), 12
    given = dict(stage=stage, steps=steps)
    for name in ("warm", "timed"):
        started = time.time()
        assert run(flags(tmp_path / name, *more, **given)).code == 0
    whole, kills, trials = time.time() - started, 0, []
    while kills < 7 or not trials:
        trials.append(out := tmp_path / f"trial-{len(trials)}")
        assert len(trials) < 15, "the kills come too late"
        while True:
            argv = flags(out, *more, "--resume", "auto", **given)
            wait = dice.uniform(.1, .9) * whole if kills < 7 else 0
            # a run that finished first is a zombie to the server: the kill does nothing, code 0
            code = run(argv, kill_after=wait).code
            if code == 0:
                whole *= .7             # the machine may have been busier when it was timed
                break
            assert code == -signal.SIGKILL
            kills += 1
        assert sha(out) == sha(tmp_path / "timed")
    assert kills == 7


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(flags, run, tmp_path, undisturbed, number, code):
    out = tmp_path / "run"
    result = run(flags(out, "--save-every", 100), signal=(2, number))
    assert result.code == code and "--resume auto" in result.err
    assert [p.name for p in out.glob("step-*")] == ["step-000003"]      # the step is finished
    assert not (out / "model").exists()
    assert run(flags(out, "--resume", "auto")).code == 0 and sha(out) == undisturbed()


# --------------------------------------------------------------------------------------- resuming

def test_stage_one_resumes_to_the_same_bits(flags, run, tmp_path, undisturbed):
    assert run(flags(tmp_path / "run", stage=1), signal=(2, signal.SIGTERM)).code == 143
    assert run(flags(tmp_path / "run", "--resume", "auto", stage=1)).code == 0
    assert sha(tmp_path / "run") == undisturbed(stage=1) != undisturbed()


def test_resuming_a_finished_run_exits_0_and_changes_nothing(flags, run, tmp_path):
    out = tmp_path / "run"
    assert run(flags(out)).code == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != "lock"}
    assert run(flags(out, "--resume", "auto")).code == 0
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != "lock"}


def test_a_run_of_another_version_is_refused(flags, run, interrupted):
    path = interrupted / "config.json"
    config = json.loads(path.read_text())
    row = config["stage_row"]
    row["aspect"] = row.pop("image_aspect")
    path.write_text(json.dumps(config))
    steps = sorted(interrupted.glob("step-*"))
    refused(run(flags(interrupted, "--resume", "auto")), 3, "another version", "--overwrite")
    assert steps and sorted(interrupted.glob("step-*")) == steps


@pytest.mark.parametrize("flag, value", [("--lr", ".5"), ("--seed", "1"), ("--batch", "4"),
                                         ("--accum", "2"), ("--dtype", "bf16")])
def test_a_changed_flag_is_refused_by_name(flags, run, interrupted, flag, value, undisturbed):
    refused(run(flags(interrupted, "--resume", "auto", flag, value)), 3, flag, "--overwrite")
    assert run(flags(interrupted, "--resume", "auto", "--keep-last", 3)).code == 0
    assert sha(interrupted) == undisturbed()        # the refusal did no harm


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_flipped_bit_falls_back_to_the_checkpoint_before(flags, run, interrupted, undisturbed,
                                                           name):
    path = interrupted / "step-000004" / name
    content = bytearray(path.read_bytes())
    content[-5 if name != "trainer.json" else content.index(b"4")] ^= 1     # its step, 4 -> 5
    path.write_bytes(content)
    result = run(flags(interrupted, "--resume", "auto"))
    assert result.code == 0 and "step-000004 passed over" in result.err
    assert sha(interrupted) == undisturbed()
    assert lines(interrupted / "step-000004/trainer.json")[0]["step"] == 4      # whole again


def forge(folder, change):
    """A checkpoint with other weights whose checksums are right."""
    tensors = load_file(folder / "trained.safetensors")
    change(tensors)
    save_file(tensors, folder / "trained.safetensors")
    trainer = json.loads((folder / "trainer.json").read_text())
    trainer["sha256"]["trained.safetensors"] = hashlib.sha256(
        (folder / "trained.safetensors").read_bytes()).hexdigest()
    (folder / "trainer.json").write_text(json.dumps(trainer))


@pytest.mark.parametrize("change", [
    lambda t: t.pop("projector.first.bias"),
    lambda t: t.update(extra=torch.ones(2)),
    lambda t: t.update({"projector.first.bias": torch.ones(1)}),       # would broadcast in silence
], ids=["one missing", "one too many", "another shape"])
def test_a_checkpoint_of_other_weights_is_refused(flags, run, interrupted, change):
    forge(interrupted / "step-000004", change)
    refused(run(flags(interrupted, "--resume", "auto")), 3, "step-000004")
    assert not (interrupted / "model").exists()


# ------------------------------------------------------------------------------------ disk and NaN

@pytest.mark.parametrize("name, part", [("trained", .02), ("trained", .9), ("optimizer", .6),
                                        ("optimizer", .999)])
def test_a_full_disk_leaves_the_checkpoint_before(flags, run, interrupted, tmp_path, undisturbed,
                                                  name, part):
    """No file may grow past a limit that lies inside the first or the second file of a save."""
    trained, limit = (int(os.stat(interrupted / f"step-000004/{n}.safetensors").st_size * f)
                      for n, f in (("trained", 1), (name, part)))
    assert 1000 < limit and (limit < trained) == (name == "trained")
    out = tmp_path / "full"
    refused(run(flags(out), file_limit=limit), 1, "step-000004", "--resume auto")
    assert [p.name for p in out.glob("step-*")] == ["step-000002"]      # nothing half-written
    assert run(flags(out, "--resume", "auto")).code == 0 and sha(out) == undisturbed()


@pytest.mark.parametrize("call, part", [("write", "step-000004.tmp/trainer.json"),
                                        ("rename", "step-000004"), ("mkdir", "step-000004"),
                                        ("write", "model.tmp/config.json")])
def test_no_space_at_any_moment_of_a_save(flags, run, tmp_path, undisturbed, call, part):
    out = tmp_path / "run"
    refused(run(flags(out), errno=(call, part, errno.ENOSPC)), 1)
    newest = "step-000006" if part.startswith("model") else "step-000002"
    assert sorted(p.name for p in out.glob("step-??????"))[-1] == newest
    assert run(flags(out, "--resume", "auto")).code == 0 and sha(out) == undisturbed()
    assert not list(out.glob("*.tmp"))


def test_nan_stops_before_the_update(flags, run, tmp_path, undisturbed):
    out = tmp_path / "run"
    refused(run(flags(out), nan=3), 1, "step 3", "nan")
    assert [p.name for p in out.glob("step-*")] == ["step-000002"]
    for path in out.rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values())
    assert [x["step"] for x in lines(out / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((out / "nan-step-4.json").read_text())["step"] == 4
    assert run(flags(out, "--resume", "auto")).code == 0 and sha(out) == undisturbed()


# ----------------------------------------------------------------- adamw8, stepped inside backward

ADAMW8 = "--optimizer", "adamw8", "--clip", 0, "--lr", .01


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("more", [(), ("--stochastic",), ("--pack", 256), ("--clip", 1)],
                         ids=["split", "stochastic", "packed", "clipped"])
def test_eight_bit_states_resume_to_the_same_bits(flags, run, tmp_path, stage, more):
    argv = lambda name, *rest: flags(tmp_path / name, *ADAMW8, *more, *rest, stage=stage)
    assert run(argv("whole")).code == 0
    assert run(argv("cut"), signal=(2, signal.SIGTERM)).code == 143
    assert run(argv("cut", "--resume", "auto")).code == 0
    assert sha(tmp_path / "cut") == sha(tmp_path / "whole")
    for name in ("trained", "optimizer"):
        a, b = (load_file(tmp_path / f"{run_}/step-000006/{name}.safetensors")
                for run_ in ("cut", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    state = {k.split("|")[1]: x.dtype for k, x in a.items()}
    kinds = {"m": torch.int8, "v": torch.uint8, "m_scale": torch.float32, "step": torch.int64,
             "v_scale": torch.float32, "low": torch.int16}
    assert state == {k: v for k, v in kinds.items() if k != "low" or more != ("--stochastic",)}
    assert {p.dtype for p in data.load_weights(tmp_path / "cut/model").values()} == {torch.bfloat16}


def test_a_step_inside_backward_frees_each_gradient_and_is_the_step_at_the_end(flags, tmp_path):
    """The same bits, and at most one gradient of the last backward alive at a time."""
    ends, alive = {}, {}
    for clip in (0, 1e9):                   # 1e9: at the end, and nothing is cut off
        args = parse(flags(tmp_path, *ADAMW8[:2], "--clip", clip, "--warmup", 0, steps=1,
                                     stage=2))
        job = train.vlm_job(args, tmp_path, "cpu")
        weights, most = list(job.trained().values()), []
        for p in weights:
            p.register_post_accumulate_grad_hook(lambda p: most.append(
                sum(q.grad is not None for q in weights)))
        out = tmp_path / str(clip)
        out.mkdir()
        assert train.train_loop(job, Run(out, args)) == 0
        ends[clip], alive[clip] = [p.detach().clone() for p in weights], max(most)
    assert all(map(torch.equal, ends[0], ends[1e9]))
    assert alive[0] <= 1 and alive[1e9] == len(weights) > 10, alive


@pytest.mark.parametrize("how", [(), ("--optimizer", "adamw8"), ADAMW8], ids=[
    "adamw", "adamw8 at the end", "adamw8 inside"])
@pytest.mark.parametrize("fault", ["nan", "nan_gradient"])
def test_nan_leaves_no_trace_on_disk(flags, run, tmp_path, how, fault):
    out = tmp_path / "run"
    refused(run(flags(out, *how), **{fault: 3}), 1, "step 3", "nan")
    assert [p.name for p in out.glob("step-*")] == ["step-000002"]
    for path in out.rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values())
    assert run(flags(out, *how, "--resume", "auto")).code == 0


def test_checkpoint_policies_change_no_bit(flags, run, tmp_path):
    made = set()
    for policy in ("none", "attention", "full"):
        assert run(flags(tmp_path / policy, "--checkpoint", policy, steps=2)).code == 0
        made.add(sha(tmp_path / policy))
    assert run(flags(tmp_path / "plain", steps=2)).code == 0
    assert made == {sha(tmp_path / "plain")}


# -------------------------------------------------------------------------------------- bad input

def test_an_output_folder_in_use_is_refused(flags, run, tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        for more in ((), ("--overwrite",), ("--resume", "auto")):
            refused(run(flags(tmp_path, *more)), 3, "in use")
    assert run(flags(tmp_path, steps=1)).code == 0          # let go of, it can be used


def test_a_folder_that_holds_a_run_is_refused_or_overwritten(flags, run, interrupted, undisturbed):
    before = {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()}
    refused(run(flags(interrupted)), 3, "--resume auto", "--overwrite")
    assert before == {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()}
    (interrupted / "notes.txt").write_text("mine")
    assert run(flags(interrupted, "--overwrite", "--save-every", 5)).code == 0
    assert [p.name for p in sorted(interrupted.glob("step-*"))] == ["step-000005", "step-000006"]
    assert sha(interrupted) == undisturbed()
    assert (interrupted / "notes.txt").read_text() == "mine"    # only a run's own files go


def test_overwrite_does_not_touch_a_folder_that_holds_no_run(flags, run, parts, tmp_path):
    folder = Path(shutil.copytree(parts, tmp_path / "mine") / "llama")
    before = {p: p.read_bytes() for p in folder.rglob("*")}
    refused(run(flags(folder, "--overwrite")), 3, "--output-dir")
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.name != "lock"}


def test_a_failed_start_does_not_take_the_folder(flags, run, tmp_path):
    """A flag mistyped once must not ask for --overwrite the next time."""
    out = tmp_path / "run"
    refused(run(flags(out, "--data", tmp_path / "none.json")), 3, "none.json")
    assert run(flags(out, steps=1)).code == 0


def test_a_failed_overwrite_keeps_the_old_run(flags, run, interrupted, undisturbed):
    refused(run(flags(interrupted, "--overwrite", "--data", "none.json")), 3, "none.json")
    assert run(flags(interrupted, "--resume", "auto")).code == 0
    assert sha(interrupted) == undisturbed()


def test_a_read_only_output_folder_is_refused(flags, run, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run(flags(tmp_path / "file/run")), 3, "file")
    refused(run(flags(tmp_path / "file")), 3, "file")
    refused(run(flags(tmp_path / "run"), errno=("mkdir", "run", errno.EROFS)), 3, "Read-only")
    (tmp_path / "run").mkdir()
    refused(run(flags(tmp_path / "run"), errno=("write", "lock", errno.EROFS)), 3, "Read-only")


def test_stage_two_says_that_stage_one_comes_first_and_then_finds_it(flags, run, tmp_path):
    """With the default folders, from whatever folder the command is given."""
    refused(run(flags(None, lone=False), cwd=tmp_path), 3, "--stage 1", "stage1/model")
    assert run(flags(None, stage=1), cwd=tmp_path).code == 0
    assert run(flags(None, lone=False), cwd=tmp_path).code == 0
    one, two = (data.load_weights(tmp_path / f"runs/toy/llava-1.5/stage{n}/model") for n in (1, 2))
    name = "multi_modal_projector.linear_1.weight"
    assert not torch.equal(one[name], two[name])
    assert (one[name] - two[name]).abs().max() < .02        # it went on from there


def test_stage_two_refuses_a_model_with_another_bridge(flags, run, tmp_path):
    assert run(flags(tmp_path / "one", "--projector-type", "linear", stage=1, steps=1)).code == 0
    start = ("--from", tmp_path / "one/model")
    refused(run(flags(tmp_path / "two", *start, lone=False)), 3, "linear", "mlp")
    assert run(flags(tmp_path / "two", *start, "--projector-type", "linear", lone=False,
                     steps=1)).code == 0


@pytest.mark.parametrize("name", ["llama/config.json", "llama/model.safetensors",
                                  "llama/tokenizer.json", "clip/config.json",
                                  "clip/model.safetensors"])
def test_a_model_folder_with_a_missing_file_is_refused(flags, run, parts, tmp_path, name):
    mine = Path(shutil.copytree(parts, tmp_path / "parts"))
    (mine / name).unlink()
    refused(run(flags(tmp_path / "run", "--vision", mine / "clip", "--llm", mine / "llama")), 3,
            str(mine / name.split("/")[0]), Path(name).name)


def test_a_model_folder_with_a_foreign_file_is_refused(flags, run, parts, tmp_path):
    refused(run(flags(tmp_path / "run", "--vision", parts / "llama")), 3)
    refused(run(flags(tmp_path / "run", "--llm", parts / "clip")), 3)
    refused(run(flags(tmp_path / "run", "--from", parts / "llama", lone=False)), 3, "llava")
    mine = Path(shutil.copytree(parts / "llama", tmp_path / "llama"))
    shutil.copy(parts / "clip/model.safetensors", mine)
    refused(run(flags(tmp_path / "run", "--llm", mine)), 3)
    assert not (tmp_path / "run/config.json").exists()


COMMAND_LINES = {
    "a part of a model that is there": ["--stage", "2", "--llm", "x"],
    "a part, and a start": ["--stage", "1", "--vision", "x", "--from", "y"],
    "a bridge, and a start": ["--stage", "1", "--recipe", "sharegpt4v", "--projector", "x"],
    "a start of no LLaMA": ["--stage", "1", "--recipe", "blip2", "--from", "x"],
    "skipping without a LLaMA": ["--stage", "1", "--recipe", "blip2", "--on-bad-sample", "skip"],
    "steps of stage 0": ["--stage", "0", "--steps", "10"],
    "a seed of stage 0": ["--stage", "0", "--seed", "5"],
    "both": ["--stage", "1", "--resume", "auto", "--overwrite"],
    "no rate to divide by": ["--stage", "1", "--recipe", "minigpt4", "--lr", "0"],
    "no stage": [], "unknown recipe": ["--stage", "1", "--recipe", "llava-9"],
    "lr nan": ["--stage", "1", "--lr", "nan"], "negative steps": ["--stage", "1", "--steps", "-1"],
    "batch and accum": ["--stage", "1", "--batch", "3", "--accum", "2"],
    "abbreviation": ["--stage", "1", "--rec", "llava"], "no part": ["--stage", "1", "--train", ""],
    "aspect": ["--stage", "1", "--image-aspect", "round"],
    "huge seed": ["--stage", "1", "--seed", "9" * 30],
    "warm-up": ["--stage", "1", "--warmup", "inf"], "text": ["--stage", "1", "--batch", "two"],
    "samples": ["--stage", "1", "--show-batch", "-1"]}


@pytest.mark.parametrize("argv", COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_a_wrong_command_line_is_one_line_and_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(argv)
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("more", [("--template", "v9"), ("--device", "abacus"),
                                  ("--device", "cuda:99")])
def test_flags_that_need_torch_to_be_judged_are_exit_2_too(flags, run, tmp_path, more):
    refused(run(flags(tmp_path / "run", *more)), 2, more[1])
    assert not (tmp_path / "run").exists()


def test_help_answers_at_once_and_without_torch():
    blocked = ("import sys, runpy\n"
               "class Block:\n"
               "    def find_spec(self, name, *rest):\n"
               "        assert name.split('.')[0] not in ('torch', 'numpy', 'PIL'), name\n"
               "sys.meta_path.insert(0, Block())\n"
               "sys.argv = ['train.py', *sys.argv[1:]]\n"
               f"runpy.run_path({str(HERE / 'train.py')!r}, run_name='__main__')\n")

    def python(*argv):
        return subprocess.run([sys.executable, "-c", blocked, *argv], capture_output=True,
                              text=True)
    result = python("--help")
    assert result.returncode == 0 and "--stage" in result.stdout, result.stderr
    result = python("--stage", "1")
    assert "AssertionError: torch" in result.stderr         # the control: past --help, it is needed
    took = []
    for _ in range(3):                                      # its CPU time: machines may be busy
        started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, HERE / "train.py", "--help"], check=True,
                       stdout=subprocess.DEVNULL)
        took.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started)
    assert min(took) < .5


# ------------------------------------------------------------------------------------- the network

def test_the_toy_path_opens_no_socket(flags, run, tmp_path):
    for stage in (1, 2):
        argv = flags(tmp_path / f"stage{stage}", stage=stage, steps=1, lone=False)
        assert run(argv, no_socket=True).code == 0
    assert lines(tmp_path / "stage2/samples.jsonl")


def test_a_socket_would_be_noticed(server, flags, tmp_path):
    order = {"argv": flags(tmp_path / "run"), "cwd": str(tmp_path), "log": str(tmp_path / "x"),
             "kill_after": 0, "fault": {"no_socket": True, "ask_socket": True}}
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    assert json.loads(server.stdout.readline()) == [99]
    assert "a socket was asked for" in (tmp_path / "x.err").read_text()


# -------------------------------------------------------------------------------- data of one's own

@pytest.fixture
def album(tmp_path):
    """A small file in LLaVA's format: pictures of odd sizes, and one sample of text alone."""
    rows = []
    for i, size in enumerate(((50, 70), (90, 30), (64, 64))):
        Image.new("RGB", size, (80 * i, 90, 30)).save(tmp_path / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "What is it?\n<image>"},
            {"from": "gpt", "value": "A plain colour."}]})
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "Say yes"},
                                                 {"from": "gpt", "value": "Yes."}]})

    def write(change=lambda rows: None):
        mine = json.loads(json.dumps(rows))
        change(mine)
        (tmp_path / "album.json").write_text(json.dumps(mine))
        return ["--data", tmp_path / "album.json", "--images", tmp_path]
    return write


def test_own_data_trains_with_pictures_and_text_alone(flags, run, album, tmp_path):
    out = tmp_path / "run"
    assert run(flags(out, *album(), "--batch", 4, "--steps", 0, "--epochs", 2)).code == 0
    assert len(lines(out / "metrics.jsonl")) == 2           # 4 samples, 2 epochs, batches of 4
    assert all(x["loss"] > 1 for x in lines(out / "metrics.jsonl"))


def test_epochs_see_every_sample_once_in_an_order_of_their_own(flags, album):
    args = parse(flags(None, *album(lambda rows: rows.pop()), "--epochs", 2, steps=0))
    samples = Samples(args)
    assert samples.steps() == 3
    epochs = [[samples[i][0].size for i in range(e * 3, e * 3 + 3)] for e in range(20)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1
    assert samples[4][0].size == samples[4][0].size         # whatever was asked before


@pytest.mark.parametrize("trains", ["projector", "projector,llm"])
def test_a_batch_of_text_alone_is_no_trouble(flags, run, album, tmp_path, trains):
    argv = flags(tmp_path / "run", *album(lambda rows: rows.__delitem__(slice(3))),
                 "--train", trains, "--accum", 2, steps=2)
    assert run(argv).code == 0


@pytest.mark.parametrize("change, words", [
    (lambda rows: rows[1].update(image="gone.png"), ("gone.png",)),
    (lambda rows: rows[1].update(image="../../etc/passwd"), ("passwd",)),
    (lambda rows: rows[1].update(image="album.json"), ("album.json",)),
    (lambda rows: rows[1]["conversations"][0].update(value="no mark"), ("sample 1", "<image>")),
    (lambda rows: rows[1]["conversations"].pop(0), ("sample 1",)),
    (lambda rows: [r["conversations"].pop() for r in rows], ("nothing to train on", "sample"))],
    ids=["missing picture", "leaves the folder", "no picture", "no mark", "no question",
         "no answers"])
def test_bad_samples_are_refused_by_name(flags, run, album, tmp_path, change, words):
    refused(run(flags(tmp_path / "run", *album(change), "--batch", 4)), 3, *words)


def test_bad_samples_can_be_skipped_and_are_listed(flags, run, album, tmp_path):
    """One without its mark, found in the text, one without its picture, found by a worker; the
    result is the same with workers and without."""
    def spoil(rows):
        rows[1].update(image="gone.png")
        rows[2]["conversations"][0].update(value="no mark")
    for workers in (0, 2):
        out = tmp_path / f"run{workers}"
        argv = flags(out, *album(spoil), "--batch", 4, "--workers", workers, steps=2)
        refused(run([*argv, "--on-bad-sample", "skip", "--most-bad", "1"]), 3, "--most-bad 1")
        assert run([*argv, "--on-bad-sample", "skip", "--overwrite"]).code == 0
        told = lines(out / "bad_samples.jsonl")  # each once; the text's before the first step
        assert [x["step"] for x in told] == [0, 1]
        assert {x["why"].split(":")[0] for x in told} == {"sample 1", "sample 2"}
    assert sha(tmp_path / "run0") == sha(tmp_path / "run2")
    refused(run(flags(tmp_path / "none", *album(lambda rows: [
        r.update(image="gone.png") for r in rows]), "--batch", 4, "--on-bad-sample", "skip")), 3,
        "not one of its 4 samples")


def test_show_batch_prints_what_is_learned_and_writes_nothing(flags, run, tmp_path):
    result = run(flags(tmp_path / "run", "--show-batch", 2))
    assert result.code == 0 and result.out.count("sample ") == 2
    assert "<image>" in result.out and "[" in result.out
    assert not (tmp_path / "run").exists()


def test_official_quirks_mask_what_the_official_code_masks(flags, run, tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps([{"id": "a", "conversations": [
        {"from": "human", "value": "Q"}, {"from": "gpt", "value": "say </s> now"}]}]))
    learned = {}
    for quirk in ((), ("--official-quirks",)):
        result = run(flags(None, "--data", tmp_path / "odd.json", "--show-batch", 1, *quirk))
        assert result.code == 0
        learned[bool(quirk)] = result.out.count("[")
    assert learned[False] > 2 and learned[True] == 0


def test_a_projector_can_be_given(flags, run, tmp_path):
    """Its values are where the bridge starts: at a rate of 0 they are where it ends."""
    given = {f"multi_modal_projector.linear_{i}.{kind}": torch.randn(32, *[32] * (kind == "weight"))
             for i in (1, 2) for kind in ("weight", "bias")}
    save_weights(tmp_path / "projector", given)
    assert run(flags(tmp_path / "run", "--projector", tmp_path / "projector", "--lr", 0, stage=1,
                     steps=1)).code == 0
    made = data.load_weights(tmp_path / "run/model")
    assert all(torch.equal(made[k], v) for k, v in given.items())
    refused(run(flags(tmp_path / "other", "--projector", tmp_path / "none", stage=1)), 3, "none")
    refused(run(flags(tmp_path / "other", "--projector", tmp_path / "projector", "--from",
                      tmp_path / "run/model", lone=False)), 2, "projector")


# -------------------------------------------------------------------------------- small and odd

@pytest.mark.parametrize("base", ["toy", "7b", "13b"])
def test_every_recipe_takes_its_own_defaults(base):
    import train
    for recipe in train.RECIPES:
        for stage in (1, 2):
            args = parse(["--stage", str(stage), "--recipe", recipe, "--base", base])
            assert args.row.losses or args.row.batch % args.row.loss_groups == 0


def test_a_whole_number_of_warm_up_steps():
    import train
    rise = [cosine(step, 340, 100) for step in (0, 50, 100, 339)]
    assert rise[:3] == [0, .5, 1] and rise[3] < 1e-3
    assert cosine(10, 340, .03) < 1 == cosine(11, 340, .03)     # ceil(10.2) steps


def test_a_list_of_parts_passes_over_names_that_are_no_numbers(parts):
    import train
    model = new_vlm(parts / "clip", parts / "llama")
    with pytest.raises(UsageError, match="no such part"):
        train.set_trainable(model, ("vision.2+",))
    assert {n.split(".")[2] for n in train.set_trainable(model, ("vision.blocks.1+",))} == {"1"}


def test_old_checkpoints_go_and_a_damaged_later_one_is_not_kept_for_them(flags, run, tmp_path):
    """A folder of a later step that is no checkpoint is not the one that --keep-last 1 keeps."""
    out = tmp_path / "run"
    argv = flags(out, "--keep-last", "1", "--seed", "7")
    assert run(argv, kill_after=0).code == 0
    shutil.rmtree(out / "model")
    newest = sorted(out.glob("step-*"))[-1]
    later = out / "step-000999"
    shutil.copytree(newest, later)                      # its trainer.json names another step
    shutil.rmtree(newest)
    assert run([*argv, "--resume", "auto"]).code == 0
    assert newest.exists() and later.exists()


def test_one_step_of_data_is_refused(flags, run, album, tmp_path):
    """Its rate would be 0, and the run would end well without having learned."""
    argv = flags(tmp_path / "run", *album(lambda rows: rows.pop()), "--batch", 64, stage=1, steps=0)
    refused(run(argv), 2, "one step", "first step is 0")


def test_data_of_ones_own_keeps_the_toys_rates():
    import train
    toy, own = (parse(["--stage", "2", *more]).row
                for more in ((), ("--data", "x.json")))
    assert (own.lr, own.batch, own.clip) == (toy.lr, toy.batch, toy.clip) and own.steps == 0
    official = parse(["--stage", "2", "--data", "x.json", "--base", "7b"]).row
    assert (official.lr, official.batch) == (2e-5, 128)


def test_data_that_has_changed_is_named_when_a_run_goes_on(flags, run, album, tmp_path):
    out, more = tmp_path / "run", ("--batch", 2, "--resume", "auto")
    assert run(flags(out, *album(), *more, steps=2)).code == 0
    skip = "--on-bad-sample", "skip"                        # the control: it changes no step
    assert run(flags(out, *album(), *more, *skip, steps=2)).code == 0
    changed = album(lambda rows: rows.append(rows[0]))
    refused(run(flags(out, *changed, *more, steps=2)), 3, "another --data file")
