#!/usr/bin/env python3
"""Runs every function of kernels/ptx.cuh by itself on a device and keeps, checks or compares what it answers; on one of
compute capability 9.0 those of kernels/ptx_sm90.cuh too.

    python3 conform.py [--check] [--compare DIR] [--out DIR] [--store DIR] [--only NAME,NAME]
                       [--driver libcuda.so] [--module conform.fatbin]

    --check        against an expectation computed here: exact, or within the bound that a primitive states
    --compare DIR  against what another device answered: a folder that --out or --store made
    --out DIR      a file of raw results per primitive, and manifest.json
    --store DIR    the same in small, to be kept as goldens: results that are as expected to the bit by their hash
                   alone, others compressed
    --driver       a library that answers as the NVIDIA driver: the machine's own, or target/emu/conform/libcuda.so
    --module       the micro-kernels; beside it, in conform_sm90.fatbin, those for 9.0

Status 0: all well; 1: something differs, and what is said; 3: there is no device. Needs Python 3.8 and nothing else.
primitives.py and hopper.py have the list: inputs, expectations, rules.
"""

import argparse
import ctypes
import hashlib
import json
import math
import pathlib
import struct
import sys
import zlib

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from floats import F16, F32, f32, is_nan, unpack  # noqa: E402
from hopper import every_of_hopper  # noqa: E402
from primitives import every  # noqa: E402

GUARD = b"\x5a" * 256  # behind every output
SHOWN = 6  # differences of a primitive that are written out
HEADERS = ["ptx.cuh", "ptx_sm90.cuh"]
SOURCES = ["kernels/conform.cu", "kernels/conform_sm90.cu"]  # and the headers, beside this in one place or the other
SOURCES += [f"{folder}/{name}" for folder in ("kernels", "../../kernels") for name in HEADERS]
WITHOUT_OPT_IN = 49152  # bytes of dynamic shared memory


class NoDevice(Exception):
    """There is nothing to run on."""


class Device:
    """Device 0 of a driver, with the micro-kernels loaded."""

    def __init__(self, driver, module):
        for name in [driver] if driver else ["libcuda.so.1", "libcuda.so"]:
            try:
                self.cuda = ctypes.CDLL(name)
                break
            except OSError as error:
                why = error
        else:
            raise NoDevice(f"no NVIDIA driver: {why}")
        device, context, count, version = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        self.call("cuInit", 0)
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise NoDevice("the driver sees no device")
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        name, value = ctypes.create_string_buffer(256), ctypes.c_int()
        self.call("cuDeviceGetName", name, 256, device)

        def attribute(which):
            self.call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
            return value.value

        self.about = {
            "device": name.value.decode(),
            "capability": f"{attribute(75)}.{attribute(76)}",
            "driver": f"{version.value // 1000}.{version.value % 1000 // 10}",
        }
        self.path, self.modules = module, {}

    def module(self, only_on):
        """The micro-kernels for every device, or those for one compute capability."""
        if only_on not in self.modules:
            stem = f"{self.path.stem}_sm{only_on.replace('.', '')}" if only_on else self.path.stem
            path = self.path.with_name(stem + self.path.suffix)
            # The emulated device has the kernels inside; it wants an image, and looks at its first bytes alone.
            image = b"//\0" if hasattr(self.cuda, "emu_set") else path.read_bytes()
            self.modules[only_on] = ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(self.modules[only_on]), image)
        return self.modules[only_on]

    def call(self, name, *arguments):
        result = getattr(self.cuda, name)(*arguments)
        if result:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(result, ctypes.byref(text))
            error = NoDevice if name == "cuInit" else RuntimeError
            raise error(f"{name} failed with {result}: {(text.value or b'').decode()}")

    def memory(self, data):
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(len(data)))
        self.call("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(len(data)))
        return address

    def map(self, taken, byte, sizes, pitches, box, swizzle):
        """A map of a tensor of fp16, for bulk copies."""
        place = ctypes.create_string_buffer(128 + 64)
        skipped = -ctypes.addressof(place) % 64
        map_ = (ctypes.c_char * 128).from_buffer(place, skipped)
        rank = len(sizes)
        self.call(
            "cuTensorMapEncodeTiled", map_, 6, rank, ctypes.c_void_p(taken.value + byte),
            (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * rank)(*pitches), (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
            0, 3 if swizzle else 0, 0, 0,
        )  # fmt: skip
        return map_

    def run(self, primitive):
        """What `out` holds when its kernel is done."""
        function = ctypes.c_void_p()
        kernel = primitive.kernel
        self.call("cuModuleGetFunction", ctypes.byref(function), self.module(primitive.only_on), kernel.encode())
        if primitive.shared > WITHOUT_OPT_IN:
            self.call("cuFuncSetAttribute", function, 8, primitive.shared)
        taken = self.memory(primitive.data)
        out = self.memory(primitive.initial + GUARD)
        arguments = [out, taken, ctypes.c_int(primitive.n), *(self.map(taken, *map_) for map_ in primitive.maps)]
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments)
        )
        if primitive.cluster > 1:
            self.launch_cluster(function, primitive, pointers)
        else:
            sizes = (*primitive.grid, primitive.block, 1, 1, primitive.shared)
            self.call("cuLaunchKernel", function, *sizes, None, pointers, None)
        self.call("cuCtxSynchronize")
        result = ctypes.create_string_buffer(primitive.size + len(GUARD))
        self.call("cuMemcpyDtoH_v2", result, out, ctypes.c_size_t(len(result)))
        for address in (taken, out):
            self.call("cuMemFree_v2", address)
        if result.raw[primitive.size :] != GUARD:
            raise RuntimeError(f"{kernel} writes beyond its output")
        return result.raw[: primitive.size]


    def launch_cluster(self, function, primitive, pointers):
        # CUlaunchAttribute: 4, the cluster's dimension; CUlaunchConfig
        attribute = ctypes.create_string_buffer(struct.pack("=I4x3I52x", 4, primitive.cluster, 1, 1))
        sizes = (*primitive.grid, primitive.block, 1, 1, primitive.shared)
        config = struct.pack("=7I4xQQI4x", *sizes, 0, ctypes.addressof(attribute), 1)
        self.call("cuLaunchKernelEx", ctypes.create_string_buffer(config), function, pointers, None)


