"""What a training run is told, and its lineage: which weights, archives and options a model comes from."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Final

from dm_generations.archive import Selection
from dm_generations.archive.selection import ALL
from dm_generations.errors import UserError

OBJECTIVES: Final = ("next-token", "dpo")
EMA: Final = 0.9999  # as the original averages the weights of a decoder
DTYPES: Final = ("float32", "bfloat16")
# They do not change the weights, so that a run can be resumed with others.
_FREE: Final = frozenset({"run", "archives", "keep", "log_every", "tensorboard", "perceptual"})
# What is trained, by its flag ("" for a text-to-image model), and the options that only it has.
_OWN: Final = (
    (
        ("",),
        *("tokenizer", "objective", "prefer", "min_gap", "beta", "weight_by", "caption_dropout", "label_smoothing"),
        *("unconditional_smoothing", "text_weight", "lora_rank", "sample_every", "sample_prompts"),
    ),
    (("", "--decoder"), "model", "config"),
    (("--decoder",), "ema"),
    (("--train-codec",), "perceptual", "adversarial_from"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """A training run. Models are folders, files or names on the Hugging Face hub; None is the embedded one.

    Attributes:
        archives: To learn from; of a decoder or a codec also folders and lists of images, as `encode` takes them.
        run: Folder of the run.
        selection: Which images; its `n_best` counts images of a prompt.
        decoder: Whether a diffusion decoder is trained, not a text-to-image model.
        train_codec: Whether the codec is trained, not a text-to-image model.
        model: To start from; there is no embedded decoder, so None is random weights of one.
        config: JSON file with `kind` and the sizes of a model to train from random weights, in place of `model`. Of a
            decoder it says only what differs from sizes that suit the codec.
        tokenizer: File or folder of the tokenizer; None is the model's own.
        codec: What the tokens are of; None is the model's own, else the embedded one.
        perceptual: Of a codec: files with the weights of LPIPS, see `perceptual.read_perceptual`; none leaves it out.
        adversarial_from: Of a codec: the step from which a discriminator counts in the loss; None is never.
        objective: One of OBJECTIVES.
        prefer: What pairs are made of, one of `data.PREFERENCES`.
        min_gap: The smallest gap of a pair.
        beta: Of `dpo`: how much moving away from the first model costs.
        weight_by: Which value weighs images in the loss, one of `data.WEIGHTS`; None for none.
        held_out: Share of the prompts that is held out.
        caption_dropout: Share of the rows that are trained without their caption.
        label_smoothing: Share of the targets that all tokens have in equal parts.
        unconditional_smoothing: The same for rows without a caption.
        text_weight: Share of the text in the loss of models that predict it.
        steps: Updates of the weights.
        batch_size: Rows, or pairs, of a batch.
        accumulate: Batches of an update.
        optimizer: One of `optimizers.OPTIMIZERS`.
        learning_rate: The peak.
        schedule: One of `optimizers.SCHEDULES`.
        warmup: Steps of the linear warm-up.
        weight_decay: Of matrices.
        clip_norm: The largest norm of gradients, 0 for no limit.
        ema: Of a decoder: how much of the average of its weights a step keeps. The first steps keep less.
        dtype: Of activations; with `lora_rank` of the weights too.
        lora_rank: Rank of the changes of dense layers; 0 trains all weights.
        lora_alpha: The changes are multiplied with `lora_alpha / lora_rank`.
        lora_layers: Regular expressions of the layers that change.
        recompute: Whether activations within layers are computed again for the gradients, to keep less in memory.
        shard_params: Whether parameters are divided among the devices.
        seed: Of everything random.
        save_every: Steps between checkpoints.
        keep: How many checkpoints are kept.
        log_every: Steps between lines of the log.
        tensorboard: Whether the log is written as event files too.
        evaluate_every: Steps between evaluations on what is held out; 0 is at the end.
        sample_every: Steps between samples; 0 for none.
        sample_prompts: To draw; none stands for some of those that are held out.
        sample_count: Images of each.
    """

    archives: tuple[Path, ...]
    run: Path
    selection: Selection = ALL
    decoder: bool = False
    train_codec: bool = False
    model: str | None = None
    config: Path | None = None
    tokenizer: Path | None = None
    codec: str | None = None
    perceptual: tuple[Path, ...] = ()
    adversarial_from: int | None = None
    objective: str = "next-token"
    prefer: str = "score"
    min_gap: float = 0.0
    beta: float = 0.1
    weight_by: str | None = None
    held_out: float = 0.05
    caption_dropout: float = 0.1
    label_smoothing: float = 0.0
    unconditional_smoothing: float = 0.0
    text_weight: float = 1 / 8
    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 50
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = EMA
    dtype: str = "float32"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_layers: tuple[str, ...] = ()
    recompute: bool = False
    shard_params: bool = False
    seed: int = 0
    save_every: int = 200
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = False
    evaluate_every: int = 100
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_count: int = 4

    def __post_init__(self) -> None:
        for name, low, high in (
            ("held_out", 0, 1),
            ("caption_dropout", 0, 1),
            ("label_smoothing", 0, 1),
            ("unconditional_smoothing", 0, 1),
            ("text_weight", 0, 1),
            ("learning_rate", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("clip_norm", 0, math.inf),
            ("ema", 0, 1),
            ("beta", 0, math.inf),
            ("min_gap", 0, math.inf),
            ("warmup", 0, self.steps - 1),
            ("adversarial_from", 0, self.steps - 1),
            ("seed", 0, 2**31 - 1),
            ("evaluate_every", 0, math.inf),
            ("sample_every", 0, math.inf),
            ("lora_rank", 0, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and (not low <= value <= high or math.isinf(value)):
                limits = f"from {low} to {high}" if high < math.inf else f"{low} or more"
                raise UserError(f"--{name.replace('_', '-')} must be {limits}, not {value:g}")
        self._check_own()
        if self.lora_layers and not self.lora_rank:
            raise UserError("--lora-layers needs --lora-rank")
        if self.model is not None and self.config is not None:
            raise UserError("use just one of --model and --config")
        if self.config is not None and self.tokenizer is None and not self.decoder:
            raise UserError("--config needs --tokenizer, the file or folder of a tokenizer")

    def _check_own(self) -> None:
        """Raise UserError for an option of something else than is trained."""
        if self.decoder and self.train_codec:
            raise UserError("use just one of --decoder and --train-codec")
        kind = "--decoder" if self.decoder else "--train-codec" if self.train_codec else ""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for owners, *names in _OWN:
            for name in names:
                if kind not in owners and getattr(self, name) != default[name]:
                    what = f"has no effect with {kind}" if kind else f"is for {owners[0]}"
                    raise UserError(f"--{name.replace('_', '-')} {what}: leave it out")

    def settings(self) -> dict[str, Any]:
        """Return what decides the weights, as JSON data."""
        values = {name: _plain(value) for name, value in vars(self).items() if name not in _FREE}
        plain = {name: _plain(value) for name, value in vars(self.selection).items()}
        default = {name: _plain(value) for name, value in vars(ALL).items()}
        values["selection"] = {name: value for name, value in plain.items() if value != default[name]}
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return str(value) if isinstance(value, float) and math.isinf(value) else value
