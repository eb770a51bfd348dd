"""`train`: from archives and a model to a folder that --model takes, with its lineage."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from dm_generations.archive import Archive
from dm_generations.archive.records import ClassLabel
from dm_generations.atomic_io import write_atomic
from dm_generations.errors import UserError, one_line
from dm_generations.models.base import class_count_of, prefix_errors
from dm_generations.models.loading import Checkpoint, Models, load_checkpoint, load_codec, load_generator
from dm_generations.models.registry import find_kind
from dm_generations.pipelines.convert import write_checkpoint
from dm_generations.pipelines.generate import GenerateOptions, Pipeline, fit_sweep
from dm_generations.pipelines.sweep import Sweep, parse_classes
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import memory_errors
from dm_generations.training import hosts
from dm_generations.training.codec import CodecTrainer
from dm_generations.training.data import Examples
from dm_generations.training.decoder import DecoderTrainer, make_decoder
from dm_generations.training.finetune import Trainer
from dm_generations.training.options import TrainOptions
from dm_generations.training.pairs import PairsTrainer, write_pairs
from dm_generations.training.run import Run, State
from dm_generations.training.trainer import BaseTrainer
from dm_generations.weights import native

MODEL_FOLDER: Final = "model"
SAMPLES_FILE: Final = "samples.db"
PAIRS_FOLDER: Final = "pairs"
HELD_OUT_FILE: Final = "held_out.txt"
_SAMPLED_PROMPTS: Final = 8  # of those that are held out
_ADVICE: Final = "use a smaller --batch-size, --dtype bfloat16 or --lora-rank"

logger = logging.getLogger(__name__)


@memory_errors(_ADVICE)
def train(options: TrainOptions) -> Path:
    """Train a model, or go on with a run that was stopped.

    Args:
        options: The run.

    Returns:
        The folder of the model.

    Raises:
        UserError: An input is missing, broken or does not fit; the loss is no number; or a file cannot be written.
    """
    compile_cache.enable()
    if not options.decoder and not options.train_codec:
        return _train_generator(options)
    with hosts.together():
        codec = load_checkpoint(options.codec, "codec")
        if options.train_codec:
            trainer: PairsTrainer = CodecTrainer(codec, options)
        else:
            trainer = DecoderTrainer(make_decoder(options, codec), codec, options)
    return _train_on_pairs(options, trainer, codec)


def _train_generator(options: TrainOptions) -> Path:
    with contextlib.ExitStack() as stack:
        with hosts.together():
            is_new = options.config is not None
            base = _make_model(options) if is_new else load_generator(options.model, options.tokenizer)
            _check_trained(base.network_class, base.name, base.kind)
            codec, _ = load_codec(base, options.model, options.codec)
            settings = _settings(options, base, codec)
            examples = stack.enter_context(
                Examples(options.archives, options.selection, codec, base.config.image_length)
            )
            trainer = Trainer(base, examples, options)
            writer = _Writer(trainer, codec, options, _lineage(base, settings))
        run = stack.enter_context(_open_run(options, trainer, settings, writer))
        with hosts.together():
            prompts = writer.write_held_out(examples, trainer.held_out)
            chosen: Sequence[str | ClassLabel] = options.sample_prompts or prompts[:_SAMPLED_PROMPTS]
            if options.sample_prompts and class_count_of(base.config):
                chosen = parse_classes(options.sample_prompts)
            if options.sample_every and not chosen:
                raise UserError("--sample-every needs --sample-prompts where nothing is held out")
        draw = functools.partial(writer.draw, prompts=chosen)
        on_step = {options.sample_every: draw} if options.sample_every else None
        run.train(options.steps, trainer.step, options.log_every, trainer.evaluate, options.evaluate_every, on_step)
        return writer.write_model(run.state, run.step)


def _train_on_pairs(options: TrainOptions, trainer: PairsTrainer, codec: Checkpoint) -> Path:
    with hosts.together():
        base = trainer.checkpoint
        settings = _settings(options, base, codec)
        writer = _Writer(trainer, codec, options, _lineage(base, settings))
    with _open_run(options, trainer, settings, writer) as run:
        folder, size = options.run / PAIRS_FOLDER, base.config.image_size
        write = functools.partial(write_pairs, folder, options.archives, options.selection, codec, size)
        with hosts.together():
            if hosts.is_first():
                write(options.batch_size)
        with hosts.together():
            trainer.use(write(options.batch_size))
        run.train(options.steps, trainer.step, options.log_every, trainer.evaluate, options.evaluate_every)
        return writer.write_model(run.state, run.step)


def _open_run(options: TrainOptions, trainer: BaseTrainer, settings: dict[str, Any], writer: "_Writer") -> Run:
    # When to log is free to change, but not to differ.
    hosts.check_same({**settings, "log_every": options.log_every, "tensorboard": options.tensorboard})
    with hosts.together():
        state = trainer.init()
    return Run(
        options.run,
        state,
        settings,
        options.save_every,
        keep=options.keep,
        put=trainer.put,
        write_model=writer.write_checkpoint,
        event_files=options.tensorboard,
    )


class _Writer:
    """Writes what a run leaves: models with their lineage, samples, and the prompts that were held out."""

    def __init__(self, trainer: BaseTrainer, codec: Checkpoint, options: TrainOptions, lineage: dict[str, Any]):
        self._trainer, self._codec, self._options, self._lineage = trainer, codec, options, lineage

    def checkpoint(self, state: State, step: int) -> Checkpoint:
        """The model of a state on the host."""
        params = self._trainer.params_of(state)
        base = self._trainer.checkpoint
        name = f"{self._options.run.resolve().name} step {step}"
        lineage = self._lineage | {"step": step}
        return dataclasses.replace(base, params=params, name=name, sha256=native.digest(params), lineage=lineage)

    def write_checkpoint(self, folder: Path, state: State, step: int) -> None:
        """Write the model of a state, without its codec, into a folder."""
        write_checkpoint(self.checkpoint(state, step), folder)

    def write_model(self, state: State, step: int) -> Path:
        """Write the model of a state on the devices, with its codec if that is another one than the embedded one."""
        final, state = self._options.run / MODEL_FOLDER, hosts.fetch(state)
        with hosts.together():
            if hosts.is_first():
                self._write_model(final, state, step)
        return final

    def _write_model(self, final: Path, state: State, step: int) -> None:
        unfinished = final.with_name(f".{final.name}.unfinished")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            write_checkpoint(self.checkpoint(state, step), unfinished)
            if not self._codec.name.startswith("embedded/") and self._codec is not self._trainer.checkpoint:
                write_checkpoint(self._codec, unfinished / native.CODEC_FOLDER)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(unfinished, final)
        except OSError as error:
            raise UserError(f"cannot write {final}: {error.strerror or one_line(error)}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def write_held_out(self, examples: Examples, numbers: np.ndarray) -> list[str | ClassLabel]:
        """Write the prompts that are held out, for `generate --prompts-file` or `--classes`; returns them."""
        texts = [examples.texts[number] for number in np.unique(examples.rows["prompt"][numbers])]
        path = self._options.run / HELD_OUT_FILE
        if not hosts.is_first():
            return texts
        try:
            lines = [str(text.label) if isinstance(text, ClassLabel) else " ".join(text.split()) for text in texts]
            write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return texts

    def draw(self, state: State, step: int, prompts: Sequence[str | ClassLabel]) -> None:
        """Draw samples of fixed keys into the run's archive; those that it has already are left."""
        state = hosts.fetch(state)
        with hosts.together():
            if hosts.is_first():
                self._draw(state, step, prompts)

    def _draw(self, state: State, step: int, prompts: Sequence[str | ClassLabel]) -> None:
        models = Models(self.checkpoint(state, step), self._codec, None)
        path = self._options.run / SAMPLES_FILE
        pipeline = Pipeline(models, GenerateOptions(db=path, is_scored=False, batch_size=self._options.batch_size))
        sweep = fit_sweep(Sweep(prompts=tuple(prompts), count=self._options.sample_count), models.generator.config)
        with Archive.open_or_create(path) as archive:
            report = pipeline.fill(archive, pipeline.plan(sweep, archive), lambda done, total: None)
        logger.info("step %s: added %s samples to %s", f"{step:,}", f"{report.added_count:,}", path)


