"""What a shard stores of a caption, read back."""

import json


def caption_text(record: str | bytes) -> str:
    """The caption of a stored record, as it was found."""
    return json.loads(record).get("caption") or ""
