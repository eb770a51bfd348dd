"""Which model a folder or file is, what is wrong with it, and our own folders."""

import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_files
from helpers import golden
from tiny import tiny_clip, tiny_dalle_bart, tiny_vqgan

from dm_generations.errors import UserError
from dm_generations.models.base import RawCheckpoint
from dm_generations.models.loading import check_names_and_shapes, load_checkpoint
from dm_generations.pipelines.convert import convert
from dm_generations.runtime.device import put_params
from dm_generations.weights import native
from dm_generations.weights.native import flatten
from dm_generations.weights.torch_file import read_torch

CLIP = sorted(golden("clip").rglob("model.safetensors"))[0].parent
DALLE_MINI = sorted(golden("dalle_bart").glob("*/flax_model.msgpack"))[0].parent


@pytest.fixture
def codec(tmp_path):
    return tiny_vqgan(tmp_path / "codec")


def change_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def assert_same(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(right[name]), err_msg=name)


@pytest.mark.parametrize(("role", "kind"), [("generator", "dalle_bart"), ("codec", "vqgan"), ("clip", "clip")])
def test_embedded_models_load_by_role_and_have_the_tensors_that_their_configs_ask_for(role, kind):
    embedded = load_checkpoint(None, role)
    checked = load_checkpoint(embedded.folder, role)  # as a folder of anyone's
    assert embedded.kind == checked.kind == kind
    assert embedded.sha256 == checked.sha256 and embedded.config == checked.config
    assert_same(embedded.params, checked.params)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("decoder/conv_in/kernel"), "lacks decoder/conv_in/kernel"),
        (lambda t: t.update(stray=np.zeros(1, np.float32)), "has unexpected stray"),
        (
            lambda t: t.update({"decoder/conv_in/bias": np.zeros(5, np.float32)}),
            r"decoder/conv_in/bias has shape \(5,\), its config asks for \(4,\)",
        ),
        (
            lambda t: t.update({"decoder/conv_in/bias": np.zeros(4, np.int32)}),
            "decoder/conv_in/bias has dtype int32",
        ),
    ],
    ids=["missing", "extra", "misshapen", "integers"],
)
def test_wrong_tensor_is_named_with_its_file(codec, change, expected):
    change_tensors(codec, change)
    with pytest.raises(UserError, match=f"model.safetensors:? {expected}|model.safetensors: {expected}"):
        load_checkpoint(codec, "codec")


def test_truncated_weights(codec):
    path = codec / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model.safetensors"):
        load_checkpoint(codec, "codec")


def test_config_of_absurd_sizes_costs_no_memory(codec):
    change_config(codec, ch=1 << 40)
    with pytest.raises(UserError, match="codec"):
        load_checkpoint(codec, "codec")


def test_another_role_is_told_from_nothing(codec, tmp_path):
    with pytest.raises(UserError, match="holds a codec, not a generator"):
        load_checkpoint(codec, "generator")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no model that this program knows; a codec is config.json with"):
        load_checkpoint(tmp_path / "empty", "codec")
    with pytest.raises(UserError, match="no such model folder or file"):
        load_checkpoint(tmp_path / "gone", "codec")


