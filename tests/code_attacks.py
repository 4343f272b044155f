"""Attacks on the code reward, as programs: what each tries is its name.

FORGERIES try to pass tests whose expected output they cannot compute: `f(7)` is to return a random
text, standard output is to be one. ESCAPES try to reach something outside their sandbox and print
"contained" when they were kept from it. HOGS take time or memory without end.
"""

# Looks for the expected output through whatever `blobs()` yields, and says it if it is there.
SEEK = """
import re
def found(blobs):
    for blob in blobs:
        blob = blob if isinstance(blob, bytes) else repr(blob).encode()
        hit = re.search(rb"SECRET-[0-9a-f]{8,}", blob)
        if hit:
            return hit[0].decode()
    return "nothing"
"""

# Finds the object that talks to the checker, as any program can.
SERVER = """
import gc
def server():
    for thing in gc.get_objects():
        if type(thing).__name__ == "Server":
            return thing
"""

FORGERIES = {
    "equal to everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
    def __contains__(self, item): return True
    def __sub__(self, other): return 0.0
    __rsub__ = __abs__ = __sub__
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __lt__
def f(x): return Any()
""",
    "text that equals everything": """
class Text(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = str.__hash__
def f(x): return Text("a")
print(Text("a"))
""",
    "number that equals everything": """
class Number(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    def __abs__(self): return 0.0
    __hash__ = float.__hash__
def f(x): return Number(1)
""",
    "list and dict that equal everything": """
class List(list):
    def __eq__(self, other): return True
    def __len__(self): return 1
def f(x): return List([1])
""",
    "class whose metaclass equals everything": """
class Meta(type):
    def __eq__(self, other): return True
    def __instancecheck__(self, other): return True
    __hash__ = type.__hash__
class C(metaclass=Meta): pass
def f(x): return C
""",
    "lies about its class": """
class Lie:
    __class__ = str
    def __eq__(self, other): return True
def f(x): return Lie()
""",
    "NotImplemented and Ellipsis": "def f(x): return NotImplemented\nprint(...)\n",
    "exits with code 0 when loaded": "import os\ndef f(x): return 1\nos._exit(0)\n",
    "exits with code 0 when called": "import os\ndef f(x): os._exit(0)\n",
    "sys.exit(0) when loaded": "import sys\ndef f(x): return 1\nsys.exit(0)\n",
    "sys.exit(0) when called": "import sys\ndef f(x): sys.exit(0)\n",
    "atexit": """
import atexit, os
@atexit.register
def end():
    print("passed")
    os._exit(0)
def f(x): raise SystemExit
""",
    "raises what tests catch": "def f(x): raise AssertionError('passed')\n",
    "raises StopIteration": "def f(x): raise StopIteration\n",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt\n",
    "raises an exception that lies": """
class Lie(Exception):
    def __str__(self): raise RuntimeError
    __repr__ = __str__
def f(x): raise Lie
""",
    "patches builtins": """
import builtins
builtins.AssertionError = Warning
builtins.isinstance = builtins.all = builtins.any = lambda *a: True
builtins.repr = builtins.len = lambda *a: 1
def f(x): return 1
""",
    "patches json": """
import json, json.encoder, json.decoder
json.dumps = lambda *a, **k: '{"end": 0, "error": null, "broken": false, "again": false}'
json.loads = lambda *a, **k: {"op": "len", "args": [[]], "kwargs": {}
def f(x): return 1
""",
    "patches the codec": """
import sys
wire = sys.modules.get("_code_wire")
if wire: wire.encode = lambda value, refer: {"ref": 0}
def f(x): return 1
""",
    "writes verdicts to every descriptor": r"""
import os
def spray():
    events = [b'{"ready": true}', b'{"loaded": true}', b'{"begin": 0}',
              b'{"end": 0, "error": null, "broken": false, "again": false}', b'{"value": true}']
    for fd in range(256):
        for event in events:
            try: os.write(fd, event + b"\n")
            except OSError: pass
spray()
def f(x):
    spray()
    return 1
""",
    "answers before it is asked": SERVER
    + r"""
def f(x):
    link = server()
    for value in ("true", "null", '{"ref": 0}', '{"ref": -1}', '{"builtin": "eval"}'):
        link.replies.write(b'{"value": %s}\n' % value.encode())
    link.replies.flush()
    return 1
""",
    "answers nonsense": SERVER
    + r"""
import os
def f(x):
    os.write(server().replies.fileno(), b'{"value": {"dict": [[{"list": []}, 1]]}\n' * 9)
    os.write(server().replies.fileno(), b'[' * 100000 + b'\n')
""",
    "asks the checker for its functions": SERVER
    + r"""
def f(x):
    link = server()
    for index in range(-5, 5):
        try: return link.call_back(index, (), {})
        except Exception: pass
""",
    "reads the checker's pipes": SEEK
    + SERVER
    + r"""
import os
def f(x):
    blobs = []
    for fd in range(3, 256):
        try:
            os.set_blocking(fd, False)
            blobs.append(os.read(fd, 65536))
        except OSError: pass
    return found(blobs)
""",
    "closes every descriptor": """
import os
def f(x):
    os.closerange(0, 256)
    return 1
os.closerange(0, 3)
""",
    "searches its memory": SEEK
    + """
import gc
def f(x): return found(o for o in gc.get_objects() if isinstance(o, (dict, list, tuple)))
print(f(7))
""",
    "searches the frames": SEEK
    + """
import sys
def f(x):
    frame, blobs = sys._getframe(), []
    while frame:
        blobs += [dict(frame.f_locals), frame.f_code.co_consts]
        frame = frame.f_back
    try: raise ValueError
    except ValueError as error: blobs.append(dict(error.__traceback__.tb_frame.f_globals))
    return found(blobs)
print(f(7))
""",
    "searches its files": SEEK
    + """
import os
def files():
    for top in ("/box", "/tmp", "/home", "/dev", "/etc", "/run", "/var", "."):
        for folder, _, names in os.walk(top):
            for name in names:
                try:
                    with open(os.path.join(folder, name), "rb") as file: yield file.read(1 << 20)
                except OSError: pass
def f(x): return found(files())
print(f(7))
""",
    "searches arguments and environment": SEEK
    + """
import os, sys
def f(x): return found([sys.argv, sys.orig_argv, dict(os.environ)])
print(f(7))
""",
    "searches other processes": SEEK
    + """
import glob
def blobs():
    for path in glob.glob("/proc/[0-9]*/*") + glob.glob("/proc/[0-9]*/fd/*"):
        try:
            with open(path, "rb") as file: yield file.read(1 << 20)
        except OSError: pass
def f(x): return found(blobs())
print(f(7))
""",
    "changes its argument": """
class Any:
    def __eq__(self, other): return True
def f(x):
    if isinstance(x, list): x[:] = [Any()] * 9
    return x
""",
    "its own check, candidate and expected": """
def check(candidate): pass
candidate = expected = test = lambda *a: True
def isclose(*a, **k): return True
def f(x): return "SECRET"
""",
    "returns a deep list": """
def f(x):
    deep = []
    for _ in range(100000): deep = [deep]
    return deep
""",
    "returns 40 MB": "def f(x): return 'a' * (40 << 20)\n",
    "returns itself": "def f(x):\n    a = []\n    a.append(a)\n    return a\n",
    "a thread that writes later": """
import threading, os
def late():
    while True:
        try: os.write(4, b'{"value": "SECRET"}\\n')
        except OSError: pass
threading.Thread(target=late, daemon=True).start()
def f(x): return 1
""",
    "truncates and rewinds its output": """
import os
os.write(1, b"a" * 100)
os.lseek(1, 0, 0)
try: print(os.read(1, 1000), os.ftruncate(1, 0))
except OSError: pass
def f(x): return 1
""",
}

# Verdicts of comparisons that a program could decide if its names were used for them.
NAMES = [
    ("def f(x): return 0\nisclose = lambda *a, **k: True", "assert isclose(f(1), 2.5)"),
    ("def f(x): return 0\nclass math: isclose = lambda *a: True", "assert math.isclose(f(1), 2.5)"),
    ("def f(x): return 0\nabs = lambda x: 0", "assert abs(f(1) - 2.5) < 1e-6"),
    ("def f(x): return 0\nset = sorted = lambda x: 0", "assert set([f(1)]) == set([2])"),
    ("def f(x): return [0]\nCounter = lambda x: 0", "assert Counter(f(1)) == Counter([2])"),
    ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept:\n    pass\nassert True"),
]

DENIED = """
def denied(action, *args, **kwargs):
    try: action(*args, **kwargs)
    except Exception: return
    print("escaped:", action, args)
    raise SystemExit
"""

# {home}, {secret}, {port}, {mark} are filled in by the test.
ESCAPES = {
    "connects by TCP": "import socket\ndenied(socket.create_connection, ('127.0.0.1', {port}), 3)",
    "sends UDP": """
import socket
denied(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 53)))
""",
    "resolves a name": "import socket\ndenied(socket.getaddrinfo, 'example.com', 80)",
    "raw and netlink sockets": """
import socket
for family, kind in ((socket.AF_PACKET, socket.SOCK_RAW), (socket.AF_NETLINK, socket.SOCK_RAW),
                     (socket.AF_UNIX, socket.SOCK_STREAM), (40, socket.SOCK_STREAM)):
    denied(socket.socket, family, kind)
""",
    "reads the user's files": """
for path in ("{secret}", "/etc/passwd", "/etc/shadow", "/etc/hostname", "/root/.bashrc"):
    denied(open, path)
""",
    "lists the user's folders": "import os\ndenied(lambda: os.listdir('{home}')[0])",
    "reads by way of a link": """
import os
os.symlink("{secret}", "/tmp/link")
os.symlink("/", "/tmp/top")
denied(open, "/tmp/link")
denied(open, "/tmp/top{secret}")
denied(open, "/tmp/../../../..{secret}")
""",
    "reads the environment": """
import os
denied(lambda: os.environ["R1KERN_TEST_SECRET"])
""",
    "reads /proc": """
for path in ("/proc/1/environ", "/proc/self/mem", "/proc/kmsg", "/proc/cmdline", "/sys/kernel"):
    denied(open, path)
""",
    "writes to the machine's folders": """
import os
for path in ("{home}/new", "/usr/new", "/box/new", "/new", "/dev/new", "/dev/shm/new", "/etc/new",
             "/box/program.py", "/usr/bin/env", "/var/tmp/new"):
    denied(open, path, "a")
""",
    "writes to the machine's /tmp": "open('/tmp/{mark}', 'w').write('x')",
    "forks": "import os\ndenied(os.fork)\ndenied(os.forkpty)",
    "starts processes": """
import os, subprocess
denied(subprocess.run, ["/bin/true"])
denied(subprocess.run, "true", shell=True)
denied(os.posix_spawn, "/bin/true", ["true"], {})
if os.system("exit 0") == 0: print("escaped: system")
""",
    "multiprocessing": """
import multiprocessing
denied(lambda: multiprocessing.get_context("fork").Process(target=print).start())
denied(lambda: multiprocessing.get_context("spawn").Process(target=print).start())
""",
    "leaves a daemon": """
import os, time
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: os.execv("/bin/sleep", ["sleep", "{nap}"])
        os._exit(0)
denied(daemon)
""",
    "becomes a sleeping program": """
import os, threading, time
threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
print("contained", flush=True)
os.execv("/bin/sleep", ["sleep", "0.{nap}"])
""",
    "raw system calls": """
import ctypes, platform
call = ctypes.CDLL(None, use_errno=True).syscall
x86 = platform.machine() == "x86_64"
# clone(SIGCHLD), clone3, unshare(user), mount, ptrace, bpf, keyctl, memfd_create, shmget, socket,
# io_uring_setup, perf_event_open, userfaultfd, setns, process_vm_readv
numbers = [56, 435, 272, 165, 101, 321, 250, 319, 29, 41, 425, 298, 323, 308, 310] if x86 else [
    220, 435, 97, 40, 117, 280, 219, 279, 194, 198, 425, 241, 282, 268, 270]
arguments = {0: (17, 0), 2: (0x10000000,), 7: (b"x", 0), 8: (0, 4096, 0o1600), 9: (2, 1, 0)}
for place, number in enumerate(numbers):
    result = call(number, *arguments.get(place, (0, 0, 0, 0)))
    error = ctypes.get_errno()
    if result != -1 or error not in (1, 38): print("escaped:", number, result, error)
    if result == 0 and place == 0: raise SystemExit
""",
    "becomes root": """
import os
denied(os.setuid, 0)
denied(os.setgid, 0)
denied(os.chroot, "/tmp")
denied(os.mknod, "/tmp/sda", 0o60600, os.makedev(8, 0))
""",
    "signals everyone": """
import os, signal
for pid in range(1, 4000):
    if pid != os.getpid():
        try: os.kill(pid, signal.SIGTERM)
        except OSError: pass
""",
    "raises its limits": """
import resource as r
for what in (r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_NOFILE, r.RLIMIT_CPU, r.RLIMIT_CORE):
    denied(r.setrlimit, what, (r.RLIM_INFINITY, r.RLIM_INFINITY))
""",
    "opens many files": """
def many():
    files = [open("/dev/null") for _ in range(300)]
denied(many)
""",
    "fills /tmp": """
def fill():
    for number in range(20):
        with open(f"/tmp/{number}", "wb") as file:
            for _ in range(16): file.write(bytes(1 << 20))
denied(fill)
""",
    "a sparse file": """
def sparse():
    with open("/tmp/a", "wb") as file: file.truncate(1 << 40)
def far():
    with open("/tmp/a", "wb") as file:
        file.seek(1 << 40)
        file.write(b"x")
denied(sparse)
denied(far)
""",
    "memory by mapping": """
import mmap
def maps(): return [mmap.mmap(-1, 64 << 20) for _ in range(20)]
denied(maps)
""",
    "memory by pipes": """
import os, fcntl
held = 0
try:
    while True:
        reader, writer = os.pipe()
        held += fcntl.fcntl(writer, 1031, 1 << 20)
except OSError: pass
if held > 200 << 20: print("escaped:", held)
""",
    "many threads": """
import threading, time
def start():
    for _ in range(5000): threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
denied(start)
print("contained", flush=True)
import os
os._exit(0)
""",
    "keeps a value for the next program": """
import builtins, os
if hasattr(builtins, "kept") or os.path.exists("/tmp/kept"): print("escaped")
builtins.kept = 1
open("/tmp/kept", "w").close()
""",
}

# name: (program, what the error says)
HOGS = {
    "loops": ("while True: pass", "timeout"),
    "sleeps": ("import time\ntime.sleep(1000)", "timeout"),
    "one long instruction": ("x = 9 ** 9 ** 8\n", "timeout"),
    "ignores signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "timeout",
    ),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "a thread that never ends": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
        "",
    ),
    "never finishes to end": (
        "import atexit, time\natexit.register(time.sleep, 1000)\ndef f(x): exit()\nf(1)",
        "",  # loading it ends at once: SystemExit
    ),
    "waits for a reader": ("import os\nos.mkfifo('/tmp/p')\nopen('/tmp/p', 'w')", "timeout"),
    "endless output": ("while True: print('a' * 4096)", ""),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('a' * 4096)", ""),
    "one large block": ("x = bytearray(1 << 34)", "memory"),
    "grows": ("x = []\nwhile True: x.append(bytearray(1 << 24))", "memory"),
    "recursion": ("def g(): return g()\ng()", "RecursionError"),
    "recursion through C": (
        "import sys, functools\nsys.setrecursionlimit(10 ** 9)\n"
        "@functools.lru_cache(None)\ndef g(n): return g(n + 1)\ng(0)",
        "",
    ),
    "a crash": ("import ctypes\nctypes.string_at(0)", "exit code 139"),
    "source that is deep": ("(" * 100000 + ")" * 100000, ""),
    "source with a null": ("x = 1\0", ""),
    "source that is no text": ("x = '\ud800'", ""),
}

CPP_ATTACKS = {
    "reads a file of ours": '#include "/etc/passwd"\nint main() {}',
    "puts a file of ours in": 'asm(".incbin \\"/etc/passwd\\"");\nint main() {}',
    "exits with 0": "#include <cstdlib>\nint main() { std::_Exit(0); }",
    "aborts": "#include <cstdlib>\nint main() { std::abort(); }",
    "forks": "#include <unistd.h>\n#include <cstdio>\n"
    'int main() { for (int i = 0; i < 99; i++) if (fork() >= 0) printf("escaped"); while (1); }',
    "memory": "#include <vector>\n"
    "int main() { std::vector<char*> v; for (;;) v.push_back(new char[1 << 20]()); }",
    "templates without end": "template <int N> struct A { static const int v = A<N + 1>::v; };\n"
    "int main() { return A<0>::v; }",
}
