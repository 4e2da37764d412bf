"""The captions of a media file. A caption that cannot be had is an answer, not an exception."""

from __future__ import annotations

from pathlib import Path

from hooktuner.config import RunConfig
from hooktuner.data.buckets import Refusal
from hooktuner.data.entries import MediaDataset

NO_CAPTION = "no caption"


def read_captions(path: Path, dataset: MediaDataset, config: RunConfig) -> tuple[str, ...] | Refusal:
    """The alternative captions of `path`, at least one, or why there is none.

    `textfile` reads the .txt of the same name as UTF-8: one alternative per line that is not blank, or the whole
    text with `disable_multiline_split`.
    """
    strategy = dataset.captions_from(config)
    if strategy == "instanceprompt":
        return _instance_prompts(dataset)
    if strategy == "filename":
        captions: tuple[str, ...] = (path.stem.replace("_", " ").strip(),)
    else:
        found = _text_file(path.with_suffix(".txt"), whole=dataset.disable_multiline_split)
        if isinstance(found, Refusal):
            return found
        captions = found
    if dataset.prepend_instance_prompt:
        captions = tuple(f"{prompt} {caption}" for caption in captions for prompt in _instance_prompts(dataset))
    return captions


def _instance_prompts(dataset: MediaDataset) -> tuple[str, ...]:
    prompt = dataset.instance_prompt or ()
    return (prompt,) if isinstance(prompt, str) else prompt


def _text_file(path: Path, *, whole: bool) -> tuple[str, ...] | Refusal:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return Refusal(NO_CAPTION, f"{path.name} is missing")
    except UnicodeDecodeError:
        return Refusal(NO_CAPTION, f"{path.name} is not UTF-8 text")
    except OSError as failure:
        return Refusal(NO_CAPTION, f"{path.name}: {failure.strerror or failure}")
    lines = [text.strip()] if whole else [line.strip() for line in text.splitlines()]
    captions = tuple(dict.fromkeys(line for line in lines if line))
    return captions or Refusal(NO_CAPTION, f"{path.name} is empty")