def _check_trained(network_class: Any, name: str, kind: str) -> None:
    """Raise UserError for a network that cannot be trained."""
    if not hasattr(network_class, "training_logits"):
        raise UserError(f"model {name!r} is a {kind}, which this program does not train")


def _make_model(options: TrainOptions) -> Checkpoint:
    """Make a model with random weights."""
    assert options.config is not None
    values = native.read_json_object(options.config)
    kind = find_kind(values.get("kind"))
    if kind is None or kind.role != "generator":
        raise UserError(f"{options.config}: kind {values.get('kind')!r:.60} is not a text-to-image model")
    _check_trained(kind.network_class, options.config.name, kind.name)
    with prefix_errors(options.config):
        config = kind.config_class.from_dict(values)
    if getattr(config, "rotary_emb", False):
        raise UserError(f"{options.config}: rotary_emb is read from checkpoints only; use false, or --model")
    network = kind.network_class(config)
    inputs = [np.zeros(each.shape, each.dtype) for each in network.example_inputs(config)]
    params = jax.device_get(jax.jit(network.init)(jax.random.key(options.seed), *inputs)["params"])
    style = values.get("text_style", kind.name)
    folder = options.config.parent
    digest = native.digest(params)
    return Checkpoint(kind.name, config, params, options.config.stem, digest, folder, options.tokenizer, style)


def _settings(options: TrainOptions, base: Checkpoint, codec: Checkpoint) -> dict[str, Any]:
    """What decides the weights; of a folder of images only its name is known."""
    archives = [
        {"name": path.name} if path.is_dir() else {"name": path.name, "sha256": _digest(path)}
        for path in options.archives
    ]
    values = options.settings() | {"base": base.sha256, "codec": codec.sha256, "archives": archives}
    if options.perceptual:
        values["perceptual"] = [{"name": path.name, "sha256": _digest(path)} for path in options.perceptual]
    return values


def _lineage(base: Checkpoint, settings: dict[str, Any]) -> dict[str, Any]:
    origin: dict[str, Any] = {"name": base.name, "sha256": base.sha256}
    if base.lineage is not None:
        origin["lineage"] = base.lineage
    return {**settings, "base": origin}


def _digest(path: Path) -> str:
    """Return the hex SHA-256 of a file. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
