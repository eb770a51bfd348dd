"""The reader of torch's files, given ones that mean harm or are damaged: nothing is run, and memory stays small."""

import pickle
import random
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch_files
from torch_files import WRITERS, Call, Global, Storage, Tensor, module, pickled, save, save_entries, save_legacy, tensor

from dm_generations.errors import UserError, short_repr
from dm_generations.models.loading import load_checkpoint
from dm_generations.weights.torch_file import Opaque, read_torch

DOUBLING = b"N" + b"q\x00h\x00\x86" * 60  # pairs of pairs, with 2**60 leaves if they were walked


def in_zip(path, data, **entries):
    return save_entries(path, {"data.pkl": data} | entries)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "builtins.open", "subprocess.call", "pathlib.Path"])
def test_nothing_is_called(tmp_path, monkeypatch, protocol, function):
    victim = tmp_path / "victim"
    monkeypatch.chdir(tmp_path)
    module_name, name = function.split(".")
    args = {
        "os.system": (f"touch {victim}",),
        "builtins.eval": (f"open({str(victim)!r}, 'w')",),
        "builtins.open": (str(victim), "w"),
        "subprocess.call": (["touch", str(victim)],),
        "pathlib.Path": (str(victim),),
    }[function]
    read = read_torch(save(tmp_path / "a.pt", {"a": Call(Global(module_name, name), args)}, protocol))
    assert isinstance(read["a"], Opaque) and (read["a"].name, read["a"].args) == (function, args)
    assert not victim.exists() and sorted(file.name for file in tmp_path.iterdir()) == ["a.pt"]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"cos\nsystem\n(S'touch victim'\ntR.", id="protocol 0"),
        pytest.param(b"(S'touch victim'\nios\nsystem\n.", id="INST"),
        pytest.param(b"(cos\nsystem\nU\x0ctouch victimo.", id="OBJ"),
        pytest.param(b"cbuiltins\ngetattr\n(cos\npath\nU\x06systemtRU\x0ctouch victim\x85R.", id="through getattr"),
        pytest.param(b"ccopyreg\n_reconstructor\n(cos\nsystem\nU\x0ctouch victimtR.", id="_reconstructor"),
    ],
)
def test_older_ways_to_call_do_nothing_either(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    assert isinstance(read_torch(in_zip(tmp_path / "a.pt", data)), Opaque)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt"]


@pytest.mark.parametrize(
    "function", ["os\nsystem", "torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "_codecs\nencode"]
)
@pytest.mark.parametrize("state", [b"}U\x08__call__K\x01s", b"N}U\x08__call__K\x01s\x86"])
def test_nothing_is_set_on_a_function(tmp_path, monkeypatch, function, state):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"a\.pt"):
        read_torch(in_zip(tmp_path / "a.pt", b"c" + function.encode() + b"\n" + state + b"b."))
    assert read_torch(save(tmp_path / "b.pt", tensor(np.ones(2)))).tolist() == [1, 1]


STORAGE = Storage(np.arange(6, dtype=np.float32))


@WRITERS
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (-1, (2,), (1,)),
        (0, (-1, -6), (1, 1)),
        (5, (6,), (-1,)),
        (0, (2**40,), (0,)),
        (0, (2**32, 2**32, 0), (0, 0, 0)),
        (0, (2**70,), (1,)),
        (2**70, (1,), (1,)),
        (0, (2,), (2**62,)),
        (0, (2,), (1, 1)),
        (0, (1,) * 100, (1,) * 100),
        (0, (1.0,), (1,)),
        (0, (True,), (1,)),
        ("0", (1,), (1,)),
        (0, None, ()),
        (0, [6], [1]),
    ],
)
def test_tensor_beyond_its_storage(tmp_path, write, offset, shape, strides):
    with pytest.raises(UserError, match=r"a\.pt: .*tensor"):
        read_torch(write(tmp_path / "a.pt", {"a": Tensor(STORAGE, offset, shape, strides)}))


@WRITERS
@pytest.mark.parametrize("count", [7, 2**40, 2**61, 2**70, -1, 1.0, None])
def test_storage_that_lies_about_its_size(tmp_path, write, count):
    kind = Global("torch", "FloatStorage")
    lying = Storage(np.arange(6, dtype=np.float32), kind, count)
    if count is None:
        lying.saved_id = lambda key: ("storage", kind, 5, "cpu", 6)
    with pytest.raises(UserError, match=r"a\.pt"):
        read_torch(write(tmp_path / "a.pt", {"a": Tensor(lying, 0, (7,), (1,))}))


