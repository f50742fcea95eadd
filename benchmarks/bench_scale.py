"""What the plugin costs the driver in a step, and how that grows with prompts, rollouts, response length and workers.

    python benchmarks/bench_scale.py                       # 128 x 8 x 8192, each axis times 1/4, 1/2, 1, 2
    python benchmarks/bench_scale.py --preset hpt          # a gate and an SFT term
    python benchmarks/bench_scale.py --factors 1 --json    # one size

The step is the real one: `PrefixTrainerSync` runs `_balance_batch`, `_compute_old_log_prob`, `_compute_advantage`,
`_compute_metrics` and `_log_rollout_data` on synthetic rollouts (responses of T/2 to T tokens, one with T), and the
plugin's methods in them are measured apart from verl's code around them (but that verl's log writes the plugin's
columns as well, and that a gate spreads the rows, counts as verl's). Two things are stand-ins: the workers,
which have the answer ready, and TransferQueue's network. The store below sends every get and put through
TransferQueue's own encoder, copies each frame once, decodes, and packs the rows as its client does.

- Bytes: all frames of the plugin's gets and puts. They follow from the sizes; no clock is involved.
- Time: CPU time of the process, of each part the fastest of `--repeats` steps. It is this machine's; compare shares and
  growth.
- Memory: growth of the resident set at its highest inside a part, by the kernel's high-water mark (as
  `bench_advantage.py`); what was freed before goes back to the kernel first. Linux with glibc only.
- Growth: slope of log(cost) over log(size); 1 is linear.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

PROMPT_TOKENS = 256
BASE = {"prompts": 128, "rollouts": 8, "tokens": 8192, "workers": 128}
#: method of the trainer -> name of the part
PARTS = {
    "_move_intervals": "intervals",
    "_gate": "gate",
    "_fetch_prefix_columns": "row columns",
    "_put_sft_weights": "SFT weights",
    "_neutralise_prefix_rollout_log_probs": "prefix log-probs",
    "_entropy": "entropy",
    "_estimate": "advantages",
    "_prefix_metrics": "metrics",
    "_rollout_log_columns": "rollout log",
}
#: function of `verl_prefix.trainer` -> the same
FUNCTIONS = {"require_finite": "finite checks", "grader_metrics": "metrics"}
VERL = "verl's own"
PLUGIN = "the plugin"


@dataclasses.dataclass
class Cost:
    """CPU seconds, bytes through TransferQueue, requests to it, bytes of extra resident memory at the highest."""

    seconds: float = 0.0
    got: int = 0
    put: int = 0
    requests: int = 0
    memory: int = 0


class Meter:
    """Costs by part. Parts nest; each gets what is not its inner parts'."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self._open: list[tuple[str, int]] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._close_segment()
        give_back_freed_memory()
        self._open.append((name, resident()))
        self._begin_segment()
        try:
            yield
        finally:
            self._close_segment()
            self._open.pop()
            self._begin_segment()

    def wrap(self, name: str, function: Callable) -> Callable:
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return measured

    @property
    def now(self) -> Cost:
        """The costs of the innermost open part."""
        return self.costs[self._open[-1][0]]

    def _begin_segment(self) -> None:
        reset_high_water_mark()
        self._since = time.process_time()

    def _close_segment(self) -> None:
        if self._open:
            self.now.seconds += time.process_time() - self._since
            self.now.memory = max(self.now.memory, high_water_mark() - self._open[-1][1])


def _status(name: str) -> int:
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def resident() -> int:
    return _status("VmRSS")


def high_water_mark() -> int:
    return _status("VmHWM")


