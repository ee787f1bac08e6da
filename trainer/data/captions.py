"""From the caption record that a shard stores to the text that the tokenizers see."""

import json


def caption_record(caption: str) -> bytes:
    """What a shard stores for an image: a UTF-8 JSON object, so that fields can be added beside the caption."""
    return json.dumps({"caption": caption}, ensure_ascii=False, separators=(",", ":")).encode()


def caption_text(record: str | bytes) -> str:
    """The caption of a stored record."""
    return json.loads(record)["caption"]
