"""Forked processes are what the genuine ones are, but for what they have imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from forked import Forked
from launch import await_all, environment, genuine_torchrun, python, torchrun

TOLD = """
import atexit, json, os, signal, sys, threading
before = [name for name in ("torch", "megatron.core", "vllm", "r1kern") if name in sys.modules]
import numpy, random, torch
names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR"
names += " OMP_NUM_THREADS PYTHONPATH TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS"
names += " TORCHELASTIC_USE_AGENT_STORE TORCHDYNAMO_DISABLE"
own = {name: os.environ.get(name) for name in names.split()}
handlers = [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ)]
told = {
    "own": own,
    "handlers": handlers,
    "main": [__name__, sys.argv[1:], sys.path[0]],
    "threads": [len(os.listdir("/proc/self/task")), torch.get_num_threads()],
    "random": [torch.rand(1).item(), numpy.random.rand(), random.random()],
}
if sys.argv[1:]:
    out = os.path.join(sys.argv[1], own["RANK"])
    json.dump(told, open(out, "w"))
    atexit.register(lambda: open(out + ".end", "w").close())
else:
    print(before)
"""

FAILS = """
import os, sys, time, pathlib
log = pathlib.Path(sys.argv[1], os.environ["TORCHELASTIC_RESTART_COUNT"] + os.environ["RANK"])
log.with_suffix(".part").write_text(str(os.getpid()))
log.with_suffix(".part").rename(log)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] in sys.argv[2]:
    while not log.with_name(log.name[0] + "0").exists():
        time.sleep(0.01)
    raise ValueError("rank 1 gives up")
if os.environ["TORCHELASTIC_RESTART_COUNT"] in sys.argv[2]:
    time.sleep(600)
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        (tmp_path / "script.py").write_text(text)
        return tmp_path / "script.py"

    return write


def test_a_forked_rank_is_as_a_genuine_one(script, tmp_path):
    found = {}
    for launcher in (torchrun, genuine_torchrun):
        folder = tmp_path / launcher.__name__
        folder.mkdir()
        launcher(2, script(TOLD), folder)
        assert len(list(folder.glob("*.end"))) == 2
        found[launcher] = [json.loads((folder / rank).read_text()) for rank in "01"]
        for told in found[launcher]:
            assert told["main"].pop(1) == [str(folder)]
            assert told["own"].pop("MASTER_ADDR")
        one, other = (told.pop("random") for told in found[launcher])
        assert not set(one) & set(other)
    assert found[torchrun] == found[genuine_torchrun]
    assert [told["own"]["RANK"] for told in found[torchrun]] == ["0", "1"]


def test_it_has_imported_what_takes_long(script):
    """Else every rank would import for itself, which nobody sees but the clock."""
    done = python(script(TOLD))
    assert done.stdout == "['torch', 'megatron.core', 'vllm', 'r1kern']\n", done.stderr


ORPHAN = """
import time
from r1kern.orphan import end_with_launcher

end_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = f"""
import os, subprocess, sys, time

os.environ |= {{"R1KERN_LAUNCHER": str(os.getpid()), "RANK": "0"}}
child = subprocess.Popen([sys.executable, "-c", {ORPHAN!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_what_launch_has_started_ends_with_it():
    """`test_pipeline` has the same of a whole job, in the full run."""
    command = [sys.executable, "-c", LAUNCHER]
    launcher = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
    child = psutil.Process(int(launcher.stdout.readline()))
    assert child.is_running()
    launcher.kill()
    launcher.wait()
    child.wait(timeout=20)


def test_the_first_failure_ends_all_and_is_shown(script, tmp_path):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 0: -9\n(.|\n)*ValueError: rank 1 gives up"):
        torchrun(2, script(FAILS), tmp_path, "01", restarts=1)
    assert time.monotonic() - began < 60
    pids = [int((tmp_path / f"{attempt}0").read_text()) for attempt in (0, 1)]
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("launcher", [torchrun, genuine_torchrun])
def test_a_failed_start_is_followed_by_another(launcher, script, tmp_path):
    launcher(2, script(FAILS), tmp_path, "0", restarts=1)
    assert {p.name for p in tmp_path.glob("??")} == {"00", "01", "10", "11"}


def test_exit_codes_output_and_the_deadline(tmp_path):
    done = python("-c", "import os, sys; print(os.getcwd()); sys.exit('no')", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, f"{tmp_path}\n", "no\n")
    assert python("-c", "import os; os._exit(7)").returncode == 7
    assert python("-m", "r1kern", "trian").returncode == 2
    endless = Forked(["-c", "import subprocess; subprocess.run(['sleep', '600'])"], environment())
    await_all([endless], 1.0)
    assert endless.poll() == -9
    left = [p for p in psutil.process_iter(["status"]) if os.getpgid(p.pid) == endless.pid]
    assert all(p.info["status"] == psutil.STATUS_ZOMBIE for p in left)