@pytest.mark.parametrize("kind", ["QInt8Storage", "FloatTensor", "load"])
def test_storage_of_an_unknown_type(tmp_path, kind):
    value = Tensor(Storage(np.ones(2, np.int8), Global("torch", kind)), 0, (2,), (1,))
    with pytest.raises(UserError, match=kind):
        read_torch(save(tmp_path / "a.pt", value))


@pytest.mark.parametrize(
    ("function", "what"), [("_rebuild_qtensor", "quantised"), ("_rebuild_sparse_tensor", "sparse")]
)
def test_tensors_that_are_no_plain_arrays(tmp_path, function, what):
    with pytest.raises(UserError, match=what):
        read_torch(save(tmp_path / "a.pt", {"a": Call(Global("torch._utils", function), (1, 2, 3))}))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".", id="lists"),
        pytest.param(b"\x80\x02)" + b"\x85" * 20_000 + b".", id="tuples"),
        pytest.param(b"\x80\x02}" + b"X\x01\0\0\0a}" * 10_000 + b"s" * 10_000 + b".", id="dicts"),
        pytest.param(b"\x80\x02N" + b"q\x00]h\x00a" * 10_000 + b".", id="lists through the memo"),
        pytest.param(b"\x80\x02]q\x00h\x00a.", id="a list that holds itself"),
        pytest.param(b"\x80\x02]q\x00h\x00\x85a.", id="a tuple in the list that it holds"),
        pytest.param(b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.", id="a deep key"),
        pytest.param(b"\x80\x04(" * 2 + b")" + b"\x85" * 200_000 + b"\x91.", id="a deep element of a set"),
    ],
)
def test_deep_nesting(tmp_path, data):
    with pytest.raises(UserError, match=r"a\.pt"):
        read_torch(in_zip(tmp_path / "a.pt", data))


def test_deep_chain_of_objects_is_read_without_recursion(tmp_path):
    data = b"\x80\x02N" + b"q\x00cm\nC\nh\x00\x85R" * 5_000 + b"."
    value = read_torch(in_zip(tmp_path / "a.pt", data))
    assert isinstance(value.args[0], Opaque)


def test_class_of_classes_is_made_without_recursion(tmp_path):
    data = b"\x80\x02ccopyreg\n_reconstructor\nq\x00(" + b"h\x00" * 5_000 + b"tR."
    assert isinstance(read_torch(in_zip(tmp_path / "a.pt", data)), Opaque)


def test_doubling_structure_is_small(tmp_path):
    value = read_torch(in_zip(tmp_path / "a.pt", b"\x80\x02" + DOUBLING + b"."))
    assert len(value) == 2 and len(short_repr(value)) <= 80


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(DOUBLING + b"q\x00}h\x00K\x01s.", id="key"),
        pytest.param(DOUBLING + b"q\x00}(h\x00K\x01u.", id="one of several keys"),
        pytest.param(b"\x80\x02}K\x01K\x02\x86Ns.", id="a pair, which can be chosen to have any hash"),
        pytest.param(b"\x80\x04}(K\x01\x91Ns.", id="a frozenset, which can be too"),
        pytest.param(DOUBLING + b"q\x00(h\x00K\x01d.", id="key of a dict of protocol 0"),
        pytest.param(DOUBLING + b"q\x00\x8f(h\x00\x90.", id="element of a set"),
        pytest.param(DOUBLING + b"q\x00(h\x00\x91.", id="element of a frozenset"),
        pytest.param(DOUBLING + b"q\x00cbuiltins\nset\n](h\x00e\x85R.", id="element of a list that becomes a set"),
        pytest.param(DOUBLING + b"q\x00}ctorch\nSize\nh\x00\x85RK\x01s.", id="key through torch.Size"),
        pytest.param(DOUBLING + b"q\x00}(U\x06moduleh\x00K\x01K\x01tQK\x01s.", id="key through a persistent id"),
        pytest.param(b"(" + b"K\x01" * 101 + b"tq\x00}h\x00K\x01s.", id="long key"),
        pytest.param(b"}\x8a\x09" + b"\x7f" * 8 + b"\x00K\x01s.", id="integer whose hash can be chosen"),
    ],
)
def test_keys_that_take_long_to_hash(tmp_path, data):
    with pytest.raises(UserError, match=r"a\.pt"):
        read_torch(in_zip(tmp_path / "a.pt", b"\x80\x04" + data))


