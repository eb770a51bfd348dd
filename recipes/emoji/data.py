"""Fetch the emoji, check their hashes, render them on white and split them.

    python -m recipes.emoji.data --size 64 --out build/emoji-64.npz      # 22 s on 2 cores

Three styles of the same concepts: "3d" and "flat" (Microsoft's Fluent emoji, MIT) and "noto" (Google's Noto
emoji, Apache-2.0). Names and groups come from unicode-emoji-json (MIT), keywords from emojilib (MIT). `npm pack`
fetches the packages from the registry that npm is configured for.

One (concept, style) pair in sixteen is held out with all its skin tones. No trainer sees those images, but each
concept is seen in another style. Country flags are left out, since the origin of the 3D ones is not stated.

N: images   S: pixels a side
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

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
SKIN_TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
VARIATION_SELECTOR = "fe0f"  # packages write it or leave it out
HELD_OUT_SHARE = 1 / 16


class Emoji(TypedDict):
    """What is known of one image."""

    key: str  # codepoints in hexadecimal, such as 1f44b-1f3fd
    concept: str  # the key without skin tones
    style: str  # one of STYLES
    tone: str  # skin tone, "" for none
    held_out: bool
    name: str
    group: str
    keywords: list[str]


def fetch_packages(folder: Path) -> dict[str, Path]:
    """Download the tarballs of PACKAGES that are missing in `folder` and check all of them.

    Returns:
        Path of the tarball by package name.

    Raises:
        SystemExit: npm is missing or failed, or a hash differs.
    """
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


def read_json(tarball: Path, member: str) -> dict[str, Any]:
    """Read a JSON file of an npm package."""
    with tarfile.open(tarball) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)


def join_codepoints(codepoints: Iterable[str]) -> str:
    """Make a key such as `1f469-200d-1f680`, without variation selectors."""
    return "-".join(codepoint for codepoint in codepoints if codepoint != VARIATION_SELECTOR)


def split_tone(key: str) -> tuple[str, str | None]:
    """Split a key into the key without skin tones and the tone's name.

    Returns:
        The key, and "" for no tone or None for several tones.
    """
    parts = key.split("-")
    tones = {SKIN_TONES[part] for part in parts if part in SKIN_TONES}
    base = "-".join(part for part in parts if part not in SKIN_TONES)
    if len(tones) > 1:
        return base, None
    return base, next(iter(tones), "")


def read_concepts(paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Read the name, group and keywords of every emoji except country flags, by key."""
    names = read_json(paths["unicode-emoji-json"], "data-by-emoji.json")
    keywords = read_json(paths["emojilib"], "dist/emoji-en-US.json")
    concepts = {}
    for emoji, entry in names.items():
        if entry["group"] == "Flags" and entry["name"].startswith("flag "):
            continue
        name = (
            entry["name"]
            .lower()
            .replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
            .replace("\N{LEFT DOUBLE QUOTATION MARK}", "")
            .replace("\N{RIGHT DOUBLE QUOTATION MARK}", "")
        )
        words = [word.replace("_", " ") for word in keywords.get(emoji, []) if re.fullmatch(r"[a-z][a-z _-]+", word)]
        key = join_codepoints(f"{ord(character):x}" for character in emoji)
        concepts[key] = {"name": name, "group": entry["group"], "keywords": words}
    return concepts


def composite_on_white(image: Image.Image, size: int) -> np.ndarray:
    """Centre an image in a white square and scale it.

    Returns:
        uint8 (size, size, 3).
    """
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    white = Image.new("RGBA", square.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, square).convert("RGB")
    return np.asarray(flat if side == size else flat.resize((size, size), Image.Resampling.BOX, reducing_gap=2))


def read_svgs(tarball: Path) -> dict[str, str]:
    """Read the SVG text of every emoji of an Iconify package, by key."""
    icons, characters = read_json(tarball, "icons.json"), read_json(tarball, "chars.json")
    svgs = {}
    for codepoints, name in characters.items():
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = icons["icons"].get(name)
        if icon is None:
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        svgs[join_codepoints(codepoints.split("-"))] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
    return svgs


def render_svg(svg: str, size: int) -> np.ndarray:
    """Render an SVG on white, uint8 (size, size, 3)."""
    import resvg_py

    # At twice the size and averaged: resvg's own edges are harder than those of the 3D images.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size)
    return composite_on_white(Image.open(io.BytesIO(bytes(png))), size)


