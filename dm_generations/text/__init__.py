"""From prompts to token ids. Never imports JAX."""

from pathlib import Path

from dm_generations.errors import UserError
from dm_generations.text.base import Tokenizer as Tokenizer
from dm_generations.text.clip import load_clip_tokenizer
from dm_generations.text.dalle_mini import MinDalleTokenizer, TextNormalizer, load_bart_tokenizer
from dm_generations.text.dalle_pytorch import DallePytorchTokenizer
from dm_generations.text.kakao_mindalle import KakaoTokenizer
from dm_generations.text.prompt_tokenizer import PromptTokenizer as PromptTokenizer


def load_tokenizer(path: str | Path, style: str, vocab_size: int, *, lower: bool = False) -> Tokenizer:
    """Load a tokenizer and set it up as a kind of model was trained with it.

    Args:
        path: The tokenizer's folder, or one of its files.
        style: "dalle_bart" (BART's), "dalle_mini" (the same after DALL-E mini's normalizer), "min_dalle",
            "mindalle" (minDALL-E), "dalle_pytorch" or "clip".
        vocab_size: Rows of the model's text embedding.
        lower: For "dalle_pytorch": put prompts in lower case, as the DALL-3 fork does.

    Raises:
        UserError: A file is missing, broken or not of this style, or needs a library that is not installed.
        ValueError: The style is unknown.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; the prompts need the model's tokenizer")
    match style:
        case "dalle_bart":
            return load_bart_tokenizer(path, vocab_size)
        case "dalle_mini":
            folder = path if path.is_dir() else path.parent
            return load_bart_tokenizer(path, vocab_size, TextNormalizer.from_folder(folder))
        case "min_dalle":
            return MinDalleTokenizer(path, vocab_size)
        case "mindalle":
            return KakaoTokenizer(path, vocab_size)
        case "dalle_pytorch":
            return DallePytorchTokenizer(path, vocab_size, lower=lower)
        case "clip":
            return load_clip_tokenizer(path, vocab_size)
    raise ValueError(f"unknown style {style!r}")
