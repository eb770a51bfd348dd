"""aMUSEd against numbers of diffusers' own pipeline, and what its reader refuses."""

import json
import shutil

import codec_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from amused_kit import CASES, complete, has_weights, rewrite_json
from safetensors.numpy import load_file, save_file

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.models.base import extra_settings_of
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.registry import parameter_shapes
from dm_generations.pipelines.convert import convert
from dm_generations.sampling import logits as sampling
from dm_generations.sampling.batching import RowInputs
from dm_generations.sampling.masked import MaskedSampler, mask_counts
from dm_generations.sampling.params import complete_extra_settings

WHOLE = [case for case in CASES if has_weights(case)]
by_name = {"ids": lambda case: case.name}
needs_weights = pytest.mark.skipif(not WHOLE, reason="only the full set of golden files has these weights")


def arrays_of(case, name="golden.npz"):
    with np.load(case / name) as arrays:
        return dict(arrays)


def settings_of(case):
    return json.loads((case / "settings.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The cases with all weights, by name."""
    return {case.name: complete(case, tmp_path_factory.mktemp("amused") / case.name) for case in CASES}


@pytest.fixture(scope="module")
def folder(folders):
    return next(iter(folders.values()))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


class Model:
    """A loaded model, with its methods compiled."""

    def __init__(self, folder):
        self.checkpoint = load_checkpoint(folder, "generator")
        self.config = self.checkpoint.config
        self.params = jax.tree.map(lambda array: np.asarray(array, np.float32), self.checkpoint.params)
        self.network = self.checkpoint.network_class(self.config)
        self.tokenizer = self.checkpoint.load_tokenizer()

    def apply(self, method, *inputs):
        return codec_kit.compiled(self.network, method)(self.params, *inputs)

    def ids(self, texts):
        return self.tokenizer.encode(texts, self.config.text_length)[0]

    def extra(self, settings) -> np.ndarray:
        """Extra settings (1, E) of what diffusers calls them."""
        temperature = settings.get("temperature", (2, 0))
        first, end = temperature if isinstance(temperature, list | tuple) else (temperature, 0.01)
        crop = settings.get("micro_conditioning_crop_coord", (0, 0))
        values = {
            "steps": settings.get("num_inference_steps", 12),
            "mask_temperature": first,
            "mask_temperature_end": end,
            "crop_top": crop[0],
            "crop_left": crop[1],
            "aesthetic_score": settings.get("micro_conditioning_aesthetic_score", 6),
        }
        return np.array([list(complete_extra_settings(extra_settings_of(self.config), values).values())], np.float32)


def encode_text(network, ids):
    return network.text_encoder(ids)


@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES, **by_name)
def test_texts_are_encoded_as_by_the_original(case, folders):
    model, arrays = Model(folders[case.name]), arrays_of(case)
    rows = json.loads((case / "text_golden.json").read_text("utf-8"))["rows"]
    ids = model.ids([row["prompt"] for row in rows])
    np.testing.assert_array_equal(ids, arrays["input_ids"])
    states, pooled = model.apply(encode_text, ids)
    codec_kit.assert_close(pooled, arrays["text_embeds"], 1e-5)
    known = arrays["text_hidden_penultimate"]
    codec_kit.assert_close(states[: len(known)], known, 1e-5)
    states, pooled = model.apply(encode_text, model.ids([None]))
    codec_kit.assert_close(pooled, arrays["empty_text_embeds"], 1e-5)
    codec_kit.assert_close(states, arrays["empty_hidden_penultimate"], 1e-5)


def logits_of(network, ids, tokens, micro_conditions):
    return jnp.moveaxis(network(ids, tokens, micro_conditions), -1, 1)


@needs_weights
@pytest.mark.e2e
@pytest.mark.parametrize("case", WHOLE, **by_name)
def test_logits_are_those_of_the_original(case, folders):
    model, arrays = Model(folders[case.name]), arrays_of(case)
    count = len(arrays["latents"])
    found = model.apply(logits_of, arrays["input_ids"][:count], arrays["latents"], arrays["micro_conds"])
    codec_kit.assert_close(found, arrays["logits"])
    wide = arrays["logits_rect_all_masked"]
    masked = np.full((1, *wide.shape[2:]), model.config.mask_token_id)
    found = model.apply(logits_of, arrays["input_ids"][:1], masked, arrays["micro_conds"][:1])
    codec_kit.assert_close(found, wide)


def row_inputs(count, length, extra):
    """Rows of a sampler that filters nothing and starts with masks alone."""
    return RowInputs(*[None] * len(RowInputs._fields))._replace(
        top_k=jnp.zeros(count, jnp.int32),
        top_p=jnp.ones(count),
        temperature=jnp.ones(count),
        init_tokens=jnp.zeros((count, length), jnp.int32),
        init_count=jnp.zeros(count, jnp.int32),
        extra=jnp.tile(extra, (count, 1)),
    )


def recorded_noise(arrays, name, step):
    """Gumbel noise of tokens (B, N, V) and of places (B, N) at a step, from the original's random numbers."""
    exponential = arrays[f"{name}__exponential"][step]
    uniforms = arrays[f"{name}__uniform"]
    uniform = uniforms[step] if step < len(uniforms) else np.ones(exponential.shape[:2])
    return -np.log(exponential), -np.log(np.clip(-np.log(np.clip(uniform, 1e-20, None)), 1e-20, None))


@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES, **by_name)
def test_the_first_step_samples_the_tokens_of_the_original(case, folders):
    """From recorded logits and random numbers: the tokens, and the choice of those that stay."""
    arrays, settings = arrays_of(case), settings_of(case)["settings"]
    model = Model(folders[case.name])
    sampler = MaskedSampler(
        model.config.codebook_size, "temperature_first", model.config.image_length, model.config.start_token, "cosine"
    )
    advance = jax.jit(sampler.advance_with_noise)
    for name in (key.removesuffix("__logits_first_step") for key in arrays if key.endswith("__logits_first_step")):
        logits = jnp.asarray(arrays[f"{name}__logits_first_step"])
        logits = jnp.moveaxis(logits.reshape(*logits.shape[:2], -1), 1, 2)  # (rows, L, V)
        scale = settings[name].get("guidance_scale", 10.0)
        uncond, cond = jnp.split(logits, 2) if scale > 1 else (logits, logits)
        guided = sampling.guide(cond, uncond, jnp.full((len(cond), 1), scale))
        rows = row_inputs(len(cond), model.config.image_length, model.extra(settings[name]))
        noise = recorded_noise(arrays, name, 0)
        found = advance(guided, 0, rows, sampler.init_rows(rows, model.config.start_token), *noise)
        expected = arrays[f"{name}__latents"][:, 0].reshape(len(cond), -1)
        np.testing.assert_array_equal(found.token, expected, err_msg=name)
        assert (np.asarray(found.token) == model.config.start_token).sum() == arrays[f"{name}__mask_len"][0].sum()


