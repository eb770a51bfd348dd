"""Decode tokens by a diffusion decoder on four devices: FOLDER of the codec, FILE of the decoder, FILE of tokens, FILE
for the images."""

import sys

import jax
import numpy as np

from dm_generations.inference.decoder import Decoder, RowKey
from dm_generations.inference.diffusion import Diffusion

if __name__ == "__main__":
    folder, file, tokens_file, images_file = sys.argv[1:]
    assert len(jax.devices()) == 4
    tokens = np.load(tokens_file)
    decoder = Decoder.load(folder, batch_size="auto", diffusion=Diffusion.load(file, "3"))
    assert decoder.batch_size == 4
    np.save(images_file, decoder(tokens, [RowKey(number) for number in range(len(tokens))]))
