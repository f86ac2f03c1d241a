"""Every kernel as machine code for sm_80 and sm_90, without a GPU: see tests/compiled.py.

Once with each Triton that somebody has, for each compiles the same source to other registers and
other spills: 3.7.1, which torch 2.13 brings and tests/requirements.txt names; 3.6.0, which torch
2.11 brings; 3.9.0, a newer one. What is not installed goes to a folder of its own, under the user's
cache; TRITON36 (TRITON371, TRITON39) in the environment names a folder that has it already
(`pip install --target FOLDER triton==3.6.0`)."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compiled

HERE = Path(__file__).parent


VERSIONS = {"3.6.0": "TRITON36", "3.7.1": "TRITON371", "3.9.0": "TRITON39"}
INSTALLED = importlib.metadata.version("triton")


def folder_of(version):
    """A folder with this Triton and nothing else, installed on first use; None if it is installed
    where the tests run."""
    if version == INSTALLED:
        return None
    if VERSIONS[version] in os.environ:
        return Path(os.environ[VERSIONS[version]])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / f"triton-{version}-py{sys.version_info.major}{sys.version_info.minor}"
    if not (folder / "triton").is_dir():
        fresh = folder.with_name(f"{folder.name}-{os.getpid()}")    # renamed when it is whole
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
                        str(fresh), f"triton=={version}"], check=True)
        fresh.rename(folder)
    return folder


@pytest.fixture(scope="module", params=sorted({*VERSIONS, INSTALLED}))
def found(request, tmp_path_factory):
    """What compiled.py finds in all kernels and all planted faults, {name: [case, case]}."""
    out = tmp_path_factory.mktemp("compiled") / "found.json"
    env = {key: value for key, value in os.environ.items()
           if key not in ("TRITON_INTERPRET", "PYTHONPATH")} | {"OMP_NUM_THREADS": "1"}
    if folder := folder_of(request.param):
        env["PYTHONPATH"] = str(folder)
    done = subprocess.run([sys.executable, HERE / "compiled.py", *compiled.MODULES, "planted",
                           "--json", out], capture_output=True, text=True, env=env)
    assert out.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 1             # the planted faults; the exit status tells of them
    read = json.loads(out.read_text())
    assert read["triton"] == request.param
    return read["cases"]


def test_no_shipped_tile_has_a_fault(found):
    shipped = [r for r in found if r["module"] != "planted"]
    bad = [r for r in shipped if r["faults"]]
    assert not bad, "\n" + compiled.table(bad)
    assert {r["module"] for r in shipped} == set(compiled.MODULES)
    assert {r["sm"] for r in shipped} == {80, 90}


def test_a_planted_fault_is_named_and_its_sound_twin_passes(found):
    planted = [r for r in found if r["module"] == "planted"]
    assert len(planted) == 20
    for r in planted:
        kind, _, fault = r["name"].partition(": ")
        wanted = kind == "planted" and not (fault == "no HGMMA" and r["sm"] == 80)
        assert any(fault in said for said in r["faults"]) == wanted, r
        assert wanted or not r["faults"], r


def code(text):
    """Lines "@P0 BRA 0x3" as compiled.disassemble gives them; the line's number is its address."""
    split = [line.removeprefix("@P0 ").split(maxsplit=1) for line in text.strip().splitlines()]
    return [(i, "@" in line, op, rest[0] if rest else "") for i, (line, (op, *rest))
            in enumerate(zip(text.strip().splitlines(), split))]


@pytest.mark.parametrize("text, inside", [
    # 0: before the loop; 3: after it. Spills there cost nothing
    ("STL a\nHMMA b\n@P0 BRA 0x1\nLDL c\nEXIT", {1, 2}),
    # a loop of two blocks; the second lies behind the end, where the assembler puts rare ones
    ("HMMA a\n@P0 BRA 0x4\n@P0 BRA 0x0\nEXIT\nSTL b\nBRA 0x2", {0, 1, 2, 4, 5}),
    # a loop without matrix instructions, then a matrix instruction in none
    ("LDL a\n@P0 BRA 0x0\nHMMA b\nEXIT", set()),
    # the outer loop holds the inner one, and so its matrix instruction
    ("STL a\nHMMA b\n@P0 BRA 0x1\nBRA P1, 0x0\nEXIT", {0, 1, 2, 3})])
def test_which_instructions_share_a_loop_with_a_matrix_instruction(text, inside):
    assert compiled.loops_with(code(text), lambda op: op == "HMMA") == inside


def test_a_module_that_ships_no_cases_is_an_error():
    done = subprocess.run([sys.executable, HERE / "compiled.py", "kernels.launch"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "no compile_cases()" in done.stderr
