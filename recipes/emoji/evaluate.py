"""Evaluate the three models: numbers in `results.json`, and image grids to look at.

    python -m recipes.emoji.evaluate --models build/models --data build/emoji-64.npz --out build/evaluation

Grids: 100 common concepts (best of 16 by CLIP), 16 samples of a name, samples at four condition scales and, at each,
those furthest from every training image, single words that are not names, styles, backgrounds, colours, counts, and
prompts of two objects. People and signs are evaluated apart from things, since their names differ in little. Names are
of training images, unless held out is said. Other samples than those of the four scales have the settings of the
model's config.

N, M: images   S: pixels a side   L: tokens of an image   P: prompts   C: samples of a prompt
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dm_generations.export.captions import without_accents
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.generator import Generator
from dm_generations.inference.scorer import Scorer
from dm_generations.models.base import default_params_of
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.models.vqgan.network import VQGAN
from dm_generations.sampling.params import SamplingParams
from dm_generations.sampling.prng import row_key
from recipes.emoji.backgrounds import BACKGROUNDS, draw_backgrounds, encode_emoji, find_backgrounds
from recipes.emoji.captions import pluralise
from recipes.emoji.clip import top1_accuracy
from recipes.emoji.data import STYLES, load_dataset
from recipes.emoji.layouts import Scene, list_small
from recipes.emoji.vqgan import compute_psnr, decode_tokens, get_codebook, reconstruct

COMMON_WORDS = (
    "rocket castle avocado strawberry dinosaur cat dog horse cow pig mouse rabbit bear panda koala tiger lion monkey "
    "elephant giraffe zebra penguin owl eagle duck chicken frog turtle snake whale dolphin fish octopus shark crab "
    "butterfly bee spider snail tree cactus rose sunflower tulip mushroom apple banana lemon grapes watermelon "
    "pineapple cherries peach pear tomato eggplant carrot corn broccoli bread cheese pizza hamburger taco donut cookie "
    "car bus taxi bicycle motorcycle train airplane helicopter sailboat house tent mountain volcano sun moon star "
    "rainbow umbrella snowman fire guitar trumpet crown key book heart ghost robot alien skull balloon"
)
COMMON = (*COMMON_WORDS.split(), "palm tree", "hot dog", "ice cream")
PEOPLE_AND_SIGNS = {"People & Body", "Symbols", "Flags"}  # groups of names
SCALES = (1.0, 2.0, 3.0, 10.0)
STYLED_NAMES = (
    "rocket",
    "castle",
    "avocado",
    "strawberry",
    "cat face",
    "octopus",
    "house",
    "pizza",
    "guitar",
    "rose",
    "crab",
    "automobile",
)
COLOUR_WORDS = ("red", "blue", "green", "purple", "yellow", "black")
COLOURED_NAMES = ("car", "heart", "book", "apple", "castle", "cat")
BACKGROUND_NAMES = ("rocket", "strawberry", "cat face", "house", "crab")
PAIRS = (
    "a cat next to a rocket",
    "a dog and a pizza",
    "a castle next to a cactus",
    "an avocado armchair",
    "a robot holding a rose",
    "a penguin on a mountain",
)
COUNT_PROMPTS = {2: "two {}", 3: "three {}", 4: "four {}"}
SCENE_PROMPTS = 50  # of pairs, and of each count
# Root mean square distance to the nearest training image, in levels of 255. By eye, images have blotches from 30 on and
# are hard to recognise from 40 on. A clean image between two styles can be as far, so the rate is an upper bound.
OUTLIER_DISTANCE = 40
MAX_MEANINGS = 5  # a word of more concepts than this is left out: anything might be right for "food"
CONTEST = 1000  # names among which CLIP must pick the right one
GRID_IMAGES = 64
VARIETY_NAMES = 40
VARIETY_IMAGES = 16  # of a name


class Samples(NamedTuple):
    """Samples of prompts."""

    images: np.ndarray  # uint8 (P, C, S, S, 3)
    scores: np.ndarray  # by CLIP, float32 (P, C)
    tokens: np.ndarray  # uint16 (P, C, L)


class Pipeline:
    """Prompts to images and scores by the package's own code."""

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        """Load the models.

        Args:
            folder: Folder with `dalle_bart`, `vqgan` and `clip`.
            batch_size: Images computed at a time.
        """
        roles = {"dalle_bart": "generator", "vqgan": "codec", "clip": "clip"}
        models = {kind: load_checkpoint(folder / kind, role) for kind, role in roles.items()}
        text, clip = (PromptTokenizer(folder / kind) for kind in ("dalle_bart", "clip"))
        self.vqgan = models["vqgan"]
        self.backgrounds = find_backgrounds(np.asarray(get_codebook(self.vqgan.params)))
        self.params = default_params_of(models["dalle_bart"].config) or SamplingParams(top_k=256, cond_scale=3.0)
        self.generator = Generator(models["dalle_bart"], text, batch_size)
        self.codec = Decoder.from_checkpoint(self.vqgan, batch_size)
        self.scorer = Scorer(models["clip"], clip, batch_size)
        self.batch_size = batch_size

    def sample(self, prompts: Sequence[str], count: int, cond_scale: float | None = None) -> Samples:
        """Draw `count` samples of each prompt, with the model's own settings but for `cond_scale`."""
        texts = [prompt for prompt in prompts for _ in range(count)]
        keys = np.array([row_key(0, i) for i in range(len(texts))], np.uint32)
        settings = self.params if cond_scale is None else dataclasses.replace(self.params, cond_scale=cond_scale)
        tokens = self.generator.generate(texts, settings, keys)
        size = self.batch_size
        images = np.concatenate([self.codec.decode(tokens[i : i + size]) for i in range(0, len(tokens), size)])
        scores = self.scorer.score(images, texts)[0]
        shape = len(prompts), count
        return Samples(images.reshape(*shape, *images.shape[1:]), scores.reshape(shape), tokens.reshape(*shape, -1))

    def draw_on_white(self, tokens: np.ndarray) -> np.ndarray:
        """Draw tokens (N, L) with those of backgrounds and layouts taken for white: uint8 (N, S, S, 3)."""
        if self.backgrounds is not None:
            backgrounds, layouts = self.backgrounds
            is_outside = np.isin(tokens, backgrounds) | np.isin(tokens, layouts)
            tokens = np.where(is_outside, backgrounds[0, 0], tokens)
        return decode_tokens(VQGAN(self.vqgan.config), self.vqgan.params, tokens.astype(np.int32))


