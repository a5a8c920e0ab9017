"""The device, its driver, and the processes that use it, for `run`."""

import ctypes
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
TINY = os.environ.get("IMAGEHERE_BENCH_TINY") == "1"
SMI = [
    "name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "utilization.gpu", "memory.used", "memory.total",
]  # fmt: skip


class Stopped(Exception):
    """Somebody stops this run."""


class Skipped(Exception):
    """A part cannot run here, and why."""


def environment():
    """Children find the driver where containers put it, too."""
    env = dict(os.environ, RUST_BACKTRACE="0", PYTHONUNBUFFERED="1")
    places = [env.get("LD_LIBRARY_PATH"), "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib"]
    env["LD_LIBRARY_PATH"] = ":".join(place for place in places if place)
    return env


# What a child asks of the driver, and answers in one line; a driver that hangs or crashes takes no run with it.
PROBE = r"""
import ctypes, json
for name in ("libcuda.so", "libcuda.so.1"):
    try:
        cuda = ctypes.CDLL(name)
        break
    except OSError as error:
        why = str(error)
else:
    raise SystemExit("no NVIDIA driver: " + why)
def ask(name, *arguments):
    result = getattr(cuda, name)(*arguments)
    if result:
        raise SystemExit(f"{name} failed with {result}")
version, count, device, value = (ctypes.c_int() for _ in range(4))
text = ctypes.create_string_buffer(256)
ask("cuInit", 0)
ask("cuDriverGetVersion", ctypes.byref(version))
ask("cuDeviceGetCount", ctypes.byref(count))
ask("cuDeviceGet", ctypes.byref(device), 0)
ask("cuDeviceGetName", text, 256, device)
def attribute(which):
    ask("cuDeviceGetAttribute", ctypes.byref(value), which, device)
    return value.value
print(json.dumps({
    "name": text.value.decode(), "devices": count.value, "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
    "capability": f"{attribute(75)}.{attribute(76)}", "multiprocessors": attribute(16),
}))
"""


def probe():
    """The device, or why there is none."""
    try:
        child = subprocess.run([sys.executable, "-c", PROBE], env=environment(), capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None, "the driver does not answer"
    if child.returncode:
        said = (child.stderr or child.stdout).strip().splitlines()
        return None, said[-1] if said else f"asking the driver ended with {child.returncode}"
    return json.loads(child.stdout), None


def clocks():
    """What nvidia-smi says of the first device now, or why it says nothing."""
    command = ["nvidia-smi", "-i", "0", "--query-gpu=" + ",".join(SMI), "--format=csv,noheader,nounits"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"absent": str(error)}
    if child.returncode:
        return {"absent": child.stdout.strip() or child.stderr.strip()}
    return dict(zip(SMI, (field.strip() for field in child.stdout.strip().split(","))))


def die_with_me():
    """In a child, before it begins: a process group of its own, which ends when this run does."""
    os.setpgrp()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Run:
    """One run: its folder, its end, the children it has."""

    def __init__(self, out, limit, device, torch_device):
        self.out = out
        self.end = time.monotonic() + limit
        self.log = open(out / "log.txt", "w", encoding="utf-8", buffering=1)
        self.children = []
        self.device = device  # what probe() says of it
        self.torch_device = torch_device
        self.place = tempfile.TemporaryDirectory(prefix="imagehere-suite-")

    def save(self, name, value):
        """Names a file only when it is whole."""
        part = self.out / f".{name}.part"
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.out / f"{name}.json")

    def stop(self):
        for child in self.children:
            if child.poll() is None:
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                child.wait()
        self.children = []

    def start(self, words, extra, **streams):
        words = [str(word) for word in words]
        self.log.write(f"\n$ {' '.join(words)}  {extra or ''}\n")
        child = subprocess.Popen(
            words, env=dict(environment(), **extra), stdout=subprocess.PIPE, preexec_fn=die_with_me, cwd=HERE, text=True,
            encoding="utf-8", errors="replace", **streams,
        )  # fmt: skip
        self.children.append(child)
        return child

    def command(self, words, seconds, meanwhile=lambda: None, **extra):
        """Runs a program for at most so long, and `meanwhile` every few seconds.

        Returns status (None: cut off), output, seconds."""
        seconds = max(1.0, min(seconds, self.end - time.monotonic()))
        start = time.monotonic()
        child = self.start(words, extra, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        cut = threading.Event()
        timer = threading.Timer(seconds, lambda: (cut.set(), self.stop()))
        timer.daemon = True
        timer.start()
        said, last = [], start
        try:
            for line in child.stdout:
                said.append(line)
                self.log.write(line)
                if time.monotonic() - last > 3:
                    meanwhile()
                    last = time.monotonic()
            status = child.wait()
        finally:
            timer.cancel()
            self.stop()
        took = time.monotonic() - start
        self.log.write(f"-> {'cut off' if cut.is_set() else status} after {took:.1f} s\n")
        return None if cut.is_set() else status, "".join(said), round(took, 2)

    def model(self):
        """A random checkpoint, of the real sizes, that takes any number of images; made once."""
        made = pathlib.Path(self.place.name) / "model"
        if not made.exists():
            preset = "tiny" if TINY else "vl-7b-vision"
            command = [HERE / "bin/imagehere", "synth", preset, "--format", "safetensors", "--out", made]
            status, said, _ = self.command(command, 90)
            if status != 0:
                raise Skipped(f"no model could be made: {said.strip()[-300:]}")
            config = json.loads((made / "config.json").read_text())
            for key in ("max_length", "max_position_embeddings"):
                config.pop(key, None)
            (made / "config.json").write_text(json.dumps(config))
        return made


class Peer:
    """A child that answers lines with lines of JSON. What else it says goes to the log."""

    def __init__(self, run, words, **extra):
        self.run, self.answers, self.last = run, queue.Queue(), ""
        self.child = run.start(words, extra, stderr=run.log, stdin=subprocess.PIPE)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.child.stdout:
            self.run.log.write(line)
            if line.startswith("{"):
                self.answers.put(json.loads(line))
            elif line.strip():
                self.last = line.strip()
        self.answers.put(None)

    def hear(self, seconds):
        """The next answer; None if it ended, or was ended because none came in time."""
        seconds = max(0.1, min(seconds, self.run.end - time.monotonic()))
        try:
            return self.answers.get(timeout=seconds)
        except queue.Empty:
            self.last = f"no answer in {seconds:.0f} s"
            self.end()
            return None

    def ask(self, line, seconds):
        try:
            self.child.stdin.write(line + "\n")
            self.child.stdin.flush()
        except OSError:
            return None
        return self.hear(seconds)

    def end(self):
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        return self.child.wait()


def tail(text, lines=25):
    return text.strip().splitlines()[-lines:]


