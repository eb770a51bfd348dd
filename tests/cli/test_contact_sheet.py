"""`contact-sheet`: files, their names, and what is refused."""

import numpy as np
import pytest
from archive_kit import fill, new_image
from helpers import ROOT
from PIL import Image

from dm_generations import Archive, Decoder
from dm_generations.cli import main

EMOJI = ROOT / "archive" / "emoji.db"


@pytest.mark.e2e
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_the_archive_that_ships_as_a_sheet(tmp_path, suffix):
    out = tmp_path / f"sheet{suffix}"
    where = ["--where", "top_k=256", "top_p=1", "temperature=1", "--prompt-texts", "a rocket", "a pizza"]
    command = ["contact-sheet", str(EMOJI), "--rows", "prompt", "--cols", "cond_scale", "--cell", "best4", *where]
    assert main([*command, "--out", str(out)]) == 0
    page = np.asarray(Image.open(out).convert("RGB"))
    with Archive.open(EMOJI) as archive:
        images = list(archive.images(prompt=["a rocket", "a pizza"], top_k=256, top_p=1, temperature=1, best=4))
    expected = Decoder.load(batch_size=8)(np.stack([image.tokens for image in images]))
    side = expected.shape[1]
    starts = (page[:, :, None] == expected[:, 0, 0]).all(axis=-1).any(axis=-1)  # pixels that an image may start at
    found = {page[y : y + side, x : x + side].tobytes() for y, x in np.argwhere(starts)}
    assert {pixels.tobytes() for pixels in expected} <= found
    before = out.read_bytes()
    assert main([*command, "--out", str(out)]) == 1, "it exists"
    assert main([*command, "--out", str(out), "--overwrite", "--theme", "dark", "--scores"]) == 0
    assert out.read_bytes() != before


@pytest.mark.e2e
def test_pages_get_numbers(tmp_path):
    out = tmp_path / "sheet.png"
    where = ["--where", "top_k=256", "top_p=1", "--prompt-texts", "a rocket"]
    axes = ["--rows", "prompt", "--cols", "cond_scale", "--pages", "temperature"]
    assert main(["contact-sheet", *axes, *where, "--out", str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet-1.png", "sheet-2.png", "sheet-3.png"]
    assert main(["contact-sheet", *axes, *where, "--out", str(out)]) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--out", "sheet.gif"], "sheet.gif"),
        (["--out", "nowhere/sheet.png"], "nowhere"),
        (["--cols", "prompt"], "prompt"),
        (["--cell", "same-seed", "--cols", "seed"], "seed"),
        (["--where", "cond_scale=99"], "cond_scale"),
        ([], "top_p"),
    ],
)
def test_what_makes_no_sheet_is_one_line_and_no_file(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    with Archive.create("a.db") as archive:
        fill(archive, *(new_image(i, cond_scale=float(i), top_p=1 / (1 + i)) for i in range(3)))
    files = sorted(tmp_path.iterdir())
    assert main(["contact-sheet", "a.db", "--rows", "prompt", "--cols", "cond_scale", *flags]) == 1
    printed = capsys.readouterr().err
    assert named in printed and printed.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == files
