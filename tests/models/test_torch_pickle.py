"""The reader of torch's files: real ones, ones written here in all variants, and ones that mean harm."""

import json
import pickle
import random
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_files
from helpers import golden_dirs
from torch_files import Call, Global, Storage, Tensor, pickled, save, save_entries, save_legacy, tensor

from dm_generations.errors import UserError
from dm_generations.models.checkpoints import mapped
from dm_generations.models.checkpoints.torch_pickle import Opaque, read_torch, state_of

GOLDEN = sorted(
    {
        file.relative_to(folder.parent): file
        for name in ("taming", "min_dalle", "mindalle_kakao", "dalle_pytorch")
        for folder in golden_dirs(name)
        for suffix in ("*.pt", "*.ckpt")
        for file in folder.rglob(suffix)
    }.items()
)
WRITERS = pytest.mark.parametrize("write", [save, save_legacy], ids=["zip", "legacy"])


def is_view(array):
    mapping = mapped._mapping(array)
    return mapping is not None and not array.flags.writeable


# files as they are


@pytest.mark.parametrize("file", [file for _, file in GOLDEN], ids=[str(name) for name, _ in GOLDEN])
def test_real_file_gives_names_shapes_and_views(file):
    value = read_torch(file)
    state = value.get("state_dict") or value.get("weights") or value
    assert all(isinstance(array, np.ndarray) and is_view(array) for array in state.values())
    for shapes in file.parent.glob("*shapes*.json"):
        expected = {name: tuple(shape) for name, shape in json.loads(shapes.read_text()).items()}
        assert {name: state[name].shape for name in expected} == expected


