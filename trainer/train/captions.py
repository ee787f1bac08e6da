"""The captions of a run: the rules that its configuration asks for, and a look at what they make of the data.

Imports no torch.
"""

from trainer.config.schema import Config
from trainer.data.captions import CaptionRules


def caption_rules(config: Config) -> CaptionRules:
    """The rules of the configuration's `captions`."""
    return CaptionRules(**config.captions.model_dump(exclude={"max_empty_fraction"}))
