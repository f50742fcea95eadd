"""Cost of the policy loss alone, forward and backward, against verl's vanilla PPO loss in the same run.

    python benchmarks/bench_loss.py [--rows 64] [--tokens 8192] [--repeats 30]

Both get the same (B, T) float32 tensors and go through verl's `agg_loss`. One row of eight is a demonstration: a prefix
of half its tokens, or the whole. Runs alternate, so that a busy machine slows both; the figure is
the ratio of the fastest runs.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from verl_prefix import columns, presets
from verl_prefix.policy_loss import SFT_WEIGHT, policy_loss

PRESETS = ("grpo", "prefix_rft", "luffy", "uft", "rl_plus", "chord_phi", "srft")


def main(
    rows: Annotated[int, typer.Option(help="B, rollouts of the micro-batch.")] = 64,
    tokens: Annotated[int, typer.Option(help="T, response positions.")] = 8192,
    repeats: Annotated[int, typer.Option(help="Timed runs of each loss.")] = 30,
) -> None:
    """Print the time of each preset's loss as a multiple of vanilla PPO's."""
    torch.manual_seed(0)
    old = -torch.rand(rows, tokens) * 2
    log_prob = (old + 0.1 * torch.randn(rows, tokens)).requires_grad_()
    advantages = torch.randn(rows, 1).expand(rows, tokens).contiguous()
    mask = torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (rows, 1))
    entropy = torch.nested.as_nested_tensor(list(torch.rand(rows, tokens)), layout=torch.jagged)
    actor = FSDPActorConfig(
        strategy="fsdp2", rollout_n=8, use_dynamic_bsz=True, policy_loss=PolicyLossConfig(loss_mode="prefix_rft")
    )
    actor.global_batch_info.update(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=rows)

    def vanilla():
        return compute_policy_loss_vanilla(old, log_prob, advantages, mask, "token-mean", actor)[0]

    def of(preset):
        config = presets.compose(preset)
        share = 1.0 if config.sampling.law == "whole" else 0.5
        lent = {"prefix": config, "prefix_len": torch.where(torch.arange(rows) % 8 == 0, mask.sum(1) * share, 0).long()}
        if max(config.sft.weight.initial, config.sft.weight.target) > 0:
            lent |= {SFT_WEIGHT: (lent["prefix_len"] > 0) / lent["prefix_len"].sum(), "entropy": entropy}

        def loss():
            with columns.lend(**lent) as used:
                value, _ = policy_loss(old, log_prob, advantages, mask, "token-mean", actor)
                return value + used.get("sft_loss", 0.0)

        return loss

    losses = {"vanilla": vanilla, **{preset: of(preset) for preset in PRESETS}}
    seconds = {name: [] for name in losses}
    for round_ in track(range(repeats + 3), "timing"):
        for name, loss in losses.items():
            log_prob.grad = None
            begin = time.perf_counter()
            loss().backward()
            if round_ >= 3:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - begin)
    fastest = {name: min(values) for name, values in seconds.items()}
    table = Table(
        title=f"loss and its gradient, {rows} x {tokens} float32, {torch.get_num_threads()} threads, {repeats} runs"
    )
    for column in ("preset", "ms", "times vanilla PPO"):
        table.add_column(column, justify="left" if column == "preset" else "right")
    for name, best in fastest.items():
        table.add_row(name, f"{1000 * best:.1f}", f"{best / fastest['vanilla']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