def test_broken_config(codec):
    (codec / "config.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        load_checkpoint(codec, "codec")


@pytest.mark.parametrize("dtype", [None, np.float32, np.float16, ml_dtypes.bfloat16])
def test_own_folder_keeps_names_shapes_and_values(codec, tmp_path, dtype):
    found = load_checkpoint(codec, "codec")
    native.save(tmp_path / "again", "vqgan", json.loads((codec / "config.json").read_text()), found.params, dtype)
    again = load_checkpoint(tmp_path / "again", "codec")
    assert again.config == found.config
    assert_same(again.params, jax.tree.map(lambda array: array.astype(dtype or array.dtype), found.params))
    # other programs read it too
    assert safetensors.numpy.load_file(codec / "model.safetensors").keys() == flatten(found.params).keys()


def test_placed_weights_do_not_follow_a_file_of_others(tmp_path):
    """Programs that train write theirs in place."""
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    found = load_checkpoint(folder, "clip")
    before = jax.tree.map(np.array, found.params)
    on_device = put_params(found.params)
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(-64, 2)
        file.write(b"\xff" * 64)
    assert_same(on_device, before)


def test_placed_weights_of_our_own_folder_are_the_mapped_file(codec):
    found = load_checkpoint(codec, "codec")
    before = jax.tree.map(np.array, found.params)
    on_device = put_params(found.params)
    if jax.default_backend() == "cpu":
        in_file, in_use = flatten(found.params), flatten(on_device)
        largest = max(in_file, key=lambda name: in_file[name].nbytes)  # lies first, at a multiple of 64
        assert in_use[largest].unsafe_buffer_pointer() == in_file[largest].ctypes.data
    changed = jax.tree.map(lambda array: array + 1, before)
    native.save(codec, "vqgan", json.loads((codec / "config.json").read_text()), changed)
    assert_same(on_device, before)
    assert_same(put_params(load_checkpoint(codec, "codec").params), changed)


def test_placed_copies_large_and_transposed_arrays_exactly(monkeypatch):
    monkeypatch.setattr("dm_generations.runtime.device.CHUNK_BYTES", 1000)
    arrays = {
        "plain": np.arange(5000, dtype=np.float32).reshape(50, 100),
        "transposed": np.arange(6000, dtype=np.float32).reshape(60, 100).T,
        "moved": np.arange(3 * 4 * 5 * 60, dtype=np.float16).reshape(60, 5, 3, 4).transpose(2, 3, 1, 0),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 4), np.float32),
    }
    assert_same(put_params(arrays), arrays)


def test_convert_gives_a_folder_that_loads_the_same(tmp_path):
    source = tmp_path / "mini"
    shutil.copytree(DALLE_MINI, source)
    shutil.copyfile(next(golden("dalle_bart").rglob("tokenizer.json")), source / "tokenizer.json")
    (line,) = convert(str(source), tmp_path / "out")
    assert "dalle_bart" in line and str(tmp_path / "out") in line
    before, after = (load_checkpoint(path, "generator") for path in (source, tmp_path / "out"))
    assert after.config == before.config and after.text_style == before.text_style
    assert_same(after.params, before.params)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("named", "others", "copied"),
    [
        ("vocab.json", ["merges.txt"], ["merges.txt", "vocab.json"]),
        ("merges_mini.txt", ["vocab_mini.json"], ["merges.txt", "vocab.json"]),
        ("bpe-16k-vocab.json", ["bpe-16k-merges.txt"], ["bpe-16k-merges.txt", "bpe-16k-vocab.json"]),
        ("my.tar.gz", [], ["tokenizer.tar.gz"]),
        ("bpe.json", ["enwiki-words-frequency.txt"], ["enwiki-words-frequency.txt", "tokenizer.json"]),
    ],
)
def test_convert_takes_all_of_a_tokenizer_that_is_named_by_one_file(tmp_path, named, others, copied):
    model, tokenizer = tiny_dalle_bart(tmp_path / "model"), tmp_path / "tokenizer"
    (model / "tokenizer.json").unlink(missing_ok=True)
    tokenizer.mkdir()
    for name in (named, *others):
        (tokenizer / name).write_text(name)
    convert(str(model), tmp_path / "out", tokenizer / named)
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if "model" not in path.name}
    del found["config.json"]
    assert sorted(found) == copied and sorted(found.values()) == sorted([named, *others])


