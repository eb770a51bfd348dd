"""Names of the Hugging Face hub, with a stand-in for the library: nothing here needs a network."""

import sys
import types

import pytest
from tiny import tiny_vqgan

from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint
from dm_generations.weights import hub


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
    errors.HfHubHTTPError, errors.LocalEntryNotFoundError = HubError, type("LocalEntryNotFoundError", (OSError,), {})
    files = ["config.json", "model.safetensors", "flax_model.msgpack", "tf_model.h5", "README.md", "vocab.json"]

    class HfApi:
        def model_info(self, repository, revision=None):
            if library.failure:
                raise library.failure
            return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(repository, revision, allow_patterns, local_files_only):
        calls.append((repository, revision, allow_patterns, local_files_only))
        if library.broken_download and not local_files_only:
            raise library.broken_download
        if library.is_cache_empty:
            raise errors.LocalEntryNotFoundError("nothing there")
        return str(tiny_vqgan(tmp_path / "snapshot"))

    library.HfApi, library.snapshot_download, library.errors = HfApi, snapshot_download, errors
    library.failure, library.is_cache_empty, library.calls = None, False, calls
    library.broken_download = None
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return library


def test_loads_one_kind_of_weights_at_the_revision(fake_hub):
    found = load_checkpoint("someone/tiny-vqgan@v1.2", "codec")
    assert found.name == "someone/tiny-vqgan@v1.2" and found.kind == "vqgan"
    assert fake_hub.calls == [("someone/tiny-vqgan", "v1.2", ["model.safetensors", "config.json", "vocab.json"], False)]


OFFLINE = [ConnectionError("no route"), ClientError("no name"), HubError("busy", status=503)]


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
    with pytest.raises(UserError, match="someone/gated: .*gated repo"):
        load_checkpoint("someone/gated", "codec")


def test_a_download_that_breaks_off_is_one_line(fake_hub):
    fake_hub.broken_download = ClientError("peer closed connection\nafter 10 bytes")
    with pytest.raises(UserError, match="someone/tiny-vqgan: .*peer closed connection after 10 bytes"):
        load_checkpoint("someone/tiny-vqgan", "codec")


@pytest.mark.parametrize("failure", OFFLINE)
def test_neither_network_nor_cache(failure, fake_hub):
    fake_hub.failure, fake_hub.is_cache_empty = failure, True
    with pytest.raises(UserError, match="not in the cache of the Hugging Face hub"):
        load_checkpoint("someone/tiny-vqgan", "codec")


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


def test_repository_without_weights():
    with pytest.raises(UserError, match="someone/else has no weights that load"):
        hub.wanted_files(["README.md", "tf_model.h5"], "someone/else")


def test_min_dalle_files_come_together():
    names = ["decoder.pt", "detoker.pt", "encoder.pt", "merges.txt", "vocab.json", "weights_old.bin"]
    assert hub.wanted_files(names, "kuprel/min-dalle") == [
        "decoder.pt",
        "detoker.pt",
        "encoder.pt",
        "merges.txt",
        "vocab.json",
    ]


def test_pieces_of_one_kind_are_fetched_with_their_index():
    small = ["config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"]
    pieces = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = [*small, *pieces, "pytorch_model-00001-of-00001.bin", "open_clip_pytorch_model.bin"]
    assert hub.wanted_files(names, "a/clip") == pieces + small
    assert hub.wanted_files([*names, "model.safetensors"], "a/clip") == ["model.safetensors", *small]
