"""Names of the Hugging Face hub: with its library and a local server, and with a stand-in for the library."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.numpy
import torch_files
from helpers import ROOT
from hub_kit import serve
from tiny import tiny_clip, tiny_vqgan

from dm_generations.errors import UserError
from dm_generations.models.clip.network import CLIPConfig
from dm_generations.models.loading import find_checkpoint, load_checkpoint
from dm_generations.models.registry import hub_files
from dm_generations.weights.hub import choose_files
from dm_generations.weights.native import read_json_object
from dm_generations.weights.state_dict import torch_name


def load_by_name(home, endpoint, *arguments):
    """Load in a process of its own: the library reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, ROOT / "tests" / "programs" / "load_from_hub.py", *arguments]
    environment = os.environ | settings | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.e2e
def test_a_model_is_downloaded_once_and_loads_without_a_network(tmp_path):
    """A codec of our own, and a CLIP with Flax's weights and PyTorch's, of which only the latter load."""
    pytest.importorskip("huggingface_hub")
    codec = tiny_vqgan(tmp_path / "hub" / "someone" / "codec")
    clip = tiny_clip(tmp_path / "hub" / "someone" / "clip")
    for folder in (codec, clip):
        (folder / "README.md").write_text("never downloaded")
        (folder / "flax_model.msgpack").write_bytes(b"never read")
    state = clip_state(clip)
    (clip / "model.safetensors").unlink()
    torch_files.save(clip / "pytorch_model.bin", {name: torch_files.tensor(array) for name, array in state.items()})
    names = ("codec=someone/codec", "clip=someone/clip")
    with serve(tmp_path / "hub") as endpoint:
        done = load_by_name(tmp_path / "home", endpoint, *names)
    assert done.stdout.split() == ["vqgan", "clip"], done.stderr
    cached = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert cached == {"config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"}
    done = load_by_name(tmp_path / "home", endpoint, *names)
    assert done.stdout.split() == ["vqgan", "clip"], done.stderr


@pytest.mark.e2e
def test_a_file_of_a_repository_is_downloaded_alone(tmp_path):
    """From a repository with several models: what it is asked for, not the others."""
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "hub" / "someone" / "heads"
    (repository / "more").mkdir(parents=True)
    state = {
        "weight": torch_files.tensor(np.ones((1, 8), np.float32)),
        "bias": torch_files.tensor(np.ones(1, np.float32)),
    }
    for name in ("a.pth", "b.pth", "more/c.pth"):
        torch_files.save(repository / name, state)
    names = ("scorer=someone/heads/b.pth", "scorer=someone/heads/more/c.pth")
    with serve(tmp_path / "hub") as endpoint:
        done = load_by_name(tmp_path / "home", endpoint, *names)
    assert done.stdout.split() == ["aesthetic"] * 2, done.stderr
    assert {path.name for path in (tmp_path / "home").rglob("snapshots/**/*.*")} == {"b.pth", "c.pth"}
    done = load_by_name(tmp_path / "home", endpoint, *names)
    assert done.stdout.split() == ["aesthetic"] * 2, done.stderr


