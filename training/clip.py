"""Train CLIP: which caption belongs to which picture.

    python -m training.clip --data build/emoji-64.npz --codec build/models/vqgan --run build/clip

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
https://arxiv.org/abs/2103.00020. A batch holds one picture each of different concepts, so that no two of its captions
are both right.
Half of the pictures are shown as the codec rebuilds them, since such pictures are what it will score.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dm_generations.models.clip.network import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig, unit
from dm_generations.models.clip.preprocessing import normalise
from dm_generations.models.loading import Checkpoint, load_checkpoint
from dm_generations.models.vqgan.network import VQGAN
from dm_generations.score import Scorer
from dm_generations.text import PromptTokenizer
from dm_generations.weights import native
from training import data
from training.captions import caption
from training.common import Run, in_float32, muon
from training.vqgan import augment, reconstruct

TEXT_LENGTH = 32
MAX_SHIFT = 2  # pixels
MAX_LOGIT_SCALE = np.log(100.0)  # as the paper clips it


def config_for(image_size: int, vocab_size: int) -> CLIPConfig:
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


class Trainer:
    """Owns the compiled step. State: params and optimiser state."""

    def __init__(self, model: CLIP, pixels: np.ndarray, rebuilt: np.ndarray, rows: list[dict], tokenizer, args):
        self.model, self.rows, self.tokenizer, self.args = model, rows, tokenizer, args
        self.pictures = jnp.asarray(np.stack([pixels, rebuilt], 1))  # (N, 2, S, S, 3)
        by_concept: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            by_concept.setdefault(row["concept"], []).append(i)
        self.of_concept = list(by_concept.values())
        self.optimiser = muon(args.learning_rate, args.steps, warmup=min(100, args.steps // 10), weight_decay=0.1)

    def init(self, params: dict | None) -> dict:
        key = jax.random.key(self.args.seed)
        if params is None:
            size = self.pictures.shape[2]
            text = jnp.zeros((1, TEXT_LENGTH), jnp.int32)
            params = jax.jit(self.model.init)(key, jnp.zeros((1, size, size, 3)), text, text)["params"]
        return {"params": params, "opt": self.optimiser.init(params)}

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _step(self, state, indices, rebuilt, ids, mask, key):
        jitter_key, augment_key = jax.random.split(key)
        pictures = augment(self.pictures[indices, rebuilt], augment_key, max_shift=MAX_SHIFT, mirrored=False)
        gain_key, offset_key = jax.random.split(jitter_key)
        gain = 1 + 0.05 * jax.random.normal(gain_key, (len(indices), 1, 1, 3))
        offset = 0.02 * jax.random.normal(offset_key, (len(indices), 1, 1, 3))
        pictures = normalise(jnp.clip(pictures * gain + offset, 0, 1) * 255)

        def loss_of(params):
            variables = {"params": params}
            image = unit(self.model.apply(variables, pictures, method="get_image_features"))
            text = unit(self.model.apply(variables, ids, mask, method="get_text_features"))
            logits = jnp.exp(params["logit_scale"]) * image @ text.T  # (B, B)
            labels = jnp.arange(len(indices))
            losses = [optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in (logits, logits.T)]
            return sum(losses) / 2, (logits.argmax(1) == labels).mean()

        (loss, top1), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        updates, opt = self.optimiser.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
        return {"params": params, "opt": opt}, {"loss": loss, "top1_batch": top1}

    def step(self, state, step: int):
        rng = np.random.default_rng([self.args.seed, step])
        concepts = rng.choice(len(self.of_concept), self.args.batch_size, replace=False)
        indices = np.array([rng.choice(self.of_concept[concept]) for concept in concepts])
        texts = [caption(self.rows[i], rng) for i in indices]
        # Few captions are long: the rest would pay for padding.
        ids, mask = self.tokenizer.encode(texts, TEXT_LENGTH if step % 8 == 0 else TEXT_LENGTH // 2)
        rebuilt = rng.integers(2, size=len(indices))
        key = jax.random.fold_in(jax.random.key(self.args.seed), step)
        return self._step(state, indices, rebuilt, ids, mask, key)


def top1_of_names(image: np.ndarray, text: np.ndarray, own: np.ndarray, count: int, seed: int) -> float:
    """Share of pictures whose own name scores best among `count` names: itself and count - 1 others at random.

    image: (N, P); text: features of all names (M, P); own: index of each picture's name (N,).
    """
    rng = np.random.default_rng(seed)
    hits = 0
    for feature, name in zip(image, own, strict=True):
        others = rng.choice(len(text) - 1, count - 1, replace=False)
        others = others + (others >= name)
        hits += feature @ text[name] > (text[others] @ feature).max()
    return hits / len(image)


def evaluate(scorer: Scorer, pixels: np.ndarray, rows: list[dict], seed: int = 0) -> dict:
    """Top-1 among 1,000 names for pictures trained on, among 100 for held-out style/concept pairs."""
    names = sorted({row["name"] for row in rows})
    name_ids = {name: i for i, name in enumerate(names)}
    text = scorer.text_features(names)
    rng = np.random.default_rng(seed)
    result = {}
    for key, held_out, count in (("top1_train_1000", False, 1000), ("top1_held_out_100", True, 100)):
        chosen = [i for i, row in enumerate(rows) if row["held_out"] == held_out]
        chosen = np.sort(rng.choice(chosen, min(len(chosen), 1000), replace=False))
        image = scorer.image_features(pixels[chosen])
        own = np.array([name_ids[rows[i]["name"]] for i in chosen])
        result[key] = top1_of_names(image, text, own, min(count, len(names)), seed)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("build/emoji-64.npz"))
    parser.add_argument("--codec", type=Path, default=Path("build/models/vqgan"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/tokenizer/clip"))
    parser.add_argument("--run", type=Path, default=Path("build/clip"), help="folder of the run; resumes")
    parser.add_argument("--out", type=Path, help="write the trained model to this folder")
    parser.add_argument("--init", help="fine-tune this model (a folder) instead of starting at random")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pixels, rows = data.load(args.data, tones=False)  # captions do not tell them apart
    tokenizer = PromptTokenizer(args.tokenizer)
    codec = load_checkpoint(args.codec, "codec")
    rebuilt = reconstruct(VQGAN(codec.config), codec.params, pixels)[0]
    train = [i for i, row in enumerate(rows) if not row["held_out"]]
    config, params = config_for(pixels.shape[1], tokenizer.eos_id + 1), None
    if args.init:
        loaded = load_checkpoint(args.init, "clip")
        config, params = loaded.config, in_float32(loaded.params)
    trainer = Trainer(CLIP(config), pixels[train], rebuilt[train], [rows[i] for i in train], tokenizer, args)
    run = Run(args.run, trainer.init(params), save_every=500, args=args)

    def check(state) -> dict:
        params = jax.device_get(state["params"])
        scorer = Scorer(Checkpoint("clip", config, params, "", "", args.tokenizer), tokenizer)
        found = evaluate(scorer, pixels, rows)
        return found | {f"rebuilt_{k}": v for k, v in evaluate(scorer, rebuilt, rows).items()}

    run.loop(args.steps, trainer.step, log_every=50, evaluate=check, evaluate_every=500)
    if args.out:
        native.save(args.out, "clip", config.to_dict(), jax.device_get(run.state["params"]), np.float16)
        shutil.copyfile(args.tokenizer / "tokenizer.json", args.out / "tokenizer.json")


if __name__ == "__main__":
    main()
