"""The decode command against what the 2022 script wrote (tests/golden/original_script/README.md).

Names and pixels are compared with expected.zip, made with a VQGAN whose weights are drawn here; pixels also with what
vqgan-jax itself decoded.
"""

import json

import numpy as np
import pytest
from decode_kit import (
    GOLDEN_CODEC,
    GOLDEN_DECODE,
    all_files,
    golden_images,
    read_images,
    write_archive_2022,
    write_codec_2022,
)
from helpers import golden_dirs

from dm_generations.cli import main
from dm_generations.export.journal import JOURNAL

CASES = {
    "images": ["--mode", "images"],
    "gallery": ["--mode", "gallery", "--gallery-cols", "4", "--gallery-rows", "2"],
    # The 2022 script was run with ids 1 9 3 and let pass that there is no prompt 3; here that is an error.
    "best": ["--mode", "images", "--prompt-ids", "1", "9", "--n-best", "2", "--sc-prompt-ids", "1"],
}
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
    assert decode_golden(out_dir, *CASES[request.param], codec=codec_2022) == 0
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
    if source == "2022":
        galleries, images = golden_images("gallery"), golden_images("images")
    else:
        for case in ("gallery", "images"):
            assert decode_golden(tmp_path / case, *CASES[case]) == 0
        galleries, images = read_images(tmp_path / "gallery"), read_images(tmp_path / "images")
    for path, gallery in galleries.items():
        folder, name = path.split("/")
        before, text = name.rsplit("_", 1)
        cells = gallery.reshape(2, 32, 4, 32, 3).swapaxes(1, 2).reshape(8, 32, 32, 3)
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
    listed = {prefix + middle + suffix for *_, prefix, suffix, files in manifest["groups"] for middle, *_ in files}
    assert manifest["mode"] == ("gallery" if case == "gallery" else "images")
    assert listed == read_images(out_dir).keys()


def test_a_second_run_touches_nothing_and_needs_no_codec(decoded, monkeypatch, capsys):
    case, out_dir = decoded
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*.png")}
    monkeypatch.setattr(
        "dm_generations.export.exporter.load_checkpoint", lambda *_: pytest.fail("the codec was loaded")
    )
    assert decode_golden(out_dir, *CASES[case]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out_dir.rglob("*.png")}
    assert f"{len(before)} there already" in capsys.readouterr().out


def test_the_missing_prompt_is_an_error_before_anything_is_written(tmp_path, capsys):
    flags = ["--prompt-ids", "1", "9", "3", "--n-best", "2", "--sc-prompt-ids", "1"]
    assert decode_golden(tmp_path / "best", *flags) == 1
    message = capsys.readouterr().err
    assert "no prompt with id 3" in message and "1, 2, 4, 9, 12" in message
    assert message.count("\n") == 1 and not (tmp_path / "best").exists()
