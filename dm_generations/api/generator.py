"""`Generator` for programs and notebooks: prompts to images, with the keys and settings of `generate`."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np

from dm_generations import archive as store
from dm_generations.api.images import SCORES, ImageList, ImageRecord, ListedImages
from dm_generations.archive import ModelInfo, NewImage, quantvec_md5
from dm_generations.archive.records import TOKEN_DTYPE, ClassLabel
from dm_generations.errors import UserError, printable
from dm_generations.inference import generator as inference_generator
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.scorer import Scorer
from dm_generations.models.loading import Checkpoint, Models, load_codec, load_generator
from dm_generations.pipelines.generate import SMALLER_BATCH, GenerateOptions, Pipeline, fit_sweep
from dm_generations.pipelines.progressive import pad_tokens
from dm_generations.pipelines.sweep import DEFAULT_SEED, Sample, Sweep, combine_settings
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import memory_errors


class Generator(inference_generator.Generator):
    """A text-to-image model with its codec, on the local devices. Call it with prompts.

    >>> generator = Generator.load()
    >>> results = generator("a rocket", n=2, cond_scale=[1, 3])
    >>> results
    <4 images of 'a rocket' by embedded/dalle_bart>
    >>> print(*(image.settings.cond_scale for image in results))
    1.0 1.0 3.0 3.0
    >>> results.tokens.shape
    (4, 64)
    >>> results[0].image().size
    (64, 64)
    """

    _source: tuple[Checkpoint, str | None, str | None] | None = None  # the checkpoint; names of it and of its codec

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        dtype: str = "float32",
        codec: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        overrides: Mapping[str, Any] = MappingProxyType({}),
    ) -> "Generator":
        """Load a model from a folder, a file or the Hugging Face hub; None is the one that ships.

        Args:
            model: The text-to-image model.
            batch_size: Images at a time on each device; fewer if memory does not hold as many.
            dtype: Of activations and caches: "float32", "bfloat16" or "float16".
            codec: What decodes its tokens; None is the model's own, else the one that ships. It is loaded when the
                generator is first called.
            tokenizer: File or folder of its tokenizer; None is the model's own.
            overrides: Entries of the model's config that its files lack or have wrong.

        Raises:
            UserError: The model is missing or broken.
        """
        compile_cache.enable()
        model, codec = (None if path is None else os.fspath(path) for path in (model, codec))
        checkpoint = load_generator(model, None if tokenizer is None else Path(tokenizer), overrides)
        generator = cls(checkpoint, checkpoint.load_tokenizer(), batch_size, dtype=dtype)
        generator._source = checkpoint, model, codec
        return generator

    @functools.cached_property
    def models(self) -> Models:
        """The model and its codec. Raises UserError if the codec is missing, broken or not compatible."""
        if self._source is None:
            raise UserError("this generator has no codec; make it with Generator.load")
        codec, codec_from = load_codec(*self._source)
        return Models(self._source[0], codec, None, codec_from)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """What decodes its tokens."""
        return Decoder.from_checkpoint(self.models.codec, self.batch_size, grid=self.models.grid)

    def __repr__(self) -> str:
        return f"<Generator {self._name}: {self.token_count} tokens below {self.codebook_size:,}>"

    def __call__(
        self,
        prompts: str | int | Sequence[str | int],
        n: int = 1,
        seed: int = DEFAULT_SEED,
        *,
        sc_prompts: str | Sequence[str | None] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        cond_scale: float | Sequence[float] | None = None,
        extra_settings: Mapping[str, float | Sequence[float]] | None = None,
        same_seeds: bool = True,
        keys: Sequence[tuple[int, int]] | None = None,
        scorer: Scorer | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_unfinished: Callable[[ImageList], None] | None = None,
        every: int | None = None,
    ) -> "GeneratedImages":
        """Generate images: every prompt with every setting, as the command `generate` does with the same values.

        Args:
            prompts: One text, or several; of a model that draws classes their numbers.
            n: Images of each combination. Image i has the same key under all settings.
            seed: 0 to 2^64 - 1.
            sc_prompts: Unconditional prompts; None is the model's own empty one.
            top_k: See `SamplingParams`; one value, or several; None is the default of `generate`, as of the next three.
            top_p: See `SamplingParams`.
            temperature: See `SamplingParams`.
            cond_scale: See `SamplingParams`.
            extra_settings: Settings that only this model has, by name, with one value each, or several.
            same_seeds: False gives each combination its own keys.
            keys: (key0, key1) of the images of each combination, in place of `n` and `seed`.
            scorer: Scores the images, whose scores `save` stores too.
            on_progress: Called with (done, total) images at the start and after every batch.
            on_unfinished: Called with the images so far, in which each image's first token fills what is not sampled
                yet. In a notebook, `display("", display_id=True).update` shows them as they grow.
            every: Steps from one call of `on_unfinished` to the next; None is an eighth of an image.

        Returns:
            The images, combination by combination.

        Raises:
            UserError: A value is out of range, or memory does not hold one image.
        """
        extra = {name: _listed(values) for name, values in (extra_settings or {}).items()}
        settings = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "cond_scale": cond_scale}
        given = {name: _listed(value) for name, value in settings.items() if value is not None}
        sweep = Sweep(
            prompts=[ClassLabel("", each) if isinstance(each, int) else each for each in _listed(prompts)],
            sc_prompts=_listed(sc_prompts),
            **given,
            extra_settings=combine_settings(extra),
            unset=frozenset(settings.keys() - given.keys()),
            count=n,
            seed=seed,
            same_seeds=same_seeds,
            row_keys=keys,
        )
        return self._draw(sweep, scorer, on_progress, on_unfinished, every)

    def _draw(
        self,
        sweep: Sweep,
        scorer: Scorer | None,
        on_progress: Callable[[int, int], None],
        on_unfinished: Callable[[ImageList], None] | None,
        every: int | None,
    ) -> "GeneratedImages":
        if every is not None and every < 1:
            raise UserError(f"every (={every}) must be at least 1")
        every = None if on_unfinished is None else every or max(1, self.step_count // 8)
        sweep = fit_sweep(sweep, self.models.generator.config)
        self.check_texts([*sweep.prompts, *sweep.sc_prompts])
        options = GenerateOptions(batch_size=self.batch_size, dtype=self.dtype, progressive_every=every)
        unfinished: dict[Sample, ImageRecord] = {}

        def show(samples: Sequence[Sample], step: int, tokens: np.ndarray) -> None:
            made = [self._unfinished(*each) for each in zip(samples, pad_tokens(tokens, self.token_count), strict=True)]
            unfinished.update(zip(samples, made, strict=True))
            assert on_unfinished is not None, "there is an `every`"
            on_unfinished(ListedImages(list(unfinished.values())))

        loaded = self, None if scorer is None else self.decoder, scorer
        pipeline = Pipeline(self.models, options, loaded=loaded, on_unfinished=show)
        plan = pipeline.plan(sweep, None)
        images: list[NewImage] = []
        on_progress(0, plan.missing_count)
        for batch in pipeline.batches(plan.samples()):
            with memory_errors(SMALLER_BATCH):
                images += pipeline.sample(batch)
            on_progress(len(images), plan.missing_count)
        return GeneratedImages(self, pipeline, images)

    def _unfinished(self, sample: Sample, tokens: np.ndarray) -> ImageRecord:
        """Return an image that is being sampled, of its tokens (L,)."""
        models, quantvec = self.models, tokens.astype(TOKEN_DTYPE).tobytes()
        prompt, sc_prompt, params = sample.combination.prompt, sample.combination.sc_prompt, sample.combination.params
        return ImageRecord(
            *(None, str(prompt), sc_prompt, params, (sample.key0, sample.key1), {}, None, self.dtype),
            *(models.generator.model_info(), models.codec.model_info(models.grid), quantvec, quantvec_md5(quantvec)),
            find_decoder=lambda codec, token_count: self.decoder,
        )


class GeneratedImages(ImageList):
    """Images that a generator made. `save` stores them in an archive."""

    def __init__(self, generator: Generator, pipeline: Pipeline, images: Sequence[NewImage]):
        """Take images of a generator, and the pipeline that made them."""
        self._generator, self._pipeline, self._images = generator, pipeline, images
        models = pipeline.models
        self._model, self._codec = models.generator.model_info(), models.codec.model_info(models.grid)

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "GeneratedImages": ...
    def __getitem__(self, index: int | slice) -> "ImageRecord | GeneratedImages":
        """Return an image, or those of a slice."""
        if isinstance(index, slice):
            return GeneratedImages(self._generator, self._pipeline, self._images[index])
        image = self._images[index]
        scores = {name: score for name in SCORES if (score := getattr(image, name)) is not None}
        return ImageRecord(
            *(
                None,
                self._pipeline.texts([image.prompt])[0],
                image.sc_prompt,
                image.params,
                (image.key0, image.key1),
                scores,
            ),
            *(image.log_prob, image.dtype, self._model, self._codec, image.quantvec, quantvec_md5(image.quantvec)),
            find_decoder=self._find_decoder,
        )

    def __repr__(self) -> str:
        prompts = list(dict.fromkeys(str(image.prompt) for image in self._images))
        of = f"{printable(prompts[0], 60)!r}" if len(prompts) == 1 else f"{len(prompts):,} prompts"
        noun = "image" if len(self) == 1 else "images"
        return f"<{len(self):,} {noun} of {of} by {self._model.name}>"

    @property
    def tokens(self) -> np.ndarray:
        """The tokens of all, uint16 (n, L)."""
        return np.array([image.tokens for image in self], np.uint16).reshape(len(self), self._generator.token_count)

    def best(self, n: int) -> "GeneratedImages":
        """Return the `n` images with the highest `clip_score_input`, best first; those without a score come last."""
        scores = [image.clip_score_input for image in self._images]
        order = sorted(range(len(self)), key=lambda i: (scores[i] is None, -(scores[i] or 0.0), i))
        return GeneratedImages(self._generator, self._pipeline, [self._images[i] for i in order[:n]])

    def save(self, archive: "str | os.PathLike[str] | store.Archive") -> int:
        """Store the images, with models and scores, as `generate` does.

        Args:
            archive: A path, whose file is made if there is none, or an archive opened with mode "w".

        Returns:
            How many were new; an image that the archive has is not stored twice.

        Raises:
            UserError: The archive cannot be written.
        """
        if isinstance(archive, store.Archive):
            return self._pipeline.store(archive, self._images)
        with store.Archive.open_or_create(archive) as opened:
            return self._pipeline.store(opened, self._images)

    def _find_decoder(self, codec: ModelInfo | None, token_count: int) -> Decoder:
        return self._generator.decoder


def _listed(value: Any) -> Sequence[Any]:
    """Return one value as a list of it; a text is one value."""
    if value is None or isinstance(value, str | int | float | np.number):
        return [value]
    return list(value)