# ------------------------------------------------------------------------------------------------ comparing


def words_of(primitive, data):
    return unpack("H" if primitive.rule == "f16" else "I", data)


def exact_differences(primitive, got, wanted):
    """(index, what is wrong), and how many NaN have other bits."""
    form = {"f16": F16, "f32": F32}.get(primitive.rule)
    wrong, payloads = [], 0
    for i, (a, b) in enumerate(zip(words_of(primitive, got), words_of(primitive, wanted))):
        if a != b:
            if form and is_nan(a, form) and is_nan(b, form):
                payloads += 1
            else:
                wrong.append((i, f"{a:#x}, not {b:#x}"))
    return wrong, f"{payloads} NaN of other bits" if payloads else ""


def near_differences(got, wanted, times):
    """The same for numbers within `times` a bound: wanted is a list of (value, bound)."""
    wrong, worst = [], 0.0
    for i, (bits, (value, bound)) in enumerate(zip(unpack("I", got), wanted)):
        x = f32(bits)
        if x != x or value != value:
            same = x != x and value != value
        elif bound == 0 or math.isinf(x) or math.isinf(value):
            same = x == value and math.copysign(1, x) == math.copysign(1, value)
        else:
            distance = abs(x - value) / bound
            worst = max(worst, distance)
            same = distance <= times
        if not same:
            wrong.append((i, f"{x!r} ({bits:#x}), not {value!r} within {times * bound:.3g}"))
    return wrong, f"at worst {worst:.2f} of the bound" if worst else ""


def against_expectation(primitive, got):
    if primitive.rule == "near":
        return near_differences(got, primitive.expected(), 1)
    return exact_differences(primitive, got, primitive.expected())


def against_golden(primitive, got, golden):
    if primitive.rule != "near":
        return exact_differences(primitive, got, golden)
    bounds = (bound for _, bound in primitive.expected())
    return near_differences(got, list(zip(map(f32, unpack("I", golden)), bounds)), 2)


def input_of(primitive, index):
    """The input of element `index`, where elements have inputs of their own."""
    count = primitive.size // (2 if primitive.rule == "f16" else 4)
    each = len(primitive.data) / count
    if each not in (1, 2, 4, 8, 12):
        return ""
    return " of " + primitive.data[int(each * index) : int(each * (index + 1))][::-1].hex()


