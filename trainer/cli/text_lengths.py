"""How the texts of a data set are measured: in the tokens of a model, or in characters."""

from pathlib import Path

from trainer.data.survey.browse.page_facts import TextMeasure
from trainer.errors import UserError
from trainer.model_files.model_source import ModelPath, find_source
from trainer.model_files.tokenizer_files import tokenizer_folders

_USED_TOKENS = 75


def text_measure(model: ModelPath | None, tokenizer: Path | None, used: int = _USED_TOKENS) -> TextMeasure:
    """In tokens where there is a model.

    Args:
        used: tokens, beyond which texts are cut off.

    Raises:
        UserError: the model's tokenizers cannot be read.
    """
    if model is None:
        return TextMeasure(lambda texts: [*map(len, texts)], "characters (give --model to count tokens)", None)
    from trainer.model.text import load_tokenizers

    tokenizers = load_tokenizers(tokenizer_folders(find_source(model), tokenizer))
    return TextMeasure(tokenizers.count_tokens, "CLIP tokens", used)


def text_measure_or_characters(model: ModelPath, tokenizer: Path | None, used: int = _USED_TOKENS) -> TextMeasure:
    """In characters where the model is not here: a page can be looked at on any machine."""
    try:
        return text_measure(model, tokenizer, used)
    except UserError:
        return text_measure(None, None)
