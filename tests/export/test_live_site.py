"""`export-site --live`: the codec as ONNX gives the pixels of `decode`; packages are checked; files are whole."""

import base64
import dataclasses
import hashlib
import io
import json
import sys
import tarfile

import numpy as np
import pytest
from codec_kit import random_params
from decode_kit import change, random_tokens, write_archive_2022
from flax.traverse_util import unflatten_dict
from helpers import first_of
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.archive import Archive, NewImage
from dm_generations.atomic_io import open_locked
from dm_generations.errors import UserError
from dm_generations.export import live_site, npm
from dm_generations.export.live_site import export_codec
from dm_generations.inference.decoder import Decoder
from dm_generations.models.dvae.discrete import DiscreteVAEConfig
from dm_generations.models.dvae.openai import OpenAIVAEConfig
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.paths import label_paths
from dm_generations.sampling.params import SamplingParams

SMALL = VQGANConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=16, z_channels=8)
SMALL = dataclasses.replace(SMALL, n_embed=32, embed_dim=8, num_groups=4)
CODECS = {
    "vqgan": ("vqgan", SMALL),
    "gumbel": ("vqgan", dataclasses.replace(SMALL, is_gumbel=True, is_signed=True, resamp_with_conv=False)),
    "discrete": ("discrete_vae", DiscreteVAEConfig(16, 32, 8, num_layers=2, num_resnet_blocks=1, hidden_dim=8)),
    "openai": ("openai_vae", OpenAIVAEConfig(n_hid=8, n_init=6, n_blk_per_group=1, vocab_size=32, image_size=32)),
}


def make_codec(name: str, folder) -> Checkpoint:
    kind, config = CODECS[name]
    return Checkpoint(kind, config, unflatten_dict(random_params(kind, config), sep="/"), name, "0" * 64, folder)


