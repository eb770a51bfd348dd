"""How small an archive could be: tokens packed by the width of the codebook, and compressed in blocks sorted by prompt.

    python benchmarks/size.py archive/emoji.db
    python benchmarks/size.py

Without an archive it makes tokens of a full-size model, below 16,384: evenly drawn, and as unevenly as words of a
language (Zipf).
"""

import argparse
import lzma
import sqlite3
from pathlib import Path

import numpy as np

_BLOCK_CODES = 1 << 18


def pack(tokens: np.ndarray, bits: int) -> bytes:
    """Return tokens with as many bits each as the codebook needs."""
    big = tokens.astype(">u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(np.unpackbits(big, axis=1)[:, 16 - bits :]).tobytes()


def report(name: str, tokens: np.ndarray, bits: int, file_bytes: int) -> None:
    """Print the size of tokens (n,) in each form."""
    blocks = [tokens[start : start + _BLOCK_CODES] for start in range(0, len(tokens), _BLOCK_CODES)]
    plain = 2 * len(tokens)
    sizes = {
        "plain": plain,
        "packed": sum(len(pack(block, bits)) for block in blocks),
        "xz": sum(len(lzma.compress(block.astype("<u2").tobytes(), preset=9)) for block in blocks),
        "packed, then xz": sum(len(lzma.compress(pack(block, bits), preset=9)) for block in blocks),
    }
    print(f"{name}: {len(tokens):,} tokens" + (f", {plain / file_bytes:.0%} of the file" if file_bytes else ""))
    for form, size in sizes.items():
        of_file = f", the file {(plain - size) / file_bytes:.0%} smaller" if file_bytes else ""
        print(f"  {form:<18}{8 * size / len(tokens):6.2f} bits a token, {1 - size / plain:.0%} smaller{of_file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", nargs="?", type=Path, help="an archive of one codec")
    path = parser.parse_args().archive
    if path is None:
        generator = np.random.default_rng(0)
        report("evenly drawn", generator.integers(0, 1 << 14, 1 << 20), 14, 0)
        weights = 1 / np.arange(1, (1 << 14) + 1)
        drawn = generator.choice(1 << 14, 1 << 20, p=weights / weights.sum())
        report("as words of a language", generator.permutation(1 << 14)[drawn], 14, 0)
        return
    connection = sqlite3.connect(path)
    blobs = connection.execute("SELECT quantvec FROM images ORDER BY prompt_id, top_k, top_p, temperature, cond_scale")
    tokens = np.frombuffer(b"".join(blob for (blob,) in blobs), "<u2")
    report(path.name, tokens, int(tokens.max()).bit_length(), path.stat().st_size)
    whole = len(lzma.compress(path.read_bytes()))
    print(f"the whole file by xz: {whole / 1e6:.2f} of {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