def reset_high_water_mark() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def give_back_freed_memory() -> None:
    """Memory that was freed before a part would hide what the part allocates."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


class Store:
    """Rows by key and field, in `units` storage units; stands for `transfer_queue`'s key-value functions."""

    def __init__(self, units: int, meter: Meter):
        from transfer_queue.storage.managers.simple_storage_manager import AsyncSimpleStorageManager
        from transfer_queue.utils.serial_utils import decode, encode

        self._select, self._pack = (
            AsyncSimpleStorageManager._select_by_positions,
            (AsyncSimpleStorageManager._pack_field_values),
        )
        self._encode, self._decode = encode, decode
        self.units, self.meter = units, meter
        self.place: dict[str, int] = {}
        self.fields: dict[str, dict[str, Any]] = defaultdict(dict)

    def _sent(self, message: Any) -> tuple[Any, int]:
        """The message as it arrives, and its bytes."""
        frames = [bytes(frame) for frame in self._encode(message)]
        return self._decode(frames), sum(map(len, frames))

    def _routed(self, keys: list[str]) -> dict[int, list[int]]:
        positions: dict[int, list[int]] = defaultdict(list)
        for position, key in enumerate(keys):
            positions[self.place.setdefault(key, len(self.place)) % self.units].append(position)
        return positions

    def kv_batch_put(self, *, keys: list[str], partition_id: str, fields: Any = None, tags: Any = None) -> Any:
        from transfer_queue import KVBatchMeta

        names = list(fields.keys())  # a TensorDict iterates over its rows
        for positions in self._routed(keys).values():
            part = {name: self._select(fields[name], positions) for name in names}
            arrived, size = self._sent({"keys": [keys[i] for i in positions], "data": part})
            self.meter.now.put += size
            self.meter.now.requests += 1
            for name, values in arrived["data"].items():
                self.fields[name].update(zip((keys[i] for i in positions), values, strict=True))
        return KVBatchMeta(keys=keys, tags=tags or [dict(self.tags[key]) for key in keys], partition_id=partition_id)

    def kv_batch_get(self, *, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> Any:
        from tensordict import TensorDict

        names = [name for name in select_fields or list(self.fields) if keys[0] in self.fields.get(name, ())]
        rows: dict[str, list] = {name: [None] * len(keys) for name in names}
        for positions in self._routed(keys).values():
            arrived, size = self._sent({name: [self.fields[name][keys[i]] for i in positions] for name in names})
            self.meter.now.got += size
            self.meter.now.requests += 1
            for name in names:
                for position, value in zip(positions, arrived[name], strict=True):
                    rows[name][position] = value
        return TensorDict({name: self._pack(values) for name, values in rows.items()}, batch_size=len(keys))

    def keep(self, keys: list[str], tags: list[dict], **columns: Any) -> None:
        """Put rows there unmeasured."""
        self.tags = dict(zip(keys, tags, strict=True))
        self._routed(keys)
        for name, values in columns.items():
            self.fields[name] = dict(zip(keys, values, strict=True))


@dataclasses.dataclass(frozen=True)
class Size:
    """Prompts of a batch, rollouts of a prompt, longest response, data-parallel workers."""

    prompts: int
    rollouts: int
    tokens: int
    workers: int

    def times(self, axis: str, factor: float) -> Size:
        return dataclasses.replace(self, **{axis: max(1, int(getattr(self, axis) * factor))})


def configuration(size: Size, preset: str, rollout_log: str) -> Any:
    import hydra

    from verl_prefix import hydra_group

    hydra_group.register(hydra)
    overrides = (
        f"+prefix={preset}",
        f"data.max_prompt_length={PROMPT_TOKENS}",
        f"data.max_response_length={size.tokens}",
        f"data.train_batch_size={size.prompts}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={size.prompts}",
        f"actor_rollout_ref.rollout.n={size.rollouts}",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        "actor_rollout_ref.model.path=none",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        f"trainer.rollout_data_dir={rollout_log}",
    )
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=list(overrides))


