"""Sample captions of an image and train the tokenizers on them.

    python -m recipes.emoji.captions --data build/emoji-64.npz --out build/tokenizer   # a second

A caption is the name of the emoji or some of its keywords. Some captions add the style ("3d", "flat", "noto"), some a
phrase that people type ("a picture of a ..."), and some put filler words around it, so that the model learns to draw
the two words that it knows of a long prompt.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from recipes.emoji.data import Emoji, load_dataset

PHRASES = (
    "a {}", "a picture of {}", "a picture of a {}", "a drawing of a {}", "painting of a {}", "{} emoji",
    "an image of {}", "the {}", "a cute {}", "a photo of a {}",
    "an icon of a {}", "one {}", "{} on a white background",
)  # fmt: skip
STYLE_PHRASES = {
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


COUNT_WORDS = {
    1: ("a small {}", "a small {}", "small {}", "a tiny {}", "a little {}"),
    2: ("two {}", "two {}", "two {}", "2 {}", "a pair of {}"),
    3: ("three {}", "three {}", "3 {}"),
    4: ("four {}", "four {}", "4 {}"),
}
PAIR_PHRASES = (
    "a {} next to a {}", "a {} next to a {}", "{} next to {}", "a {} and a {}", "a {} and a {}", "{} and {}",
    "a {} beside a {}", "a {} with a {}",
)  # fmt: skip
OTHER_WORD_SHARE = 0.1  # of small emoji: named by a keyword, or by one word of their name
BACKGROUND_PHRASES = ("{} on {}", "{} on {}", "{} on a {} background", "{}, {} background")
MENTIONED_SHARE = 0.35  # of captions say what the background is


def mention_background(caption: str, background: str, rng: np.random.Generator) -> tuple[str, bool]:
    """Add the background, a colour or "at night", to some captions; a background that is named already goes.

    Returns:
        The caption, and whether it names the background.
    """
    caption = caption.replace(" on a white background", "")
    if rng.random() >= MENTIONED_SHARE:
        return caption, False
    return f"{caption} {background}" if " " in background else str(rng.choice(BACKGROUND_PHRASES)).format(
        caption, background
    ), True


def sample_caption(emoji: Emoji, rng: np.random.Generator) -> str:
    """Sample a caption of an image."""
    if emoji["keywords"] and rng.random() < 0.15:
        count = min(len(emoji["keywords"]), int(rng.integers(1, 4)))
        text = " ".join(rng.choice(emoji["keywords"], count, replace=False))
    else:
        text = emoji["name"]
    kind = rng.random()
    if kind < 0.6:
        text = str(rng.choice(STYLE_PHRASES[emoji["style"]])).format(text)
    elif kind < 0.8:
        text = str(rng.choice(PHRASES)).format(text)
    if rng.random() < 0.12:
        words = list(rng.choice(FILLERS, int(rng.integers(1, 6))))
        words.insert(int(rng.integers(len(words) + 1)), text)
        text = " ".join(words)
    return text


def sample_word(emoji: Emoji, rng: np.random.Generator) -> str:
    """Sample what a small emoji is called."""
    if rng.random() < OTHER_WORD_SHARE:
        return str(rng.choice([*emoji["keywords"], emoji["name"].split()[-1]]))
    return emoji["name"]


def pluralise(name: str) -> str:
    """Make the plural of a name, by the regular rules."""
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def caption_scene(emoji: Sequence[Emoji], rng: np.random.Generator) -> str:
    """Sample a caption of small emoji: one, two different ones, or more of a kind."""
    names = [sample_word(one, rng) for one in emoji]
    if len({one["key"] for one in emoji}) > 1:
        return str(rng.choice(PAIR_PHRASES)).format(*names)
    name = names[0] if len(names) == 1 or rng.random() < 0.2 else pluralise(names[0])
    return str(rng.choice(COUNT_WORDS[len(names)])).format(f"3d {name}" if rng.random() < 0.1 else name)


def train_tokenizer(emoji: list[Emoji], vocab_size: int, start: str, end: str, special_last: bool) -> Tokenizer:
    """Train a byte-level BPE tokenizer of lower-cased text, `<start> text <end>`.

    Args:
        emoji: Images whose captions it is trained on.
        vocab_size: Highest number of tokens, the special ones included.
        start: Special token before the text.
        end: Special token after the text.
        special_last: True gives `start` and `end` the two highest ids, as CLIP has them. False gives them ids 0 and 2,
            with `<pad>` as 1, as BART has them.
    """
    rng = np.random.default_rng(0)
    texts = [sample_caption(one, rng) for _ in range(4) for one in emoji]
    texts += [word for one in emoji for word in one["keywords"]] + [f for f in FILLERS for _ in range(20)]
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
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - (2 if special_last else 0),
        special_tokens=[] if special_last else [start, "<pad>", end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if special_last:
        tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)]
    )
    return tokenizer


def list_names(emoji: list[Emoji]) -> str:
    """List the names under their groups, one a line, each with its keywords."""
    keywords: dict[str, dict[str, list[str]]] = {}
    for one in emoji:
        words = [word for word in one["keywords"] if word != one["name"]]
        keywords.setdefault(one["group"], {})[one["name"]] = words
    parts = []
    for group, names in sorted(keywords.items()):
        lines = [f"{name}: {', '.join(words)}" if words else name for name, words in sorted(names.items())]
        parts.append("\n".join((f"# {group}", *lines)) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Train both tokenizers from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("build/emoji-64.npz"), help="file of recipes.emoji.data")
    parser.add_argument("--out", type=Path, default=Path("build/tokenizer"), help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens of each vocabulary (default: 2048)")
    args = parser.parse_args()
    _, emoji = load_dataset(args.data)
    for kind, start, end, special_last in (
        ("dalle_bart", "<s>", "</s>", False),
        ("clip", "<|startoftext|>", "<|endoftext|>", True),
    ):
        tokenizer = train_tokenizer(emoji, args.vocab_size, start, end, special_last)
        folder = args.out / kind
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        ids = tokenizer.encode("A cute avocado armchair").ids
        print(json.dumps({"kind": kind, "size": tokenizer.get_vocab_size(), "ids": ids, "text": tokenizer.decode(ids)}))
    (args.out / "names.txt").write_text(list_names(emoji), encoding="utf-8")


if __name__ == "__main__":
    main()
