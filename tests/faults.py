"""Runs of train.py as children of a warm process, and what goes wrong in them.

Importing torch takes seconds, a fork a fraction of one. So one process imports everything and never
computes, because a fork of a process whose autograd threads run is not safe; every run is a child
of it. `python tests/faults.py` is such a process for the tests, which compute themselves: a line
of JSON in (an order), a line of JSON out (the exit codes). tests/soak/ forks its own children.

An order: {argv, fault: {name: value}, log, cwd} and, where they are wanted,

    kill_after      seconds after which every rank is SIGKILLed; 0: never
    signal_after    [seconds, number of a signal] for every rank
    kill_rank       [seconds, rank]: only this one is SIGKILLed; as from torchrun, SIGTERM follows
                    for the others
    ranks           how many processes; faults happen in the first one
    limit           seconds after which a run counts as hung
"""
import builtins
import io
import json
import math
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"      # its threads would not survive a fork
ROOT = Path(__file__).resolve().parents[1]
HUNG = "hung"


# ----------------------------------------------------------------------------------- the faults

def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Operations:
    """Counts what a run does to the disk, and SIGKILLs it before number k (0: only counts).

    Half-done writes count too: a file just opened is empty, and safetensors' file is cut in half
    once it is written. since, until: the calls of functions that open and close the stretch that
    is counted."""

    def __init__(self, k, log):
        self.k, self.log, self.seen, self.on = k, log, [], False
        for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "remove"):
            self.wrap(os, name)
        real = io.open

        def opened(file, mode="r", *rest, **more):
            if not set(mode) & set("wax+"):
                return real(file, mode, *rest, **more)
            self.operation(f"open {file}")
            handle = real(file, mode, *rest, **more)
            self.operation(f"write {file}")
            return handle
        io.open = builtins.open = opened
        from formats import checkpoints
        from trainer import checkpoint
        for module in (checkpoint, checkpoints):
            self.wrap_save(module)

    def operation(self, what, before=lambda: None):
        if self.on:
            self.seen.append(what)
            with self.silent():
                Path(self.log).write_text("\n".join(self.seen))
            if len(self.seen) == self.k:
                before()
                kill()

    @contextmanager
    def silent(self):
        self.on = False
        yield
        self.on = True

    def wrap(self, owner, name):
        real = getattr(owner, name)

        def counted(*a, **more):
            self.operation(f"{name} {a[0]}")
            return real(*a, **more)
        setattr(owner, name, counted)

    def wrap_save(self, module):
        real = module.save_file

        def counted(tensors, path, *rest):
            self.operation(f"save_file {path}")
            real(tensors, path, *rest)
            self.operation(f"half of {path}", lambda: os.truncate(path, os.stat(path).st_size // 2))
        module.save_file = counted


def before_call(module, name, number, action):
    """Have `action` happen before call `number` (from 1) of module.<name>."""
    real, calls = getattr(module, name), []

    def watched(*a, **more):
        calls.append(1)
        if len(calls) == number:
            action()
        return real(*a, **more)
    setattr(module, name, watched)


def before_batch(train, step, action):
    """Have action(model) happen when the batch of `step` is asked for."""
    real = train.MicroBatches

    def batches_of(samples, model, args, *ranks):
        batches = real(samples, model, args, *ranks)

        def at(s):
            if s == step:
                action(model)
            return batches(s)
        return at
    train.MicroBatches = batches_of


def refuse(*a, **more):
    raise AssertionError("a socket was asked for")


def fail_calls(name, part, number):
    """Calls of os.<name>, or opening a file ("write"), end in OSError for paths that hold `part`.
    """
    real = io.open if name == "write" else getattr(os, name)

    def failing(path, *a, **more):
        if part in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *a, **more)
    if name == "write":
        io.open = builtins.open = failing
    else:
        setattr(os, name, failing)


def set_clock_back(calls, seconds):
    """From call number `calls` on the clock of the day is `seconds` behind."""
    real, count = time.time, iter(range(10 ** 9))
    time.time = lambda: real() - (seconds if next(count) >= calls else 0)


def watch_memory(path, every):
    """Write this process's resident bytes and open files every so many steps."""
    from trainer.run_folder import Run
    real = Run.log

    def log(run, step, grad_norm):
        stopped = real(run, step, grad_norm)
        if step % every == 0:
            with open(path, "a") as file:
                file.write(json.dumps({"step": step, **resident()}) + "\n")
        return stopped
    Run.log = log


def resident():
    """{bytes: resident, files: open} of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"bytes": pages * os.sysconf("SC_PAGE_SIZE"), "files": len(os.listdir("/proc/self/fd"))}


def inject(train, fault):
    """What goes wrong in this child."""
    from trainer import run_folder
    if "plant" in fault:                    # a fault of the program itself: controls of the soak
        from soak import planted
        getattr(planted, fault["plant"])(train)
    if "kill_save" in fault:                # from the second save to the end of the run
        operations = Operations(*fault["kill_save"])
        before_call(run_folder, "save_checkpoint", 2, lambda: setattr(operations, "on", True))
    if "kill_start" in fault:               # from the start to the first batch
        operations = Operations(*fault["kill_start"])
        operations.on = True
        before_call(train, "GradientStep", 1, lambda: setattr(operations, "on", False))
    if "signal" in fault:
        step, number = fault["signal"]
        before_batch(train, step, lambda model: os.kill(os.getpid(), number))
    if "nan" in fault:
        before_batch(train, fault["nan"], lambda m: m.projector.first.weight.data.fill_(math.nan))
    if "nan_gradient" in fault:             # of a finite loss
        before_batch(train, fault["nan_gradient"], lambda m: m.projector.first.weight.register_hook(
            lambda g: g * math.nan))
    if "file_limit" in fault:
        limit = (fault["file_limit"], resource.RLIM_INFINITY)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before_call(run_folder, "save_checkpoint", 2,
                    lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    if "errno" in fault:                    # (name in os or "write", part of a path, errno)
        fail_calls(*fault["errno"])
    if "clock" in fault:
        set_clock_back(*fault["clock"])
    if "memory" in fault:
        watch_memory(*fault["memory"])
    if "no_socket" in fault:
        socket.socket = socket.create_connection = socket.getaddrinfo = refuse
        sys.addaudithook(lambda event, a: refuse() if event.startswith("socket.") else None)
    if "ask_socket" in fault:               # the control of the line above
        before_batch(train, 0, lambda model: socket.socket())


# --------------------------------------------------------------------------------- the children

def child(train, order, rank):
    """What a child does; returns its exit code."""
    os.setsid()                             # a kill of this child reaches nobody else
    os.chdir(order["cwd"])
    name = f"{order['log']}-{rank}" if rank else order["log"]
    for number, kind in ((1, "out"), (2, "err")):
        handle = os.open(f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    if not order["fault"].get("no_socket"):     # 20 descriptions a run would take most of its time
        train.generate = lambda *a, **more: iter((5, 6, 7))
    if rank == 0:
        inject(train, order["fault"])
    from formats.errors import exit_status

    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return train.main(train.parse_args(order["argv"]))
    return exit_status(run)


def fork(train, order, rank, environment):
    """The pid of a new child that runs train.py."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        code = child(train, order, rank)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def send(pids, number):
    """A signal to children of this process; one that has ended is a zombie, which takes it."""
    for pid in pids:
        os.kill(pid, number)


def exit_codes(pids, limit):
    """The exit codes, negative for a signal; HUNG for what had to be killed after `limit` s."""
    codes, end = {}, time.monotonic() + limit
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = HUNG
        time.sleep(.003)
    return [codes[pid] for pid in pids]


def run_children(train, order):
    """Run an order to its end. Returns its exit codes, one a rank."""
    ranks = order.get("ranks", 1)
    environment = {"WORLD_SIZE": str(ranks)}
    if ranks > 1:
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
                           GLOO_SOCKET_IFNAME="lo")
    pids = [fork(train, order, rank, environment) for rank in range(ranks)]
    if order.get("kill_after"):
        time.sleep(order["kill_after"])
        send(pids, signal.SIGKILL)
    if order.get("signal_after"):
        seconds, number = order["signal_after"]
        time.sleep(seconds)
        send(pids, number)
    if order.get("kill_rank"):
        seconds, rank = order["kill_rank"]
        time.sleep(seconds)
        send(pids[rank:rank + 1], signal.SIGKILL)
        time.sleep(.2)
        send(pids, signal.SIGTERM)
    return exit_codes(pids, order.get("limit", 300))


def in_child(function, *args, limit=600):
    """JSON that function(*args) returns in a child; None if the child came to an end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.close(reader)
            with open(writer, "w") as pipe:
                json.dump(function(*args), pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    return json.loads(text) if exit_codes([pid], limit) == [0] else None


def warm_up():
    """Import all, and do once what is slow the first time. Returns the module train."""
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # a child that listens to it says so
    import torch

    import train
    from trainer.run_folder import plot_loss
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").write_text('{"step": 1, "loss": 6.5}\n'
                                                    '{"step": 2, "loss": 7.5}\n')
        plot_loss(Path(folder))
    return train


def serve():
    train = warm_up()
    for line in sys.stdin:
        print(json.dumps(run_children(train, json.loads(line))), flush=True)


if __name__ == "__main__":
    sys.exit(serve())
