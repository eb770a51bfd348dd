"""The reader of torch's files: real ones, and ones written here in all variants."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch_files
from codec_kit import is_mapped
from helpers import golden_dirs
from torch_files import WRITERS, Call, Global, Storage, Tensor, module, save, save_entries, save_legacy, tensor

from dm_generations.errors import UserError
from dm_generations.weights.torch_file import Opaque, read_torch, state_of

GOLDEN = sorted(
    {
        file.relative_to(folder.parent): file
        for name in ("taming", "min_dalle", "mindalle_kakao", "dalle_pytorch")
        for folder in golden_dirs(name)
        for suffix in ("*.pt", "*.ckpt")
        for file in folder.rglob(suffix)
    }.items()
)


def is_view(array):
    return is_mapped(array) and not array.flags.writeable


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
    assert is_mapped(read["part"]) and is_mapped(read["scalar"])


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(tmp_path, protocol):
    value = {
        "n": [None, True, False, -1, 300, 70_000, -(2**40), 1.5],
        "t": ("text \u00e9\n", b"\x00\xff", b"", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "s": {1, "b"},
        3: {"deep": [[["x"]]], "set": {2}},
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


def test_state_of_anything_else(tmp_path):
    assert state_of({"a": 1}) == {"a": 1}
    for value in (1, Global("a", "B"), Call(Global("a", "B"), (), {"_parameters": {}})):
        with pytest.raises(UserError, match="not a network"):
            state_of(read_torch(save(tmp_path / "a.pt", value)))


def test_state_of_a_module_that_holds_itself(tmp_path):
    looped = Call(Global("a", "B"), (), {"_parameters": {}, "_buffers": {}, "_modules": {}})
    looped.state["_modules"] |= {"x": looped, "y": looped}
    with pytest.raises(UserError, match="not a network"):
        state_of(read_torch(save(tmp_path / "a.pt", looped)))


def test_state_of_a_module_with_shared_parts_is_limited(tmp_path):
    part = module([(f"w{i}", None) for i in range(1000)])
    for _ in range(20):
        part = module(modules=[("a", part), ("b", part)])
    with pytest.raises(UserError, match="parts"):
        state_of(read_torch(save(tmp_path / "a.pt", part)))
