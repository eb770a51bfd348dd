"""aMUSEd's tokenizer: CLIP's, with the padding that its configuration names, which the network reads like words."""

from pathlib import Path
from typing import Any

from dm_generations.errors import UserError, short_repr
from dm_generations.models.clip.tokenizer import load_clip_tokenizer
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.weights.native import read_json_object

CONFIG_FILE = "tokenizer_config.json"


def load_amused_tokenizer(path: Path, vocab_size: int | None) -> PromptTokenizer:
    """Load the tokenizer of an aMUSEd.

    Args:
        path: A folder with tokenizer_config.json and the files of a CLIP's tokenizer, or one of these.
        vocab_size: Rows of the model's text embedding. None leaves ids unchecked.

    Raises:
        UserError: A file is missing or broken.
    """
    tokenizer = load_clip_tokenizer(path, vocab_size)
    config = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if not config.is_file():
        raise UserError(f"{config} is missing, which says what fills up prompts: put the model's own there")
    token: Any = read_json_object(config).get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    pad_id = tokenizer.find_id(token) if isinstance(token, str) else None
    if pad_id is None:
        raise UserError(f"{config}: pad_token is {short_repr(token)}, which the tokenizer does not have")
    tokenizer.pad_id = pad_id
    return tokenizer
