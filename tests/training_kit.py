"""Archives and runs for tests of training, of the tiny models."""

import functools
import json
from pathlib import Path

import numpy as np
from tiny import CODEBOOK_SIZE, GRID, TinyModels

from dm_generations.archive import Archive, ModelInfo, NewImage
from dm_generations.cli import main
from dm_generations.models.loading import load_checkpoint
from dm_generations.sampling.params import SamplingParams

PROMPTS = tuple(f"prompt {number}" for number in range(8))


def write_archive(path: Path, models: TinyModels, count: int = 48, seed: int = 0, **changes) -> Path:
    """Images of random tokens in turns of PROMPTS, with random scores; `changes` are fields of `NewImage`."""
    rng = np.random.default_rng(seed)
    with Archive.create(path) as archive, archive.transaction():
        ids = [archive.model_id(info) for info in _model_infos(models)]
        images = [
            NewImage(
                **{
                    "prompt": PROMPTS[number % len(PROMPTS)],
                    "sc_prompt": None,
                    "params": SamplingParams(top_k=50 + number % 2),
                    "key0": seed,
                    "key1": number,
                    "quantvec": rng.integers(CODEBOOK_SIZE, size=GRID**2).astype("<u2").tobytes(),
                    "time_start": 1.0,
                    "time_end": 2.0,
                    "clip_score_input": float(rng.normal()),
                    **changes,
                }
            )
            for number in range(count)
        ]
        archive.add_images(images, *ids, 1)
    return path


@functools.cache
def _model_infos(models: TinyModels) -> list[ModelInfo]:
    folders = (models.dalle_bart, "generator"), (models.vqgan, "codec"), (models.clip, "clip")
    return [load_checkpoint(folder, role).model_info() for folder, role in folders]


def train_words(models: TinyModels, archive: Path, run: Path, *words: object) -> list[str]:
    """A command that trains the tiny model for 4 steps; later flags replace earlier ones."""
    words = ("--steps", 4, "--batch-size", 4, "--learning-rate", 0.01, "--save-every", 2, "--log-every", 1, *words)
    models_words = ("--model", models.dalle_bart, "--codec", models.vqgan)
    return [str(word) for word in ("train", archive, "--run", run, *models_words, *words)]


def run_train(models: TinyModels, archive: Path, run: Path, *words: object) -> int:
    """Run that command here; returns its exit status."""
    return main(train_words(models, archive, run, *words))


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
