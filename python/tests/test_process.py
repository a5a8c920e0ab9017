"""The interpreter meanwhile: other threads run, Ctrl-C works, nothing else needs to be installed."""

import subprocess
import sys
import textwrap
import threading
import time

from conftest import pixels

PROMPT = "First:<ImageHere>, second:<ImageHere>."


def python(code, *arguments):
    """Runs a program in an interpreter of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_other_threads_run_while_images_are_encoded(encoder, files):
    done, counted = threading.Event(), 0

    def work():
        encoder.features([files[0][:-3] + i.to_bytes(3, "little") for i in range(400)])
        done.set()

    worker = threading.Thread(target=work)
    begin = time.perf_counter()
    worker.start()
    while not done.is_set():
        counted += 1
        time.sleep(0.001)
    worker.join()
    taken = time.perf_counter() - begin
    assert counted > 100 * taken, f"{counted} turns in {taken:.2f} s"


def test_calls_from_several_threads(encoder, files):
    expected = [memoryview(encoder.encode(PROMPT, [f, files[0]]).inputs_embeds).tobytes() for f in files]
    wrong = []

    def work(i):
        for _ in range(5):
            sequence = encoder.encode(PROMPT, [files[i], files[0]])
            if memoryview(sequence.inputs_embeds).tobytes() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ctrl_c_stops_an_encode(checkpoint, tmp_path):
    file = tmp_path / "pixels"
    file.write_bytes(pixels(1, 60, 40))
    ran = python(
        """
        import os, signal, sys, threading, time
        import imagehere
        encoder = imagehere.Encoder(sys.argv[1], "cpu")
        data = open(sys.argv[2], "rb").read()
        image = lambda i: memoryview(i.to_bytes(3, "little") + data[3:]).cast("B", (40, 60, 3))
        images = [image(i) for i in range(20000)]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have come without it
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        begin = time.perf_counter()
        try:
            encoder.features(images)
            print("finished", time.perf_counter() - begin)
        except KeyboardInterrupt:
            print("interrupted", time.perf_counter() - begin)
        print(len(encoder.encode("<ImageHere>", images[:1])), "positions after that")
        """,
        checkpoint,
        file,
    )
    assert ran.returncode == 0, ran.stderr
    word, seconds = ran.stdout.split()[:2]
    assert word == "interrupted" and "positions after that" in ran.stdout, ran.stdout


def test_needs_neither_numpy_nor_torch(checkpoint, files):
    ran = python(
        """
        import sys
        for name in ["numpy", "torch", "PIL"]:
            sys.modules[name] = None
        import imagehere
        encoder = imagehere.Encoder(sys.argv[1], "cpu")
        sequence = encoder.encode("<ImageHere>", bytes.fromhex(sys.argv[2]))
        print(memoryview(sequence.inputs_embeds).shape)
        """,
        checkpoint,
        files[2].hex(),
    )
    assert ran.returncode == 0 and ran.stdout.startswith("(1, "), ran.stderr


def test_memory_is_given_back(encoder, files):
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
    for _ in range(20):
        encoder.encode(PROMPT, files[:2])
    before = resident()
    for _ in range(300):
        encoder.encode(PROMPT, files[:2])
        encoder.features(files)
    assert resident() - before < 20e6