class Dataset:
    """The real images, their reconstructions, and their names.

    Attributes:
        reconstructed: The images through the codec, uint8 (N, S, S, 3).
        on_white: The images as their tokens on a white background draw them, which samples are compared with.
        on_backgrounds: On a random background each, as drawn by the codec.
        is_held_out: bool (N,).
        names: All names, sorted.
        index_of_name: Index by name.
        name_features: CLIP's features of the names.
    """

    def __init__(self, pipeline: Pipeline, path: Path) -> None:
        """Load the data set and encode its names and images.

        Args:
            pipeline: The models.
            path: File of `recipes.emoji.data`.
        """
        self.pixels, self.emoji = load_dataset(path, with_tones=False)
        codec, params = VQGAN(pipeline.vqgan.config), pipeline.vqgan.params
        self.reconstructed, _ = reconstruct(codec, params, self.pixels)
        tokens = encode_emoji(codec.config, params, self.pixels, self.emoji)
        indices = np.arange(len(self.pixels))
        self.tokens = tokens
        self.on_white = decode_tokens(codec, params, tokens.compose(indices, 0 * indices))
        self.backgrounds = np.random.default_rng(4).integers(len(BACKGROUNDS), size=len(indices))
        self.on_backgrounds = decode_tokens(codec, params, tokens.compose(indices, self.backgrounds))
        self.is_held_out = np.array([one["held_out"] for one in self.emoji])
        self.names = sorted({one["name"] for one in self.emoji})
        self.index_of_name = {name: i for i, name in enumerate(self.names)}
        self.name_features = pipeline.scorer.text_features(self.names)

    def choose_names(self, in_people_and_signs: bool, count: int) -> list[str]:
        """Choose names of training images at random, at most `count`."""
        pool = {
            one["name"]
            for one in self.emoji
            if (one["group"] in PEOPLE_AND_SIGNS) == in_people_and_signs and not one["held_out"]
        }
        return list(np.random.default_rng(1).choice(sorted(pool), min(count, len(pool)), replace=False))

    def list_word_meanings(self) -> dict[str, set[int]]:
        """List, for single words that are not names, the indices of names that have the word or its keyword."""
        meanings: dict[str, set[int]] = {}
        for one in self.emoji:
            for word in {*one["keywords"], *split_name(one["name"])}:
                meanings.setdefault(word, set()).add(self.index_of_name[one["name"]])
        return {
            word: names
            for word, names in meanings.items()
            if word not in self.index_of_name and " " not in word and len(names) <= MAX_MEANINGS
        }


