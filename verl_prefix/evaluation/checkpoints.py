"""Which folder vLLM has to load for a checkpoint: a Hugging Face folder, or verl's `global_step_N`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from verl_prefix.exceptions import EvaluationError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
#: where verl's FSDP and Megatron checkpoints keep a Hugging Face export, below `global_step_N`; `merged`: see `resolve`
_EXPORTS = ("", "merged", "huggingface", "actor/huggingface", "model/huggingface", "actor/model/huggingface")
#: bytes read at either end of a weight file
_PIECE = 1 << 16


def resolve(model: str) -> str:
    """The folder with `config.json` and weights in or below `model`; anything that is no folder is a hub id.

    Raises:
        EvaluationError: a folder without merged weights; says how to merge them.
    """
    folder = Path(model)
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise EvaluationError(f"--model {model}: the folder does not exist.")
        return model
    for export in _EXPORTS:
        if (folder / export / "config.json").is_file() and _weights(folder / export):
            return str((folder / export).resolve())
    actor = folder / "actor" if (folder / "actor").is_dir() else folder
    steps = sorted((f for f in folder.glob("global_step_*") if f.is_dir()), key=lambda f: int(f.name.split("_")[-1]))
    if steps:
        raise EvaluationError(f"--model {model}: holds several checkpoints; name one, e.g. {steps[-1]}.")
    backend = "fsdp" if list(actor.glob("model_world_size_*.pt")) else ""
    backend = backend or ("megatron" if list(actor.glob("**/dist_ckpt")) else "")
    if not backend:
        raise EvaluationError(f"--model {model}: has no config.json with weights; name a Hugging Face folder.")
    raise EvaluationError(
        f"--model {model}: holds {backend} shards, not merged weights. Merge them, then evaluate the result:\n"
        f"python -m verl.model_merger merge --backend {backend} --local_dir {actor} --target_dir {folder / 'merged'}\n"
        "(or train with actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model])"
    )


def _weights(folder: Path) -> list[Path]:
    return sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))


def fingerprint(model: str) -> str:
    """Tells checkpoints apart that were written to one path after another: sizes, and both ends of each weight file."""
    seen = hashlib.sha256()
    for file in _weights(Path(model)):
        size = file.stat().st_size
        with file.open("rb") as stream:
            seen.update(f"{file.name} {size}".encode() + stream.read(_PIECE))
            stream.seek(max(0, size - _PIECE))
            seen.update(stream.read(_PIECE))
    return seen.hexdigest()[:16]