def test_convert_never_overwrites_and_leaves_nothing_half_done(codec, tmp_path):
    convert(str(codec), tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        convert(str(codec), tmp_path / "out")
    change_tensors(codec, lambda t: t.update({"decoder/conv_in/bias": np.full(4, 1e6, np.float32)}))
    with pytest.raises(UserError, match=r"decoder/conv_in/bias.*use bfloat16"):
        convert(str(codec), tmp_path / "half", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec", "out"]


def test_clip_loads_from_pytorch_model_bin_too(tmp_path):
    """A state_dict as torch.save writes it gives the tensors of the safetensors file."""
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    expected = load_checkpoint(folder, "clip")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch_files.save(folder / "pytorch_model.bin", {name: torch_files.tensor(array) for name, array in tensors.items()})
    assert_same(load_checkpoint(folder, "clip").params, expected.params)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_clip_loads_from_pieces(tmp_path, name):
    """As transformers saves what is larger than a file should be."""
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    expected = load_checkpoint(folder, "clip")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = name.split(".")
    files = {f"{stem}-0000{number + 1}-of-00002.{suffix}": list(tensors)[number::2] for number in range(2)}
    for file, part in files.items():
        if suffix == "bin":
            torch_files.save(folder / file, {key: torch_files.tensor(tensors[key]) for key in part})
        else:
            safetensors.numpy.save_file({key: tensors[key] for key in part}, folder / file)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, part in files.items() for key in part}}))
    found = load_checkpoint(folder, "clip")
    assert_same(found.params, expected.params)
    assert found.sha256 == expected.sha256
    if name == "model.safetensors":  # what is wrong is said of the piece that has it
        extra = {key: tensors[key] for key in files[file]} | {"text_model.extra.weight": np.zeros((2, 2), np.float32)}
        safetensors.numpy.save_file(extra, folder / file)
        with pytest.raises(UserError, match=f"{file} has unexpected text_model.extra"):
            load_checkpoint(folder, "clip")
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"lacks .*{file}"):
        load_checkpoint(folder, "clip")
    for broken in ({}, {"weight_map": {"a": "../elsewhere.bin"}}, {"weight_map": [1]}):
        index.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"index.json does not say which files"):
            load_checkpoint(folder, "clip")


def prefixed(prefix):
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


WRAPPERS = {
    "DistributedDataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "the other way round": prefixed("_orig_mod.module."),
    "in the middle": lambda state: {re.sub(r"^(\w+)\.", r"\1._orig_mod.", name): state[name] for name in state},
    "a training state": lambda state: {
        "epoch": 3,
        "model": prefixed("module._orig_mod.")(state),
        "optimizer": {"state": {0: {"exp_avg": next(iter(state.values()))}}},
        "ema": {},
    },
}
TORCH_FILES = [
    (sorted(golden(name).glob(f"**/{file_name}"))[0].parent, role)
    for name, file_name, role in (
        ("taming", "*.ckpt", "codec"),
        ("mindalle_kakao", "stage2_last.ckpt", "generator"),
        ("mindalle_kakao", "stage1_last.ckpt", "codec"),
        ("dalle_pytorch", "dalle.pt", "generator"),
        ("dalle_pytorch", "dalle.pt", "codec"),
        ("min_dalle", "encoder.pt", "generator"),
    )
]


