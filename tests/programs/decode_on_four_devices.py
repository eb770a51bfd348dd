"""Decode tokens on four devices: FOLDER of the codec, FILE of tokens, FILE for the images."""

import sys

import jax
import numpy as np

from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint

if __name__ == "__main__":
    folder, tokens_file, images_file = sys.argv[1:]
    assert len(jax.devices()) == 4
    tokens = np.load(tokens_file)
    codec = Decoder.from_checkpoint(load_checkpoint(folder, "codec"), batch_size=6)
    assert codec.batch_size == 8  # two for each device
    with jax.transfer_guard("disallow"):
        parts = list(codec.start(tokens).on_device())
        assert {len(shard.data) for part, _ in parts for shard in part.addressable_shards} == {2}
        np.save(images_file, np.concatenate([jax.device_get(part)[:count] for part, count in parts]))
