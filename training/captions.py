"""Captions of a picture, drawn anew each time it is shown, and the tokenizers trained on them.

    python -m training.captions --data build/emoji-64.npz --out build/tokenizer   # a second

A caption is the emoji's name or some of its words, sometimes with its style ("3d", "flat", "noto"), sometimes in a
phrase such as people type ("a picture of a ..."), sometimes among words that mean nothing here, so that a long prompt
of which the model knows two words still draws those two.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from training import data

PHRASES = (
    "a {}", "a picture of {}", "a picture of a {}", "a drawing of a {}", "painting of a {}", "{} emoji",
    "an image of {}", "the {}", "a cute {}", "a photo of a {}",
    "an icon of a {}", "one {}", "a small {}", "{} on a white background",
)  # fmt: skip
STYLED = {
    "3d": ("3d {}", "a 3d {}", "{} 3d", "{}, 3d", "{} in 3d style", "3d render of a {}", "a 3d render of {}"),
    "flat": ("flat {}", "a flat {}", "{} flat", "{}, flat", "{} in flat style", "flat icon of a {}",
        "a flat drawing of {}"),
    "noto": ("noto {}", "a noto {}", "{} noto", "{}, noto", "{} in noto style", "noto emoji of a {}",
        "a noto drawing of {}"),
}  # fmt: skip
FILLERS = (
    "in front of", "on stage", "in the shape of", "full of", "at the bottom of", "made of", "with a crowd of",
    "taking off", "from", "and", "with", "in", "on top of",
    "next to", "under", "over", "branded", "very", "really", "beautiful",
    "detailed", "high quality", "of the", "by night", "some", "many",
    "shaped", "for", "about", "in a city", "art", "digital art",
    "singing", "dancing", "flying", "happy", "big", "old", "new", "style", "like", "without", "during", "inside",
)  # fmt: skip


def caption(row: dict, rng: np.random.Generator) -> str:
    """One caption of a picture; `row` is what training.data says of it."""
    if row["keywords"] and rng.random() < 0.15:
        count = min(len(row["keywords"]), int(rng.integers(1, 4)))
        text = " ".join(rng.choice(row["keywords"], count, replace=False))
    else:
        text = row["name"]
    draw = rng.random()
    if draw < 0.6:
        text = str(rng.choice(STYLED[row["style"]])).format(text)
    elif draw < 0.8:
        text = str(rng.choice(PHRASES)).format(text)
    if rng.random() < 0.12:
        words = list(rng.choice(FILLERS, int(rng.integers(1, 6))))
        words.insert(int(rng.integers(len(words) + 1)), text)
        text = " ".join(words)
    return text


def train_tokenizer(rows: list[dict], vocab_size: int, ends: tuple[str, str], ends_last: bool) -> Tokenizer:
    """Byte-level BPE of lower-cased text, `<start> text <end>`.

    ends: the two special tokens; they take ids 0 and 2 with `<pad>` 1 between (as BART has them), or the two
    highest ids (as CLIP has them).
    """
    rng = np.random.default_rng(0)
    texts = [caption(row, rng) for _ in range(4) for row in rows]
    texts += [word for row in rows for word in row["keywords"]] + [f for f in FILLERS for _ in range(20)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[\s_]+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    special = [] if ends_last else [ends[0], "<pad>", ends[1]]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - (2 if ends_last else 0),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if ends_last:
        tokenizer.add_special_tokens(list(ends))
    start, end = (tokenizer.token_to_id(token) for token in ends)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=[(ends[0], start), (ends[1], end)]
    )
    return tokenizer


def list_names(rows: list[dict]) -> str:
    """What may be asked for: each name on a line, with the further words it is known by, under its group."""
    known: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        known.setdefault(row["group"], {})[row["name"]] = [word for word in row["keywords"] if word != row["name"]]
    parts = []
    for group in sorted(known):
        lines = [": ".join((name, ", ".join(words))) if words else name for name, words in sorted(known[group].items())]
        parts.append("\n".join((f"# {group}", *lines)) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("build/emoji-64.npz"))
    parser.add_argument("--out", type=Path, default=Path("build/tokenizer"))
    parser.add_argument("--vocab-size", type=int, default=2048)
    args = parser.parse_args()
    rows = data.load(args.data)[1]
    for kind, ends, ends_last in (
        ("dalle_bart", ("<s>", "</s>"), False),
        ("clip", ("<|startoftext|>", "<|endoftext|>"), True),
    ):
        tokenizer = train_tokenizer(rows, args.vocab_size, ends, ends_last)
        folder = args.out / kind
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        ids = tokenizer.encode("A cute avocado armchair").ids
        print(json.dumps({"kind": kind, "size": tokenizer.get_vocab_size(), "ids": ids, "text": tokenizer.decode(ids)}))
    (args.out / "names.txt").write_text(list_names(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
