"""Encoded captions, clips and features on disk, under a key of everything that they depend on.

    <folder>/<first two hex digits>/<hex>.safetensors

The key is the digest of a JSON object: what was encoded (the digest of a file's bytes and the exact frames, size and
crop, or the caption) and with what (family, flavour, encoder, the plugin options that say so, versions, dtype). It is
kept in the file's metadata, so that an entry can be explained. Any change makes another key; nothing is invalidated,
so nothing stale can be found. Files are written under a temporary name in the same folder, flushed and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hooktuner.data.media import PREPROCESSING

if TYPE_CHECKING:
    import torch

    from hooktuner.context import Run
    from hooktuner.family import Part
    from hooktuner.technique import Clip

Kind = Literal["text", "latents", "features"]

FORMAT = 1
"""Raise this when entries of the same key mean something else than before."""

SMALL_FILE = 64 * 2**20
"""Files of an encoder up to this many bytes are known by their content, larger ones by size and time."""


class EncodingPlugin(Protocol):
    """What a cache key needs of a plugin (`hooktuner.plugins.Plugin`)."""

    name: str
    version: str

    @property
    def implementations(self) -> Mapping[str, Any]: ...


class EncodingPlugins(Protocol):
    """What encoding needs of the active plugins (`hooktuner.plugins.PluginSet`)."""

    @property
    def plugins(self) -> Sequence[Any]: ...
    @property
    def family(self) -> Any: ...
    def has(self, hook: str) -> bool: ...
    def load_model(self, run: Run, part: Part) -> Any: ...
    def encode_text(self, run: Run, encoder: Any, captions: Sequence[str]) -> Sequence[Mapping[str, torch.Tensor]]: ...
    def encode_latents(self, run: Run, vae: Any, pixels_BCFHW: torch.Tensor) -> Mapping[str, torch.Tensor]: ...
    def encode_features(self, run: Run, clip: Clip) -> Mapping[str, torch.Tensor]: ...


# ---------------------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True)
class CacheKey:
    """`hex` names the file; `text` is the JSON of which it is the digest."""

    hex: str
    text: str


@dataclass(frozen=True)
class Recipe:
    """With what one kind of entry is encoded in this run: the part of the key that all entries share."""

    facts: Mapping[str, Any]

    @classmethod
    def of(cls, kind: Kind, run: Run, plugins: EncodingPlugins) -> Recipe:
        """Read the recipe from the run: family, flavour, encoder, options, versions, dtype."""
        if kind == "features":
            encoders = [plugin for plugin in plugins.plugins if "encode_features" in plugin.implementations]
        else:
            encoders = [plugins.family]
        options = {
            name: {field: getattr(values, field) for field in values.cache_fields.get(kind, ())}
            for name, values in sorted(run.options.items())
            if values.cache_fields.get(kind)
        }
        return cls(
            {
                "format": FORMAT,
                "kind": kind,
                "family": run.card.name if run.card else None,
                "flavour": run.flavour.name,
                "encoder": "" if kind == "features" else encoder_identity(run.model_path, kind),
                "plugins": {plugin.name: plugin.version for plugin in encoders},
                "options": options,
                "dtype": str(run.weight_dtype),
                **({} if kind == "text" else {"preprocessing": PREPROCESSING}),
            }
        )

    def key(self, **what: Any) -> CacheKey:
        """The key of one entry; `what` says what is encoded."""
        return _digest({**self.facts, "what": what})

    @cached_property
    def digest(self) -> str:
        """A name for the recipe itself."""
        return _digest(self.facts).hex


def _digest(facts: Mapping[str, Any]) -> CacheKey:
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return CacheKey(hashlib.blake2b(text.encode(), digest_size=20).hexdigest(), text)


_PARTS: Mapping[str, tuple[str, ...]] = {
    "text": ("text_encoder", "tokenizer", "processor"),
    "latents": ("vae",),
}
"""How subfolders of a checkpoint in the diffusers layout begin that an encoder is read from."""


def encoder_identity(model_path: Path | str | None, kind: Kind) -> str:
    """What the encoder of `kind` is.

    Of a local folder: a digest of the encoder's subfolders (of the whole folder, where it has none of the usual
    names). Of a hub id: the id and, where it can be learned, the commit.
    """
    if model_path is None:
        return ""
    folder = Path(model_path)
    if not folder.is_dir():
        return f"{model_path}@{_hub_commit(str(model_path))}"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    inside = [path for path in files if path.relative_to(folder).parts[0].startswith(_PARTS[kind])]
    digest = hashlib.blake2b(digest_size=20)
    for path in inside or files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        status = path.stat()
        if status.st_size <= SMALL_FILE:
            digest.update(hashlib.blake2b(path.read_bytes()).digest())
        else:
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _hub_commit(repository: str) -> str:
    """The commit that the hub's default branch is at, or was at when it was last fetched; empty where unknown."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        path = Path(hf_hub_download(repository, "model_index.json"))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return ""  # loading the model will say what is wrong with it
    return path.parent.name if path.parent.parent.name == "snapshots" else ""


# --------------------------------------------------------------------------------------------------------- files


class Store:
    """A folder of entries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: CacheKey | str) -> Path:
        """Where an entry is, or would be."""
        name = key if isinstance(key, str) else key.hex
        return self.folder / name[:2] / f"{name}.safetensors"

    def has(self, key: CacheKey | str) -> bool:
        """Whether a whole entry is there. One that was cut off or damaged is removed, so that it is made again."""
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="numpy"):  # reads the header and compares it with the file's size
                return True
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)
            return False

    def load(self, key: CacheKey | str) -> dict[str, torch.Tensor]:
        """The tensors of an entry, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path(key))

    def save(self, key: CacheKey, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write an entry: complete, or not at all."""
        from safetensors.torch import save

        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        temporary = path.with_name(f".{key.hex}.{_host()}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(save(plain, metadata={"key": key.text}))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def sweep(self) -> int:
        """Remove what killed writes left behind, and say how many; never what another process is writing."""
        removed = 0
        for temporary in self.folder.glob("??/.*.tmp"):
            if _is_leftover(temporary):
                temporary.unlink(missing_ok=True)
                removed += 1
        return removed


def _host() -> str:
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def _is_leftover(temporary: Path) -> bool:
    *_, host, process, _ = temporary.name.split(".")
    try:
        if time.time() - temporary.stat().st_mtime > 3600:
            return True
        if host != _host() or not process.isdigit():
            return False
        os.kill(int(process), 0)
    except FileNotFoundError:
        return False
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(process) == os.getpid()
