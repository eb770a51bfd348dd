"""The codec on the device: exact, compiled once, a row in any company the same."""

import jax
import numpy as np
import pytest
from decode_kit import GOLDEN_CODEC, random_tokens

from dm_generations.decode.codec import Codec
from dm_generations.errors import UserError
from dm_generations.models import checkpoints


@pytest.fixture(scope="module")
def codec():
    return Codec.from_checkpoint(checkpoints.load(GOLDEN_CODEC, "codec"), batch_size=4)


def test_decodes_the_golden_tokens(codec):
    with np.load(GOLDEN_CODEC / "golden.npz") as arrays:
        decoded = codec.decode(arrays["tokens"])
        assert decoded.dtype == np.uint8 and decoded.shape == arrays["decoded_uint8"].shape
        assert np.abs(decoded.astype(int) - arrays["decoded_uint8"]).max() <= 1


def test_a_row_decodes_alike_in_any_company_and_compiles_once(codec):
    tokens = random_tokens(4, codec.token_count, codec.codebook_size)
    with jax.transfer_guard("disallow"):  # every copy to or from the device is one that was asked for
        together, alone = codec.decode(tokens), codec.decode(tokens[3:])
    np.testing.assert_array_equal(together[3:], alone)
    assert codec._to_uint8._cache_size() == 1


def test_pixels_are_truncated_not_rounded(codec):
    """Half of all bytes would be one higher had they been rounded."""
    with np.load(GOLDEN_CODEC / "golden.npz") as arrays:
        scaled = arrays["decoded"].clip(0, 1) * 255
        inside = (scaled % 1 > 0.6) & (scaled % 1 < 0.99)
        np.testing.assert_array_equal(codec.decode(arrays["tokens"])[inside], np.floor(scaled[inside]))


def test_a_code_outside_the_codebook_is_refused(codec):
    tokens = np.full((1, codec.token_count), codec.codebook_size, np.uint16)
    with pytest.raises(UserError, match="outside the codec's codebook"):
        codec.decode(tokens)
