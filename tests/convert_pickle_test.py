"""Tests of tools/convert_pickle.py.

usage: convert_pickle_test.py SOURCE_ROOT

Archives come from two sources: those that torch itself wrote (tests/fixtures), held against the same
tensors written by the safetensors library, and ones written here with Python's own pickler, whose
values are held against index arithmetic.
"""
import collections
import contextlib
import importlib.util
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import types
import unittest
import zipfile

ROOT = pathlib.Path(sys.argv[1]).resolve()
PROGRAM = ROOT / "tools" / "convert_pickle.py"
PICKLED = ROOT / "tests" / "fixtures" / "pickled"
FIXTURES = ROOT / "tests" / "fixtures" / "pretrained"
sys.dont_write_bytecode = True
spec = importlib.util.spec_from_file_location("convert_pickle", PROGRAM)
convert_pickle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_pickle)


# --- a pickler that writes what torch.save writes ----------------------------------------------


def module(name, **members):
    made = sys.modules[name] = types.ModuleType(name)
    for key, value in members.items():
        value.__module__, value.__name__, value.__qualname__ = name, key, key
        setattr(made, key, value)
    return made


KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
         "ComplexFloat", "ComplexDouble")
torch = module("torch", **{f"{kind}Storage": type(kind, (), {}) for kind in KINDS})
utils = module("torch._utils", _rebuild_tensor_v2=lambda *_: None,
               _rebuild_parameter=lambda *_: None, _rebuild_qtensor=lambda *_: None)


class Storage:
    def __init__(self, kind, key, data, numel):
        self.kind, self.key, self.data, self.numel = kind, str(key), data, numel


