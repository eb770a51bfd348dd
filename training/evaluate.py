"""What the trained models can do, as numbers and as grids to look at.

    python -m training.evaluate --models build/models --data build/emoji-64.npz --out build/evaluation

Writes `results.json` and PNG grids: the 100 common concepts (best of 16 by CLIP), condition scales (apart for people
and signs, whose names differ in little) and, at each, the pictures furthest from every training picture, single words
that are no names, styles, colour words and two-object prompts. Names are trained ones, unless a line says "held out".
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dm_generations.decode.codec import Codec
from dm_generations.export.captions import without_accents
from dm_generations.generate.generator import Generator, RowSettings
from dm_generations.models import checkpoints
from dm_generations.models.vqgan import VQGAN
from dm_generations.score import Scorer
from dm_generations.text import PromptTokenizer
from dm_generations.threefry import row_key
from training import data
from training.clip import top1_of_names
from training.vqgan import psnr, reconstruct

COMMON = (
    "rocket castle avocado strawberry dinosaur cat dog horse cow pig mouse rabbit bear panda koala tiger lion monkey "
    "elephant giraffe zebra penguin owl eagle duck chicken frog turtle snake whale dolphin fish octopus shark crab "
    "butterfly bee spider snail tree cactus rose sunflower tulip mushroom apple banana lemon grapes watermelon "
    "pineapple cherries peach pear tomato eggplant carrot corn broccoli bread cheese pizza hamburger taco donut cookie "
    "car bus taxi bicycle motorcycle train airplane helicopter sailboat house tent mountain volcano sun moon star "
    "rainbow umbrella snowman fire guitar trumpet crown key book heart ghost robot alien skull balloon"
).split() + ["palm tree", "hot dog", "ice cream"]
PEOPLE_AND_SIGNS = {"People & Body", "Symbols", "Flags"}  # groups of names
STYLED = "rocket,castle,avocado,strawberry,cat face,octopus,house,pizza,guitar,rose,crab,automobile".split(",")
COLOURS = "red,blue,green,purple,yellow,black".split(",")
COLOURED = "car,heart,book,apple,castle,cat".split(",")
# Levels of 255, root mean square, to the nearest training picture. By eye: blotches from 30, hard to tell from 40 on.
# A clean picture between two styles can be as far, so the share is an upper bound of what a person would call garbage.
FAR = 40
WORD_MEANINGS = 5  # "corn" is said of two concepts, "food" of a hundred: of a word said of more, anything may be drawn
PAIRS = (
    "a cat next to a rocket",
    "an avocado armchair",
    "a castle under a rainbow",
    "a dog and a pizza",
    "a robot holding a rose",
    "a penguin on a mountain",
)


class Pipeline:
    """Prompts to pictures and scores, through the package's own code."""

    def __init__(self, folder: Path, batch_size: int = 32):
        roles = {"dalle_bart": "generator", "vqgan": "codec", "clip": "clip"}
        models = {kind: checkpoints.load(folder / kind, role) for kind, role in roles.items()}
        self.codec_checkpoint = models["vqgan"]
        text, clip = (PromptTokenizer(folder / kind) for kind in ("dalle_bart", "clip"))
        self.generator = Generator(models["dalle_bart"], text, batch_size)
        self.codec = Codec.from_checkpoint(models["vqgan"], batch_size)
        self.scorer = Scorer(models["clip"], clip, batch_size)
        self.batch_size = batch_size

    def draw(self, prompts: list[str], count: int, cond_scale: float, temperature=1.0, top_k=256, seed=0):
        """Pictures uint8 (len(prompts), count, S, S, 3) and their scores (len(prompts), count)."""
        rows = [(prompt, i) for prompt in prompts for i in range(count)]
        settings = RowSettings(top_k, 1.0, temperature, cond_scale)
        keys = np.array([row_key(seed, i) for _, i in rows], np.uint32)
        texts = [prompt for prompt, _ in rows]
        tokens = self.generator.generate(texts, settings, keys)
        pictures = self.decode(tokens)
        scores = self.scorer.score(pictures, texts)[0]
        return pictures.reshape(len(prompts), count, *pictures.shape[1:]), scores.reshape(len(prompts), count)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        size = self.batch_size
        return np.concatenate([self.codec.decode(tokens[i : i + size]) for i in range(0, len(tokens), size)])