def read_webps(tarball: Path) -> dict[str, bytes]:
    """Read the WebP bytes of every emoji of the 3D package, by key."""
    webps = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            path = Path(member.name)
            file = tar.extractfile(member) if path.suffix == ".webp" else None
            if file is not None:
                webps[join_codepoints(path.stem.split("-"))] = file.read()
    return webps


def is_held_out(concept: str, style: str) -> bool:
    """Tell by a hash whether a pair belongs to the held-out sixteenth."""
    digest = hashlib.sha256(f"{concept}/{style}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def list_emoji(keys: dict[str, set[str]], concepts: dict[str, dict[str, Any]]) -> list[Emoji]:
    """List and split the images, in a fixed order.

    Args:
        keys: The keys that each style has.
        concepts: What `read_concepts` returns.
    """
    styles = {key: [style for style in STYLES if key in keys[style]] for key in set().union(*keys.values())}
    emoji: list[Emoji] = []
    for style in STYLES:
        for key in sorted(keys[style]):
            concept, tone = split_tone(key)
            if concept not in concepts or tone is None:
                continue
            held_out = len(styles.get(concept, ())) > 1 and is_held_out(concept, style)
            known = concepts[concept]
            emoji.append(
                {
                    "concept": concept,
                    "style": style,
                    "tone": tone,
                    "held_out": held_out,
                    "key": key,
                    "name": known["name"],
                    "group": known["group"],
                    "keywords": known["keywords"],
                }
            )
    # A concept whose pairs are all held out would be seen nowhere, so it is not held out.
    seen = {one["concept"] for one in emoji if not one["held_out"]}
    for one in emoji:
        one["held_out"] = one["held_out"] and one["concept"] in seen
    return emoji


def build_dataset(size: int, downloads: Path) -> tuple[np.ndarray, list[Emoji]]:
    """Fetch and render all emoji.

    Returns:
        Pixels, uint8 (N, size, size, 3), and what is known of each image.
    """
    paths = fetch_packages(downloads)
    webps = read_webps(paths["@lobehub/fluent-emoji-3d"])
    svgs = {
        "flat": read_svgs(paths["@iconify-json/fluent-emoji-flat"]),
        "noto": read_svgs(paths["@iconify-json/noto"]),
    }
    keys = {"3d": set(webps)} | {style: set(found) for style, found in svgs.items()}
    emoji = list_emoji(keys, read_concepts(paths))

    def render(one: Emoji) -> np.ndarray:
        if one["style"] == "3d":
            return composite_on_white(Image.open(io.BytesIO(webps[one["key"]])), size)
        return render_svg(svgs[one["style"]][one["key"]], size)

    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(render, emoji))), emoji


def save_dataset(path: Path, pixels: np.ndarray, emoji: list[Emoji]) -> None:
    """Write the data set to an .npz file, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez(file, pixels=pixels, emoji=np.frombuffer(json.dumps(emoji).encode(), np.uint8))
    Path(file.name).replace(path)


def load_dataset(path: Path, with_tones: bool = True) -> tuple[np.ndarray, list[Emoji]]:
    """Load what `save_dataset` wrote.

    Args:
        path: The .npz file.
        with_tones: False leaves out images of skin tones.

    Returns:
        Pixels, uint8 (N, S, S, 3), and what is known of each image.
    """
    with np.load(path) as data:
        pixels, emoji = data["pixels"], json.loads(data["emoji"].tobytes())
    chosen = [i for i, one in enumerate(emoji) if with_tones or not one["tone"]]
    return pixels[chosen], [emoji[i] for i in chosen]


def main() -> None:
    """Build the data set from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("build/emoji-64.npz"), help="file to write")
    parser.add_argument("--downloads", type=Path, default=Path("build/downloads"), help="folder of the packages")
    args = parser.parse_args()
    pixels, emoji = build_dataset(args.size, args.downloads)
    save_dataset(args.out, pixels, emoji)
    held_out = sum(one["held_out"] for one in emoji)
    print(f"{args.out}: {len(emoji)} images of {len({one['concept'] for one in emoji})} concepts, {held_out} held out")
    print(f"pixels SHA-256 {hashlib.sha256(pixels.tobytes()).hexdigest()}")


if __name__ == "__main__":
    main()