def rollouts(size: Size, prefix: Any) -> tuple[list[str], list[dict], dict[str, list]]:
    """Keys, tags and columns of a batch as the agent loops leave it; every prompt's first sessions have a prefix."""
    from verl_prefix.agent_loop import RECORD

    rng, order = torch.Generator().manual_seed(0), np.random.default_rng(0)
    rows = size.prompts * size.rollouts
    lengths = torch.randint(max(size.tokens // 2, 2), size.tokens + 1, (rows,), generator=rng).tolist()
    lengths[-1] = size.tokens
    keys, tags, columns = [], [], defaultdict(list)
    for row, length in enumerate(lengths):
        prompt, session = divmod(row, size.rollouts)
        prefixed = session < prefix.sampling.rollouts
        ratio = 1.0 if prefix.sampling.law == "whole" else float(order.uniform(0.05, 0.95))
        demo_len = length if prefixed else 0
        responses = torch.randint(48, 58, (length,), generator=rng)
        reward = torch.zeros(length)
        reward[-1] = float(order.random() < 0.5)
        record = {
            "demo_index": 0 if prefixed else -1,
            "demo_len": demo_len,
            "low": 0.05 if prefixed else float("nan"),
            "high": 0.95 if prefixed else float("nan"),
            "ratio": ratio if prefixed else 0.0,
            "hit_limit": length == size.tokens,
            "no_demonstration": False,
        }
        seq_len = PROMPT_TOKENS + length
        keys.append(f"uid{prompt}_{session}_0")
        tags.append({"seq_len": seq_len, "min_global_steps": 0, "max_global_steps": 0, "status": "success"})
        for name, value in {
            "uid": f"uid{prompt}",
            "index": prompt,
            "reward_model": {"ground_truth": "1", "style": "rule"},
            "prompts": torch.randint(48, 58, (PROMPT_TOKENS,), generator=rng),
            "responses": responses,
            "response_mask": torch.ones(length, dtype=torch.int64),
            "rollout_log_probs": -torch.rand(length, generator=rng),
            "rm_scores": reward,
            "num_turns": 2,
            "prefix_len": torch.tensor(min(int(ratio * demo_len), length)),
            "extra_fields": {
                **{"global_steps": 0, "min_global_steps": 0, "max_global_steps": 0, "turn_scores": []},
                **{"tool_rewards": [], "reward_extra_info": {"grader_timeout": 0.0}, RECORD: record},
            },
            # what the padding of a gated batch copies
            "input_ids": torch.zeros(seq_len, dtype=torch.int64),
            "position_ids": torch.arange(seq_len),
            "loss_mask": torch.ones(length, dtype=torch.int64),
        }.items():
            columns[name].append(value)
    return keys, tags, dict(columns)


class Workers:
    """Has log-probabilities and entropies ready, prompt and response, as the workers put them."""

    def __init__(self, store: Store, workers: int):
        self.store, self._dispatch_info = store, {"actor": list(range(workers))}

    def compute_log_prob(self, batch: Any) -> Any:
        rng = torch.Generator().manual_seed(1)
        for key in batch.keys:
            length = len(self.store.fields["prompts"][key]) + len(self.store.fields["responses"][key])
            self.store.fields["log_probs"][key] = -torch.rand(length, generator=rng)
            self.store.fields["entropy"][key] = torch.rand(length, generator=rng)
        return batch


def trainer_for(size: Size, preset: str, folder: str, meter: Meter) -> tuple[Any, Store]:
    """The plugin's trainer, without the cluster that its constructor builds."""
    from data_prep.testbed.tokenizer import build_tokenizer
    from verl_prefix.metrics import CorrelationWatch
    from verl_prefix.trainer import PrefixTrainerSync

    trainer = object.__new__(PrefixTrainerSync)
    trainer.config = configuration(size, preset, folder)
    trainer._begin(trainer.config)
    store = Store(trainer.config.transfer_queue.backend.SimpleStorage.num_data_storage_units, meter)
    trainer._correlation = CorrelationWatch(-1.0)  # synthetic log-probabilities agree with nothing
    trainer.global_steps, trainer.timing_raw = 1, {}
    trainer.use_critic = trainer.use_reference_policy = False
    trainer.tokenizer = build_tokenizer()
    trainer.actor_rollout_wg = Workers(store, size.workers)
    trainer._rollout_moe_lb_metrics_accumulator = None
    trainer.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: size.workers)
    for method, name in PARTS.items():
        setattr(trainer, method, meter.wrap(name, getattr(trainer, method)))
    return trainer, store


def step(trainer: Any, store: Store, size: Size, folder: str) -> dict[str, float]:
    """What the driver does between generation and update, and after it."""
    from transfer_queue import KVBatchMeta

    import verl_prefix.trainer

    keys, tags, columns = rollouts(size, trainer.prefix)
    store.fields.clear()
    store.place.clear()
    store.keep(keys, tags, **columns)
    del columns
    names = ("kv_batch_get", "kv_batch_put")
    metrics: dict[str, float] = {}
    patched = mock.patch.multiple("transfer_queue", **{name: getattr(store, name) for name in names})
    measured = mock.patch.multiple(
        "verl_prefix.trainer",
        **{name: store.meter.wrap(part, getattr(verl_prefix.trainer, name)) for name, part in FUNCTIONS.items()},
    )
    with patched, measured, store.meter.part(VERL):
        batch = KVBatchMeta(partition_id="train", keys=keys, tags=tags)
        batch = trainer._balance_batch(batch, metrics)
        store.tags = dict(zip(batch.keys, batch.tags, strict=True))
        batch = trainer._compute_old_log_prob(batch, metrics)
        batch = trainer._compute_advantage(batch, metrics)
        timing = dict.fromkeys(("step", "gen", "adv", "update_actor"), 1.0)
        trainer._compute_metrics(batch, metrics, timing, 1, 0)
        trainer._init_dump_executor()
        trainer._log_rollout_data(batch, {}, folder)
        trainer._shutdown_dump_executor()
    return metrics


def measure(size: Size, preset: str, repeats: int = 1) -> dict[str, Cost]:
    """Part -> cost of one step, the fastest of each; the plugin's parts also in sum (memory: the largest)."""
    best: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            meter = Meter()
            trainer, store = trainer_for(size, preset, folder, meter)
            step(trainer, store, size, folder)
            for name, cost in meter.costs.items():
                kept = best.setdefault(name, cost)
                kept.seconds, kept.memory = min(kept.seconds, cost.seconds), max(kept.memory, cost.memory)
    parts = [cost for name, cost in best.items() if name != VERL]
    best[PLUGIN] = Cost(
        *(sum(getattr(cost, field) for cost in parts) for field in ("seconds", "got", "put", "requests")),
        memory=max(cost.memory for cost in parts),
    )
    return best


def per_worker(size: Size, preset: str) -> dict[str, int]:
    """Bytes that the plugin adds to what Ray carries: once per worker at the start, and per step and prompt."""
    from functools import partial

    from ray import cloudpickle
    from verl.utils.config import omega_conf_to_dataclass

    from verl_prefix.config import PrefixConfig
    from verl_prefix.policy_loss import worker_loss

    config = configuration(size, preset, "none")
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    loss = partial(worker_loss, config=actor, prefix=PrefixConfig.of(config.prefix))
    without = partial(worker_loss, config=actor)
    return {
        "loss function, per worker at the start": len(cloudpickle.dumps(loss)),
        "of it the prefix section": len(cloudpickle.dumps(loss)) - len(cloudpickle.dumps(without)),
        "prefix interval, per prompt and step (law=adaptive)": 2 * torch.tensor([0.0, 1.0]).element_size(),
    }


def growth(sizes: list[float], costs: list[float]) -> float:
    """Slope of log(cost) over log(size); NaN where a cost is 0."""
    if len(sizes) < 2 or min(costs) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def in_child(sizes: list[Size], preset: str, repeats: int) -> Iterator[tuple[Size, dict[str, Cost]]]:
    """`measure` of each size, in a process of its own whose freed memory goes back to the kernel at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    listed = json.dumps([dataclasses.asdict(size) for size in sizes])
    command = [sys.executable, __file__, f"--child={listed}", f"--preset={preset}", f"--repeats={repeats}"]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        for line in child.stdout or ():
            if line.startswith("{"):  # the others are verl's
                found = json.loads(line)
                yield Size(**found["size"]), {name: Cost(**cost) for name, cost in found["costs"].items()}
        if child.wait():
            errors.seek(0)
            raise SystemExit(errors.read())


def as_line(size: Size, preset: str, costs: dict[str, Cost]) -> str:
    listed = {name: dataclasses.asdict(cost) for name, cost in costs.items()}
    return json.dumps({"size": dataclasses.asdict(size), "preset": preset, "costs": listed})


def by_part(costs: dict[str, Cost]) -> Table:
    """The parts of one step."""
    table = Table(box=None, padding=(0, 1))
    for name in ("part", "share of driver time", "got MB", "put MB", "requests", "peak extra MB"):
        table.add_column(name, justify="left" if name == "part" else "right")
    total = costs[PLUGIN].seconds + costs[VERL].seconds
    parts = dict.fromkeys([*PARTS.values(), *FUNCTIONS.values()])
    for name in [*(part for part in parts if part in costs), PLUGIN, VERL]:
        cost = costs[name]
        numbers = (cost.got / 1e6, cost.put / 1e6, cost.requests, cost.memory / 1e6)
        table.add_row(name, f"{cost.seconds / total:.1%}", *(f"{number:.4g}" for number in numbers))
    return table


def by_axis(base: Size, factors: list[float], results: dict[Size, dict[str, Cost]]) -> Table:
    """Growth of the plugin's and of verl's costs along each axis."""
    table = Table(box=None, padding=(0, 1))
    for name in ("axis", "sizes", "of", "time", "bytes", "requests", "peak extra"):
        table.add_column(name, justify="left" if name in ("axis", "of") else "right")
    for axis in BASE:
        sizes = [base.times(axis, factor) for factor in factors]
        at = [getattr(size, axis) for size in sizes]
        for who in (PLUGIN, VERL):
            costs = [results[size][who] for size in sizes]
            series = (
                [cost.seconds for cost in costs],
                [cost.got + cost.put for cost in costs],
                [cost.requests for cost in costs],
                [cost.memory for cost in costs],
            )
            table.add_row(axis, f"{at[0]} to {at[-1]}", who, *(f"{growth(at, values):.2f}" for values in series))
    return table


def main(
    preset: Annotated[str, typer.Option(help="Preset whose step is measured.")] = "prefix_rft",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a batch.")] = BASE["prompts"],
    rollouts_per_prompt: Annotated[int, typer.Option("--n", min=1, help="Rollouts of a prompt.")] = BASE["rollouts"],
    tokens: Annotated[int, typer.Option(min=8, help="Longest response.")] = BASE["tokens"],
    workers: Annotated[int, typer.Option(min=1, help="Data-parallel workers.")] = BASE["workers"],
    factors: Annotated[str, typer.Option(help="Factors on each axis, with commas.")] = "0.25,0.5,1,2",
    repeats: Annotated[int, typer.Option(min=1, help="Measured steps of each size; the fastest counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per size instead of tables.")] = False,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print the parts of a step at the base size, and the growth along each axis."""
    torch.set_num_threads(1)
    if child:
        sizes = [Size(**given) for given in json.loads(child)]
        measure(Size(8, sizes[0].rollouts, 64, 8), preset)  # loads what is loaded lazily
        for size in sizes:
            print(as_line(size, preset, measure(size, preset, repeats)), flush=True)
        return
    base = Size(prompts, rollouts_per_prompt, tokens, workers)
    chosen = [float(factor) for factor in factors.split(",")]
    wanted = {base: None}  # in order, each once
    if len(chosen) > 1:
        wanted.update({base.times(axis, factor): None for axis in BASE for factor in chosen})
    results = {}
    for size, costs in in_child(list(wanted), preset, repeats):
        results[size] = costs
        if as_json:
            print(as_line(size, preset, costs), flush=True)
    if as_json:
        return
    console = Console(width=120)
    console.print(f"{preset}: {prompts} prompts x {rollouts_per_prompt} rollouts x {tokens} tokens, {workers} workers")
    console.print(by_part(results[base]))
    if len(chosen) > 1:
        console.print(by_axis(base, chosen, results))
    for what, size in per_worker(base, preset).items():
        console.print(f"Ray, {what}: {size} bytes")


if __name__ == "__main__":
    typer.run(main)
