"""Train DalleBart: a caption to the codes of its picture.

    python -m training.dalle_bart --data build/emoji-64.npz --codec build/models/vqgan --run build/dalle_bart

A small model learns its pictures by heart, and so does its unconditional half, if it may: it goes on from the first
codes as surely as the conditional half, and super conditioning, which magnifies the difference of the two, magnifies
noise. Guidance magnifies log p(code | caption) - log p(code), which is largest not for the right code but for one that
is improbable with the caption (1 in 600, say) and far more so without it (1 in 100,000). At cond_scale 10 such codes
blotched nearly every second picture. So rows without a caption (`--dropped`) are asked for all codes alike: guidance is
then, nearly, a temperature of 1 / cond_scale. A large model that has a prior worth keeping is fine-tuned with
`--unconditional-smoothing 0.005` in place of 1: its rows without a caption are then asked for their codes.

A little label smoothing keeps the logits of codes that never occur level, where there is nothing else to hold them.

Of the codes that a row reads, a share between none and all is replaced, few mostly. So it goes on well after a code
that was drawn badly; and where most are wrong, only the caption can tell what to draw. Without such rows the style
word, which decides little once the first right codes are read, is not learnt at all.

The first codes have nothing before them: only the caption tells them, so they are learnt last, and what follows goes by
them. So their loss counts more.

A codec says the same in many ways. The small one has 900 codes for cells that are white, a quarter of all, and which
of them it takes there hardly shows. With `--thrift` the more common one of nearly equal codes is learnt.
"""

import argparse
import contextlib
import dataclasses
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from tokenizers import Tokenizer

from dm_generations.models.dalle_mini.network import DalleBart, DalleBartConfig
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.network import VQGAN
from dm_generations.text import PromptTokenizer
from dm_generations.weights import native
from training import data
from training.captions import caption
from training.common import Run, dense_in_bfloat16, in_float32, multiplies_bfloat16, muon
from training.vqgan import encode, encode_frugally

CORRUPTION_POWER = 4  # the share of codes replaced is u ** 4, u uniform: a fifth on average
LABEL_SMOOTHING = 0.005
FIRST_COUNT_MORE = 4  # the first code's loss, beside that of the last: only the caption tells the first ones


def config_for(codebook_size: int, image_length: int, text_vocab_size: int) -> DalleBartConfig:
    return DalleBartConfig.from_dict(
        {
            "encoder_vocab_size": text_vocab_size,
            "image_vocab_size": codebook_size,  # and one row more, for the start token
            "image_length": image_length,
            "max_text_length": 32,
            "d_model": 192,
            "encoder_layers": 2,
            "encoder_ffn_dim": 960,
            "encoder_attention_heads": 4,
            "decoder_layers": 3,
            "decoder_ffn_dim": 384,
            "decoder_attention_heads": 4,
            "dropout": 0.0,
            "use_scan": False,
            "use_glu": True,
            "use_bias": False,
            "ln_positions": "normformer",
            "decoder_start_token_id": codebook_size,
            "bos_token_id": codebook_size + 1,
            "eos_token_id": codebook_size + 1,
            "pad_token_id": codebook_size + 1,
        }
    )


