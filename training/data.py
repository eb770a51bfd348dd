"""Fetch the emoji, check them by hash, draw them on white and split them.

    python -m training.data --size 64 --out build/emoji-64.npz      # 22 s on 2 cores

Three styles of the same concepts: "3d" and "flat" (Microsoft's Fluent emoji, MIT) and "noto" (Google's Noto
emoji, Apache-2.0). Names and groups come from unicode-emoji-json (MIT), further words from emojilib (MIT).
The packages are fetched by `npm pack`, whatever registry npm is set up for, and refused if a hash differs.

One (concept, style) pair in sixteen is held out, with all its skin tones: no trainer sees those pictures, while the
concept is seen in another style. Country flags are left out: where the 3D set has them from is not stated.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = {  # name@version: SHA-256 of the tarball
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "@iconify-json/fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "@iconify-json/noto@1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "unicode-emoji-json@0.9.0": "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    "emojilib@4.0.3": "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
}
STYLES = ("3d", "flat", "noto")
TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
HELD_OUT_SHARE = 1 / 16


def fetch(folder: Path) -> dict[str, Path]:
    """Tarballs of PACKAGES in `folder`, downloaded where missing; SystemExit without npm, or if a hash differs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for package, expected in PACKAGES.items():
        name, version = package.rsplit("@", 1)
        path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            _npm_pack(package, folder)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise SystemExit(f"{path}: SHA-256 {found}, expected {expected}; delete the file and try again")
        paths[name] = path
    return paths


def _npm_pack(package: str, folder: Path) -> None:
    try:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit("npm, which fetches the emoji, is not installed; it comes with Node.js") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"npm could not fetch {package} (exit status {error.returncode}); try again later") from None


def read_json(tarball: Path, member: str) -> dict:
    with tarfile.open(tarball) as tar:
        return json.load(tar.extractfile(f"package/{member}"))


def codepoints(emoji: str) -> str:
    """`1f469-200d-1f680`: without the variation selector, which packages write or leave out at will."""
    return "-".join(f"{ord(c):x}" for c in emoji if ord(c) != 0xFE0F)


def split_tone(key: str) -> tuple[str, str]:
    """A key without its skin tones, and the tone's name ("" for none, None for two people of two tones)."""
    parts = key.split("-")
    tones = {TONES[p] for p in parts if p in TONES}
    base = "-".join(p for p in parts if p not in TONES)
    return base, "" if not tones else tones.pop() if len(tones) == 1 else None


def concepts(paths: dict[str, Path]) -> dict[str, dict]:
    """By codepoints: name, group and further words of every emoji but country flags."""
    names = read_json(paths["unicode-emoji-json"], "data-by-emoji.json")
    words = read_json(paths["emojilib"], "dist/emoji-en-US.json")
    found = {}
    for emoji, entry in names.items():
        if entry["group"] == "Flags" and entry["name"].startswith("flag "):
            continue
        keywords = [w.replace("_", " ") for w in words.get(emoji, []) if re.fullmatch(r"[a-z][a-z _-]+", w)]
        name = entry["name"].lower().replace("’", "'").replace("“", "").replace("”", "")
        found[codepoints(emoji)] = {"name": name, "group": entry["group"], "keywords": keywords}
    return found


def on_white(image: Image.Image, size: int) -> np.ndarray:
    """RGBA of any shape to uint8 (size, size, 3): fitted, centred, alpha-blended over white."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    white = Image.new("RGBA", square.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, square).convert("RGB")
    return np.asarray(flat if side == size else flat.resize((size, size), Image.Resampling.BOX, reducing_gap=2))


def svg_sources(tarball: Path) -> dict[str, str]:
    """SVG text by codepoints, of an Iconify package."""
    icons, chars = read_json(tarball, "icons.json"), read_json(tarball, "chars.json")
    found = {}
    for key, name in chars.items():
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        key = "-".join(p for p in key.split("-") if p != "fe0f")
        found[key] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
    return found


def draw_svg(svg: str, size: int) -> np.ndarray:
    import resvg_py

    # Drawn at twice the size and averaged: resvg's own edges are harder than those of the 3D pictures.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size)
    return on_white(Image.open(io.BytesIO(bytes(png))), size)


def webp_sources(tarball: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".webp":
                found["-".join(p for p in path.stem.split("-") if p != "fe0f")] = tar.extractfile(member).read()
    return found


def is_held_out(concept: str, style: str) -> bool:
    digest = hashlib.sha256(f"{concept}/{style}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def build(size: int, downloads: Path) -> tuple[np.ndarray, list[dict]]:
    """Pixels uint8 (N, size, size, 3) and a dict per picture, in a fixed order."""
    paths = fetch(downloads)
    known = concepts(paths)
    sources = {
        "3d": webp_sources(paths["@lobehub/fluent-emoji-3d"]),
        "flat": svg_sources(paths["@iconify-json/fluent-emoji-flat"]),
        "noto": svg_sources(paths["@iconify-json/noto"]),
    }
    styles_of: dict[str, set] = {}
    for style in STYLES:
        for key in sources[style]:
            styles_of.setdefault(key, set()).add(style)
    jobs = []
    for style in STYLES:
        for key in sorted(sources[style]):
            base, tone = split_tone(key)
            if base not in known or tone is None:
                continue
            # A pair is held out only if its concept is seen in another style.
            held_out = len(styles_of.get(base, ())) > 1 and is_held_out(base, style)
            jobs.append({"concept": base, "style": style, "tone": tone, "held_out": held_out, "key": key} | known[base])

    def draw(job: dict) -> np.ndarray:
        source = sources[job["style"]][job["key"]]
        if job["style"] == "3d":
            return on_white(Image.open(io.BytesIO(source)), size)
        return draw_svg(source, size)

    with ThreadPoolExecutor(2) as pool:
        pixels = np.stack(list(pool.map(draw, jobs)))
    # Two styles' pair may both be held out; then its concept would be seen nowhere: give one back.
    by_concept: dict[str, set] = {}
    for job in jobs:
        if not job["held_out"]:
            by_concept.setdefault(job["concept"], set()).add(job["style"])
    for job in jobs:
        if job["concept"] not in by_concept:
            job["held_out"] = False
    return pixels, jobs


def save(path: Path, pixels: np.ndarray, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez(file, pixels=pixels, rows=np.frombuffer(json.dumps(rows).encode(), np.uint8))
    Path(file.name).replace(path)


def load(path: Path, tones: bool = True) -> tuple[np.ndarray, list[dict]]:
    """What `save` wrote: pixels uint8 (N, S, S, 3) and N dicts; without `tones`, no pictures of skin tones."""
    with np.load(path) as data:
        pixels, rows = data["pixels"], json.loads(data["rows"].tobytes())
    kept = [i for i, row in enumerate(rows) if tones or not row["tone"]]
    return pixels[kept], [rows[i] for i in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="pixels a side (64)")
    parser.add_argument("--out", type=Path, default=Path("build/emoji-64.npz"))
    parser.add_argument("--downloads", type=Path, default=Path("build/downloads"))
    args = parser.parse_args()
    pixels, rows = build(args.size, args.downloads)
    save(args.out, pixels, rows)
    held_out = sum(row["held_out"] for row in rows)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    print(f"{args.out}: {len(rows)} pictures of {len({r['concept'] for r in rows})} concepts, {held_out} held out")
    print(f"pixels SHA-256 {digest}")


if __name__ == "__main__":
    main()
