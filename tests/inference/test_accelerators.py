"""What a CPU can check of programs for a GPU: they lower for one, and their products keep all bits of float32."""

import jax
import jax.extend.core
import numpy as np
import pytest
from helpers import first_of
from tiny import GRID, IMAGE_SIZE, tiny_models

from dm_generations.inference.decoder import Decoder
from dm_generations.inference.generator import Generator
from dm_generations.inference.scorer import Scorer
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.sampling import decode_loop
from dm_generations.sampling.params import SamplingParams

PRODUCTS = {"dot_general", "conv_general_dilated"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("models"))


class Recorder:
    """Records the programs that are run, each once: by name, as JAX traces it."""

    def __init__(self):
        self.jaxprs = {}

    def wrap(self, function):
        """A compiled function that is recorded when it is called."""

        def run(*arguments):
            name = function.__name__
            is_inner = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
            if name not in self.jaxprs and not is_inner:
                traced = function.trace(*arguments)
                traced.lower(lowering_platforms=("cuda",))
                self.jaxprs[name] = traced.jaxpr.jaxpr
            return function(*arguments)

        run.lower, run.trace = function.lower, function.trace
        return run

    def products(self, name: str) -> list[tuple[np.dtype, object]]:
        """The type of the factors, and the precision, of each matrix product and convolution of a program."""
        found = [
            (equation.invars[0].aval.dtype, equation.params["precision"])
            for equation in equations(self.jaxprs[name])
            if equation.primitive.name in PRODUCTS
        ]
        assert found
        return found


@pytest.fixture
def recorder(monkeypatch):
    """Records what is compiled from now on with `jax.jit`, and the programs of `decode_loop`."""
    recorder, jit = Recorder(), jax.jit
    monkeypatch.setattr(jax, "jit", lambda function, **options: recorder.wrap(jit(function, **options)))
    for name in ("init_cache", "decode_steps", "teacher_forced_margins"):
        monkeypatch.setattr(decode_loop, name, recorder.wrap(getattr(decode_loop, name)))
    return recorder


def equations(jaxpr):
    """All equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inner, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                    yield from equations(getattr(inner, "jaxpr", inner))


def is_rounded(dtype, precision) -> bool:
    """Whether a GPU rounds the factors of a product, of float32, first."""
    return dtype == np.float32 and precision != (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


@pytest.mark.e2e
@pytest.mark.parametrize("dtype", first_of(["bfloat16", "float32"]))
def test_sampling(models, recorder, dtype):
    checkpoint = load_checkpoint(models.dalle_bart, "generator")
    generator = Generator(checkpoint, PromptTokenizer(checkpoint.folder), batch_size=2, dtype=dtype)
    arguments = ["a cat"], SamplingParams(256, cond_scale=3.0), np.zeros((1, 2), np.uint32)
    tokens = generator.generate(*arguments)
    generator.teacher_forced_margins(*arguments, tokens)
    for name in ("init_cache", "decode_steps", "teacher_forced_margins"):
        products = recorder.products(name)
        if dtype == "float32":
            assert not any(is_rounded(*product) for product in products)
        else:  # what is read in every step is read in 16 bits
            assert any(factors.name == "bfloat16" for factors, _ in products)


def test_decoding(models, recorder):
    codec = Decoder.from_checkpoint(load_checkpoint(models.vqgan, "codec"), batch_size=2)
    codec.decode(np.zeros((1, GRID**2), np.uint16))
    (name,) = recorder.jaxprs
    assert not any(is_rounded(*product) for product in recorder.products(name))


def test_scoring(models, recorder):
    checkpoint = load_checkpoint(models.clip, "clip")
    scorer = Scorer(checkpoint, PromptTokenizer(checkpoint.folder), batch_size=2)
    scorer.score(np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), ["a cat"])
    assert len(recorder.jaxprs) == 2
    for name in recorder.jaxprs:
        assert not any(is_rounded(*product) for product in recorder.products(name))
