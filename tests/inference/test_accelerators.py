"""What a CPU can tell of programs for a GPU: they lower for one, and multiply float32 as float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GRID, IMAGE_SIZE, tiny_models

from dm_generations.inference.decoder import Decoder
from dm_generations.inference.generator import Generator
from dm_generations.inference.scorer import Scorer
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.sampling import decode_loop as loop
from dm_generations.sampling.params import SamplingParams

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("models"))


def products(traced) -> list[str]:
    """The matrix products and convolutions of a program, as it is lowered for a GPU."""
    found = PRODUCT.findall(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert found
    return found


def rounded(lines: list[str]) -> list[str]:
    """Those that read float32, and round it first."""
    return [line for line in lines if "xf32>," in line.split(" : ")[-1] and line.count("HIGHEST") < 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drawing(models, dtype):
    checkpoint = load_checkpoint(models.dalle_bart, "generator")
    generator = Generator(checkpoint, PromptTokenizer(checkpoint.folder), batch_size=2, dtype=dtype)
    rows = generator._rows(
        ["a cat"] * 2, SamplingParams(256, cond_scale=3.0), np.zeros((2, 2), np.uint32), None, None, 0
    )
    inputs = generator._inputs(generator._next_batch(rows, 2))
    static, params = (generator._model, generator._sampler, None), generator._params
    state = jax.eval_shape(lambda params, inputs: loop.init_cache(*static, params, inputs), params, inputs)
    steps = jnp.int32(0), jnp.int32(GRID**2)
    for traced in (
        loop.init_cache.trace(*static, params, inputs),
        loop.decode_steps.trace(*static, params, inputs, state, *steps),
        loop.teacher_forced_margins.trace(*static, params, inputs, state),
    ):
        lines = products(traced)
        if dtype == "float32":
            assert not rounded(lines)
        else:  # what is read in every step is read in 16 bits
            assert any("xbf16>," in line for line in lines)


def test_decoding(models):
    codec = Decoder.from_checkpoint(load_checkpoint(models.vqgan, "codec"), batch_size=2)
    assert not rounded(products(codec._to_uint8.trace(codec._params, jnp.zeros((2, GRID**2), jnp.uint16))))


def test_scoring(models):
    checkpoint = load_checkpoint(models.clip, "clip")
    scorer = Scorer(checkpoint, PromptTokenizer(checkpoint.folder), batch_size=2)
    images, ids = jnp.zeros((2, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.uint8), jnp.zeros((2, 16), jnp.int32)
    assert not rounded(products(scorer._image_tower.trace(scorer._params, images)))
    assert not rounded(products(scorer._text_tower.trace(scorer._params, ids, ids)))
