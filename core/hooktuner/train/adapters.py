"""What is trained: a LoRA adapter (peft, through the model's own `add_adapter`) or all weights; and its export.

Adapters are exported in the form that `load_lora_weights` of the family's pipeline reads: keys
`transformer.<module>.lora_A.weight`, with alpha folded into B so that alpha = rank (other tools read neither
diffusers' metadata nor agree on a default, and r = alpha needs none).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from hooktuner.config import RunConfig
from hooktuner.context import Run
from hooktuner.errors import ModelError
from hooktuner.randomness import derive_seed
from hooktuner.technique import Regularizer

ADAPTER = "default"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Trainables:
    """Every trainable parameter, in exactly one group. Names are stable over runs: they are keys in checkpoints."""

    groups: Mapping[str, Mapping[str, nn.Parameter]]

    def named(self) -> dict[str, nn.Parameter]:
        """All trainable parameters by name, in a fixed order."""
        return {name: parameter for group in self.groups.values() for name, parameter in group.items()}

    def describe(self) -> list[str]:
        """One line per group: count and dtypes."""
        lines = []
        for group, parameters in self.groups.items():
            dtypes = Counter(str(parameter.dtype).removeprefix("torch.") for parameter in parameters.values())
            total = sum(parameter.numel() for parameter in parameters.values())
            lines.append(f"{group}: {total:,} parameters in {len(parameters)} tensors ({', '.join(sorted(dtypes))})")
        return lines


def prepare_trainables(run: Run, denoiser: nn.Module) -> None:
    """Freeze or unfreeze the denoiser, and add the adapter where one is trained.

    The adapter's initial values are a function of the run's seed. Errors: `ModelError` where the targets of the
    family match no module.
    """
    if run.config.model_type == "full":
        denoiser.requires_grad_(True)
        return
    assert run.card is not None
    denoiser.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(run.config.seed, "adapter-initialisation"))
        try:
            denoiser.add_adapter(_lora_config(run.config, run.card.lora_targets), ADAPTER)  # type: ignore[operator]
        except ValueError as failure:
            raise ModelError(
                f"{run.card.name} — the adapter cannot be added: {failure}. The family's `lora_targets` must name "
                "linear or convolution layers of its denoiser."
            ) from failure
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _lora_config(config: RunConfig, targets: str) -> LoraConfig:
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or config.lora_rank,  # type: ignore[arg-type]  # peft scales by a float, too
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )


def collect_trainables(denoiser: nn.Module, regularizers: Mapping[str, Regularizer]) -> Trainables:
    """The denoiser's trainable parameters and those of every regularizer's modules."""
    groups: dict[str, dict[str, nn.Parameter]] = {
        "denoiser": {name: value for name, value in denoiser.named_parameters() if value.requires_grad}
    }
    taken = {id(parameter) for parameter in groups["denoiser"].values()}
    for plugin, regularizer in regularizers.items():
        mine = {
            f"regularizer.{plugin}.{module}.{name}": value
            for module, network in regularizer.modules().items()
            for name, value in network.named_parameters()
            if value.requires_grad and id(value) not in taken
        }
        if mine:
            groups[plugin] = mine
            taken |= {id(parameter) for parameter in mine.values()}
    return Trainables(groups)


def export(run: Run, denoiser: nn.Module, folder: Path) -> list[Path]:
    """Write what other programs load: the adapter file, or the full `transformer/` folder. Returns the paths."""
    assert run.card is not None
    if run.config.model_type == "full":
        target = folder / run.card.lora_prefix
        denoiser.save_pretrained(target)  # type: ignore[operator]
        return [target]
    path = folder / ADAPTER_FILE
    save_file(adapter_state(denoiser, run.config, run.card.lora_prefix), path, metadata={"format": "pt"})
    return [path]


def adapter_state(denoiser: nn.Module, config: RunConfig, prefix: str) -> dict[str, Tensor]:
    """The adapter under its exported keys, float32 on the CPU, alpha folded into B."""
    scale = (config.lora_alpha or config.lora_rank) / config.lora_rank
    state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    exported = {}
    for key, value in state.items():
        value = value.detach().float().cpu()
        exported[f"{prefix}.{key}"] = (value * scale if ".lora_B." in key and scale != 1 else value).contiguous()
    return exported


def parameter_bytes(parameters: Iterable[Tensor]) -> int:
    """Memory of some tensors in bytes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
