"""Train CLIP: which caption belongs to which image.

    python -m recipes.emoji.clip --data build/emoji-64.npz --codec build/models/vqgan --run build/clip

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
https://arxiv.org/abs/2103.00020. A batch holds one image each of different concepts, so no image has two right
captions. Most of them are on backgrounds or small, as the codec draws them, since CLIP will score such images.

B, N: images   M: names   Q: scenes   S: pixels a side   P: features
"""

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dm_generations.inference.scorer import Scorer
from dm_generations.models.clip.network import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, unit
from dm_generations.models.clip.preprocessing import normalise
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.models.vqgan.network import VQGAN
from dm_generations.weights import native
from recipes.emoji.backgrounds import BACKGROUNDS, COLOURS, encode_emoji
from recipes.emoji.captions import caption_scene, mention_background, sample_caption
from recipes.emoji.common import make_optimizer, open_run, to_float32
from recipes.emoji.data import Emoji, load_dataset
from recipes.emoji.layouts import Scene, list_small, sample_scene
from recipes.emoji.vqgan import augment, decode_tokens

TEXT_LENGTH = 32
LONG_TEXT_EVERY = 8  # steps; few captions need more than half of TEXT_LENGTH, so the other steps are padded to half
MAX_SHIFT = 2  # pixels
BACKGROUNDS_OF_EMOJI = 6
BACKGROUND_SHARE = 0.6  # of the images that are no scenes
SCENES_OF_EMOJI = 3
SCENE_SHARE = 0.35  # of the images whose emoji has scenes
MAX_LOGIT_SCALE = np.log(100.0)  # as in the paper


def make_config(image_size: int, vocab_size: int) -> CLIPConfig:
    """Make the configuration of the small CLIP."""
    return CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=image_size // 4,
        ),
        projection_dim=128,
    )


def jitter_colours(images: jax.Array, key: jax.Array) -> jax.Array:
    """Scale and shift the colour channels of images, float32 (B, S, S, 3) in [0, 1], at random."""
    gain_key, offset_key = jax.random.split(key)
    gain = 1 + 0.05 * jax.random.normal(gain_key, (len(images), 1, 1, 3))
    offset = 0.02 * jax.random.normal(offset_key, (len(images), 1, 1, 3))
    return jnp.clip(images * gain + offset, 0, 1)