class Trainer:
    def __init__(self, model: DalleBart, tokens: np.ndarray, rows: list[dict], tokenizer: PromptTokenizer, args):
        self.model, self.config, self.args = model, model.config, args
        self.tokens, self.rows, self.tokenizer = tokens.astype(np.int32), rows, tokenizer
        length = self.config.image_length
        weights = 1 + FIRST_COUNT_MORE * 0.5 ** (np.arange(length) / length**0.5)  # halved by each row of codes
        self.weights = jnp.asarray(weights / weights.mean(), jnp.float32)
        self.optimiser = muon(
            args.learning_rate, args.steps, warmup=min(100, args.steps // 10), weight_decay=0.02, adam_share=1.0
        )

    def init(self, params: dict | None) -> dict:
        if params is None:
            text = jnp.zeros((1, self.config.max_text_length), jnp.int32)
            image = jnp.zeros((1, self.config.image_length), jnp.int32)
            params = jax.jit(self.model.init)(jax.random.key(self.args.seed), text, text, image)["params"]
        return {"params": params, "opt": self.optimiser.init(params)}

    def logits(self, params, ids, mask, tokens):
        """Teacher forced: (B, L, vocabulary) of tokens (B, L); what lies above the codebook is never next."""
        start = jnp.full((len(tokens), 1), self.config.decoder_start_token_id, jnp.int32)
        inputs = jnp.concatenate([start, tokens[:, :-1]], axis=1)
        return self.model.apply({"params": params}, ids, mask, inputs)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _step(self, state, ids, mask, inputs, targets, smoothing):
        def loss_of(params):
            with nn.intercept_methods(dense_in_bfloat16) if self.args.bfloat16 else contextlib.nullcontext():
                logits = self.logits(params, ids, mask, inputs)
            log_z = jax.nn.logsumexp(logits, axis=-1)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            loss = log_z - (1 - smoothing[:, None]) * chosen - smoothing[:, None] * logits.mean(-1)
            return (loss * self.weights).mean()

        loss, grads = jax.value_and_grad(loss_of)(state["params"])
        updates, opt = self.optimiser.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {"loss": loss}

    def shown(self, step: int) -> np.ndarray:
        """Indices (B,) of the rows of a step: all are shown once, in random order, before one is shown again."""
        epochs, places = np.divmod(step * self.args.batch_size + np.arange(self.args.batch_size), len(self.rows))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([self.args.seed, epoch, 1]).permutation(len(self.rows))
            indices[epochs == epoch] = order[places[epochs == epoch]]
        return indices

    def batch(self, step: int) -> tuple[np.ndarray, ...]:
        """Text ids and mask (B, T), codes to read and to predict (B, L), all int32; label smoothing (B,) float32."""
        rng = np.random.default_rng([self.args.seed, step])
        count = self.args.batch_size
        chosen = self.shown(step)
        dropped = rng.random(count) < self.args.dropped
        texts = ["" if drop else caption(self.rows[i], rng) for i, drop in zip(chosen, dropped, strict=True)]
        # Few captions are long: the rest would pay for padding.
        length = self.config.max_text_length
        ids, mask = self.tokenizer.encode(texts, length if step % 8 == 0 else length // 2)
        others = self.tokens[rng.integers(len(self.rows), size=count)]
        targets = self.tokens[chosen]
        # Wrong codes: half are any code, half are what another picture has at this place.
        wrong = np.where(
            rng.random(targets.shape) < 0.5,
            rng.integers(self.config.codebook_size, size=targets.shape),
            others,
        )
        is_wrong = rng.random(targets.shape) < rng.random((count, 1)) ** CORRUPTION_POWER
        inputs = np.where(is_wrong, wrong, targets).astype(np.int32)
        smoothing = np.where(dropped, self.args.unconditional_smoothing, LABEL_SMOOTHING).astype(np.float32)
        return ids, mask, inputs, targets, smoothing

    def step(self, state, step: int):
        return self._step(state, *self.batch(step))

    @partial(jax.jit, static_argnums=0)
    def _nats(self, params, ids, mask, tokens):
        log_p = jax.nn.log_softmax(self.logits(params, ids, mask, tokens))
        return -jnp.take_along_axis(log_p, tokens[..., None], axis=-1).mean()

    def nats(self, params, tokens: np.ndarray, texts: list[str]) -> float:
        """Mean negative log-likelihood of a code, in nats, with nothing corrupted."""
        return float(self._nats(params, *self.tokenizer.encode(texts, self.config.max_text_length), tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("build/emoji-64.npz"))
    parser.add_argument("--codec", type=Path, default=Path("build/models/vqgan"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/tokenizer/dalle_bart"))
    parser.add_argument("--run", type=Path, default=Path("build/dalle_bart"), help="folder of the run; resumes")
    parser.add_argument("--out", type=Path, help="write the trained model to this folder")
    parser.add_argument("--init", help="fine-tune this model (a folder) instead of starting at random")
    parser.add_argument("--steps", type=int, default=5800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--dropped", type=float, default=0.05, metavar="SHARE", help="rows without a caption, 0 to 1")
    parser.add_argument(
        "--unconditional-smoothing",
        type=float,
        default=1.0,
        metavar="SHARE",
        help=f"label smoothing of rows without a caption; 1: all codes alike (default: 1; others {LABEL_SMOOTHING})",
    )
    parser.add_argument(
        "--thrift",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the codec's error, given up for each nat that makes a code more common (default: 0, the nearest code)",
    )
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=multiplies_bfloat16(),
        help="multiply matrices of dense layers in bfloat16 (default: where the device has units for it)",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pixels, rows = data.load(args.data, tones=False)  # captions do not tell them apart
    codec = load_checkpoint(args.codec, "codec")
    if args.thrift < 0:
        raise SystemExit(f"--thrift {args.thrift:g} would make codes rare: give 0 or more")
    if args.thrift and codec.config.is_gumbel:
        raise SystemExit(f"{args.codec} chooses codes by logits, not by distance: give --thrift 0")
    if args.thrift:
        tokens = encode_frugally(VQGAN(codec.config), codec.params, pixels, args.thrift)
    else:
        tokens = encode(VQGAN(codec.config), codec.params, pixels)
    train = np.array([not row["held_out"] for row in rows])
    tokenizer = PromptTokenizer(args.tokenizer)
    vocab_size = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")).get_vocab_size()
    config, params = config_for(codec.config.codebook_size, tokens.shape[1], vocab_size), None
    if args.init:
        loaded = load_checkpoint(args.init, "generator")
        config, params = loaded.config, in_float32(loaded.params)
    train_rows = [row for row, is_train in zip(rows, train, strict=True) if is_train]
    trainer = Trainer(DalleBart(config), tokens[train], train_rows, tokenizer, args)
    run = Run(args.run, trainer.init(params), save_every=250, args=args)

    probe = np.random.default_rng(0).choice(np.flatnonzero(train), 256, replace=False)
    unseen = np.flatnonzero(~train)[:256]

    def check(state) -> dict:
        def styled(indices):
            return [f"{rows[i]['style']} {rows[i]['name']}" for i in indices]

        return {
            "nats_train": trainer.nats(state["params"], tokens[probe], styled(probe)),
            "nats_train_without_text": trainer.nats(state["params"], tokens[probe], [""] * len(probe)),
            "nats_held_out": trainer.nats(state["params"], tokens[unseen], styled(unseen)),
        }

    run.loop(args.steps, trainer.step, log_every=25, evaluate=check, evaluate_every=250)
    if args.out:
        params = jax.device_get(run.state["params"])
        native.save(args.out, "dalle_bart", dataclasses.asdict(config), params, np.float16)
        shutil.copyfile(args.tokenizer / "tokenizer.json", args.out / "tokenizer.json")


if __name__ == "__main__":
    main()