def test_a_codec_that_the_library_cannot_convert_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("an operation\nof a later library")

    monkeypatch.setattr(live_site, "find_converter", lambda: refuse)
    with pytest.raises(UserError, match=r"discrete.*an operation") as raised:
        export_codec(make_codec("discrete", tmp_path), 4)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "factor"), first_of([("vqgan", 2), ("discrete", 1), ("gumbel", 1), ("openai", 1)], count=2)
)
def test_the_codec_as_onnx_gives_the_pixels_of_decode(name, factor, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    checkpoint = make_codec(name, tmp_path)
    config, grid = checkpoint.config, factor * checkpoint.config.grid
    session = onnxruntime.InferenceSession(export_codec(checkpoint, grid))
    tokens = random_tokens(3, grid**2, config.codebook_size)
    (name,) = [one.name for one in session.get_inputs()]
    found = np.concatenate([session.run(None, {name: row[None].astype(np.int32)})[0] for row in tokens])
    expected = Decoder.from_checkpoint(checkpoint, 3, grid=grid)(tokens)
    assert found.min() >= 0 and found.max() <= 1 and expected.std() > 10
    np.testing.assert_allclose((found * np.float32(255)).astype(np.uint8).astype(int), expected, atol=1)


@pytest.fixture
def package(tmp_path):
    """A package of npm in a folder, as `npm pack` writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("package/dist/a.js", "package/../../b.js", "package/package.json"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"code"))
    data = buffer.getvalue()
    made = npm.Package("scripts", "1.2.3", base64.b64encode(hashlib.sha512(data).digest()).decode(), ["dist/a.js"])
    (tmp_path / made.file).write_bytes(data)
    return made


def test_scripts_of_a_folder_of_packages(package, tmp_path):
    assert npm.read_scripts(tmp_path, [package]) == {"a.js": b"code"}


def test_a_package_that_is_missing_changed_or_lacks_a_file(package, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=package.file):
        npm.read_scripts(tmp_path / "elsewhere", [package])
    with pytest.raises(UserError, match=r"c\.js"):
        npm.read_scripts(tmp_path, [dataclasses.replace(package, files=["dist/a.js", "c.js"])])
    with pytest.raises(UserError, match=r"scripts 1\.2\.3"):
        npm.read_scripts(tmp_path, [dataclasses.replace(package, sha512="A" * 88)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm"):
        npm.read_scripts(None, [package])


@pytest.fixture
def export(tmp_path, models, monkeypatch):
    """Export a site of an archive, with other scripts, and a codec that is not converted."""
    monkeypatch.setattr(live_site, "find_converter", lambda: None)
    monkeypatch.setattr(live_site, "read_scripts", lambda folder: {"a.js": b"code"})
    monkeypatch.setattr(live_site, "export_codec", lambda checkpoint, grid: f"{checkpoint.kind} {grid}".encode())
    tokens = random_tokens(3, GRID**2, CODEBOOK_SIZE)
    archive = write_archive_2022(tmp_path / "a.db", tokens, ("a boat", "a car"))

    def export(*others, codec=models.vqgan, **selection) -> int:
        chosen = live_site.Selection.of(**selection)
        return live_site.export_live_site([archive, *others], tmp_path / "site", chosen, str(codec), None)[1]

    export.archive, export.site = archive, tmp_path / "site"
    return export


def test_a_live_site_has_all_that_it_needs(export):
    assert export(prompt=["a car"]) == 3
    site = json.loads((export.site / "site.json").read_text())
    with Archive.open(export.site / site["archives"][0]["file"]) as archive:
        assert archive.count() == 3 and list(archive.prompts().values()) == ["a car"]
    assert (export.site / site["codec"]["file"]).read_bytes() == f"vqgan {GRID}".encode()
    assert (export.site / "scripts" / "a.js").read_bytes() == b"code"
    assert '<meta name="site" content="site.json">' in (export.site / "index.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in export.site.iterdir()) == sorted(
        [".lock", "archive-1.db", "index.html", "scripts", "site.json", "worker.js", site["codec"]["file"]]
    )


def test_a_live_site_of_several_archives(export, tmp_path):
    (tmp_path / "later").mkdir()
    other = write_archive_2022(tmp_path / "later" / "a.db", random_tokens(4, GRID**2, CODEBOOK_SIZE), ("a boat",))
    assert export(other) == 2 * 3 + 4
    archives = json.loads((export.site / "site.json").read_text())["archives"]
    assert [one["name"] for one in archives] == label_paths([export.archive, other])
    for one, count in zip(archives, (6, 4), strict=True):
        with Archive.open(export.site / one["file"]) as archive:
            assert archive.count() == count
    assert not list(export.site.glob(".new-*"))


def test_archives_of_different_grids_are_refused(export, models, tmp_path):
    other, side = tmp_path / "b.db", 2 * GRID
    write_archive_2022(other, random_tokens(4, side**2, CODEBOOK_SIZE), ("a boat",))
    with pytest.raises(UserError, match=rf"takes 4x4 tokens below \d+, but {other} holds 8x8 tokens"):
        export(other)
    other.unlink()
    info = load_checkpoint(models.vqgan, "codec").model_info()
    params = SamplingParams(top_k=5, temperature=1.0)
    tokens = random_tokens(1, side**2, CODEBOOK_SIZE).astype("<u2").tobytes()
    image = NewImage("a boat", None, params, 7, 1, tokens, 1.0, 2.0, 20.0, 20.0, 3.0)
    with Archive.create(other) as archive, archive.transaction():
        codec_id = archive.model_id(dataclasses.replace(info, token_shape=(side, side)))
        archive.add_images([image], None, codec_id, None, 1)
    with pytest.raises(UserError, match=rf"a.db has grids of 4 x 4 tokens, {other} of 8 x 8; export them apart"):
        export(other)
    assert sorted(path.name for path in export.site.iterdir()) == [".lock"]


def test_two_exports_do_not_share_a_folder(export):
    export()
    with open_locked(export.site / ".lock"), pytest.raises(UserError, match="site"):
        export()


def test_without_the_library_it_is_one_line(export, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match="site"):
        export()
    assert not export.site.exists()


def test_a_run_that_fails_leaves_the_site_as_it_was(export, models, tmp_path):
    export()
    before = {path: path.read_bytes() for path in export.site.rglob("*") if path.is_file()}
    change(export.archive, "UPDATE images SET quantvec = x'00' WHERE id = 1")
    with pytest.raises(UserError):
        export()
    with pytest.raises(UserError):
        export(codec=tmp_path / "no-codec")
    assert {path: path.read_bytes() for path in export.site.rglob("*") if path.is_file()} == before