def draw_on_backgrounds(
    codec: Checkpoint, pixels: np.ndarray, emoji: list[Emoji], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw emoji, uint8 (N, S, S, 3), on a few backgrounds each, by the codec.

    Returns:
        Images, uint8 (N, K, S, S, 3); the backgrounds, indices in `BACKGROUNDS` (N, K).
    """
    backgrounds = np.random.default_rng(seed).integers(len(BACKGROUNDS), size=(len(pixels), BACKGROUNDS_OF_EMOJI))
    tokens = encode_emoji(codec.config, codec.params, pixels, emoji)
    if tokens.backgrounds is None:
        raise SystemExit("the codec draws no backgrounds; teach it with recipes.emoji.background_decoder")
    rows = np.repeat(np.arange(len(pixels)), BACKGROUNDS_OF_EMOJI)
    drawn = decode_tokens(VQGAN(codec.config), codec.params, tokens.compose(rows, backgrounds.ravel()))
    return drawn.reshape(*backgrounds.shape, *pixels.shape[1:]), backgrounds


def draw_in_scenes(
    codec: Checkpoint, pixels: np.ndarray, emoji: list[Emoji], seed: int
) -> tuple[np.ndarray, list[Scene]]:
    """Draw a few scenes of every emoji that can be small, uint8 (N, S, S, 3), by the codec.

    Returns:
        Images, uint8 (Q, S, S, 3), and their scenes; `SCENES_OF_EMOJI` of an emoji follow each other.
    """
    rng = np.random.default_rng([seed, 1])
    pool = list_small(emoji)
    scenes = [sample_scene(pool, len(COLOURS), rng, first=index) for index in np.repeat(pool, SCENES_OF_EMOJI)]
    tokens = encode_emoji(codec.config, codec.params, pixels, emoji)
    return decode_tokens(VQGAN(codec.config), codec.params, tokens.compose_scenes(scenes)), scenes


class Trainer:
    """The compiled training step. Its state has parameters and optimiser state."""

    def __init__(
        self,
        model: CLIP,
        pixels: np.ndarray,
        drawn: np.ndarray,
        backgrounds: np.ndarray,
        in_scenes: np.ndarray,
        scenes: list[Scene],
        emoji: list[Emoji],
        tokenizer: PromptTokenizer,
        args: argparse.Namespace,
    ) -> None:
        """Group the images by concept.

        Args:
            model: The CLIP.
            pixels: uint8 (N, S, S, 3).
            drawn: Each image on a few backgrounds, as the codec draws it, uint8 (N, K, S, S, 3).
            backgrounds: Which backgrounds, indices in `BACKGROUNDS` (N, K).
            in_scenes: Scenes as the codec draws them, `SCENES_OF_EMOJI` of each small emoji, uint8 (Q, S, S, 3).
            scenes: What they show.
            emoji: What is known of each image.
            tokenizer: CLIP's tokenizer.
            args: Flags of the command.
        """
        self.model, self.emoji, self.tokenizer, self.args = model, emoji, tokenizer, args
        self.images = np.concatenate([pixels[:, None], drawn], 1)  # (N, 1 + K, S, S, 3)
        self.in_scenes, self.scenes = in_scenes, scenes
        self.first_scenes = {int(index): SCENES_OF_EMOJI * i for i, index in enumerate(list_small(emoji))}
        self.backgrounds = np.pad(backgrounds, ((0, 0), (1, 0)))  # the first is on white
        by_concept: dict[str, list[int]] = {}
        for i, one in enumerate(emoji):
            by_concept.setdefault(one["concept"], []).append(i)
        self.indices_of_concepts = list(by_concept.values())
        self.optimizer = make_optimizer(
            args.learning_rate, args.steps, warmup=min(100, args.steps // 10), weight_decay=0.1
        )

    def init(self, params: dict[str, Any] | None) -> dict[str, Any]:
        """Make the state of step 0, from random parameters if `params` is None."""
        key = jax.random.key(self.args.seed)
        if params is None:
            size = self.images.shape[2]
            text = jnp.zeros((1, TEXT_LENGTH), jnp.int32)
            params = jax.jit(self.model.init)(key, jnp.zeros((1, size, size, 3)), text, text)["params"]
        return {"params": params, "opt": self.optimizer.init(params)}

    def _loss(self, params: Any, images: jax.Array, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        apply: Any = partial(self.model.apply, {"params": params})
        image = unit(apply(images, method="get_image_features"))
        text = unit(apply(ids, mask, method="get_text_features"))
        logits = jnp.exp(params["logit_scale"]) * image @ text.T  # (B, B)
        labels = jnp.arange(len(images))
        losses = [optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in (logits, logits.T)]
        return (losses[0] + losses[1]) / 2, (logits.argmax(1) == labels).mean()

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(
        self, state: dict[str, Any], images: jax.Array, ids: jax.Array, mask: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take a step on images and their captions. Returns the new state and the metrics.

        Args:
            state: The state before.
            images: uint8 (B, S, S, 3).
            ids: Tokens of the captions (B, T).
            mask: 1 for tokens and 0 for padding (B, T).
            key: JAX key.
        """
        jitter_key, augment_key = jax.random.split(key)
        images = augment(images, augment_key, max_shift=MAX_SHIFT, mirror=False)
        images = normalise(jitter_colours(images, jitter_key) * 255)
        (loss, top1), grads = jax.value_and_grad(self._loss, has_aux=True)(state["params"], images, ids, mask)
        updates, opt = self.optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
        return {"params": params, "opt": opt}, {"loss": loss, "top1_batch": top1}

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Sample an image of an emoji, uint8 (S, S, 3), and its caption."""
        scene = self.first_scenes.get(index)
        if scene is not None and rng.random() < SCENE_SHARE:
            scene += int(rng.integers(SCENES_OF_EMOJI))
            caption = caption_scene([self.emoji[i] for i in self.scenes[scene].emoji], rng)
            image, background = self.in_scenes[scene], self.scenes[scene].colour
        else:
            variant = int(rng.integers(1, self.images.shape[1])) if rng.random() < BACKGROUND_SHARE else 0
            caption = sample_caption(self.emoji[index], rng)
            image, background = self.images[index, variant], self.backgrounds[index, variant]
        return image, mention_background(caption, BACKGROUNDS[background].name, rng)[0]

    def step(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take the step of this number. Returns the new state and the metrics."""
        rng = np.random.default_rng([self.args.seed, step])
        concepts = rng.choice(len(self.indices_of_concepts), self.args.batch_size, replace=False)
        indices = [int(rng.choice(self.indices_of_concepts[concept])) for concept in concepts]
        images, captions = zip(*(self.sample(index, rng) for index in indices), strict=True)
        length = TEXT_LENGTH if step % LONG_TEXT_EVERY == 0 else TEXT_LENGTH // 2
        ids, mask = self.tokenizer.encode(captions, length)
        key = jax.random.fold_in(jax.random.key(self.args.seed), step)
        return self.update(state, np.stack(images), ids, mask, key)


def top1_accuracy(images: np.ndarray, names: np.ndarray, labels: np.ndarray, count: int, seed: int) -> float:
    """Compute the share of images whose right name scores best among itself and `count` - 1 random others.

    Args:
        images: Features of the images (N, P).
        names: Features of all names (M, P).
        labels: Index of the right name of each image (N,).
        count: Names that compete for an image, at most M.
        seed: Seed of the other names.
    """
    rng = np.random.default_rng(seed)
    hits = 0
    for image, label in zip(images, labels, strict=True):
        others = rng.choice(len(names) - 1, count - 1, replace=False)
        others = others + (others >= label)
        hits += image @ names[label] > (names[others] @ image).max()
    return hits / len(images)


def evaluate(scorer: Scorer, pixels: np.ndarray, emoji: list[Emoji], seed: int = 0) -> dict[str, float]:
    """Compute top-1 accuracy among 1,000 names for training images and among 100 names for held-out images."""
    names = sorted({one["name"] for one in emoji})
    index_of_name = {name: i for i, name in enumerate(names)}
    name_features = scorer.text_features(names)
    rng = np.random.default_rng(seed)
    result = {}
    for key, held_out, count in (("top1_train_1000", False, 1000), ("top1_held_out_100", True, 100)):
        indices = [i for i, one in enumerate(emoji) if one["held_out"] == held_out]
        chosen = np.sort(rng.choice(indices, min(len(indices), 1000), replace=False))
        labels = np.array([index_of_name[emoji[i]["name"]] for i in chosen])
        features = scorer.image_features(pixels[chosen])
        result[key] = top1_accuracy(features, name_features, labels, min(count, len(names)), seed)
    return result


def parse_args() -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("build/emoji-64.npz"), help="file of recipes.emoji.data")
    parser.add_argument("--codec", type=Path, default=Path("build/models/vqgan"), help="folder of the VQGAN")
    parser.add_argument("--tokenizer", type=Path, default=Path("build/tokenizer/clip"), help="folder of the tokenizer")
    parser.add_argument("--run", type=Path, default=Path("build/clip"), help="folder of the run; resumes")
    parser.add_argument("--out", type=Path, help="write the trained model to this folder")
    parser.add_argument("--init", help="fine-tune this model (a folder) instead of starting at random")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a step (default: 128)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak rate of Muon (default: 0.004)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    return parser.parse_args()


