"""The UNet of a diffusion decoder in PyTorch, to be timed beside ours; it needs torch."""

import math

import numpy as np
import torch
from torch.nn import functional

from dm_generations.models.diffusion_decoder.network import EPSILON, GROUPS, DiffusionDecoderConfig


class TorchUNet:
    """The network, channels last, on one device."""

    def __init__(self, config: DiffusionDecoderConfig, params: dict, device: str):
        self.config, self.device = config, device
        self.params = self._put(params)

    def _put(self, tree):
        if isinstance(tree, dict):
            return {name: self._put(part) for name, part in tree.items()}
        array = tree.transpose(3, 2, 0, 1) if tree.ndim == 4 else tree.T
        layout = torch.channels_last if tree.ndim == 4 else torch.contiguous_format
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, memory_format=layout)

    def _conv(self, weights, x, stride=1):
        kernel = weights["kernel"]
        return functional.conv2d(x, kernel, weights["bias"], stride=stride, padding=kernel.shape[-1] // 2)

    def _norm(self, weights, x):
        return functional.group_norm(x, GROUPS, weights["scale"], weights["bias"], EPSILON)

    def _resample(self, x, how):
        if how == "down":
            return functional.avg_pool2d(x, 2)
        return functional.interpolate(x, scale_factor=2.0, mode="nearest") if how == "up" else x

    def _block(self, weights, x, time, how=""):
        h = self._resample(functional.silu(self._norm(weights["in_layers_0"], x)), how)
        h = self._conv(weights["in_layers_2"], h)
        shift = functional.linear(time, weights["emb_layers_1"]["kernel"], weights["emb_layers_1"]["bias"])
        scale, shift = shift[..., None, None].chunk(2, dim=1)
        h = functional.silu(self._norm(weights["out_layers_0"], h) * (1 + scale) + shift)
        x = self._resample(x, how)
        x = self._conv(weights["skip_connection"], x) if "skip_connection" in weights else x
        return x + self._conv(weights["out_layers_3"], h)

    def _attention(self, weights, x):
        batch, channels, height, width = x.shape
        heads = self.config.head_count(channels)
        normed = self._norm(weights["norm"], x).flatten(2)
        qkv = functional.conv1d(normed, weights["qkv"]["kernel"], weights["qkv"]["bias"])
        if self.config.use_new_attention_order:
            parts = qkv.reshape(batch, 3, heads, -1, height * width).unbind(1)
        else:
            parts = qkv.reshape(batch, heads, 3, -1, height * width).unbind(2)
        q, k, v = (part.transpose(2, 3) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, channels, -1)
        mixed = functional.conv1d(mixed, weights["proj_out"]["kernel"], weights["proj_out"]["bias"])
        return x + mixed.reshape(x.shape)

    def _modules(self, name, h, time, how=""):
        """Run the blocks of one number: a residual one, attention, and one that resamples."""
        h = self._block(self.params[f"{name}_0"], h, time, how)
        for place in (1, 2):
            weights = self.params.get(f"{name}_{place}")
            if weights is not None:
                h = self._attention(weights, h) if "qkv" in weights else self._block(weights, h, time, "up")
        return h

    def __call__(self, x, times, vectors):
        """Return (B, 6, H, W) of arrays as ours takes them."""
        config, params = self.config, self.params
        x, times, vectors = (torch.from_numpy(array).to(self.device) for array in (x, times, vectors))
        x, vectors = (part.permute(0, 3, 1, 2) for part in (x, vectors))  # which is channels last
        half = config.num_channels // 2
        angles = times[:, None] * torch.exp(-math.log(10_000) * torch.arange(half, device=self.device) / half)
        time = torch.cat([angles.cos(), angles.sin()], dim=1)
        for name in ("time_embed_0", "time_embed_2"):
            time = functional.silu(functional.linear(time, params[name]["kernel"], params[name]["bias"]))
        h = self._conv(params["input_blocks_0_0"], x)
        kept, number = [h], 1
        for level in range(len(config.level_channels)):
            for place in range(config.num_res_blocks + (level < len(config.level_channels) - 1)):
                how = "down" if place == config.num_res_blocks else ""
                h = self._modules(f"input_blocks_{number}", h, time, how)
                kept.append(h)
                number += 1
        h = torch.cat([h, self._conv(params["external_block"]["op"], vectors, stride=2)], dim=1)
        h = self._attention(params["middle_block_cond_1"], self._block(params["middle_block_cond_0"], h, time))
        h = self._block(params["middle_block_cond_2"], h, time)
        for number in range(len(kept)):
            h = self._modules(f"output_blocks_{number}", torch.cat([h, kept.pop()], dim=1), time)
        return self._conv(params["out_2"], functional.silu(self._norm(params["out_0"], h)))
