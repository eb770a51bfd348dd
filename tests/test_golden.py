"""The golden files are what was recorded: no checkout, editor or archive changed a byte of them."""

import hashlib

from helpers import ROOT

FOLDER = ROOT / "tests" / "golden"
SUMS = FOLDER / "SHA256SUMS"  # made in this folder by: find . -type f ! -name SHA256SUMS | sort | xargs sha256sum
LIMIT_BYTES = 14_000_000


def test_files_are_as_they_were_recorded():
    for line in SUMS.read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


def test_they_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < LIMIT_BYTES