def clip_state(folder):
    """The weights of a CLIP in a folder of our own under PyTorch's names, and the config of transformers' for them."""
    config = CLIPConfig.from_dict(read_json_object(folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    flat = safetensors.numpy.load_file(folder / "model.safetensors")
    return {torch_name(path, array.shape)[0]: to_torch(path, array) for path, array in flat.items()}


def to_torch(path, array):
    if not path.endswith("kernel"):
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


class HubError(OSError):
    """As requests' errors are, an OSError that may carry a response."""

    def __init__(self, text, status=None):
        super().__init__(text)
        self.response = types.SimpleNamespace(status_code=status) if status else None


class ClientError(Exception):
    """As httpx's errors are, which huggingface_hub lets out since 1.0: no OSError, and no response."""


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A huggingface_hub that "downloads" a tiny codec; records what it was asked for."""
    calls = []
    library, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError, errors.LocalEntryNotFoundError = (
        HubError,
        type("LocalEntryNotFoundError", (FileNotFoundError,), {}),
    )
    files = ["config.json", "model.safetensors", "flax_model.msgpack", "tf_model.h5", "README.md", "vocab.json"]

    class HfApi:
        def model_info(self, repo_id, revision=None):
            if library.failure:
                raise library.failure
            return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in library.files])

    def hf_hub_download(repo_id, filename, revision):
        return str(tiny_vqgan(tmp_path / "snapshot") / filename)

    def snapshot_download(repo_id, revision, allow_patterns=None, local_files_only=False):
        calls.append((repo_id, revision, allow_patterns, local_files_only))
        if library.broken_download and not local_files_only:
            raise library.broken_download
        if library.is_cache_empty:
            raise errors.LocalEntryNotFoundError("nothing there")
        return str(tiny_vqgan(tmp_path / "snapshot"))

    library.HfApi, library.snapshot_download, library.errors = HfApi, snapshot_download, errors
    library.hf_hub_download, library.files = hf_hub_download, files
    library.failure, library.is_cache_empty, library.calls = None, False, calls
    library.broken_download = None
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return library


def test_loads_one_kind_of_weights_at_the_revision(fake_hub):
    found = load_checkpoint("someone/tiny-vqgan@v1.2", "codec")
    assert (found.name, found.kind) == ("someone/tiny-vqgan@v1.2", "vqgan")
    assert fake_hub.calls == [("someone/tiny-vqgan", "v1.2", ["model.safetensors", "config.json", "vocab.json"], False)]


OFFLINE = [ConnectionError("no route"), ClientError("no name"), HubError("busy", status=503)]


def test_a_name_can_be_that_of_one_file(fake_hub, tmp_path):
    """With the configs next to it, and nothing else of the repository."""
    fake_hub.files += ["other.pt", "more/config.json"]
    name = "someone/tiny-vqgan/model.safetensors@v1.2"
    with pytest.raises(UserError, match="holds"):  # a file of our own folder is nothing without the folder
        load_checkpoint(name, "codec")
    assert fake_hub.calls == [("someone/tiny-vqgan", "v1.2", ["model.safetensors", "config.json", "vocab.json"], False)]
    with pytest.raises(UserError, match=r"some\.pt.*other\.pt"):
        load_checkpoint("someone/tiny-vqgan/some.pt", "codec")


@pytest.mark.parametrize("failure", OFFLINE)
def test_without_a_network_the_cache_serves(failure, fake_hub):
    fake_hub.failure = failure
    assert load_checkpoint("someone/tiny-vqgan", "codec").kind == "vqgan"
    assert fake_hub.calls == [("someone/tiny-vqgan", None, None, True)]


def test_unknown_repository_is_one_line(fake_hub):
    fake_hub.failure = HubError("404 Client Error\nRepository Not Found", status=404)
    with pytest.raises(UserError, match="someone/nothing: no such folder, and the Hugging Face hub") as caught:
        load_checkpoint("someone/nothing", "codec")
    assert "\n" not in str(caught.value)


def test_a_gated_repository_says_so(fake_hub):
    fake_hub.failure, fake_hub.is_cache_empty = HubError("403 Client Error: gated repo", status=403), True
    with pytest.raises(UserError, match=r"someone/gated: .*gated repo"):
        load_checkpoint("someone/gated", "codec")


def test_a_download_that_breaks_off_is_one_line(fake_hub):
    fake_hub.broken_download = ClientError("peer closed connection\nafter 10 bytes")
    with pytest.raises(UserError, match=r"someone/tiny-vqgan: .*peer closed connection after 10 bytes"):
        load_checkpoint("someone/tiny-vqgan", "codec")


@pytest.mark.parametrize("name", ["someone/tiny-vqgan", "someone/tiny-vqgan/some.pt"])
@pytest.mark.parametrize("failure", OFFLINE)
def test_neither_network_nor_cache(failure, name, fake_hub):
    fake_hub.failure, fake_hub.is_cache_empty = failure, name.count("/") == 1
    with pytest.raises(UserError, match="not in the cache of the Hugging Face hub"):
        load_checkpoint(name, "codec")


def test_a_folder_goes_before_the_hub(fake_hub, tmp_path, monkeypatch):
    tiny_vqgan(tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("someone/tiny", "codec").name == "tiny"
    assert fake_hub.calls == []


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"no such file or folder.*dm-generations\[checkpoints\]"):
        load_checkpoint("someone/model", "codec")


@pytest.mark.parametrize("spec", ["models/a/b", "../up/there", "/absolute/path", "a b/c", "alone", "x/y@"])
def test_what_cannot_be_a_hub_name_never_asks_the_hub(fake_hub, spec):
    with pytest.raises(UserError, match="no such model folder or file"):
        load_checkpoint(spec, "codec")
    assert fake_hub.calls == []


def test_repository_without_weights(fake_hub):
    fake_hub.files[:] = ["README.md", "config.json", "tf_model.h5"]
    with pytest.raises(UserError, match="someone/tiny-vqgan holds no model"):
        load_checkpoint("someone/tiny-vqgan", "clip")
    fake_hub.files.remove("config.json")
    assert find_checkpoint("someone/tiny-vqgan", "codec") is None
    assert fake_hub.calls == []


SMALL = ["config.json", "merges.txt", "tokenizer.json", "vocab.json"]
INDEXES = ["model.safetensors.index.json", "pytorch_model.bin.index.json"]
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize(
    ("role", "there", "chosen"),
    [
        ("clip", ["flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"], ["pytorch_model.bin"]),
        ("clip", ["flax_model.msgpack", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        ("clip", ["flax_model.msgpack", *SHARDS, "pytorch_model-00001-of-00001.bin", "open_clip_model.bin"], SHARDS),
        ("clip", ["model.safetensors", *SHARDS], ["model.safetensors"]),
        ("codec", ["flax_model.msgpack", "pytorch_model.bin", "model.safetensors"], ["flax_model.msgpack"]),
        ("generator", ["flax_model.msgpack", "pytorch_model.bin"], ["flax_model.msgpack"]),
        ("generator", ["decoder.pt", "detoker.pt", "encoder.pt", "old.bin"], ["decoder.pt", "encoder.pt"]),
        ("codec", ["decoder.pt", "detoker.pt", "encoder.pt", "old.bin"], ["detoker.pt"]),
        ("generator", ["stage1_last.ckpt", "stage2_last.ckpt"], ["stage2_last.ckpt"]),
        ("codec", ["stage1_last.ckpt", "stage2_last.ckpt"], ["stage1_last.ckpt"]),
        ("generator", ["some_name.pt"], ["some_name.pt"]),
        ("codec", ["ckpts/last.ckpt"], ["ckpts/last.ckpt"]),
        ("codec", ["decoder.pkl", "encoder.pkl"], ["decoder.pkl", "encoder.pkl"]),
    ],
)
def test_weights_are_chosen_by_role(role, there, chosen):
    assert choose_files([*SMALL, *there], hub_files(role), is_native=False) == chosen + SMALL


def test_weights_of_our_own_folder_are_chosen_whatever_else_is_there():
    names = ["flax_model.msgpack", "model.safetensors", "config.json", "codec/model.safetensors"]
    chosen = choose_files(names, hub_files("generator"), is_native=True)
    assert chosen == ["model.safetensors", "codec/model.safetensors", "config.json"]


def test_indexes_of_several_files_come_with_them():
    assert choose_files([*INDEXES, *SHARDS], hub_files("clip"), is_native=False) == SHARDS + INDEXES