def report(primitive, what, wrong, note):
    """Says how it went; whether it went well."""
    if not wrong:
        print(f"{primitive.name}: {what}{', ' + note if note else ''}")
        return True
    count = primitive.size // (2 if primitive.rule == "f16" else 4)
    print(f"{primitive.name}: NOT {what}: {len(wrong)} of {count} differ{', ' + note if note else ''}")
    for index, text in wrong[:SHOWN]:
        print(f"    [{index}]{input_of(primitive, index)}: {text}")
    return False


# ---------------------------------------------------------------------------------------------------- keeping


def digest(data):
    return hashlib.sha256(data).hexdigest()


def entry_of(primitive, result):
    return {"rule": primitive.rule, "input": digest(primitive.data + primitive.initial), "output": digest(result)}


def save(place, about, results, small):
    place.mkdir(parents=True, exist_ok=True)
    manifest = dict(about, sources={}, primitives={})
    for source in SOURCES:
        path = HERE / source
        if path.exists():
            manifest["sources"][path.name] = digest(path.read_bytes())
    for primitive, result in results:
        manifest["primitives"][primitive.name] = entry_of(primitive, result)
        if not small:
            (place / f"{primitive.name}.bin").write_bytes(result)
        elif primitive.rule == "near" or result != primitive.expected():
            (place / f"{primitive.name}.z").write_bytes(zlib.compress(result, 9))
    (place / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def golden_of(place, manifest, primitive):
    """What another device answered, or why that cannot be said."""
    entry = manifest["primitives"].get(primitive.name)
    if entry is None:
        return None, "no golden"
    if entry["input"] != entry_of(primitive, b"")["input"]:
        return None, "the golden is of other inputs: make it again on a GPU, or leave it out of its manifest"
    raw, packed = place / f"{primitive.name}.bin", place / f"{primitive.name}.z"
    if raw.exists():
        return raw.read_bytes(), None
    golden = zlib.decompress(packed.read_bytes()) if packed.exists() else primitive.expected()
    if digest(golden) != entry["output"]:
        return None, "the golden has another hash than its manifest says"
    return golden, None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    for name in ("compare", "out", "store"):
        parser.add_argument(f"--{name}", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--only", help="primitives, with commas between")
    parser.add_argument("--driver")
    parser.add_argument("--module", type=pathlib.Path, default=HERE / "conform.fatbin")
    options = parser.parse_args()
    primitives = every() + every_of_hopper()
    if options.only:
        names = options.only.split(",")
        unknown = set(names) - {primitive.name for primitive in primitives}
        if unknown:
            parser.error(f"no primitive {', '.join(sorted(unknown))}: there are {', '.join(p.name for p in primitives)}")
        primitives = [primitive for primitive in primitives if primitive.name in names]
    manifest = json.loads((options.compare / "manifest.json").read_text()) if options.compare else None
    try:
        device = Device(options.driver, options.module)
    except NoDevice as error:
        print(error)
        return 3
    print(f"device: {device.about['device']}, {device.about['capability']}, CUDA {device.about['driver']}")
    if manifest:
        print(f"golden: {manifest['device']}, {manifest['capability']}, CUDA {manifest['driver']}")
    well, results = True, []
    here = [primitive for primitive in primitives if primitive.only_on in (None, device.about["capability"])]
    if len(here) < len(primitives):
        print(f"left out, for this device lacks them: {', '.join(p.name for p in primitives if p not in here)}")
    for primitive in here:
        try:
            result = device.run(primitive)
        except RuntimeError as error:
            print(f"{primitive.name}: NOT run: {error}")
            well = False
            break  # a device that failed once answers no more
        results.append((primitive, result))
        if options.check:
            well &= report(primitive, "as expected", *against_expectation(primitive, result))
        if manifest:
            golden, why = golden_of(options.compare, manifest, primitive)
            if golden is not None:
                well &= report(primitive, "as the golden", *against_golden(primitive, result, golden))
            else:
                print(f"{primitive.name}: {why}")
                well &= why == "no golden"
    for place, small in ((options.out, False), (options.store, True)):
        if place:
            save(place, device.about, results, small)
    print(f"{len(results)} primitives: {'all well' if well else 'NOT WELL'}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
