"""Scripts that a live site needs, from packages of npm, pinned and checked by their hashes.

The packages come from a folder that the user names, from the cache, or through `npm pack`, which downloads them.
"""

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dm_generations.atomic_io import write_atomic
from dm_generations.errors import UserError, one_line, printable
from dm_generations.paths import cache_dir

_MAX_FILE_BYTES = 64 << 20
_DOWNLOAD_S = 600


@dataclass(frozen=True)
class Package:
    """A package of npm.

    Attributes:
        name: Its name.
        version: Its version.
        sha512: Of its file, in base 64, as npm's lock files have it.
        files: Those that are needed, without `package/`.
    """

    name: str
    version: str
    sha512: str
    files: Sequence[str]

    @property
    def file(self) -> str:
        """The name that `npm pack` gives it."""
        return f"{self.name}-{self.version}.tgz"


PACKAGES = (
    Package(
        "onnxruntime-web",
        "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        (
            *("dist/ort.wasm.min.js", "dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm"),
            *("dist/ort.webgpu.min.js", "dist/ort-wasm-simd-threaded.asyncify.mjs"),
            "dist/ort-wasm-simd-threaded.asyncify.wasm",
        ),
    ),
    Package(
        "sql.js",
        "1.17.0",
        "HNdo5+2eSTEm7iLcfXUd2mjZX3Oe+5mJ0uDgIpirS7gSLHhZIw9kWDWxNcDVeFGEIBxJlkgo525g0CZJoH8GgA==",
        ("dist/sql-wasm.js", "dist/sql-wasm.wasm", "LICENSE"),
    ),
)


def read_scripts(folder: Path | None, packages: Sequence[Package] = PACKAGES) -> Mapping[str, bytes]:
    """Return the files of the packages by their names, without folders.

    Args:
        folder: Where the packages lie, as `npm pack` writes them; None for the cache and npm.
        packages: Which.

    Raises:
        UserError: A package is not there, cannot be downloaded, or is not the one that is expected.
    """
    found: dict[str, bytes] = {}
    for package in packages:
        data = _read_package(package, folder)
        found |= {Path(name).name: content for name, content in _extract(package, data).items()}
    return found


def _read_package(package: Package, folder: Path | None) -> bytes:
    source = cache_dir("npm") if folder is None else folder
    path = source / package.file
    if folder is None and not path.is_file():
        write_atomic(path, _check(package, _download(package), "npm"))
    try:
        data = path.read_bytes()
    except OSError as error:
        advice = f"run `npm pack {package.name}@{package.version}` there"
        raise UserError(f"{path}: {error.strerror}; {advice}") from error
    return _check(package, data, str(path))


def _check(package: Package, data: bytes, source: str) -> bytes:
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != package.sha512:
        raise UserError(
            f"{source}: this is not {package.name} {package.version} as it was published; remove it and try again"
        )
    return data


def _download(package: Package) -> bytes:
    wanted = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm is needed to download {wanted}; install it, or run `npm pack {wanted}` on another machine and give "
            "the folder of the packages with --packages"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", wanted, "--ignore-scripts", "--silent", "--pack-destination", folder]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_DOWNLOAD_S)
            if done.returncode == 0:
                return (Path(folder) / package.file).read_bytes()
            lines = done.stderr.strip().splitlines()
            reason = printable(lines[-1]) if lines else f"exit status {done.returncode}"
        except (OSError, subprocess.SubprocessError) as error:
            reason = one_line(error)
    raise UserError(f"npm does not give {wanted}: {reason}; or give the folder of the packages with --packages")


def _extract(package: Package, data: bytes) -> dict[str, bytes]:
    """Return the files that are needed, without writing any."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            file = tar.extractfile(member) if name in package.files and member.size <= _MAX_FILE_BYTES else None
            if file is not None:
                found[name] = file.read()
    if missing := set(package.files) - found.keys():
        raise UserError(f"{package.name} {package.version} lacks {', '.join(sorted(missing))}")
    return found
