"""One of N workers: torchrun --nproc-per-node N tests/data_parallel_worker.py OUT.pt [WORKERS OF A SEQUENCE]

FSDP2 on gloo shards a model whose only weights are the log-probabilities themselves; each data-parallel worker trains
on its share of the rows, in micro-batches of its own, with the loss that verl's workers call. With more than one worker
of a sequence (Ulysses), each of them has a part of the packed tokens, and verl's own functions cut and gather them.
Worker 0 writes each case's loss and whole gradient.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from verl.utils import tensordict_utils as tu
from verl.utils import ulysses
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from verl_prefix.config import PrefixConfig
from verl_prefix.policy_loss import worker_loss

ROWS, TOKENS, PROMPT = 16, 6, 2
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


class Policy(torch.nn.Module):
    """Row, position -> log-probability of the token there."""

    def __init__(self):
        super().__init__()
        start = torch.randn(ROWS, PROMPT + TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.logit = torch.nn.Parameter(start)

    def forward(self, rows: list[int]) -> torch.Tensor:
        return -torch.nn.functional.softplus(self.logit[rows])


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    length = torch.randint(1, TOKENS + 1, (ROWS,), generator=draw)
    return {
        "length": length,
        "prefix_len": torch.where(torch.arange(ROWS) % 4 == 0, (length + 1) // 2, 0),
        "old": -2 * torch.rand(ROWS, TOKENS, generator=draw, dtype=torch.float64),
        "advantage": torch.randn(ROWS, TOKENS, generator=draw, dtype=torch.float64),
        "entropy": torch.rand(ROWS, TOKENS, generator=draw, dtype=torch.float64),
        "sft_weight": torch.rand(ROWS, generator=draw, dtype=torch.float64),
    }


def micro_batch(model: Policy, given: dict[str, torch.Tensor], rows: list[int], workers: int):
    def nested(values):
        return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)

    length = [int(given["length"][row]) for row in rows]
    cut = list(zip(rows, length, strict=True))
    data = TensorDict(
        {
            "prompts": nested(torch.ones(PROMPT, dtype=torch.int64) for _ in rows),
            "responses": nested(torch.ones(n, dtype=torch.int64) for n in length),
            "input_ids": nested(torch.ones(PROMPT + n, dtype=torch.int64) for n in length),
            "response_mask": nested(torch.ones(n, dtype=torch.int64) for n in length),
            "old_log_probs": nested(given["old"][row, :n] for row, n in cut),
            "advantages": nested(given["advantage"][row, :n] for row, n in cut),
            "entropy": nested(given["entropy"][row, :n] for row, n in cut),
            "sft_weight": given["sft_weight"][rows] * (given["prefix_len"][rows] > 0),
            "prefix_len": given["prefix_len"][rows],
        },
        batch_size=len(rows),
    )
    tokens = int(given["length"].sum())
    tu.assign_non_tensor(data, dp_size=workers, batch_num_tokens=tokens, global_batch_size=ROWS)
    log_prob = model(rows)
    packed = torch.cat([log_prob[i, : PROMPT + n] for i, n in enumerate(length)])
    return {
        "log_probs": torch.nested.nested_tensor_from_jagged(through_ulysses(packed), data["input_ids"].offsets())
    }, data


def through_ulysses(packed: torch.Tensor) -> torch.Tensor:
    """Only this worker's part of the tokens is its own; the others' come by verl's gather, as in its FSDP engine."""
    group = ulysses.get_ulysses_sequence_parallel_group()
    if group is None:
        return packed
    own, _, pad = ulysses.ulysses_pad_and_slice_inputs(packed[None], sp_size=dist.get_world_size(group))
    return ulysses.gather_outputs_and_unpad(own[0], gather_dim=0, unpad_dim=0, padding_size=pad)


def loss_and_gradient(aggregation: str, rank: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of data-parallel worker `rank` of `workers`, both averaged over the workers as FSDP averages gradients."""
    model = Policy()
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        loss_agg_mode=aggregation,
        loss_scale_factor=TOKENS if aggregation.endswith("norm") else None,
        entropy_coeff=0.0,
        policy_loss=PolicyLossConfig(loss_mode="prefix_rft"),
    )
    prefix = PrefixConfig.of({"sft": {"weight": {"initial": 1.0}}})
    given, own = batch(), list(range(rank, ROWS, workers))
    cut = 1 + rank % 3  # micro-batches differ between workers, but not in number
    total = torch.zeros((), dtype=torch.float64)
    for rows in (own[:cut], own[cut:]):
        output, data = micro_batch(model, given, rows, workers)
        loss = worker_loss(config, output, data, prefix=prefix)[0]
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    found = model.logit.grad
    return total / dist.get_world_size(), found.full_tensor() if dist.get_world_size() > 1 else found


def main() -> None:
    dist.init_process_group("gloo")
    sequence = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    mesh = init_device_mesh("cpu", (dist.get_world_size() // sequence, sequence), mesh_dim_names=("dp", "sp"))
    ulysses.set_ulysses_sequence_parallel_group(mesh["sp"].get_group() if sequence > 1 else None)
    rank, workers = mesh["dp"].get_local_rank(), mesh["dp"].size()
    found = {aggregation: loss_and_gradient(aggregation, rank, workers) for aggregation in AGGREGATIONS}
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