def main() -> None:
    """Train from the command line."""
    args = parse_args()
    pixels, emoji = load_dataset(args.data, with_tones=False)  # captions do not tell skin tones apart
    tokenizer = PromptTokenizer(args.tokenizer)
    codec = load_checkpoint(args.codec, "codec")
    drawn, backgrounds = draw_on_backgrounds(codec, pixels, emoji, args.seed)
    train = [i for i, one in enumerate(emoji) if not one["held_out"]]
    config, params = make_config(pixels.shape[1], tokenizer.eos_id + 1), None
    if args.init:
        loaded = load_checkpoint(args.init, "clip")
        config, params = loaded.config, to_float32(loaded.params)
    train_emoji = [emoji[i] for i in train]
    trainer = Trainer(
        CLIP(config),
        pixels[train],
        drawn[train],
        backgrounds[train],
        *draw_in_scenes(codec, pixels[train], train_emoji, args.seed),
        train_emoji,
        tokenizer,
        args,
    )
    run = open_run(args.run, trainer.init(params), save_every=500, args=args)

    def evaluate_state(state: dict[str, Any]) -> dict[str, float]:
        params = jax.device_get(state["params"])
        scorer = Scorer(Checkpoint("clip", config, params, "", "", args.tokenizer), tokenizer)
        on_backgrounds = evaluate(scorer, drawn[:, -1], emoji)
        return evaluate(scorer, pixels, emoji) | {f"on_backgrounds_{k}": v for k, v in on_backgrounds.items()}

    run.train(args.steps, trainer.step, log_every=50, evaluate=evaluate_state, evaluate_every=500)
    if args.out:
        native.save(args.out, "clip", config.to_dict(), jax.device_get(run.state["params"]), np.float16)
        shutil.copyfile(args.tokenizer / "tokenizer.json", args.out / "tokenizer.json")


if __name__ == "__main__":
    main()