def test_doubling_structure_in_a_message_is_cut(tmp_path):
    ordered = Global("collections", "OrderedDict")
    value = Call(ordered, ([("x", 1)],))
    for _ in range(30):  # an OrderedDict takes two levels
        value = Call(ordered, ([("a", value), ("b", value)],))
    path = save(tmp_path / "dalle.pt", {"hparams": {"num_text_tokens": value}, "vae_params": None, "weights": {}})
    with pytest.raises(UserError, match=r"dalle\.pt") as error:
        load_checkpoint(path, "generator")
    assert "num_text_tokens" in str(error.value) and len(str(error.value)) < 1000


def test_number_of_names_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("dm_generations.weights.unpickler.MAX_NAMES", 100)
    data = b"".join(b"cm\nC%d\n0" % index for index in range(101))
    with pytest.raises(UserError, match=r"a\.pt"):
        read_torch(in_zip(tmp_path / "a.pt", data + b"N."))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x02\x8d" + struct.pack("<Q", 2**40) + b"abc.", id="text of 1 TB"),
        pytest.param(b"\x80\x02\x8e" + struct.pack("<Q", 2**63 - 1) + b"abc.", id="bytes of 8 EB"),
        pytest.param(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.", id="bytearray of 1 TB"),
        pytest.param(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.", id="integer of 2 GB"),
        pytest.param(b"\x80\x02\x8b" + struct.pack("<i", -1) + b"abc.", id="integer of -1 bytes"),
        pytest.param(b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"abc.", id="old text of 2 GB"),
        pytest.param(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N", id="frame of 4 EB"),
        pytest.param(b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", id="integer of 255 bytes"),
        pytest.param(b"L" + b"9" * 100_000 + b"L\n.", id="integer of 100,000 digits"),
        pytest.param(b"S'abc\n.", id="text without a quote"),
        pytest.param(b"\x80\x02" + b"\x8c\x01a" * 2 + b"0" * 3 + b".", id="empty stack"),
        pytest.param(b"\x80\x02(.", id="mark as a value"),
        pytest.param(b"\x80\x02](K\x01a.", id="appended to a mark"),
        pytest.param(b"\x80\x02K\x01K\x02a.", id="appended to a number"),
        pytest.param(b"\x80\x02}(K\x01u.", id="key without a value"),
        pytest.param(b"\x80\x02}]K\x01s.", id="list as a key"),
        pytest.param(b"\x80\x02t.", id="tuple without a mark"),
        pytest.param(b"\x80\x02h\x05.", id="memo never filled"),
        pytest.param(b"\x80\x02K\x01)R.", id="call of a number"),
        pytest.param(b"\x80\x02\x82\x01.", id="extension registry"),
        pytest.param(b"\x80\x05\x97.", id="out-of-band buffer"),
        pytest.param(b"Pabc\n.", id="textual persistent id"),
        pytest.param(b"\x80\x02K\x01Q.", id="persistent id of another kind"),
        pytest.param(b"\x80\x02K\x01K\x02\x93.", id="class named by numbers"),
        pytest.param(b"c" + b"a" * 5000 + b"\nb\n.", id="class name of 5000 characters"),
        pytest.param(b"c_codecs\nencode\n(X\x01\0\0\0aX\x04\0\0\0zlibtR.", id="encoding that unpacks"),
        pytest.param(b"ccollections\nOrderedDict\nK\x05\x85R.", id="OrderedDict of a number"),
        pytest.param(b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00N))tR.", id="type within a type"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_wrong_pickle_is_an_error_that_names_the_file_and_takes_no_memory(tmp_path, data):
    path = in_zip(tmp_path / "a.pt", data)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.pt") as error:
            read_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"N\x96" + struct.pack("<Q", 2) + b"ab.", id="bytes"),
        pytest.param(b"NX\x01\0\0\0a.", id="text"),
        pytest.param(b"Ncos\nsystem\n.", id="name"),
        pytest.param(b"N\x95" + struct.pack("<Q", 2) + b"K\x01.", id="frame"),
    ],
)
def test_value_across_the_end_of_a_frame(tmp_path, data):
    """What the standard library's unpickler and pickletools read differently."""
    with pytest.raises(UserError, match=r"a\.pt"):
        read_torch(in_zip(tmp_path / "a.pt", b"\x80\x04\x95" + struct.pack("<Q", 2) + data))