def choose_best(images: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """Choose the `count` best samples of each prompt: (P, count, S, S, 3)."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(images, order[..., None, None, None], axis=1)


def make_labelled_grid(images: np.ndarray, labels: Sequence[str], columns: int) -> Image.Image:
    """Lay images, uint8 (N, S, S, 3), out in rows of `columns`, each with a line of text below."""
    size, line = images.shape[1], 12
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + 4), rows * (size + line + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = i % columns * (size + 4), i // columns * (size + line + 4)
        sheet.paste(Image.fromarray(image), (x, y))
        label = without_accents(label)
        while pen.textlength(label) > size + 2:
            label = label[:-1]
        pen.text((x + 1, y + size), label, fill="black")
    return sheet


def split_name(name: str) -> list[str]:
    """Split a name into words that a person might type alone."""
    words = [word.strip(",:") for word in name.split()]
    return [word for word in words if len(word) > 2 and word not in ("and", "the", "with")]


def find_nearest(images: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest known image to each image by root mean square distance.

    Args:
        images: uint8 (N, S, S, 3).
        known: uint8 (M, S, S, 3).

    Returns:
        Indices, int (N,); distances in levels of 255, float32 (N,).
    """
    known = known.reshape(len(known), -1).astype(np.float32)
    squares = np.square(known).sum(1)
    nearest, distances = [], []
    for part in np.array_split(images.reshape(len(images), -1).astype(np.float32), -(-len(images) // 64)):
        from_each = squares - 2 * part @ known.T
        nearest.append(from_each.argmin(1))
        distances.append(from_each.min(1) + np.square(part).sum(1))
    return np.concatenate(nearest), np.sqrt(np.maximum(np.concatenate(distances), 0) / known.shape[1])


def evaluate_codec(dataset: Dataset) -> dict[str, float]:
    """Compute mean PSNR of training and held-out images."""
    psnr = compute_psnr(dataset.reconstructed, dataset.pixels)
    on_backgrounds = compute_psnr(dataset.on_backgrounds, draw_backgrounds(dataset.pixels, dataset.backgrounds))
    return {
        "held_out_images": int(dataset.is_held_out.sum()),
        "psnr_held_out": float(psnr[dataset.is_held_out].mean()),
        "psnr_train": float(psnr[~dataset.is_held_out].mean()),
        "psnr_held_out_on_backgrounds": float(on_backgrounds[dataset.is_held_out].mean()),
    }


def evaluate_clip(pipeline: Pipeline, dataset: Dataset, images: np.ndarray) -> dict[str, float]:
    """Compute CLIP's top-1 accuracy on images of the data set, as they are or reconstructed."""
    features = pipeline.scorer.image_features(images)
    labels = np.array([dataset.index_of_name[one["name"]] for one in dataset.emoji])
    result = {}
    for key, of_split, count in (
        ("top1_train_1000", ~dataset.is_held_out, CONTEST),
        ("top1_held_out_100", dataset.is_held_out, 100),
    ):
        result[key] = top1_accuracy(features[of_split], dataset.name_features, labels[of_split], count, 0)
    return result


def measure_pairwise(images: np.ndarray) -> float:
    """Compute the mean root mean square distance of all pairs of images, uint8 (N, S, S, 3), in levels of 255."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    squares = np.square(flat).mean(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T / flat.shape[1], 0))
    return float(distances[np.triu_indices(len(images), 1)].mean())


def measure_variety(
    pipeline: Pipeline, dataset: Dataset, names: Sequence[str], cond_scale: float | None
) -> dict[str, float]:
    """Compare 16 samples of each name with each other, and the real images mirrored and moved at random."""
    rng = np.random.default_rng(4)
    images = pipeline.sample(names, VARIETY_IMAGES, cond_scale).images
    distinct = np.array([len(np.unique(some.reshape(len(some), -1), axis=0)) for some in images])
    real = []
    for name in names:
        pool = [i for i, one in enumerate(dataset.emoji) if one["name"] == name and not one["held_out"]]
        chosen = dataset.pixels[rng.choice(pool, VARIETY_IMAGES)]
        padded = np.pad(chosen, ((0, 0), (8, 8), (8, 8), (0, 0)), constant_values=255)
        size = chosen.shape[1]
        moved = [
            one[y : y + size, x : x + size][:, :: rng.choice([-1, 1])]
            for one, (y, x) in zip(padded, rng.integers(17, size=(len(padded), 2)), strict=True)
        ]
        real.append(measure_pairwise(np.stack(moved)))
    return {
        "distinct_of_16": float(distinct.mean()),
        "names_with_12_distinct": float((distinct >= 12).mean()),
        "pairwise_distance": float(np.mean([measure_pairwise(some) for some in images])),
        "pairwise_distance_real": float(np.mean(real)),
    }


def evaluate_samples(
    pipeline: Pipeline, dataset: Dataset, args: argparse.Namespace, in_people_and_signs: bool
) -> dict[str, dict[str, float]]:
    """Draw samples at each condition scale, save grids and compute accuracy, score and outliers."""
    kind = "people_and_signs_" if in_people_and_signs else ""
    chosen = dataset.choose_names(in_people_and_signs, args.names)
    labels = np.repeat([dataset.index_of_name[name] for name in chosen], args.samples)
    result = {}
    for cond_scale in SCALES:
        images, scores, tokens = pipeline.sample(chosen, args.samples, cond_scale)
        flat = images.reshape(-1, *images.shape[2:])
        features = pipeline.scorer.image_features(flat)
        on_white = pipeline.draw_on_white(tokens.reshape(len(flat), -1))
        features_on_white = pipeline.scorer.image_features(on_white)
        _, distances = find_nearest(on_white, dataset.on_white[~dataset.is_held_out])
        best = np.arange(len(chosen)), scores.argmax(1)
        result[f"samples_{kind}scale_{cond_scale:g}"] = {
            "top1_1000": top1_accuracy(features, dataset.name_features, labels, CONTEST, 0),
            "top1_1000_on_white": top1_accuracy(features_on_white, dataset.name_features, labels, CONTEST, 0),
            "mean_score": float(scores.mean()),
            "outlier_rate": float((distances > OUTLIER_DISTANCE).mean()),
            "outlier_rate_best": float((distances.reshape(scores.shape)[best] > OUTLIER_DISTANCE).mean()),
        } | measure_variety(pipeline, dataset, chosen[:VARIETY_NAMES], cond_scale)
        file = f"{kind}scale-{cond_scale:g}.png"
        make_labelled_grid(images[:GRID_IMAGES, 0], chosen[:GRID_IMAGES], 16).save(args.out / file)
        furthest = np.argsort(-distances)[:GRID_IMAGES]
        names = [chosen[i // args.samples] for i in furthest]
        make_labelled_grid(flat[furthest], names, 16).save(args.out / f"furthest-{file}")
    return result


def evaluate_scenes(pipeline: Pipeline, dataset: Dataset, args: argparse.Namespace) -> dict[str, float]:
    """Draw counts and pairs of things. A sample is right if every quarter is nearest to what the prompt asks for.

    A quarter is compared, on white, with every small training emoji alone there, and with none.
    """
    rng = np.random.default_rng(5)
    pool = list_small(dataset.emoji)
    pool = pool[~dataset.is_held_out[pool]]
    chosen = rng.choice(pool, (SCENE_PROMPTS, 2), replace=False)
    names = [[dataset.emoji[i]["name"] for i in pair] for pair in chosen]
    alone = [Scene(quarter, 0, (int(i),)) for i in pool for quarter in range(4)]
    known = split_quarters(pipeline.draw_on_white(dataset.tokens.compose_scenes(alone)))
    known = known.reshape(len(pool), 4, *known.shape[1:])[:, np.arange(4), np.arange(4)]  # (M, 4, S / 2, S / 2, 3)
    known = np.concatenate([known, np.full_like(known[:1], 255)])
    labels = np.append(pool, -1)
    result: dict[str, float] = {}
    for kind, prompts, wanted in (
        *(
            (f"count_{count}", [text.format(pluralise(name)) for name, _ in names], chosen[:, :1].repeat(count, 1))
            for count, text in COUNT_PROMPTS.items()
        ),
        ("pair", [f"a {one} next to a {other}" for one, other in names], chosen),
    ):
        samples = pipeline.sample(prompts, args.samples)
        quarters = split_quarters(pipeline.draw_on_white(samples.tokens.reshape(-1, samples.tokens.shape[-1])))
        seen = np.stack([labels[find_nearest(quarters[:, i], known[:, i])[0]] for i in range(4)], axis=1)
        seen = np.sort(seen, axis=1).reshape(*samples.scores.shape, 4)
        none = np.full((len(wanted), 4 - wanted.shape[1]), -1)
        is_right = (seen == np.sort(np.concatenate([wanted, none], axis=1), axis=1)[:, None]).all(-1)
        shown = [(seen == wanted[:, i, None, None]).any(-1) for i in range(wanted.shape[1])]
        best = np.arange(len(prompts)), samples.scores.argmax(1)
        result |= {
            f"{kind}_right": float(is_right.mean()),
            f"{kind}_right_best": float(is_right[best].mean()),
            f"{kind}_shown": float(np.all(shown, axis=0).mean()),
            f"{kind}_number": float(((seen >= 0).sum(-1) == wanted.shape[1]).mean()),
            f"{kind}_distinct": float(np.mean([len(np.unique(each, axis=0)) for each in samples.tokens])),
        }
        images = choose_best(samples.images, samples.scores, 1)[:, 0]
        make_labelled_grid(images, prompts, 10).save(args.out / f"{kind}.png")
    return result


def split_quarters(images: np.ndarray) -> np.ndarray:
    """Split images, uint8 (N, S, S, 3), into their quarters, row-major: (N, 4, S / 2, S / 2, 3)."""
    half = images.shape[1] // 2
    return np.stack([images[:, y : y + half, x : x + half] for y in (0, half) for x in (0, half)], axis=1)


def evaluate_words(pipeline: Pipeline, dataset: Dataset, args: argparse.Namespace) -> dict[str, float]:
    """Draw single words. A sample is right if the nearest of all names is one that the word can mean."""
    meanings = dataset.list_word_meanings()
    chosen = list(np.random.default_rng(3).choice(sorted(meanings), min(args.names, len(meanings)), replace=False))
    images, scores, tokens = pipeline.sample(chosen, args.samples)
    flat = images.reshape(-1, *images.shape[2:])
    nearest = (pipeline.scorer.image_features(flat) @ dataset.name_features.T).argmax(1)
    make_labelled_grid(images[:GRID_IMAGES, 0], chosen[:GRID_IMAGES], 16).save(args.out / "words.png")
    on_white = pipeline.draw_on_white(tokens.reshape(len(flat), -1))
    _, distances = find_nearest(on_white, dataset.on_white[~dataset.is_held_out])
    return {
        "top1": float(np.mean([name in meanings[chosen[i // args.samples]] for i, name in enumerate(nearest)])),
        "mean_score": float(scores.mean()),
        "outlier_rate": float((distances > OUTLIER_DISTANCE).mean()),
    }


def measure_style_accuracy(pipeline: Pipeline, dataset: Dataset) -> float:
    """Compute the share of samples of "<style> <name>" whose nearest image of that concept has that style."""
    images_of_name: dict[str, dict[str, int]] = {}
    for i, one in enumerate(dataset.emoji):
        images_of_name.setdefault(one["name"], {})[one["style"]] = i
    pool = sorted(name for name, styles in images_of_name.items() if len(styles) == len(STYLES))
    chosen = np.random.default_rng(2).choice(pool, 64, replace=False)
    hits = []
    for style in STYLES:
        tokens = pipeline.sample([f"{style} {name}" for name in chosen], 1).tokens[:, 0]
        for name, image in zip(chosen, pipeline.draw_on_white(tokens), strict=True):
            distances = {
                other: np.square(dataset.pixels[i].astype(float) - image).mean()
                for other, i in images_of_name[name].items()
            }
            hits.append(min(distances, key=lambda other: distances[other]) == style)
    return float(np.mean(hits))


def save_grids(pipeline: Pipeline, folder: Path) -> None:
    """Save the grids of common concepts, variety, styles, backgrounds, colours and pairs."""
    names = [background.name if " " in background.name else f"on {background.name}" for background in BACKGROUNDS]
    backgrounds = [f"{name} {background}" for name in BACKGROUND_NAMES for background in dict.fromkeys(names)]
    styles = [f"{style}{name}" for name in STYLED_NAMES for style in ("", *(f"{style} " for style in STYLES))]
    colours = [f"{colour} {name}" for name in COLOURED_NAMES for colour in COLOUR_WORDS]
    for file, prompts, count, best, columns in (
        ("common.png", COMMON, 16, 1, 10),
        ("styles.png", styles, 8, 1, 8),
        ("variety.png", [f"a {name}" for name in STYLED_NAMES], VARIETY_IMAGES, VARIETY_IMAGES, VARIETY_IMAGES),
        ("backgrounds.png", backgrounds, 4, 1, len(set(names))),
        ("colours.png", colours, 8, 1, 6),
        ("pairs.png", PAIRS, 8, 4, 8),
    ):
        samples = pipeline.sample(prompts, count)
        images = choose_best(samples.images, samples.scores, best)
        labels = [prompt for prompt in prompts for _ in range(best)]
        make_labelled_grid(images.reshape(-1, *images.shape[2:]), labels, columns).save(folder / file)


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("build/models"), help="folder of the three models")
    parser.add_argument("--data", type=Path, default=Path("build/emoji-64.npz"), help="file of recipes.emoji.data")
    parser.add_argument("--out", type=Path, default=Path("build/evaluation"), help="folder to write")
    parser.add_argument("--names", type=int, default=128, help="names of each kind, at most (default: 128)")
    parser.add_argument("--samples", type=int, default=2, help="samples of each name (default: 2)")
    return parser.parse_args()


def main() -> None:
    """Evaluate from the command line."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(args.models)
    dataset = Dataset(pipeline, args.data)
    results: dict[str, Any] = {
        "codec": evaluate_codec(dataset),
        "clip_real": evaluate_clip(pipeline, dataset, dataset.pixels),
        "clip_reconstructed": evaluate_clip(pipeline, dataset, dataset.reconstructed),
        "clip_on_backgrounds": evaluate_clip(pipeline, dataset, dataset.on_backgrounds),
    }
    for in_people_and_signs in (False, True):
        results |= evaluate_samples(pipeline, dataset, args, in_people_and_signs)
    results["scenes"] = evaluate_scenes(pipeline, dataset, args)
    results["words"] = evaluate_words(pipeline, dataset, args)
    results["style_accuracy"] = measure_style_accuracy(pipeline, dataset)
    save_grids(pipeline, args.out)
    text = json.dumps(results, indent=2)
    (args.out / "results.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
