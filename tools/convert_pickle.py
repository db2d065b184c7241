#!/usr/bin/env python3
"""Rewrites a checkpoint that PyTorch pickled as safetensors, without running what the pickle says.

usage: convert_pickle.py FOLDER [--out OUT] [--mixer-kwargs JSON]

FOLDER holds `config.json` and `pytorch_model.bin`, as lrnnx and mamba_ssm save them (a zip archive:
torch 1.6 or newer). OUT, by default FOLDER itself, gets `model.safetensors` and `config.json`.
lrnnx does not save its `mixer_kwargs`; those given here are put into the written `config.json`.

A pickle is a program. This one is interpreted here, not by the pickle module: it may build dicts,
lists, tuples and numbers, and name what REBUILD and STORAGES list. Anything else is refused by its
name. Complex tensors become real ones with a last axis of 2, (re, im), as the library reads them.

Exit status 0: written; 2: refused, with one line that says why.
"""
import argparse
import collections
import contextlib
import io
import json
import math
import os
import pathlib
import pickletools
import struct
import sys
import zipfile

WEIGHTS = "pytorch_model.bin"
MAX_PROGRAM_BYTES = 64 << 20
MAX_RANK = 64  # that of torch
# Bytes that all tensors together may have for each byte of the archive: views may repeat a storage,
# but a small file must not fill the disk.
MAX_GROWTH = 16


class Refused(Exception):
    """The file is damaged, or asks for something that this program does not do."""


# name in a pickle -> (name in safetensors, bytes of a real number, real numbers of an element)
STORAGES = {
    "torch DoubleStorage": ("F64", 8, 1),
    "torch FloatStorage": ("F32", 4, 1),
    "torch HalfStorage": ("F16", 2, 1),
    "torch BFloat16Storage": ("BF16", 2, 1),
    "torch LongStorage": ("I64", 8, 1),
    "torch IntStorage": ("I32", 4, 1),
    "torch ShortStorage": ("I16", 2, 1),
    "torch CharStorage": ("I8", 1, 1),
    "torch ByteStorage": ("U8", 1, 1),
    "torch BoolStorage": ("BOOL", 1, 1),
    "torch ComplexFloatStorage": ("F32", 4, 2),
    "torch ComplexDoubleStorage": ("F64", 8, 2),
}

# key: of the archive's entry data/<key>; numel: elements, complex ones counting once
Storage = collections.namedtuple("Storage", "dtype size parts key numel")
# offset, shape and strides in elements of the storage
Tensor = collections.namedtuple("Tensor", "storage offset shape strides")
# A name of REBUILD or STORAGES on the stack of the interpreter.
Name = collections.namedtuple("Name", "text")


def is_index(value):
    return type(value) is int and 0 <= value < 1 << 63


def rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise Refused("a tensor is not rebuilt from a storage, a shape and strides")
    if len(shape) != len(strides) or len(shape) > MAX_RANK:
        raise Refused(f"a tensor of storage {storage.key!r} has {len(shape)} sizes and "
                      f"{len(strides)} strides: expected as many of both, at most {MAX_RANK}")
    if not all(map(is_index, (offset, *shape, *strides))):
        raise Refused(f"a tensor of storage {storage.key!r}: expected an offset, sizes and strides "
                      "that are numbers from 0 on")
    if metadata:
        raise Refused(f"a tensor of storage {storage.key!r} is conjugated or negated lazily")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
    if math.prod(shape) > 0 and last >= storage.numel:
        raise Refused(f"a tensor of shape {shape} reaches element {last} of storage "
                      f"{storage.key!r}, which has {storage.numel}")
    return Tensor(storage, offset, shape, strides)


def rebuild_parameter(data, requires_grad=True, hooks=None):
    if not isinstance(data, Tensor):
        raise Refused("a parameter is not rebuilt from a tensor")
    return data


# All that a pickle may call.
REBUILD = {
    "collections OrderedDict": dict,
    "torch._utils _rebuild_tensor_v2": rebuild_tensor,
    "torch._utils _rebuild_parameter": rebuild_parameter,
}


def call(name, arguments):
    if not isinstance(name, Name) or name.text not in REBUILD or type(arguments) is not tuple:
        raise Refused("the pickle calls something that is not a function")
    if name.text == "collections OrderedDict" and arguments:
        raise Refused("the pickle passes arguments to OrderedDict")
    try:
        return REBUILD[name.text](*arguments)
    except TypeError:
        raise Refused(f"the pickle calls {name.text} with {len(arguments)} arguments") from None


