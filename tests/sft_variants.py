"""Run by tests/test_sft.py under torchrun: one optimizer step of verl's SFT trainer for each way to cut the same batch.

usage: sft_variants.py WORK_FOLDER OUT.pt VARIANTS.json, with variants {name: {"preset": name, "overrides": [...]}}
Writes {name: {"loss", "grad_norm", "gradients": {parameter: tensor}, "parameters": {parameter: tensor}}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import verl  # noqa: F401  the plugin
from hydra import compose, initialize_config_module
from torch.distributed.tensor import DTensor
from verl.trainer import sft_trainer
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def one_step(config) -> dict:
    from verl.utils import device

    device.auto_set_device(config)  # what the trainer's main begins with; the plugin's seam
    trainer = sft_trainer.SFTTrainer(config)
    engine, seen = trainer.engine, {}
    step, train_batch = engine.optimizer_step, trainer.training_client.train_batch

    def optimizer_step():
        seen["gradients"] = {name: full(p.grad) for name, p in engine.module.named_parameters()}
        return step()

    def logged(data):
        output = train_batch(data)
        metrics = output["metrics"]
        seen.update(loss=metrics["loss"], grad_norm=metrics["grad_norm"])
        return output

    engine.optimizer_step, trainer.training_client.train_batch = optimizer_step, logged
    trainer.fit()
    seen["parameters"] = {name: full(p) for name, p in engine.module.named_parameters()}
    return seen


def main() -> None:
    work, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    initialize_global_process_group()
    results = {}
    with initialize_config_module("verl.trainer.config", version_base=None):
        for name, variant in variants.items():
            common = [f"model.path={work}/model", f"data.train_files={work}/train.parquet"]
            common.append(f"trainer.default_local_dir={work}/checkpoints/{name}")
            overrides = [f"+sft={variant['preset']}", *common, *variant["overrides"]]
            results[name] = one_step(compose("sft_trainer_engine", overrides=overrides))
    if torch.distributed.get_rank() == 0:
        torch.save(results, out)
    destroy_global_process_group()


if __name__ == "__main__":
    main()