@needs_weights
@pytest.mark.e2e
@pytest.mark.parametrize("case", WHOLE, **by_name)
def test_all_steps_give_the_tokens_and_images_of_the_original(case, folders):
    """With the original's random numbers, under every recorded setting."""
    model, arrays, given = Model(folders[case.name]), arrays_of(case), settings_of(case)
    config = model.config
    decoder = Decoder.from_checkpoint(load_checkpoint(folders[case.name], "codec"), batch_size=2)
    places = config.image_length, config.start_token, config.masking_schedule
    sampler = MaskedSampler(config.codebook_size, config.sampling_order, *places)
    advance = jax.jit(sampler.advance_with_noise)
    count = 2  # for all, so that each program is compiled once
    for name, settings in given["settings"].items():
        expected = arrays[f"{name}__latents"]
        assert len(settings["prompts"]) == 1
        steps, is_one = expected.shape[1], int(len(expected) == 1)
        scale, extra = settings.get("guidance_scale", 10.0), model.extra(settings)
        texts = [given["prompts"][settings["prompts"][0]]] * count + [settings.get("negative")] * count
        text = model.apply("encode_prompt", model.ids(texts), model.ids(texts))
        cache = model.apply("init_cache", text, np.tile(extra, (2 * count, 1)))
        rows = row_inputs(count, config.image_length, extra)
        state = sampler.init_rows(rows, config.start_token)
        for step in range(steps):
            logits, cache = model.apply("decode_step", cache, jnp.tile(state.token, (2, 1)), step)
            guided = sampling.guide(logits[:count], logits[count:], jnp.full((count, 1), scale))
            noise = (np.repeat(each, 1 + is_one, axis=0) for each in recorded_noise(arrays, name, step))
            state = advance(guided, step, rows, state, *noise)
            found = np.asarray(state.token[: len(expected)]).reshape(expected[:, step].shape)
            np.testing.assert_array_equal(found, expected[:, step], err_msg=f"{name} {step}")
        difference = np.abs(
            decoder.decode(np.asarray(state.token, np.uint16)).astype(int) - arrays[f"{name}__image_uint8_nhwc"]
        )
        assert difference.max() <= 1, name
        assert (difference == 0).mean() > 0.99, name


