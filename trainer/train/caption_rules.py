"""The captions and tags of a run: the rules that its configuration asks for, and a look at what they make of the data.

Imports no torch.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from trainer.config.schema import Config
from trainer.data.captions import CaptionRules
from trainer.data.loss_weights import LossWeights, TagSeparators
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.caption_survey import CaptionSurvey, sampled_records, survey_captions
from trainer.data.survey.image_weights import holds_weights, image_weights
from trainer.data.tag_groups import TagGroup
from trainer.errors import UserError
from trainer.model.text import TOKENS_PER_CHUNK, CaptionTokenizer, load_tokenizers
from trainer.model.token_words import words_of
from trainer.model_files.run_model import RunModel

_log = logging.getLogger(__name__)
_EXAMPLES = 5
_LONGEST = 400


def caption_rules(config: Config) -> CaptionRules:
    """The rules of the configuration's `captions`."""
    fields = config.captions.model_dump(exclude={"max_empty_fraction", "max_tokens", "chunks", "tag_groups"})
    groups = (
        TagGroup(group.name, tuple(group.tags), group.keep, group.dropout, group.take)
        for group in config.captions.tag_groups
    )
    return CaptionRules(**fields, tag_groups=tuple(groups))


def tag_separators(config: Config) -> TagSeparators:
    """What stands between the tags that are weighted."""
    captions = config.captions
    others = (captions.keep_tokens_separator, captions.secondary_separator)
    return TagSeparators(captions.tag_separator, tuple(filter(None, others)))


def run_loss_weights(config: Config, prepared: PreparedSet) -> LossWeights | None:
    """How much each image of the prepared set counts in this run; see `image_weights`."""
    return image_weights(config.data.sources, config.objective.loss_weights, tag_separators(config), prepared)


def caption_tokenizer(config: Config, model: RunModel) -> CaptionTokenizer:
    """The model's tokenizers, which know the run's new tokens, set to as many chunks as `captions.max_tokens` takes."""
    return tokenizers_for(config, model.tokenizers)


def tokenizers_for(config: Config, folders: tuple[Path, Path | None]) -> CaptionTokenizer:
    """The same from the tokenizers' folders alone."""
    words = words_of(config.new_tokens.tokens)
    return load_tokenizers(folders, config.captions.max_tokens // TOKENS_PER_CHUNK, words)


def survey_of(config: Config, records: Sequence[tuple[str, str]]) -> CaptionSurvey:
    """What becomes of (key, caption record) pairs in this run; the texts of its first epochs are the examples."""
    return survey_captions(records, caption_rules(config), config.run.seed, _EXAMPLES)


def describe_captions(config: Config, model: RunModel, survey: CaptionSurvey) -> list[str]:
    """Examples with their tokens, and what is remarkable in the sample."""
    tokenizer = caption_tokenizer(config, model)
    count_tokens = tokenizer.count_tokens
    random = caption_rules(config).is_random
    lines = [f"captions as they will be trained{', in the first two epochs' if random else ''}:"]
    for example in survey.examples:
        lines.append(f"  {example.key}")
        counts = count_tokens(example.texts)
        lines += [f"    {count:>4} tokens: {_short(text)}" for text, count in zip(example.texts, counts, strict=True)]
    sampled = len(survey.texts)
    too_long = sum(count > tokenizer.max_tokens for count in count_tokens(survey.texts))
    lines.append(
        f"  of {sampled:,} sampled: {len(survey.empty_keys):,} without text, {too_long:,} longer than the "
        f"{tokenizer.max_tokens} tokens that are used"
    )
    lines += [f"  {line}" for line in missing_words(config, survey)]
    captions = config.captions
    asks_for_tags = captions.use != "caption" or caption_rules(config).cuts_tags
    if asks_for_tags and sampled and not survey.with_tags:
        lines.append("  none of them has tags, so that what `captions` asks for tags has no effect")
    if captions.several == "random" and sampled and not survey.with_several:
        lines.append("  none of them has several captions or lines, so that `captions.several` has no effect")
    asks_for_weights = config.objective.loss_weights.per_image and holds_weights(config.data.sources)
    if asks_for_weights and sampled and not survey.with_weights:
        lines.append("  none of them has a loss weight other than 1: see `weight_field` and its like in `data.sources`")
    return lines


def missing_words(config: Config, survey: CaptionSurvey) -> list[str]:
    """A line for each new token that no sampled text holds."""
    lines = []
    for token in config.new_tokens.tokens if survey.texts else ():
        words = words_of([token])
        if all(words.spelled(text) == text for text in survey.texts):
            line = f"no text of {len(survey.texts):,} sampled ones holds the new token {token.token}, which then does "
            lines.append(f"{line}not train; put it into captions, or all of them by `captions.prefix`")
    return lines


def require_captions(config: Config, survey: CaptionSurvey) -> None:
    """UserError where more of the sampled images than `captions.max_empty_fraction` have an empty text."""
    limit = config.captions.max_empty_fraction
    if survey.empty_fraction > limit:
        empty, sampled = len(survey.empty_keys), len(survey.texts)
        raise UserError(
            f"captions.max_empty_fraction = {limit:g}: {empty:,} of {sampled:,} sampled images have an empty text, "
            f"such as {', '.join(survey.empty_keys[:3])}; caption them before they are prepared, or raise the limit"
        )


def check_captions(config: Config) -> None:
    """Refuse to train where too many texts are empty, and warn of new tokens that none holds.

    Takes a fraction of a second.
    """
    survey = survey_of(config, sampled_records(PreparedSet.open(config.data.prepared)))
    require_captions(config, survey)
    for line in missing_words(config, survey):
        _log.warning("%s", line)


def _short(text: str) -> str:
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return "".join(c if c.isprintable() else " " for c in text) or "(empty)"
