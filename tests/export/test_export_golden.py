"""The decode command against what the 2022 script wrote (tests/golden/original_script/README.md).

Names and pixels are compared with expected.zip, made with a VQGAN whose weights are computed here; pixels also with
what vqgan-jax itself decoded.
"""

import json
import re

import numpy as np
import pytest
from decode_kit import (
    GOLDEN_CODEC,
    GOLDEN_DECODE,
    all_files,
    golden_images,
    listed_paths,
    read_images,
    write_archive_2022,
    write_codec_2022,
)
from helpers import golden_dirs

from dm_generations.archive import Archive
from dm_generations.cli import build_parser, main
from dm_generations.export.journal import JOURNAL


def read_cases() -> dict[str, list[str]]:
    """The flags of each folder of expected.zip, from the table in its README."""
    text = (GOLDEN_DECODE / "README.md").read_text()
    rows = re.findall(r"(?m)^\| `(\w+)/` \| `(.+?)`", text)
    return {folder: flags.replace(f"--out-dir {folder}", "").split() for folder, flags in rows}


def known_prompts(flags: list[str]) -> tuple[list[str], set[str]]:
    """The flags with ids of prompts that the archive has, and the other ids.

    The 2022 script let pass that a prompt is missing; here that is an error.
    """
    args = build_parser().parse_args(["decode", *flags])
    with Archive.open(GOLDEN_DECODE / "archive.db") as archive:
        missing = {str(number) for number in set(args.prompt_ids) - archive.prompts().keys()}
    return [flag for flag in flags if flag not in missing], missing


CASES = read_cases()
CODECS = [file.parent for root in golden_dirs("vqgan_jax") for file in sorted(root.glob("*/golden.npz"))]


def decode_golden(out_dir, *flags, codec=GOLDEN_CODEC):
    archive = str(GOLDEN_DECODE / "archive.db")
    return main(["decode", "--db", archive, "--codec", str(codec), "--out-dir", str(out_dir), *flags])


@pytest.fixture(scope="module")
def codec_2022(tmp_path_factory):
    return write_codec_2022(tmp_path_factory.mktemp("codec") / "vqgan")


@pytest.fixture(scope="module", params=CASES)
def decoded(request, codec_2022, tmp_path_factory):
    """The name of a case, and the folder that it was decoded into."""
    out_dir = tmp_path_factory.mktemp("golden") / request.param
    assert decode_golden(out_dir, *known_prompts(CASES[request.param])[0], codec=codec_2022) == 0
    return request.param, out_dir


def test_writes_the_files_of_the_2022_script(decoded):
    """The same names, and the same pixels to 1 of 255."""
    case, out_dir = decoded
    expected, found = golden_images(case), read_images(out_dir)
    assert found.keys() == expected.keys()
    for path, pixels in found.items():
        assert pixels.shape == expected[path].shape, path
        assert np.abs(pixels.astype(int) - expected[path]).max() <= 1, path


@pytest.mark.parametrize("folder", CODECS, ids=lambda folder: folder.name)
def test_writes_the_pixels_that_the_original_decodes(folder, tmp_path):
    """Recorded tokens to files, against the recorded uint8 pixels of vqgan-jax."""
    recorded = np.load(folder / "golden.npz")
    archive = write_archive_2022(tmp_path / "a.db", recorded["tokens"])
    out_dir = tmp_path / "out"
    assert main(["decode", "--db", str(archive), "--codec", str(folder), "--out-dir", str(out_dir)]) == 0
    found = list(read_images(out_dir).values())  # in order of rank, which is that of the tokens
    assert len(found) == len(recorded["decoded_uint8"])
    assert np.abs(np.stack(found).astype(int) - recorded["decoded_uint8"]).max() <= 1


@pytest.mark.parametrize("source", ["2022", "ours"])
def test_a_gallery_holds_the_images_in_order_of_rank(source, tmp_path):
    """Row by row, the rest black: in what the 2022 script wrote, and so in ours."""
    args = build_parser().parse_args(["decode", *CASES["gallery"]])
    rows, cols = args.gallery_rows, args.gallery_cols
    if source == "2022":
        galleries, images = golden_images("gallery"), golden_images("images")
    else:
        for case in ("gallery", "images"):
            assert decode_golden(tmp_path / case, *CASES[case]) == 0
        galleries, images = read_images(tmp_path / "gallery"), read_images(tmp_path / "images")
    for path, gallery in galleries.items():
        folder, name = path.split("/")
        before, text = name.rsplit("_", 1)
        height, width = gallery.shape[0] // rows, gallery.shape[1] // cols
        cells = gallery.reshape(rows, height, cols, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
        for rank, cell in enumerate(cells):
            image = images.get(f"{folder}/{before}_{rank:02d}_{text}", np.zeros_like(cell))
            np.testing.assert_array_equal(cell, image, err_msg=f"{path} {rank}")


def test_leaves_nothing_but_images_and_the_page(decoded):
    _, out_dir = decoded
    others = {path for path in all_files(out_dir) if not path.endswith(".png")}
    assert others == {"manifest.js", "samplebrowser.html", JOURNAL}


def test_the_manifest_lists_every_file(decoded):
    case, out_dir = decoded
    script = (out_dir / "manifest.js").read_text()
    manifest = json.loads(script[script.index("{") : script.rindex("}") + 1])
    assert manifest["mode"] == ("gallery" if case == "gallery" else "images")
    assert set(listed_paths(manifest)) == read_images(out_dir).keys()


def test_a_second_run_touches_nothing_and_needs_no_codec(decoded, monkeypatch, capsys):
    case, out_dir = decoded
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*.png")}
    monkeypatch.setattr(
        "dm_generations.export.exporter.load_checkpoint", lambda *_: pytest.fail("the codec was loaded")
    )
    assert decode_golden(out_dir, *known_prompts(CASES[case])[0]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out_dir.rglob("*.png")}
    assert str(len(before)) in capsys.readouterr().out


@pytest.mark.parametrize("case", [case for case in CASES if known_prompts(CASES[case])[1]])
def test_a_missing_prompt_is_an_error_before_anything_is_written(case, tmp_path, capsys):
    assert decode_golden(tmp_path / case, *CASES[case]) == 1
    message = capsys.readouterr().err
    assert all(number in message for number in known_prompts(CASES[case])[1])
    assert message.count("\n") == 1 and not (tmp_path / case).exists()