@needs_weights
@pytest.mark.e2e
@pytest.mark.parametrize("case", WHOLE, **by_name)
def test_the_codec_decodes_and_encodes_as_the_original(case):
    arrays = arrays_of(case, "vq_golden.npz")
    codec = load_checkpoint(case, "codec")
    assert load_checkpoint(case / "vqvae", "codec").sha256 == codec.sha256
    pixels = codec_kit.applied(codec, "decode_code", arrays["codes"])
    codec_kit.assert_close(pixels, codec_kit.nhwc(arrays["decoded_nchw"]))
    codes = arrays["codes"].reshape(len(arrays["codes"]), -1).astype(np.uint16)
    found = Decoder.from_checkpoint(codec, batch_size=1).decode(codes)
    assert (found == arrays["pixels_uint8_nhwc"]).mean() > 0.99  # a rare pixel lies between two levels
    images = codec_kit.nhwc(arrays["input_nchw"])
    continuous = codec_kit.applied(codec, "encode_continuous", images)
    codec_kit.assert_close(continuous, codec_kit.nhwc(arrays["encoder_out_nchw"]))
    _, indices = codec_kit.applied(codec, "encode", images)
    is_clear = arrays["argmin_margin"].reshape(len(images), -1) > 1e-3
    expected = arrays["indices"].reshape(len(images), -1)
    np.testing.assert_array_equal(np.asarray(indices)[is_clear], expected[is_clear])


@pytest.mark.parametrize("role", ["generator", "codec"])
def test_every_parameter_has_its_name_and_shape_in_the_file(role, folder):
    """What messages say of a tensor is what the file calls it."""
    from dm_generations.models.amused import checkpoint as reader

    raw = (reader.read_generator if role == "generator" else reader.read_codec)(folder)
    shapes = parameter_shapes(raw.kind, raw.config)
    named = {raw.file_of(path): {} for path in shapes}
    for path, shape in shapes.items():
        name, in_file = raw.name_in_file(path, shape)
        named[raw.file_of(path)][name] = in_file
    for file, found in named.items():
        assert found == {name: array.shape for name, array in load_file(file).items()}, file


@pytest.mark.e2e
def test_a_codec_with_attention_in_the_middle_has_its_names(copy):
    """As other pipelines of diffusers have it: dense layers, which are convolutions of one pixel here."""
    rewrite_json(copy / "vqvae" / "config.json", mid_block_add_attention=True)
    (file,) = (copy / "vqvae").glob("*.safetensors")
    tensors = load_file(file)
    width = len(tensors["decoder.conv_in.bias"])
    for coder in ("encoder", "decoder"):
        base = f"{coder}.mid_block.attentions.0"
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            tensors |= {f"{base}.{name}.weight": np.eye(width, dtype=np.float32), f"{base}.{name}.bias": np.ones(width)}
        tensors |= {f"{base}.group_norm.{leaf}": np.ones(width, np.float32) for leaf in ("weight", "bias")}
    save_file({name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}, file)
    codec = load_checkpoint(copy / "vqvae", "codec")
    assert codec.config.has_mid_attention
    del tensors["decoder.mid_block.attentions.0.to_q.weight"]
    save_file({name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}, file)
    with pytest.raises(UserError, match=r"decoder\.mid_block\.attentions\.0\.to_q\.weight"):
        load_checkpoint(copy / "vqvae", "codec")


