"""Time and memory of loading a checkpoint: Flax's msgpack, PyTorch's zip, and each converted to our own folder.

    python benchmarks/load.py --gb 1

Writes random weights of the shapes of DALL-E mini and LlamaGen, with as many layers as N GB of float32 hold, to a
temporary folder (about 6 times N on the disk, and 3 times N of memory while they are written), and loads each format in
a process of its own: read, checked, hashed and placed on the device. The files have just been written or read, so they
come from the cache of the system. CPU time tells formats apart where other programs use the cores.
"""

import argparse
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))

from dm_generations.pipelines.convert import convert

REPEATS = 3
_OF_LAYER = {
    "FlaxBartAttention_0": "self_attn",
    "FlaxBartAttention_1": "encoder_attn",
    "LayerNorm_0": "pre_self_attn_layer_norm",
    "LayerNorm_1": "self_attn_layer_norm",
    "LayerNorm_2": "pre_encoder_attn_layer_norm",
    "LayerNorm_3": "encoder_attn_layer_norm",
    "GLU_0": "glu",
}
_OF_GLU = {"LayerNorm_0": "ln0", "LayerNorm_1": "ln1", "Dense_0": "fc0", "Dense_1": "fc1", "Dense_2": "fc2"}


def random_weights(gigabytes: float) -> tuple[dict, dict[str, np.ndarray]]:
    """Return config.json of a DALL-E mini with fewer or more layers, and its float32 weights by path."""
    from dm_generations.models.registry import get_kind, parameter_shapes

    def shapes_of(layers: int) -> tuple[dict, dict[str, tuple[int, ...]]]:
        values = {"model_type": "dallebart", "encoder_layers": layers, "decoder_layers": layers, "use_scan": False}
        return values, parameter_shapes("dalle_bart", get_kind("dalle_bart").config_class.from_dict(values))

    one, two = (sum(4 * int(np.prod(shape)) for shape in shapes_of(layers)[1].values()) for layers in (1, 2))
    values, shapes = shapes_of(max(1, round(1 + (gigabytes * 1e9 - one) / (two - one))))
    rng = np.random.default_rng(0)
    return values, {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_flax(folder: Path, values: dict, flat: dict[str, np.ndarray]) -> None:
    """Write `config.json` and `flax_model.msgpack`, as Flax's `to_bytes` writes arrays below 1 GiB."""
    import msgpack

    from dm_generations.weights.native import unflatten

    def packed(array: np.ndarray) -> msgpack.ExtType:
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    with open(folder / "flax_model.msgpack", "wb") as file:
        msgpack.pack(unflatten(flat), file, default=packed)


def write_torch(folder: Path, flat: dict[str, np.ndarray]) -> None:
    """Write `encoder.pt` and `decoder.pt`, with min-dalle's names and layouts of the same weights."""
    import torch_files

    folder.mkdir()
    for part in ("encoder", "decoder"):
        prefix = re.compile(rf"model/{part}/|(?=lm_head/)" if part == "decoder" else rf"model/{part}/")
        state = {}
        for name, array in flat.items():
            if match := prefix.match(name):
                array = array.T if name.endswith("kernel") else array
                state[_name_in_min_dalle(name[match.end() :])] = torch_files.tensor(array)
        torch_files.save(folder / f"{part}.pt", state)


def write_llamagen(folder: Path, gigabytes: float) -> None:
    """Write `c2i_L_256.pt` with LlamaGen's names, of its width L."""
    import torch_files

    width, hidden, tokens, classes = 1024, 2816, 16_384, 1000
    of_layer = {
        **{"attention.wqkv": (3 * width, width), "attention.wo": (width, width), "attention_norm": (width,)},
        **{"feed_forward.w1": (hidden, width), "feed_forward.w3": (hidden, width), "feed_forward.w2": (width, hidden)},
        "ffn_norm": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        **{"tok_embeddings": (tokens, width), "output": (tokens, width), "norm": (width,)},
        "cls_embedding.embedding_table": (classes + 1, width),
    }
    layers = round(gigabytes * 1e9 / sum(4 * int(np.prod(shape)) for shape in of_layer.values()))
    for layer in range(layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    rng = np.random.default_rng(0)
    state = {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    torch_files.save(
        folder / "c2i_L_256.pt", {"model": {name: torch_files.tensor(array) for name, array in state.items()}}
    )


def _name_in_min_dalle(name: str) -> str:
    *modules, leaf = name.split("/")
    if modules[0] == "layers":
        names = _OF_GLU if modules[2] == "GLU_0" and len(modules) > 3 else {}
        modules = ["layers", modules[1].rpartition("_")[2], _OF_LAYER[modules[2]], *modules[3:]]
        modules = [names.get(module, module) for module in modules]
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write(gigabytes: float, flax: Path, torch: Path) -> None:
    values, flat = random_weights(gigabytes)
    write_flax(flax, values, flat)
    write_torch(torch, flat)


def load(path: Path) -> tuple[float, float, int, int]:
    """Measure CPU and wall seconds, the bytes of the weights, and the peak of memory above what JAX took before."""
    import jax

    from dm_generations.models.loading import load_checkpoint
    from dm_generations.runtime.device import put_params

    jax.block_until_ready(jax.numpy.zeros(1))
    load_checkpoint(None, "generator")  # what is imported and traced once
    before, start, cpu_start = peak_bytes(), time.perf_counter(), time.process_time()
    params = put_params(load_checkpoint(path, "generator").params)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return cpu, wall, sum(leaf.nbytes for leaf in jax.tree.leaves(params)), peak_bytes() - before


def report(pool: ProcessPoolExecutor, what: str, path: Path) -> None:
    cpu, wall, size, peak = min(pool.submit(load, path).result() for _ in range(REPEATS))
    memory = f"peak memory {peak / 1e9:.2f} GB for {size / 1e9:.2f} GB of weights"
    print(f"{what:<26}{wall:6.2f} s ({cpu:.2f} s of CPU time), {memory}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="gigabytes of weights, 0.5 at least (default: 1)")
    args = parser.parse_args()
    # Everything in processes of its own: on Linux a new one inherits the peak of the one that started it.
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        flax, torch, llamagen = (Path(folder) / name for name in ("flax", "torch", "llamagen"))
        pool.submit(write, args.gb, flax, torch).result()
        pool.submit(write_llamagen, llamagen, args.gb).result()
        files = ("flax_model.msgpack", "encoder.pt, decoder.pt", "c2i_L_256.pt")
        for what, path in zip(files, (flax, torch, llamagen), strict=True):
            report(pool, what, path)
            pool.submit(convert, str(path), path.with_suffix(".own")).result()
            report(pool, "  as our own folder", path.with_suffix(".own"))


if __name__ == "__main__":
    main()