class Call:
    """An object that is pickled as function(*arguments)."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        return ("storage", getattr(torch, value.kind + "Storage"), value.key, "cpu", value.numel)


def tensor(storage, offset, shape, strides, *more):
    return Call(utils._rebuild_tensor_v2, storage, offset, shape, strides, False,
                collections.OrderedDict(), *more)


def pickled(state, protocol=2):
    out = io.BytesIO()
    Pickler(out, protocol).dump(state)
    return out.getvalue()


def write_archive(folder, program, storages=(), compression=zipfile.ZIP_STORED, **entries):
    (folder / "config.json").write_text("{}")
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.data)
        for name, text in entries.items():
            archive.writestr(f"archive/{name}", text)


# --- a reader of safetensors -------------------------------------------------------------------


def read_safetensors(path):
    """name -> (dtype, shape, bytes)"""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    assert metadata.get("format") == "pt", metadata
    ranges = sorted(entry["data_offsets"] for entry in header.values())
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:])), ranges
    assert not ranges or (ranges[0][0], 8 + length + ranges[-1][1]) == (0, len(content)), ranges
    return {name: (entry["dtype"], entry["shape"],
                   content[8 + length :][slice(*entry["data_offsets"])])
            for name, entry in header.items()}


def in_row_major_order(data, size, offset, shape, strides):
    """The elements of a view, one by one."""
    return b"".join(
        data[at * size : (at + 1) * size]
        for index in itertools.product(*map(range, shape))
        for at in [offset + sum(i * s for i, s in zip(index, strides))])


class ConvertTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = pathlib.Path(temporary.name) / "in"
        self.out = pathlib.Path(temporary.name) / "out"
        self.folder.mkdir()

    def convert(self, folder=None, **options):
        with contextlib.redirect_stdout(io.StringIO()):
            convert_pickle.convert(folder or self.folder, self.out, **options)
        return read_safetensors(self.out / "model.safetensors")

    def assert_refused(self, *words):
        with self.assertRaises(convert_pickle.Refused) as raised:
            self.convert()
        for word in words:
            self.assertIn(word, str(raised.exception))
        self.assertEqual(list(self.out.glob("*")), [], "something was written")


class Fixtures(ConvertTest):
    def test_tensors_are_those_that_the_safetensors_library_wrote(self):
        folders = [PICKLED, *(path.parent for path in FIXTURES.glob("*/pytorch_model.bin"))]
        self.assertEqual({"pickled", "lrnnx_hybrid", "mamba_ssm_default", "mamba_ssm_hybrid"},
                         {folder.name for folder in folders})
        for folder in folders:
            with self.subTest(folder.name):
                self.out = self.folder.parent / folder.name
                self.assertEqual(self.convert(folder),
                                 read_safetensors(folder / "model.safetensors"))
                self.assertEqual((self.out / "config.json").read_bytes(),
                                 (folder / "config.json").read_bytes())

    def test_the_same_input_gives_the_same_bytes(self):
        self.convert(FIXTURES / "lrnnx_hybrid")
        first = (self.out / "model.safetensors").read_bytes()
        self.out = self.folder.parent / "again"
        self.convert(FIXTURES / "lrnnx_hybrid")
        self.assertEqual((self.out / "model.safetensors").read_bytes(), first)

    def test_mixer_kwargs_complete_the_configuration(self):
        config = json.loads((FIXTURES / "lrnnx_hybrid" / "config.json").read_text())
        kwargs = config.pop("mixer_kwargs")
        (self.folder / "config.json").write_text(json.dumps(config))
        (self.folder / "pytorch_model.bin").symlink_to(
            FIXTURES / "lrnnx_hybrid" / "pytorch_model.bin")
        self.convert(mixer_kwargs=json.dumps(kwargs))
        self.assertEqual(json.loads((self.out / "config.json").read_text()),
                         {**config, "mixer_kwargs": kwargs})

    def test_the_folder_itself_may_be_completed_once(self):
        for name in ("config.json", "pytorch_model.bin"):
            (self.folder / name).write_bytes((FIXTURES / "mamba_ssm_default" / name).read_bytes())
        command = [sys.executable, PROGRAM, self.folder]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual({path.name for path in self.folder.iterdir()},
                         {"config.json", "pytorch_model.bin", "model.safetensors"})
        again = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((again.returncode, again.stdout), (2, ""))
        self.assertRegex(again.stderr, r"^convert_pickle.py: .*exists already\n$")


class Tensors(ConvertTest):
    def test_types(self):
        names = {"Double": ("F64", 8), "Float": ("F32", 4), "Half": ("F16", 2),
                 "BFloat16": ("BF16", 2), "Long": ("I64", 8), "Int": ("I32", 4),
                 "Short": ("I16", 2), "Char": ("I8", 1), "Byte": ("U8", 1), "Bool": ("BOOL", 1),
                 "ComplexFloat": ("F32", 4), "ComplexDouble": ("F64", 8)}
        storages, state, expected = [], {}, {}
        for key, (kind, (dtype, size)) in enumerate(names.items()):
            parts = 2 if kind.startswith("Complex") else 1
            storages.append(Storage(kind, key, os.urandom(6 * size * parts), 6))
            state[kind] = tensor(storages[-1], 0, (2, 3), (3, 1))
            expected[kind] = (dtype, [2, 3] + [2] * (parts - 1), storages[-1].data)
        write_archive(self.folder, pickled(state), storages)
        self.assertEqual(self.convert(), expected)

    def test_views_of_one_storage(self):
        views = {  # offset, shape, strides
            "whole": (0, (60,), (1,)),
            "scalar": (59, (), ()),
            "empty": (0, (3, 0, 2), (0, 2, 1)),
            "slice": (7, (4, 5), (5, 1)),
            "columns": (2, (5, 3), (12, 1)),
            "every_third": (1, (20,), (3,)),
            "transposed": (0, (6, 10), (1, 6)),
            "permuted": (0, (5, 3, 4), (1, 20, 5)),
            "expanded": (11, (4, 3), (0, 1)),
            "expanded_inside": (11, (3, 4), (2, 0)),
            "overlapping": (0, (6, 5), (3, 1)),
            "sizes_of_one": (3, (1, 4, 1, 2, 1), (99, 7, 0, 2, 12345)),
        }
        for kind, size in (("Float", 4), ("ComplexDouble", 16), ("Char", 1)):
            with self.subTest(kind):
                self.out = self.folder.parent / kind
                storage = Storage(kind, "0", os.urandom(60 * size), 60)
                state = {name: tensor(storage, *view) for name, view in views.items()}
                write_archive(self.folder, pickled(state), [storage])
                got = self.convert()
                self.assertEqual(got.keys(), views.keys())
                for name, (offset, shape, strides) in views.items():
                    last = [2] if kind.startswith("Complex") else []
                    self.assertEqual(got[name][1], [*shape, *last], name)
                    want = in_row_major_order(storage.data, size, offset, shape, strides)
                    self.assertEqual(got[name][2], want, name)

    def test_random_views(self):
        rng = random.Random(1)
        storage = Storage("Short", "0", rng.randbytes(2 * 4000), 4000)
        views = {}
        while len(views) < 200:
            shape = tuple(rng.randint(1, 4) for _ in range(rng.randint(0, 4)))
            strides = tuple(rng.choice((0, 1, 2, 3, 4, 7, 12, 16, 48)) for _ in shape)
            views[f"view{len(views)}"] = (rng.randint(0, 3000), shape, strides)
        state = {name: tensor(storage, *view) for name, view in views.items()}
        write_archive(self.folder, pickled(state), [storage])
        got = self.convert()
        for name, view in views.items():
            self.assertEqual(got[name][2], in_row_major_order(storage.data, 2, *view), view)

    def test_state_dicts_of_modules(self):
        # Parameters, and an ordered dict with attributes, as Module.state_dict() returns it.
        storage = Storage("Float", "weights", os.urandom(16), 4)
        parameter = Call(utils._rebuild_parameter, tensor(storage, 0, (4,), (1,)), True,
                         collections.OrderedDict())
        state = collections.OrderedDict(a=parameter, b=tensor(storage, 2, (2,), (1,)))
        state._metadata = collections.OrderedDict({"": {"version": 1}})
        write_archive(self.folder, pickled(state), [storage], byteorder="little", version="3\n")
        self.assertEqual(self.convert(), {"a": ("F32", [4], storage.data),
                                          "b": ("F32", [2], storage.data[8:])})


class Refusals(ConvertTest):
    def refuse_state(self, state, *words, storages=(), protocol=2):
        write_archive(self.folder, pickled(state, protocol), storages)
        self.assert_refused(*words)

    def test_code_is_not_run(self):
        victim = self.folder / "run"
        command = f"touch {victim}"
        for function in (os.system, eval, exec, __import__, getattr, shutil.rmtree,
                         utils._rebuild_qtensor, type):
            name = f"{function.__module__}.{function.__name__}".replace("builtins", "__builtin__")
            self.refuse_state({"a": Call(function, command)}, f"names '{name}'")
        self.refuse_state(Call(os.system, command), "posix.system")
        self.refuse_state({"a": Call(os.system, command)}, "opcode", protocol=4)
        self.assertFalse(victim.exists())

    def test_the_program_says_so_in_one_line(self):
        write_archive(self.folder, pickled({"a": Call(os.system, "true")}))
        done = subprocess.run([sys.executable, PROGRAM, self.folder, "--out", self.out],
                              capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertRegex(done.stderr, r"^convert_pickle.py: .*'posix.system'.*\n$")
        done = subprocess.run([sys.executable, PROGRAM, self.folder / "none"],
                              capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (2, 1))
        self.assertIn("config.json", done.stderr)

    def test_what_may_be_named_may_not_be_abused(self):
        storage = Storage("Float", "0", bytes(16), 4)
        good = tensor(storage, 0, (4,), (1,))
        for state, word in (
                ({"a": torch.FloatStorage}, "expected a tensor, got Name"),
                ({"a": storage}, "expected a tensor, got Storage"),
                ({"a": 3}, "expected a tensor, got int"),
                ({"a": {"b": good}}, "expected a tensor, got dict"),
                ({3: good}, "3 is not the name"),
                ({"__metadata__": good}, "'__metadata__' is not the name"),
                ([good], "does not hold a dict"),
                ({"a": Call(torch.FloatStorage, 1)}, "not a function"),
                ({"a": Call(collections.OrderedDict, [("b", good)])}, "arguments to OrderedDict"),
                ({"a": Call(utils._rebuild_tensor_v2, storage)}, "with 1 arguments"),
                ({"a": Call(utils._rebuild_parameter, 1, True, None)}, "from a tensor"),
                ({"a": Call(utils._rebuild_tensor_v2, good, 0, (1,), (1,))}, "from a storage"),
                ({("a",): good}, "a tuple as a key"),
                ({"a": Call(utils._rebuild_parameter, good, True, None, state={"b": 1})},
                 "treats a Tensor as a dict"),
                ({"a": tensor(storage, 0, (4,), (1,), {"conj": True})}, "lazily")):
            with self.subTest(word):
                self.refuse_state(state, word, storages=[storage])

    def test_tensors_stay_in_their_storage(self):
        storage = Storage("Float", "0", bytes(16), 4)
        for offset, shape, strides, word in (
                (0, (5,), (1,), "element 4"), (1, (4,), (1,), "element 4"),
                (4, (), (), "element 4"), (0, (2, 2), (3, 1), "element 4"),
                (0, (2,), (1 << 62,), "element"),
                (-1, (4,), (1,), "from 0 on"), (0, (-4,), (1,), "from 0 on"),
                (3, (4,), (-1,), "from 0 on"), (0, (True,), (1,), "from 0 on"),
                (0, (1.0,), (1,), "from 0 on"), (0, (4,), (1, 1), "2 strides"),
                (0, [4], [1], "a shape and strides"), (0, (1,) * 65, (1,) * 65, "at most 64"),
                (0, (1 << 64,), (0,), "from 0 on")):
            with self.subTest(f"{offset} {shape} {strides}"):
                self.refuse_state({"a": tensor(storage, offset, shape, strides)}, word,
                                  storages=[storage])

    def test_storages_have_the_bytes_that_they_claim(self):
        for data, numel, word in ((bytes(12), 4, "has 12 bytes, expected 16"),
                                  (bytes(20), 4, "has 20 bytes, expected 16"),
                                  (bytes(16), -4, "number of elements"),
                                  (bytes(16), 1 << 70, "number of elements")):
            storage = Storage("Float", "0", data, numel)
            self.refuse_state({"a": tensor(storage, 0, (1,), (1,))}, word, storages=[storage])
        storage = Storage("Float", "0", bytes(16), 4)
        self.refuse_state({"a": tensor(storage, 0, (4,), (1,))}, "no entry 'data/0'")
        storage.key = "../data.pkl"
        self.refuse_state({"a": tensor(storage, 0, (4,), (1,))}, "no entry")

    def test_a_small_file_does_not_fill_the_disk(self):
        storage = Storage("Float", "0", bytes(4), 1)
        self.refuse_state({"a": tensor(storage, 0, (1 << 20, 1 << 20), (0, 0))},
                          "times the archive", storages=[storage])

    def test_programs_that_no_pickler_writes(self):
        for program, word in (
                (b"", "damaged"), (b"\x80\x02", "damaged"), (b".", "damaged"), (b"0.", "POP"),
                (b"\x80\x02}u.", "damaged"), (b"\x80\x02}(K\x01u.", "damaged"),
                (b"h\x00.", "damaged"),
                (b"\x80\x02}q\x00h\x01.", "damaged"), (b"\x80\x02(\x85.", "damaged"),
                (b"\x80\x02K\x01K\x02K\x03s.", "treats a int as a dict"),
                (b"\x80\x02K\x01a.", "damaged"), (b"\x80\x02]}b.", "treats a list as a dict"),
                (b"\xff\xff.", "damaged"), (b"cos\nsystem\n.", "'os.system'"),
                (b"(S'true'\nios\nsystem\n.", "opcode STRING"), (b"\x82\x01.", "opcode EXT1"),
                (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "opcode NEWOBJ"),
                (b"X\xff\xff\xff\xffa.", "damaged"), (b"K\x01Q.", "not a storage"),
                (b"\x80\x02" + b"(" * 100000 + b"t" * 100000 + b".", "does not hold a dict")):
            with self.subTest(program[:30]):
                write_archive(self.folder, program)
                self.assert_refused(word)

    def test_archives_that_torch_does_not_write(self):
        storage = Storage("Float", "0", bytes(4000), 1000)
        program = pickled({"a": tensor(storage, 0, (1000,), (1,))})
        write_archive(self.folder, program, [storage], compression=zipfile.ZIP_DEFLATED)
        self.assert_refused("compressed")
        write_archive(self.folder, program, [storage], byteorder="big")
        self.assert_refused("big-endian")
        with self.assertWarns(UserWarning):
            write_archive(self.folder, program, [storage, storage])
        self.assert_refused("two entries", "archive/data/0")
        write_archive(self.folder, program, [storage], **{"../other/data.pkl": program})
        self.convert()  # "*/data.pkl" of one level only

    def test_files_of_other_formats(self):
        (self.folder / "config.json").write_text("{}")
        for content in (b"", b"PK", pickled({}), b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
            (self.folder / "pytorch_model.bin").write_bytes(content)
            self.assert_refused("not a zip file", "torch 1.6")


class DamagedFiles(ConvertTest):
    def setUp(self):
        super().setUp()
        self.config = (FIXTURES / "mamba_ssm_default" / "config.json").read_bytes()
        self.content = (FIXTURES / "mamba_ssm_default" / "pytorch_model.bin").read_bytes()
        self.expected = read_safetensors(FIXTURES / "mamba_ssm_default" / "model.safetensors")
        (self.folder / "config.json").write_bytes(self.config)

    def test_truncated(self):
        for length in [*range(0, len(self.content), 211), len(self.content) - 1]:
            (self.folder / "pytorch_model.bin").write_bytes(self.content[:length])
            self.assert_refused()

    def test_flipped_bits_are_refused_or_change_nothing(self):
        rng = random.Random(2)
        for count in range(400):
            damaged = bytearray(self.content)
            # Half of them where the structure is: at the end, in the list of entries.
            begin = 0 if count % 2 else len(damaged) - 3000
            damaged[rng.randrange(begin, len(damaged))] ^= 1 << rng.randrange(8)
            (self.folder / "pytorch_model.bin").write_bytes(damaged)
            self.out = self.folder.parent / f"out{count}"
            try:
                self.assertEqual(self.convert(), self.expected)
            except convert_pickle.Refused:
                self.assertEqual(list(self.out.glob("*")), [])

    def test_any_program_ends_in_a_result_or_a_refusal(self):
        with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
            program = archive.read("pytorch_model/data.pkl")
        rng = random.Random(3)
        results = 0
        for _ in range(2000):
            damaged = bytearray(program)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                convert_pickle.interpret(bytes(damaged))
                results += 1
            except convert_pickle.Refused:
                pass
        self.assertGreater(results, 0)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[2:]])