@pytest.mark.e2e
def test_convert_makes_one_folder_that_is_the_same_model(folder, tmp_path):
    convert(str(folder), tmp_path / "own")
    for role in ("generator", "codec"):
        first, second = load_checkpoint(folder, role), load_checkpoint(tmp_path / "own", role)
        assert (first.sha256, first.config) == (second.sha256, second.config)
    texts = ["a red cat", None]
    length = load_checkpoint(folder, "generator").config.text_length
    ids = [
        load_checkpoint(path, "generator").load_tokenizer().encode(texts, length)[0]
        for path in (folder, tmp_path / "own")
    ]
    np.testing.assert_array_equal(*ids)


def test_the_schedule_says_how_many_stay_masked():
    """Shares rounded in float32: 8 of 12 steps leave a little less than a half."""
    cosine, linear = mask_counts(256, "cosine"), mask_counts(256, "linear")
    assert cosine[12, 7] == cosine[3, 1] == 127
    assert (cosine[1, 0], linear[4, 0], linear[4, 1], linear[4, 3]) == (0, 192, 128, 0)
    assert all((np.diff(table[steps, :steps]) <= 0).all() for table in (cosine, linear) for steps in range(1, 257))


# What is refused, each by one line that names the file and what to do.

BAD = {
    "another scheduler": ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "_class_name"),
    "a field of another scheduler": ("scheduler/scheduler_config.json", {"beta_start": 0.1}, "beta_start"),
    "an unknown schedule": ("scheduler/scheduler_config.json", {"masking_schedule": "sqrt"}, "masking_schedule"),
    "no mask token": ("scheduler/scheduler_config.json", {"mask_token_id": None}, "mask_token_id"),
    "a mask token among the codes": ("scheduler/scheduler_config.json", {"mask_token_id": 1}, "mask_token_id"),
    "biases": ("transformer/config.json", {"use_bias": True}, "use_bias"),
    "another width of the text": ("transformer/config.json", {"encoder_hidden_size": 7}, "encoder_hidden_size"),
    "another model": ("transformer/config.json", {"_class_name": "UNet2DModel"}, "_class_name"),
    "levels that are no list": ("vqvae/config.json", {"block_out_channels": "64"}, "block_out_channels"),
}


@pytest.mark.parametrize(("name", "changes", "named"), BAD.values(), ids=BAD)
def test_a_config_that_does_not_fit_is_refused(name, changes, named, copy):
    rewrite_json(copy / name, **changes)
    with pytest.raises(UserError, match=named) as error:
        load_checkpoint(copy, "generator")
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    "part",
    ["transformer/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "vqvae/config.json"],
)
def test_a_part_that_is_missing_is_named(part, copy):
    (copy / part).unlink()
    with pytest.raises(UserError, match=part):
        load_checkpoint(copy, "generator")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_weights_that_are_missing_are_named(part, copy):
    for file in (copy / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=part):
        load_checkpoint(copy, "generator")


def test_the_transformer_alone_is_not_a_model(folder):
    with pytest.raises(UserError, match="transformer"):
        load_checkpoint(folder / "transformer", "generator")


def test_a_tensor_of_another_shape_is_named(copy):
    """A codec of the wrong dimension: its file, its tensor and both shapes."""
    rewrite_json(copy / "vqvae" / "config.json", vq_embed_dim=5)
    with pytest.raises(UserError, match=r"vqvae.*quantize\.embedding\.weight|vqvae.*quant_conv\.weight"):
        load_checkpoint(copy, "codec")
    rewrite_json(copy / "transformer" / "config.json", in_channels=7)
    with pytest.raises(UserError, match=r"transformer.*(embed|mlm_layer)\..*weight"):
        load_checkpoint(copy, "generator")


@pytest.mark.e2e
@pytest.mark.parametrize("pad_token", [None, 3, "no such token"])
def test_padding_that_the_tokenizer_lacks_is_refused(pad_token, copy):
    rewrite_json(copy / "tokenizer" / "tokenizer_config.json", pad_token=pad_token)
    with pytest.raises(UserError, match="pad_token"):
        load_checkpoint(copy, "generator").load_tokenizer()
