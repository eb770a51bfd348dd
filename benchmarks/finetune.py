"""Run the loop of docs/how-to/fine-tune.md on the model that ships, and print what it brings on prompts held out.

    python benchmarks/finetune.py --out finetune      # needs '.[train]'; ten minutes on 2 cores

It draws 16 images of each of 200 names of emoji, trains on the 4 best of each name (or by DPO on the best and the
worst), and draws the names that were held out with the model before and after. It prints the mean CLIP score, and the
share of images whose own name is the nearest of all names by CLIP, with 95% intervals over names. A stopped run goes on
with the same command.
"""

import argparse
import collections
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dm_generations import Archive, Scorer
from dm_generations.archive import ModelInfo
from dm_generations.archive.vectors import find_vector_model, read_vectors
from dm_generations.pipelines.compare import INTERVAL

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, IMAGES = 200, 16
RESAMPLES = 2000


def read_names() -> list[str]:
    """Read the names of all emoji that the model learnt."""
    lines = (ROOT / "docs" / "names.txt").read_text(encoding="utf-8").splitlines()
    return sorted({line.split(":")[0] for line in lines if line and not line.startswith("#")})


def run(*words: str | Path | float) -> None:
    subprocess.run([sys.executable, "-m", "dm_generations", *map(str, words)], check=True, stdout=sys.stderr)


def judge(path: Path, names: list[str], texts: np.ndarray, clip: ModelInfo) -> np.ndarray:
    """Return of each prompt the mean score, and the share of images that CLIP knows by name; float64 (prompts, 2)."""
    by_prompt = collections.defaultdict(list)
    with Archive.open(path) as archive:
        ids, vectors = read_vectors(archive, find_vector_model(archive, clip))
        nearest = np.argmax(vectors.astype(np.float32) @ texts.T, axis=1)
        known = dict(zip(ids.tolist(), (names[index] for index in nearest), strict=True))
        for image in archive.images():
            by_prompt[image.prompt].append((image.scores["clip_score_input"], known[image.id] == image.prompt))
    return np.array([np.mean(by_prompt[prompt], axis=0) for prompt in sorted(by_prompt)])


def describe(values: np.ndarray) -> str:
    """Write the mean of values of prompts with its 95% interval."""
    resampled = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(resampled, INTERVAL)
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    """Run the loop, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("finetune"), help="folder (default: finetune)")
    parser.add_argument("--drawn-at", type=float, default=1.0, help="condition scale of what is learnt (default: 1)")
    parser.add_argument("--objective", choices=["next-token", "dpo"], default="next-token", help="as of `train`")
    parser.add_argument("--steps", type=int, default=200, help="of training (default: 200)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="its peak (default: 2e-5)")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    names = read_names()
    prompts, drawn, trained = args.out / "prompts.txt", args.out / "drawn.db", args.out / "run"
    prompts.write_text("\n".join(random.Random(0).sample(names, PROMPTS)) + "\n", encoding="utf-8")
    run("generate", "--db", drawn, "--prompts-file", prompts, "--n", IMAGES, "--cond-scale", args.drawn_at)
    chosen = ("--n-best", 4) if args.objective == "next-token" else ("--objective", "dpo", "--min-gap", 2)
    training = ("--steps", args.steps, "--learning-rate", args.learning_rate, "--unconditional-smoothing", 1)
    run("train", drawn, "--run", trained, *chosen, "--held-out", 0.25, *training)
    scorer = Scorer.load()
    assert scorer.info is not None
    texts = scorer.text_features(names)
    for scale in (1, 3):
        values = []
        for name, model in (("before", ()), ("after", ("--model", trained / "model"))):
            path = args.out / f"{name}-{scale}.db"
            run("generate", "--db", path, "--prompts-file", trained / "held_out.txt", "--n", IMAGES,
                "--seed", 1, "--cond-scale", scale, "--no-score", *model)  # fmt: skip
            run("score", "--db", path, "--vectors")
            values.append(judge(path, names, texts, scorer.info))
        before, after = values
        for column, what in enumerate(("CLIP score", "known by name")):
            change = describe(after[:, column] - before[:, column])
            means = f"before {before[:, column].mean():.3f}, after {after[:, column].mean():.3f}"
            print(f"scale {scale}, {what}: {means}, change {change}")


if __name__ == "__main__":
    main()