def test_huge_memo_index_takes_no_memory(tmp_path):
    path = in_zip(tmp_path / "a.pt", b"\x80\x02K\x07r\xff\xff\xff\xff0j\xff\xff\xff\xff.")
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.pt"):
        read_torch(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_data_copied_over_and_over(tmp_path, monkeypatch):
    monkeypatch.setattr("dm_generations.weights.unpickler.MAX_COPIED", 1000)
    numbers = b"(" + b"K\x01" * 100 + b"lq\x00"
    copies = b"0c__builtin__\nset\nq\x01" + b"0h\x01h\x00\x85R" * 11
    with pytest.raises(UserError, match="over and over"):
        read_torch(in_zip(tmp_path / "a.pt", b"\x80\x02" + numbers + copies + b"."))


def test_number_of_steps_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("dm_generations.weights.unpickler.MAX_OPCODES", 100)
    with pytest.raises(UserError, match="steps"):
        read_torch(in_zip(tmp_path / "a.pt", b"\x80\x02" + b"]" * 200 + b"."))


# archives


@WRITERS
def test_truncation_is_an_error_that_names_the_file(tmp_path, write):
    whole = write(tmp_path / "a.pt", {"a": tensor(np.arange(3.0)), "b": tensor(np.ones(2, np.int8))}).read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / "a.pt").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.pt"):
            read_torch(tmp_path / "a.pt")


@WRITERS
def test_damaged_bytes_give_a_value_or_an_error(tmp_path, write):
    path = tmp_path / "a.pt"
    value = {"a": tensor(np.arange(3.0)), "b": [module([("w", tensor(np.ones(2)))])], "c": {1: (2, "x")}}
    whole = write(path, value).read_bytes()
    generator = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        message = None
        try:
            read_torch(path)
        except UserError as error:
            message = str(error)
        assert message is None or "a.pt" in message


def test_compressed_entries_are_refused(tmp_path):
    data, _ = pickled({"a": 1})
    entries = {"data.pkl": data, "data/0": bytes(1 << 24)}
    path = save_entries(tmp_path / "a.pt", entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"a\.pt.*compressed"):
        read_torch(path)


def test_a_program_of_torchscript_is_called_one(tmp_path):
    """Such as OpenAI's own `ViT-B-32.pt`, the code in which is compressed."""
    entries = {"data.pkl": pickled(1)[0], "code/__torch__.py": b"class CLIP", "constants.pkl": pickled(())[0]}
    path = save_entries(tmp_path / "ViT-B-32.pt", entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"ViT-B-32\.pt: it is a program of TorchScript .* folder that transformers"):
        read_torch(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_is_there_twice(tmp_path):
    path = in_zip(tmp_path / "a.pt", pickled(1)[0])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", pickled(2)[0])
    with pytest.raises(UserError, match="twice"):
        read_torch(path)


def test_names_that_leave_the_archive_are_only_names(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = in_zip(folder / "a.pt", pickled([1])[0], **{"../../victim": b"x", "data/../../../victim": b"x"})
    assert read_torch(path) == [1]
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "a.pt"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"data/0": None}, "lacks the tensor data '0'"),
        ({"data/0": b"\0" * 23}, "too few"),
        ({"data.pkl": None}, r"without a/data\.pkl"),
    ],
)
def test_archive_that_lacks_something(tmp_path, change, what):
    with pytest.raises(UserError, match=what):
        read_torch(save(tmp_path / "a.pt", {"a": Tensor(STORAGE, 0, (2,), (1,))}, **change))


def test_entry_sizes_that_lie(tmp_path):
    path = save(tmp_path / "a.pt", {"a": Tensor(STORAGE, 0, (2,), (1,))})
    whole = bytearray(path.read_bytes())
    at = whole.rindex(b"PK\x01\x02")  # the last entry of the directory, data/0
    whole[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"ends within its entry 'a/data/0'"):
        read_torch(path)


@pytest.mark.parametrize("count", [5, 7, -1, 2**62])
def test_legacy_file_with_another_size_of_storage(tmp_path, count):
    value = {"a": Tensor(STORAGE, 0, (2,), (1,)), "b": tensor(np.ones(9))}
    with pytest.raises(UserError, match="another size"):
        read_torch(save_legacy(tmp_path / "a.pt", value, {"0": count}))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!DOCTYPE html>", "not a file that torch.save wrote"),
        (pickle.dumps({"a": 1}, 2), "torch.save did not write it"),
        (pickle.dumps(torch_files.MAGIC_NUMBER, 2) + pickle.dumps(9, 2), "format"),
        (b"PK\x03\x04 and no more", "zip"),
    ],
)
def test_other_files(tmp_path, content, what):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.pt.*{what}"):
        read_torch(path)


def test_unreadable_file(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read_torch(path)
