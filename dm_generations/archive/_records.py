"""The values that go in and out of an archive: small, frozen, holding no cursor.

Units: `top_k` 0 and `top_p` 1.0 mean no limit, `cond_scale` 1.0 no super conditioning; `key0` and `key1` are
the uint32 words of the picture's PRNG key; times are UTC Unix seconds; scores are CLIP logits. `log_prob` is the
natural logarithm of how likely the model found the codes that were drawn, `dtype` what it computed in, one of DTYPES;
the first `init_count` codes were given, not drawn, and `init_md5` is their hex MD5, "" if
there are none.
"""

from dataclasses import dataclass, field

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, order=True)
class Settings:
    """What all pictures of a group share."""

    prompt_id: int
    sc_prompt_id: int
    top_k: int
    top_p: float
    temperature: float
    cond_scale: float


@dataclass(frozen=True, slots=True)
class Group:
    settings: Settings
    count: int


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One picture as stored. `quantvec` is always bytes; the rest of a 2022 file is whatever it holds."""

    id: int
    prompt_id: int
    sc_prompt_id: int
    top_k: int
    top_p: float
    temperature: float
    cond_scale: float
    key0: int
    key1: int
    quantvec: bytes  # little-endian uint16, row-major over the token grid
    quantvec_md5: str | None
    clip_score_input: float | None
    clip_score_tokenized: float | None
    generator_id: int | None
    codec_id: int | None
    sampler_version: int | None = None
    log_prob: float | None = None
    dtype: str | None = None
    init_count: int = 0
    init_md5: str = ""


@dataclass(frozen=True, slots=True)
class NewImage:
    """One picture to store; prompts are given as text, and their ids found or made."""

    prompt: str
    sc_prompt: str | None  # None: the model's own empty unconditional prompt
    top_k: int
    top_p: float
    temperature: float
    cond_scale: float
    key0: int
    key1: int
    quantvec: bytes
    time_start: float | None
    time_end: float | None
    clip_score_input: float | None = None
    clip_score_tokenized: float | None = None
    time_scored: float | None = None
    log_prob: float | None = None
    dtype: str | None = None
    init_count: int = 0
    init_md5: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """Which weights made or judged a picture. Two are the same when kind, sha256 and config are."""

    kind: str  # "generator", "codec" or "clip"
    name: str
    sha256: str  # of the weight file, 64 lower-case hex digits
    config: dict = field(hash=False)
    grid: int | None = None  # codecs only: side of the token grid,
    codebook_size: int | None = None  # number of codes,
    image_size: int | None = None  # side of the picture in pixels
