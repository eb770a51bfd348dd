"""Files that other processes decode and encode: the same bytes under the same names."""

import dataclasses

import pytest
from decode_kit import all_files, random_tokens, write_archive_2022
from diffusion_kit import TINY, tiny_decoder
from ray_kit import PickledPool
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.archive import Archive
from dm_generations.errors import UserError
from dm_generations.export import remote
from dm_generations.export.captions import Strips
from dm_generations.export.exporter import ExportOptions, export_archive
from dm_generations.export.journal import JOURNAL, Journal
from dm_generations.export.plan import Layout
from dm_generations.inference.diffusion import Diffusion

LAYOUTS = {
    "images": Layout("images", 8, 4),
    "gallery": Layout("gallery", 3, 2),
    "seamless": Layout("gallery", 3, 2, is_seamless=True),
    "tar": Layout("tar", 8, 4, shard_size=7),
    "zip": Layout("zip", 8, 4),
}


@pytest.fixture
def export(models, tmp_path):
    """Decodes 22 images of two prompts into a folder."""
    tokens = random_tokens(11, GRID**2, CODEBOOK_SIZE)
    db = write_archive_2022(tmp_path / "a.db", tokens, ("a boat", "a cat"))

    def export(name, layout, pool=None, **options):
        seen = []
        with Archive.open(db) as archive:
            report = export_archive(
                archive,
                ExportOptions(tmp_path / name, layout, codec=str(models.vqgan), batch_size=4, **options),
                lambda *counts: seen.append(counts),
                pool=pool,
            )
        return report, seen, all_files(tmp_path / name)

    return export


class VanishingFont(Strips):
    """A font that was there when the command began."""

    def check(self):
        pass


SLOWER = ("gallery", "seamless", "zip")


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.e2e] * (name in SLOWER)) for name in LAYOUTS])
def test_a_pool_writes_what_one_process_writes(export, monkeypatch, layout):
    monkeypatch.setattr(remote, "ITEMS", 5)  # several pieces, and galleries that are larger than one
    options = {"has_metadata": True} if layout == "images" else {}
    options |= {"strips": Strips(captions=True, score_labels=True)} if layout == "gallery" else {}
    alone, progress, expected = export("alone", LAYOUTS[layout], **options)
    report, seen, files = export("pool", LAYOUTS[layout], PickledPool(), **options)
    assert files == expected
    assert len(files) >= 1
    assert (report.written, report.problems) == (alone.written, []) == (alone.written, alone.problems)
    assert seen[0] == progress[0] == (0, 22)
    assert seen[-1] == progress[-1] == (22, 22)
    report, seen, files = export("pool", LAYOUTS[layout], PickledPool(), **options)
    assert (report.written, report.already_there) == (0, alone.written)
    assert files == expected


@pytest.mark.e2e
def test_a_pool_decodes_by_diffusion_as_one_process_does(export, monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "ITEMS", 5)
    network = dataclasses.replace(TINY, image_size=2, level_channels=(32,), attention_levels=())  # quick to compile
    diffusion = Diffusion.load(tiny_decoder(tmp_path / "decoder", network), "ddim3", 0.5, seed=3)
    layout = Layout("images", 8, 4, decodings=2)
    _, _, expected = export("alone", layout, diffusion=diffusion)
    report, _, files = export("pool", layout, PickledPool(), diffusion=diffusion)
    assert files == expected
    assert (report.written, report.problems) == (44, [])


def test_a_folder_has_one_driver(export, tmp_path):
    (tmp_path / "taken").mkdir()
    with Journal(tmp_path / "taken") as journal:
        journal.open(create=True)
        with pytest.raises(UserError, match="taken"):
            export("taken", LAYOUTS["images"], PickledPool())
        assert all_files(tmp_path / "taken").keys() == {JOURNAL}


@pytest.mark.e2e
def test_a_file_that_cannot_be_encoded_is_reported_and_the_rest_written(export):
    strips = VanishingFont(captions=True, font="/nowhere/font.ttf")
    alone, _, expected = export("alone", LAYOUTS["gallery"], strips=strips)
    report, _, files = export("pool", LAYOUTS["gallery"], PickledPool(), strips=strips)
    assert len(report.problems) == len(alone.problems) == 4
    assert files.keys() == expected.keys()