def storage(reference):
    if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
        raise Refused("the pickle refers to something that is not a storage")
    _, kind, key, _, numel = reference  # the fourth is the device
    if type(key) is not str or not is_index(numel):
        raise Refused("the pickle refers to a storage without a name or a number of elements")
    if not isinstance(kind, Name) or kind.text not in STORAGES:
        raise Refused(f"storage {key!r} has no type of storage")
    return Storage(*STORAGES[kind.text], key, numel)


class Interpreter:
    """A stack, the marks on it, and what the pickle has put aside under numbers."""

    def __init__(self):
        self.stack, self.marks, self.memo = [], [], {}

    def run(self, program):
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.execute(opcode.name, argument)
        raise ValueError("no STOP")

    def execute(self, name, argument):
        stack = self.stack
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in LITERALS:
            stack.append(argument)
        elif name in NEW:
            stack.append(NEW[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self.last(int(name[-1]))))
        elif name == "GLOBAL":
            if argument not in REBUILD and argument not in STORAGES:
                raise Refused(f"the pickle names {argument.replace(' ', '.', 1)!r}, "
                              "which is no part of a tensor")
            stack.append(Name(argument))
        elif name == "BINPERSID":
            stack.append(storage(stack.pop()))
        elif name == "REDUCE":
            stack.append(call(*self.last(2)))
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.last(2) if name == "SETITEM" else self.since_mark())
        elif name in ("APPEND", "APPENDS"):
            values = self.last(1) if name == "APPEND" else self.since_mark()
            self.target(list).extend(values)
        elif name == "BUILD":
            # The attributes of a state dict, which are versions of modules.
            self.last(1)
            self.target(dict)
        elif name != "PROTO":
            raise Refused(f"the pickle uses the opcode {name}, which no tensor needs")

    def last(self, count):
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise IndexError("stack underflow")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def since_mark(self):
        begin = self.marks.pop()
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def target(self, kind):
        if type(self.stack[-1]) is not kind:
            raise Refused(f"the pickle treats a {type(self.stack[-1]).__name__} as a "
                          f"{kind.__name__}")
        return self.stack[-1]

    def set_items(self, values):
        if len(values) % 2:
            raise IndexError("a key without a value")
        for key, value in zip(values[::2], values[1::2]):
            if type(key) not in (str, int):
                raise Refused(f"the pickle uses a {type(key).__name__} as a key")
            self.target(dict)[key] = value


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list}


def interpret(program):
    try:
        return Interpreter().run(program)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise Refused(f"the pickle is damaged: {error}") from None


# What zipfile raises for damaged archives. NotImplementedError is a RuntimeError, and
# UnicodeDecodeError a ValueError.
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, OSError, OverflowError, RuntimeError, ValueError,
              struct.error)