@WRITERS
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, *(name for name in torch_files.KINDS if name != "bfloat16")])
def test_tensor_keeps_values_shape_and_dtype(tmp_path, write, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    read = read_torch(write(tmp_path / "a.pt", {"a": tensor(array)}))["a"]
    assert read.dtype == array.dtype and is_view(read)
    np.testing.assert_array_equal(read, array)


@WRITERS
def test_strides_offset_sharing_scalars_and_empty_tensors(tmp_path, write):
    shared = Storage(np.arange(12, dtype=np.float32))
    value = {
        "transposed": Tensor(shared, 0, (4, 3), (1, 4)),
        "part": Tensor(shared, 5, (2,), (3,)),
        "scalar": Tensor(shared, 7, (), ()),
        "expanded": Tensor(shared, 2, (3, 2), (0, 1)),
        "empty": Tensor(Storage(np.zeros(0, np.float32)), 0, (0, 5), (5, 1)),
        "behind": tensor(np.array([1, 2], np.int64)),
    }
    read = read_torch(write(tmp_path / "a.pt", value))
    np.testing.assert_array_equal(read["transposed"], np.arange(12).reshape(3, 4).T)
    assert read["part"].tolist() == [5, 8] and read["scalar"] == 7 and read["scalar"].shape == ()
    assert read["expanded"].tolist() == [[2, 3]] * 3
    assert read["empty"].shape == (0, 5)
    assert read["behind"].tolist() == [1, 2]
    assert mapped._mapping(read["part"]) is mapped._mapping(read["scalar"])


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(tmp_path, protocol):
    value = {
        "n": [None, True, False, -1, 300, 70_000, -(2**40), 1.5],
        "t": ("text \u00e9\n", b"\x00\xff", b"", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "s": {1, "b"},
        3: {"deep": [[["x"]]], ("a", 1): frozenset({2})},
    }
    path = save_entries(tmp_path / "a.pt", {"data.pkl": pickle.dumps(value, protocol), "version": b"3"})
    assert read_torch(path) == value


def test_values_by_name(tmp_path):
    ordered = Global("collections", "OrderedDict")
    value = {
        "ordered": Call(ordered, ([("b", 1), ("a", 2)],), {"_metadata": 1}),
        "size": Call(Global("torch", "Size"), ((2, 3),)),
        "parameter": Call(Global("torch._utils", "_rebuild_parameter"), (tensor(np.ones(2)), True, Call(ordered))),
        "old": Tensor(Storage(np.arange(4.0)), 1, (2,), (2,), "_rebuild_tensor", ()),
        "gpu": Tensor(Storage(np.ones(1, np.float32), Global("torch.cuda", "FloatStorage")), 0, (1,), (1,)),
        "subclass": Call(
            Global("torch._tensor", "_rebuild_from_type_v2"),
            (
                Global("torch._utils", "_rebuild_tensor"),
                Global("net", "Weight"),
                (Storage(np.ones(2)), 0, (2,), (1,)),
                {},
            ),
        ),
        "set": Call(Global("__builtin__", "set"), ([1, 2],)),
    }
    read = read_torch(save(tmp_path / "a.pt", value))
    assert list(read["ordered"].items()) == [("b", 1), ("a", 2)]
    assert read["size"] == (2, 3) and read["set"] == {1, 2}
    assert [read[name].tolist() for name in ("parameter", "old", "gpu", "subclass")] == [[1, 1], [1, 3], [1], [1, 1]]


def test_tensor_over_untyped_storage(tmp_path):
    array = np.arange(6, dtype=np.uint16)
    storage = Storage(array.view(np.uint8), Global("torch.storage", "UntypedStorage"))
    more = (False, Call(Global("collections", "OrderedDict")), Global("torch", "uint16"))
    read = read_torch(save(tmp_path / "a.pt", Tensor(storage, 2, (2, 2), (2, 1), "_rebuild_tensor_v3", more)))
    assert read.dtype == np.uint16 and read.tolist() == [[2, 3], [4, 5]]


def test_big_endian_file(tmp_path):
    storage = Storage(np.array([1, 256], ">i4"), Global("torch", "IntStorage"))
    value = {"a": Tensor(storage, 0, (2,), (1,)), "b": tensor(np.array([3], np.uint8))}
    assert read_torch(save(tmp_path / "a.pt", value, byteorder=b"big"))["a"].tolist() == [1, 256]
    assert read_torch(save(tmp_path / "a.pt", value, byteorder=b"little"))["a"].tolist() == [1 << 24, 1 << 16]
    for order, wrong in ((b"middle", value), (b"big", tensor(np.ones(2, ml_dtypes.bfloat16)))):
        with pytest.raises(UserError, match=r"a\.pt.*(byte order|big-endian)"):
            read_torch(save(tmp_path / "a.pt", wrong, byteorder=order))


def test_part_of_a_storage_in_a_legacy_file(tmp_path):
    part = Storage(np.arange(6, dtype=np.float32), view=("7", 2, 3))
    assert read_torch(save_legacy(tmp_path / "a.pt", Tensor(part, 1, (2,), (1,)))).tolist() == [3, 4]
    part.view = ("7", 4, 3)
    with pytest.raises(UserError, match="beyond"):
        read_torch(save_legacy(tmp_path / "a.pt", Tensor(part, 1, (2,), (1,))))


@WRITERS
def test_other_classes_are_inert_and_recorded(tmp_path, write):
    node, settings = Global("omegaconf", "DictConfig"), Global("argparse", "Namespace")
    value = {
        "callbacks": {Global("lightning.callbacks", "Checkpoint"): {"best": 0.5}},
        "hparams": Call(settings, (), {"lr": 1e-4}, new=True),
        "config": Call(node, (1, Call(node)), {"x": [1]}),
        "device": Call(Global("torch", "device"), ("cuda", 0)),
    }
    read = read_torch(write(tmp_path / "a.pt", value))
    ((callback, best),) = read["callbacks"].items()
    assert (callback.name, callback.args, best) == ("lightning.callbacks.Checkpoint", None, {"best": 0.5})
    hparams, config = read["hparams"], read["config"]
    assert (hparams.name, hparams.args, hparams.state) == ("argparse.Namespace", (), {"lr": 1e-4})
    assert config.args[0] == 1 and config.args[1].name == "omegaconf.DictConfig" and config.state == {"x": [1]}
    assert repr(read["device"]) == "<Opaque torch.device(...)>"


def test_items_of_other_classes_and_references_back(tmp_path):
    # an object that is a dict by inheritance, holds itself, and is made in two ways of protocol 4
    data = b"\x80\x04\x8c\x01m\x8c\x01C\x93)\x81q\x00(X\x01\x00\x00\x00kh\x00u\x8c\x01m\x8c\x01D\x93)}\x92\x86."
    first, second = read_torch(save_entries(tmp_path / "a.pt", {"data.pkl": data}))
    assert isinstance(first, Opaque) and (first.name, first.items) == ("m.C", [("k", first)])
    assert (second.name, second.args) == ("m.D", ())


def module(parameters=(), buffers=(), modules=(), **more):
    ordered = Global("collections", "OrderedDict")
    parts = {"_parameters": parameters, "_buffers": buffers, "_modules": modules}
    state = {"training": False} | {name: Call(ordered, (list(part),)) for name, part in parts.items()} | more
    return Call(Global("net", "Module"), (), state, new=True)


@WRITERS
def test_state_of_a_pickled_module(tmp_path, write):
    def numbered(number):
        return tensor(np.full(2, number, np.float32))

    block = module([("w", numbered(1)), ("b", None)], [("seen", numbered(2)), ("mask", numbered(3))])
    block.state["_non_persistent_buffers_set"] = {"mask"}
    network = module([("w", numbered(0))], modules=[("blocks", module(modules=[("0", block), ("1", None)]))])
    state = state_of(read_torch(write(tmp_path / "encoder.pkl", network)))
    assert {name: array.tolist() for name, array in state.items()} == {
        "w": [0, 0],
        "blocks.0.w": [1, 1],
        "blocks.0.seen": [2, 2],
    }


def test_state_of_anything_else():
    assert state_of({"a": 1}) == {"a": 1}
    for value in (1, Opaque("a.B"), Opaque("a.B", (), {"_parameters": {}})):
        with pytest.raises(UserError, match="not a network"):
            state_of(value)


def test_state_of_a_module_that_holds_itself():
    looped = Opaque("a.B", (), {"_parameters": {}, "_buffers": {}, "_modules": {}})
    looped.state["_modules"] |= {"x": looped, "y": looped}
    with pytest.raises(UserError, match="not a network"):
        state_of(looped)


# files that mean harm


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
        pytest.param(b"cos\nsystem\n}U\x08__call__K\x01sb.", id="BUILD on a function"),
    ],
)
def test_older_ways_to_call_do_nothing_either(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    assert isinstance(read_torch(in_zip(tmp_path / "a.pt", data)), Opaque)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt"]


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
    data = b"\x80\x02N" + b"q\x00h\x00\x86" * 60 + b"."  # 2**60 leaves, if it were walked
    assert len(read_torch(in_zip(tmp_path / "a.pt", data))) == 2


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


def test_huge_memo_index_takes_no_memory(tmp_path):
    path = in_zip(tmp_path / "a.pt", b"\x80\x02K\x07r\xff\xff\xff\xff0j\xff\xff\xff\xff.")
    tracemalloc.start()
    assert read_torch(path) == 7
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_data_copied_over_and_over(tmp_path, monkeypatch):
    monkeypatch.setattr("dm_generations.models.checkpoints.inert_pickle.MAX_COPIED", 1000)
    numbers = b"(" + b"K\x01" * 100 + b"lq\x00"
    copies = b"0c__builtin__\nset\nq\x01" + b"0h\x01h\x00\x85R" * 11
    with pytest.raises(UserError, match="over and over"):
        read_torch(in_zip(tmp_path / "a.pt", b"\x80\x02" + numbers + copies + b"."))


def test_number_of_steps_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("dm_generations.models.checkpoints.inert_pickle.MAX_OPCODES", 100)
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
        try:
            read_torch(path)
        except UserError as error:
            assert "a.pt" in str(error)


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
        (b"version https://git-lfs.github.com/spec/v1\n", "not a file that torch.save wrote"),
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
