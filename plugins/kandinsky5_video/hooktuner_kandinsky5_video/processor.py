"""The Qwen2.5-VL processor of a checkpoint without its video processor.

`Qwen2VLProcessor` builds a video processor that exists only where torchvision is installed, although Kandinsky 5
Video shows Qwen text and nothing else. `ProcessorMixin` learns a processor's parts from the signature of its
`__init__`, so a subclass whose `__init__` has no `video_processor` loads and saves everywhere. It keeps the name of
its base, so that saved checkpoints say what the released ones say.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLProcessor


class TextProcessor(Qwen2VLProcessor):
    """`Qwen2VLProcessor` for text (and images)."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template, **kwargs)


TextProcessor.__name__ = Qwen2VLProcessor.__name__
TextProcessor.__module__ = Qwen2VLProcessor.__module__