class Archive:
    """The entries of a zip archive as torch.save writes it: <name>/data.pkl, <name>/data/<key>."""

    def __init__(self, path):
        self.bytes = path.stat().st_size
        try:
            self.zip = zipfile.ZipFile(path)
        except ZIP_ERRORS as error:
            raise Refused(f"{error}; expected an archive as torch 1.6 or newer saves it") from None
        self.entries = {}
        for entry in self.zip.infolist():
            if entry.filename in self.entries:
                raise Refused(f"the archive has two entries {entry.filename!r}")
            self.entries[entry.filename] = entry
        programs = [name for name in self.entries if name.split("/")[1:] == ["data.pkl"]]
        if len(programs) != 1:
            raise Refused(f"the archive has {len(programs)} entries */data.pkl, expected one")
        self.folder = programs[0].split("/")[0]
        if self.folder + "/byteorder" in self.entries and self.read("byteorder", 6) != b"little":
            raise Refused("the numbers are big-endian")
        self.key, self.data = None, b""

    def read(self, name, limit):
        entry = self.entries.get(f"{self.folder}/{name}")
        if entry is None:
            raise Refused(f"the archive has no entry {name!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Refused(f"the entry {name!r} is compressed, which torch.save does not do")
        if entry.file_size > limit:
            raise Refused(f"the entry {name!r} has {entry.file_size} bytes, "
                          f"expected at most {limit}")
        try:
            data = self.zip.read(entry)  # checks the CRC
        except ZIP_ERRORS as error:
            raise Refused(f"the entry {name!r} is damaged: {error}") from None
        if len(data) != entry.file_size:
            raise Refused(f"the entry {name!r} ends early")
        return data

    def storage(self, storage):
        """The bytes of a storage; the last one is kept, since tensors may share it."""
        if self.key != storage.key:
            self.data = self.read(f"data/{storage.key}", self.bytes)
            self.key = storage.key
        expected = storage.numel * storage.size * storage.parts
        if len(self.data) != expected:
            raise Refused(f"storage {storage.key!r} has {len(self.data)} bytes, "
                          f"expected {expected}")
        return self.data


def real_shape(tensor):
    return tensor.shape if tensor.storage.parts == 1 else (*tensor.shape, tensor.storage.parts)


def byte_count(tensor):
    return math.prod(real_shape(tensor)) * tensor.storage.size


def contiguous_parts(numbers, offset, shape, strides):
    """The numbers of a view in row-major order, as bytes, run by run."""
    if not shape:
        yield numbers[offset : offset + 1].tobytes()
    elif len(shape) == 1:
        n, stride = shape[0], strides[0]
        if stride == 0:
            yield numbers[offset : offset + 1].tobytes() * n
        else:
            yield numbers[offset : offset + (n - 1) * stride + 1 : stride].tobytes()
    elif strides[0] == shape[1] * strides[1]:  # two axes that are one
        yield from contiguous_parts(numbers, offset, (shape[0] * shape[1], *shape[2:]), strides[1:])
    else:
        for i in range(shape[0]):
            yield from contiguous_parts(numbers, offset + i * strides[0], shape[1:], strides[1:])


def tensor_parts(tensor, archive):
    shape, strides, parts = real_shape(tensor), tensor.strides, tensor.storage.parts
    data = archive.storage(tensor.storage)
    if math.prod(shape) == 0:
        return
    if parts > 1:
        strides = (*(s * parts for s in strides), 1)
    numbers = memoryview(data).cast({1: "B", 2: "H", 4: "I", 8: "Q"}[tensor.storage.size])
    # Axes of one element have any stride.
    kept = [i for i, n in enumerate(shape) if n != 1]
    yield from contiguous_parts(numbers, tensor.offset * parts, tuple(shape[i] for i in kept),
                                tuple(strides[i] for i in kept))


def check_state_dict(state, archive):
    if type(state) is not dict:
        raise Refused("the pickle does not hold a dict of tensors")
    for name, value in state.items():
        if type(name) is not str or name == "__metadata__":
            raise Refused(f"{name!r} is not the name of a tensor")
        if not isinstance(value, Tensor):
            raise Refused(f"{name!r}: expected a tensor, got {type(value).__name__}")
    total = sum(map(byte_count, state.values()))
    if total > MAX_GROWTH * archive.bytes:
        raise Refused(f"the tensors have {total} bytes, more than {MAX_GROWTH} times the archive")


@contextlib.contextmanager
def atomic_file(path):
    """A file that appears under its name when it is complete, or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_safetensors(path, state, archive):
    order = sorted(state, key=lambda name: (-state[name].storage.size, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        begin, end = end, end + byte_count(state[name])
        header[name] = {"dtype": state[name].storage.dtype, "shape": real_shape(state[name]),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for part in tensor_parts(state[name], archive):
                file.write(part)


def completed_config(text, mixer_kwargs):
    if mixer_kwargs is None:
        return text
    try:
        config, given = json.loads(text), json.loads(mixer_kwargs)
    except ValueError as error:
        raise Refused(f"config.json or --mixer-kwargs: malformed JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(given, dict):
        raise Refused("config.json and --mixer-kwargs: expected objects")
    if config.get("mixer_kwargs"):
        raise Refused("--mixer-kwargs: config.json has some already")
    return (json.dumps({**config, "mixer_kwargs": given}, indent=2) + "\n").encode()


def convert(folder, out, mixer_kwargs=None):
    weights = out / "model.safetensors"
    if weights.exists():
        raise Refused(f"{weights} exists already")
    given = (folder / "config.json").read_bytes()
    config = completed_config(given, mixer_kwargs)
    archive = Archive(folder / WEIGHTS)
    state = interpret(archive.read("data.pkl", MAX_PROGRAM_BYTES))
    check_state_dict(state, archive)
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, state, archive)
    if out.resolve() != folder.resolve() or config != given:
        with atomic_file(out / "config.json") as file:
            file.write(config)
    print(f"{weights}: {len(state)} tensors, {sum(map(byte_count, state.values()))} bytes")


def main():
    parser = argparse.ArgumentParser(description="pytorch_model.bin to model.safetensors")
    parser.add_argument("folder", type=pathlib.Path, help="with config.json and pytorch_model.bin")
    parser.add_argument("--out", type=pathlib.Path, help="folder to write, default: the same")
    parser.add_argument("--mixer-kwargs", metavar="JSON", help="that lrnnx was trained with")
    arguments = parser.parse_args()
    try:
        convert(arguments.folder, arguments.out or arguments.folder, arguments.mixer_kwargs)
    except (Refused, OSError) as error:
        where = "" if isinstance(error, OSError) else f"{arguments.folder}: "
        print(f"convert_pickle.py: {where}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