@pytest.mark.parametrize(
    ("source", "role", "wrapper"),
    [(*case, "a training state") for case in TORCH_FILES] + [(*TORCH_FILES[-1], wrapper) for wrapper in WRAPPERS],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_training_puts_around_weights_and_names_is_left_behind(tmp_path, source, role, wrapper):
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    expected = load_checkpoint(folder, role)
    for file in (file for file in folder.rglob("*") if file.suffix in (".pt", ".ckpt")):
        content = plain(read_torch(file))
        if "weights" in content:  # dalle.pt, with the config beside them
            wrapped = content | {"weights": WRAPPERS[wrapper](content["weights"])}
        else:
            wrapped = WRAPPERS[wrapper](content.get("state_dict", content))
        file.unlink()  # the arrays are views of it
        torch_files.save(file, with_tensors(wrapped))
    found = load_checkpoint(folder, role)
    assert (found.sha256, found.config) == (expected.sha256, expected.config)


def plain(value):
    return {name: plain(part) for name, part in value.items()} if isinstance(value, dict) else value


def with_tensors(value):
    if isinstance(value, dict):
        return {name: with_tensors(part) for name, part in value.items()}
    return torch_files.tensor(value) if isinstance(value, np.ndarray) else value


def test_clip_loads_from_what_training_wrote(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    expected = load_checkpoint(folder, "clip").sha256
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(prefixed("_orig_mod.")(tensors), folder / "model.safetensors")
    assert load_checkpoint(folder, "clip").sha256 == expected
    (folder / "model.safetensors").unlink()
    torch_files.save(folder / "pytorch_model.bin", with_tensors(WRAPPERS["a training state"](tensors)))
    assert load_checkpoint(folder, "clip").sha256 == expected


def test_a_pointer_of_git_lfs_is_named_whatever_file_it_stands_for(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    codec = tiny_vqgan(tmp_path / "codec")
    generator = tiny_dalle_bart(tmp_path / "generator")
    archive, ckpt, yaml = (tmp_path / name for name in ("model.tar.gz", "last.ckpt", "last.yaml"))
    for path in (codec / "config.json", generator / "tokenizer.json", archive, yaml, ckpt):
        path.write_text(pointer)
    for path in (codec, archive, ckpt):
        with pytest.raises(UserError, match="git lfs pull"):
            load_checkpoint(path, "codec")
    with pytest.raises(UserError, match=r"tokenizer\.json .*git lfs pull"):
        load_checkpoint(generator, "generator").load_tokenizer()


def test_a_config_of_any_size_takes_no_memory(codec):
    with open(codec / "config.json", "r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match=r"config\.json"):
        load_checkpoint(codec, "codec")


def test_an_option_that_is_not_supported_is_named_with_its_file(tmp_path):
    for case, role, change in (
        (CLIP, "clip", {"text_config": {"hidden_act": "sin"}}),
        (DALLE_MINI, "generator", {"use_alibi": True}),
    ):
        folder = tmp_path / role
        shutil.copytree(case, folder)
        change_config(folder, **change)
        with pytest.raises(UserError, match=f"{folder}.*(hidden_act|use_alibi)"):
            load_checkpoint(folder, role)


def test_weights_of_a_big_endian_machine_are_read_and_written_as_they_are(tmp_path):
    """In the byte order of this machine: own.save writes bytes as they lie in memory, and JAX takes no others."""
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    expected = load_checkpoint(folder, "clip").params
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    swapped = {}
    for name, array in tensors.items():
        swapped[name] = torch_files.tensor(array)
        swapped[name].storage.elements = swapped[name].storage.elements.astype(">f4")
    torch_files.save(folder / "pytorch_model.bin", swapped, byteorder=b"big")
    found = load_checkpoint(folder, "clip")
    assert all(array.dtype == np.dtype("=f4") for array in flatten(found.params).values())
    assert_same(found.params, expected)
    assert_same(put_params(found.params), expected)
    convert(str(folder), tmp_path / "out")
    assert_same(load_checkpoint(tmp_path / "out", "clip").params, expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, np.complex64, np.bool_])
def test_dtypes_that_weights_do_not_have_are_refused(dtype, tmp_path):
    with pytest.raises(UserError, match=r"weights.pt: a/b has dtype .*float32"):
        check_names_and_shapes(
            {"a/b": (2,)}, RawCheckpoint("vqgan", None, {"a": {"b": np.zeros(2, dtype)}}, (tmp_path / "weights.pt",))
        )


def test_clip_role_knows_its_embedded_kind(tmp_path):
    assert load_checkpoint(tiny_clip(tmp_path / "clip"), "clip").kind == "clip"
    assert load_checkpoint(tiny_dalle_bart(tmp_path / "bart"), "generator").text_style == "dalle_bart"
