"""The soak: python tests/soak --minutes 60      (make soak MINUTES=60)

It goes on where the last one stopped: a piece of work that records.jsonl has is not done again.

    --only "flipped bit"        one row of the plan; --kind "stage 1": on one kind of stage
    --list                      the plan, and what of it is done
    --page                      write docs/reliability.md from the records, and nothing else

Linux; the trials of a small disk need root or user namespaces (unshare), else they are left out."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def parse(argv=None):
    p = argparse.ArgumentParser(description="Disturb training runs, and see what is left of them.",
                                allow_abbrev=False)
    p.add_argument("--minutes", type=float, default=60, help="stop after the piece that ends later")
    p.add_argument("--only", help="one kind of trial")
    p.add_argument("--kind", help="one kind of stage, or of file")
    p.add_argument("--records", type=Path, default=ROOT / "tests/soak/records.jsonl")
    p.add_argument("--list", action="store_true")
    p.add_argument("--page", action="store_true")
    return p.parse_args(argv)


def enter_namespace():
    """Start again as root of a user namespace, where a small disk can be mounted."""
    if "SOAK_NAMESPACE" in os.environ or not shutil.which("unshare"):
        return
    how = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*how, "true"], capture_output=True).returncode == 0:
        os.environ["SOAK_NAMESPACE"] = "yes"
        os.execvp(how[0], [*how, sys.executable, *sys.argv])


def main():
    args = parse()
    from soak import page, records
    done = records.read(args.records)
    if args.page:
        page.write(done)
        return 0
    from soak import plan               # imports torch
    pieces = plan.pieces(args.only, args.kind, done)
    if args.list:
        for piece in pieces:
            print(f"{piece.what:34} {piece.kind:18} {piece.first_seed:4} of {piece.seeds} pieces")
        return 0
    enter_namespace()
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        room = None
        while time.monotonic() < end and (piece := plan.next_piece(pieces)):
            if room is None:
                room = plan.open_room(folder)
            record = plan.do(room, piece)
            records.append(record, args.records)
            print(f"{piece.what}, {piece.kind}, seed {record['seed']}: {record['held']:,} of "
                  f"{record['done']:,} in {record['seconds']} s", flush=True)
            for failure in record["failures"]:
                print("   ", failure, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