def best_first(pictures: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` best of each row: (N, count, S, S, 3)."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(pictures, order[..., None, None, None], axis=1)


def labelled_grid(pictures: list[np.ndarray], labels: list[str], columns: int) -> Image.Image:
    """Pictures uint8 (S, S, 3) with a line of text under each."""
    size, line = pictures[0].shape[0], 12
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (size + 4), rows * (size + line + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = i % columns * (size + 4), i // columns * (size + line + 4)
        sheet.paste(Image.fromarray(picture), (x, y))
        label = without_accents(label)
        while pen.textlength(label) > size + 2:
            label = label[:-1]
        pen.text((x + 1, y + size), label, fill="black")
    return sheet


def words_of(name: str) -> list[str]:
    """The words of a name that a person might ask for alone."""
    words = [word.strip(",:") for word in name.split()]
    return [word for word in words if len(word) > 2 and word not in ("and", "the", "with")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("build/models"))
    parser.add_argument("--data", type=Path, default=Path("build/emoji-64.npz"))
    parser.add_argument("--out", type=Path, default=Path("build/evaluation"))
    parser.add_argument("--names", type=int, default=128, help="training names drawn at each condition scale, at most")
    parser.add_argument(
        "--draws", type=int, default=2, help="pictures of each name, the best of them by CLIP told apart"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pixels, rows = data.load(args.data, tones=False)
    pipeline = Pipeline(args.models)
    results = {}

    held_out = np.array([row["held_out"] for row in rows])
    codec = pipeline.codec_checkpoint
    rebuilt = reconstruct(VQGAN(codec.config), codec.params, pixels)[0]
    results["codec"] = {
        "held_out_pictures": int(held_out.sum()),
        "psnr_held_out": psnr(rebuilt[held_out], pixels[held_out]).mean(),
        "psnr_train": psnr(rebuilt[~held_out], pixels[~held_out]).mean(),
    }

    names = sorted({row["name"] for row in rows})
    name_ids = {name: i for i, name in enumerate(names)}
    text = pipeline.scorer.text_features(names)
    own = np.array([name_ids[row["name"]] for row in rows])
    for what, pictures in (("real", pixels), ("rebuilt", rebuilt)):
        image = pipeline.scorer.image_features(pictures)
        results[f"clip_{what}"] = {
            "top1_train_1000": top1_of_names(image[~held_out], text, own[~held_out], 1000, 0),
            "top1_held_out_100": top1_of_names(image[held_out], text, own[held_out], 100, 0),
        }

    for of_kind, kind in ((False, ""), (True, "people_and_signs_")):
        pool = {row["name"] for row in rows if (row["group"] in PEOPLE_AND_SIGNS) == of_kind and not row["held_out"]}
        chosen = list(np.random.default_rng(1).choice(sorted(pool), min(args.names, len(pool)), replace=False))
        for cond_scale in (1.0, 3.0, 10.0):
            pictures, scores = pipeline.draw(chosen, args.draws, cond_scale)
            flat = pictures.reshape(-1, *pictures.shape[2:])
            image = pipeline.scorer.image_features(flat)
            asked = np.repeat([name_ids[name] for name in chosen], args.draws)
            distances = distance_to_nearest(flat, rebuilt[~held_out])
            best = np.arange(len(chosen)), scores.argmax(1)
            results[f"drawn_{kind}scale_{cond_scale:g}"] = {
                "top1_1000": top1_of_names(image, text, asked, 1000, 0),
                "mean_score": float(scores.mean()),
                "far_share": float((distances > FAR).mean()),
                "far_share_of_best": float((distances.reshape(scores.shape)[best] > FAR).mean()),
            }
            of_scale = f"{kind}scale-{cond_scale:g}.png"
            labelled_grid(list(pictures[:64, 0]), chosen[:64], 16).save(args.out / of_scale)
            furthest = np.argsort(-distances)[:64]
            labels = [chosen[i // args.draws] for i in furthest]
            labelled_grid([flat[i] for i in furthest], labels, 16).save(args.out / f"furthest-{of_scale}")

    # A word is drawn right if the nearest of all names is one that has it or whose keywords have it.
    meant: dict[str, set[int]] = {}
    for row in rows:
        for word in {*row["keywords"], *words_of(row["name"])}:
            meant.setdefault(word, set()).add(name_ids[row["name"]])
    pool = [word for word, of in meant.items() if word not in name_ids and " " not in word and len(of) <= WORD_MEANINGS]
    chosen = list(np.random.default_rng(3).choice(sorted(pool), min(args.names, len(pool)), replace=False))
    pictures, scores = pipeline.draw(chosen, args.draws, 3.0)
    flat = pictures.reshape(-1, *pictures.shape[2:])
    nearest = (pipeline.scorer.image_features(flat) @ text.T).argmax(1)
    results["words"] = {
        "top1": float(np.mean([nearest[i] in meant[chosen[i // args.draws]] for i in range(len(nearest))])),
        "mean_score": float(scores.mean()),
        "far_share": float((distance_to_nearest(flat, rebuilt[~held_out]) > FAR).mean()),
    }
    labelled_grid(list(pictures[:64, 0]), chosen[:64], 16).save(args.out / "words.png")

    pictures, scores = pipeline.draw(list(COMMON), 16, 3.0)
    labelled_grid(list(best_first(pictures, scores, 1)[:, 0]), list(COMMON), 10).save(args.out / "common.png")

    prompts = [f"{style}{name}" for name in STYLED for style in ("", "3d ", "flat ", "noto ")]
    pictures, scores = pipeline.draw(prompts, 8, 3.0)
    labelled_grid(list(best_first(pictures, scores, 1)[:, 0]), prompts, 8).save(args.out / "styles.png")
    results["style_obeyed"] = style_obeyed(pipeline, pixels, rows)

    prompts = [f"{colour} {name}" for name in COLOURED for colour in COLOURS]
    pictures, scores = pipeline.draw(prompts, 8, 3.0)
    labelled_grid(list(best_first(pictures, scores, 1)[:, 0]), prompts, 6).save(args.out / "colours.png")
    pictures, scores = pipeline.draw(list(PAIRS), 8, 3.0)
    four = best_first(pictures, scores, 4).reshape(-1, *pictures.shape[2:])
    labelled_grid(list(four), [p for p in PAIRS for _ in range(4)], 8).save(args.out / "pairs.png")

    text = json.dumps(results, indent=2)
    (args.out / "results.json").write_text(text + "\n")
    print(text)


def distance_to_nearest(pictures: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Root mean square difference (N,) of each of `pictures` (N, S, S, 3) to the nearest of `known`, uint8 levels."""
    known = known.reshape(len(known), -1).astype(np.float32)
    squares = np.square(known).sum(1)
    nearest = []
    for part in np.array_split(pictures.reshape(len(pictures), -1).astype(np.float32), -(-len(pictures) // 64)):
        nearest.append((squares[:, None] - 2 * known @ part.T).min(0) + np.square(part).sum(1))
    return np.sqrt(np.maximum(np.concatenate(nearest), 0) / known.shape[1])


def style_obeyed(pipeline: Pipeline, pixels: np.ndarray, rows: list[dict]) -> float:
    """Of pictures drawn for "<style> <name>", the share whose nearest picture of that concept has that style."""
    by_concept: dict[str, dict[str, int]] = {}
    for i, row in enumerate(rows):
        by_concept.setdefault(row["name"], {})[row["style"]] = i
    full = sorted(name for name, styles in by_concept.items() if len(styles) == 3)
    chosen = np.random.default_rng(2).choice(full, 64, replace=False)
    hits = []
    for style in data.STYLES:
        pictures = pipeline.draw([f"{style} {name}" for name in chosen], 1, 3.0)[0][:, 0]
        for name, picture in zip(chosen, pictures, strict=True):
            distances = {
                other: np.square(pixels[i].astype(float) - picture).mean() for other, i in by_concept[name].items()
            }
            hits.append(min(distances, key=distances.get) == style)
    return float(np.mean(hits))


if __name__ == "__main__":
    main()
