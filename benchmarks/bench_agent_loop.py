"""Rollouts per second and core through the plugin's agent loop, against verl's single-turn loop in the same run.

    python benchmarks/bench_agent_loop.py [--prompts 64] [--n 8] [--lengths 32,1024,8192] [--repeats 5]

Both go through `AgentLoopWorker._run_agent_loop` of stock verl, `hydra.utils.instantiate` per rollout included, with
verl's full configuration, the testbed's tokenizer and a server that answers at once. A batch is `prompts` x `n` tasks
started together, as the worker does it; verl's loop gets the same rows without a demonstration column. Two figures:

- `loop`: instantiate and `run`, which is what an agent loop decides.
- `with as_dict`: and the tensors that verl stores, made by verl's own code on both sides.

Time is CPU time of the process, its threads included (verl tokenises in a thread pool); runs alternate, and the fastest
of each counts. `--profile` prints where the plugin's time goes.
"""

from __future__ import annotations

import asyncio
import cProfile
import logging
import pstats
import time
from typing import Annotated, Any

import hydra
import typer
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from verl.experimental.agent_loop import agent_loop as verl_agent_loop
from verl.experimental.agent_loop import single_turn_agent_loop  # noqa: F401  registers both loops
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from data_prep.testbed.tokenizer import build_tokenizer
from verl_prefix import hydra_group
from verl_prefix.names import AGENT_NAME

SINGLE_TURN = "single_turn_agent"
PROMPT_LENGTH = 512
_VERSION = {"global_steps": 0, "min_global_steps": 0, "max_global_steps": 0}


class Server:
    """Answers at once with as many tokens as were asked for."""

    def __init__(self, response_length: int):
        self.ids, self.log_probs = [48] * response_length, [-0.5] * response_length

    async def generate(self, *, sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        await asyncio.sleep(0)
        count = sampling_params.get("max_tokens", len(self.ids))
        return TokenOutput.model_construct(
            token_ids=self.ids[:count],
            log_probs=self.log_probs[:count],
            routed_experts=None,
            num_preempted=None,
            extra_fields=dict(_VERSION),
        )


class Worker(verl_agent_loop.AgentLoopWorker):
    """verl's worker without reward, TransferQueue and model: what `_run_agent_loop` reads, and no more."""

    def __init__(self, config: DictConfig, server: Server, store: bool):
        self.config, self.llm_client, self.store = config, server, store
        self.tokenizer, self.processor, self.hf_model_type = build_tokenizer(), None, "qwen2"
        self.dataset_cls, self.tools = RLHFDataset, []

    async def _agent_loop_postprocess(self, output, validate, **kwargs):
        return output.as_dict() if self.store else output


def configuration(response_length: int) -> DictConfig:
    """verl's whole configuration with the preset, as a worker gets it."""
    hydra_group.register(hydra)
    overrides = (
        "+prefix=prefix_rft",
        f"data.max_prompt_length={PROMPT_LENGTH}",
        f"data.max_response_length={response_length}",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        "actor_rollout_ref.model.path=none",
    )
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=list(overrides))


def rows(prompts: int, n: int, response_length: int, demonstrations: bool) -> list[dict[str, Any]]:
    """What `_run_agent_loop` is given for each rollout of a batch."""
    made = []
    for prompt in range(prompts):
        row = {
            "raw_prompt": [{"role": "user", "content": f"Problem {prompt}: what is the sum of 1 to {prompt}? " * 8}],
            "uid": f"uid-{prompt}",
            "index": prompt,
            "global_steps": 1,
            "data_source": "bench",
            "reward_model": {"ground_truth": "1", "style": "rule"},
            "extra_info": {"index": prompt},
        }
        if demonstrations:
            row["demos"] = [f"{prompt}:".ljust(max(response_length // 2, 8), "0")]
        made += [{**row, "session_id": session} for session in range(n)]
    return made


async def batch(worker: Worker, agent: str, given: list[dict[str, Any]]) -> int:
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
    trajectory = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": False}
    tasks = [
        asyncio.create_task(worker._run_agent_loop(dict(sampling), trajectory, agent_name=agent, trace=False, **row))
        for row in given
    ]
    return len(await asyncio.gather(*tasks))


def cpu_seconds(worker: Worker, agent: str, given: list[dict[str, Any]]) -> float:
    """CPU time of one batch. Prompt ids are cached by `uid` and demonstrations by their text, so every batch gets new
    ones, as a trainer's do; an epoch has more demonstrations than the cache holds.
    """
    stamp = time.monotonic_ns()
    fresh = [{**row, "uid": f"{row['uid']}-{stamp}"} for row in given]
    for row in fresh:
        if "demos" in row:
            row["demos"] = [f"{text.rstrip('0')}{stamp}".ljust(len(text), "0") for text in row["demos"]]
    begin = time.process_time()
    asyncio.run(batch(worker, agent, fresh))
    return time.process_time() - begin


def measure(prompts: int, n: int, length: int, repeats: int, store: bool) -> tuple[float, float]:
    """Rollouts per CPU second: verl's single-turn loop, the plugin's."""
    config, server = configuration(length), Server(length)
    sides = {
        SINGLE_TURN: (Worker(config, server, store), rows(prompts, n, length, False)),
        AGENT_NAME: (Worker(config, server, store), rows(prompts, n, length, True)),
    }
    seconds: dict[str, list[float]] = {agent: [] for agent in sides}
    for _ in range(repeats):
        for agent, (worker, given) in sides.items():
            seconds[agent].append(cpu_seconds(worker, agent, given))
    return tuple(prompts * n / min(seconds[agent]) for agent in sides)  # type: ignore[return-value]


def profile(prompts: int, n: int, length: int) -> None:
    worker, given = Worker(configuration(length), Server(length), False), rows(prompts, n, length, True)
    cpu_seconds(worker, AGENT_NAME, given)
    profiler = cProfile.Profile()
    profiler.enable()
    cpu_seconds(worker, AGENT_NAME, given)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("cumtime").print_stats(25)


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a batch.")] = 64,
    n: Annotated[int, typer.Option(min=1, help="Rollouts a prompt; one of them has a prefix.")] = 8,
    lengths: Annotated[str, typer.Option(help="Response lengths in tokens, with commas.")] = "32,1024,8192",
    repeats: Annotated[int, typer.Option(min=1, help="Timed batches of each loop.")] = 5,
    profiled: Annotated[bool, typer.Option("--profile", help="Profile the plugin's loop instead.")] = False,
) -> None:
    """Print rollouts per second and core of both loops, and the ratio."""
    logging.disable(logging.WARNING)
    if profiled:
        for length in map(int, lengths.split(",")):
            profile(prompts, n, length)
        return
    table = Table(box=None, padding=(0, 1))
    for name in ("response", "measured", "verl single-turn /s", "prefix_agent /s", "ratio"):
        table.add_column(name, justify="right")
    for length in map(int, lengths.split(",")):
        for store in (False, True):
            theirs, ours = measure(prompts, n, length, repeats, store)
            what = "with as_dict" if store else "loop"
            table.add_row(str(length), what, f"{theirs:.0f}", f"{ours:.0f}", f"{ours / theirs:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
