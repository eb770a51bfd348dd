"""Damaged checkpoints, configs and tokenizers of every format: a model or one line; no traceback, hang or 2 GB."""

import random
import re
import shutil
import sys
import tempfile

import pytest
from diffusion_kit import tiny_decoder
from helpers import golden, golden_dirs, time_limit

from dm_generations.errors import UserError
from dm_generations.models.loading import find_checkpoint

SECONDS = 20
MAX_BYTES = 2 << 30  # more than the process had before
VALUES = (b"-1", b"999999999999", b"1e9", b"null", b'"x"', b"[]", b"0")
RECORDED = re.compile(r".*\.npz|settings\.json|.*(golden|shapes|cleaning)\.json|README\.md|[0-9]\.npy|script_.*")
GOLDEN = (
    ("dalle_bart", "flax_model.msgpack", "generator"),
    ("dalle_pytorch", "dalle.pt", "generator"),
    ("min_dalle", "encoder.pt", "generator"),
    ("mindalle_kakao", "stage2_last.ckpt", "generator"),
    ("llamagen", "c2i_*.pt", "generator"),
    ("llamagen", "t2i_*.pt", "generator"),
    ("llamagen", "vq_*.pt", "codec"),
    ("amused", "model_index.json", "generator"),
    ("amused", "model_index.json", "codec"),
    ("janus", "model.safetensors", "generator"),
    ("janus", "model.safetensors", "codec"),
    ("taming", "*.ckpt", "codec"),
    ("chameleon", "*.ckpt", "codec"),
    ("open_magvit2", "*.ckpt", "codec"),
    ("vqgan_jax", "flax_model.msgpack", "codec"),
    ("clip", "model.safetensors", "clip"),
)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Folders of checkpoints of every format, with the role of each. Some golden files are in the fuller set alone."""
    found = [
        (sorted(file.parent for file in files)[0], role)
        for name, file_name, role in GOLDEN
        if (files := [file for folder in golden_dirs(name)[:1] for file in folder.glob(f"**/{file_name}")])
    ]
    diffusion = tiny_decoder(tmp_path_factory.mktemp("diffusion")).parent
    return [*found, (diffusion, "decoder"), (models.dalle_bart, "generator"), (models.vqgan, "codec")]


def list_files(folder):
    """Names, sizes and times of all files, which tell whether one was touched."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    return [(path, status.st_size, status.st_mtime_ns) for path, status in files]


def peak_memory():
    """The most memory that this process has had, in bytes."""
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mutate(content: bytes, numbers: random.Random) -> bytes:
    """Flip bits, cut, overwrite the head or a stretch, or put another value at the place of a digit."""
    damaged = bytearray(content)
    kind = numbers.choice(["bit", "bits", "head", "cut", "zeros", "value"])
    limit = len(damaged) if numbers.random() < 0.5 else min(len(damaged), 3000)  # half of them where the names are
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else numbers.randrange(2, 30)):
            damaged[numbers.randrange(limit)] ^= 1 << numbers.randrange(8)
    elif kind == "head":
        for _ in range(4):
            damaged[numbers.randrange(min(len(damaged), 200))] = numbers.randrange(256)
    elif kind == "cut":
        del damaged[numbers.randrange(len(damaged)) :]
    elif kind == "zeros":
        start = numbers.randrange(limit)
        damaged[start : start + numbers.randrange(1, 50)] = bytes(numbers.randrange(1, 50))
    elif digits := [index for index in range(limit) if chr(damaged[index]).isdigit()]:
        index = numbers.choice(digits)
        damaged[index : index + 1] = numbers.choice(VALUES)
    return bytes(damaged)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGALRM")
@pytest.mark.parametrize(
    ("seed", "count"),
    [
        (0, 6),
        *(pytest.param(seed, 1000, marks=pytest.mark.slow) for seed in range(1, 5)),
    ],
)
def test_damage_is_a_model_or_one_line(folders, seed, count, tmp_path, monkeypatch):
    numbers = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outside = list_files(golden(""))
    memory = peak_memory()
    for index in range(count):
        source, role = numbers.choice(folders)
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not RECORDED.fullmatch(file.name))
        file = numbers.choice([file for file in files if file.stat().st_size])
        file.chmod(0o644)
        file.write_bytes(mutate(file.read_bytes(), numbers))
        message = ""
        try:
            with time_limit(SECONDS):
                found = find_checkpoint(folder, role)
                if found is not None and (found.tokenizer or role == "clip"):
                    found.load_tokenizer().encode(["a cat"], 8)
        except UserError as error:
            message = str(error)
        assert "\n" not in message, (seed, index, file.name)
        assert peak_memory() - memory < MAX_BYTES, (seed, index, file.name)
        assert {path.name for path in tmp_path.iterdir()} <= {"model"}, (seed, index, file.name)
    assert list_files(golden("")) == outside
