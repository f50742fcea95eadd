"""Seam: the agent loop `prefix_agent`. One rollout: prompt, maybe a demonstration's prefix, the policy's continuation.

The prefix stands at the head of the response, cut on token ids. Its length travels as the column `prefix_len`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any
from uuid import uuid4

import torch
from verl.experimental.agent_loop import agent_loop as verl_agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.utils.profiler import simple_timer

from verl_prefix.config import PrefixConfig
from verl_prefix.demonstrations import DemonstrationTokenizer
from verl_prefix.names import AGENT_NAME
from verl_prefix.sampling import PrefixDraw, draw_prefix

#: key of the rollout's prefix record in verl's `extra_fields`
RECORD = "prefix"
_CACHED_PROMPTS = 256


class PrefixAgentLoopOutput(AgentLoopOutput):
    """verl's output with the prefix length as a column of its own, so that it reaches trainer and loss as a tensor."""

    prefix_len: int = 0

    def as_dict(self) -> dict[str, Any]:
        output = super().as_dict()
        # Every row has to have the same columns; the first one decides which.
        output["prefix_len"] = torch.tensor(self.prefix_len, dtype=torch.int64)
        return output


def prefix_record(draw: PrefixDraw | None, *, hit_limit: bool) -> dict[str, Any]:
    """What the trainer and the rollout log want to know of one rollout's prefix. Equal keys in every row."""
    empty = {"demo_index": -1, "demo_len": 0, "low": math.nan, "high": math.nan, "ratio": 0.0}
    drawn = empty if draw is None else {key: getattr(draw, key) for key in empty}
    return {**drawn, "hit_limit": hit_limit}


class PrefixAgentLoop(AgentLoopBase):
    """Single-turn rollout with an optional prefix. One instance serves every rollout of its worker.

    Rows without a usable demonstration, sessions beyond `prefix.sampling.rollouts` and validation rows (whose file has
    no demonstration column) are plain rollouts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prefix_config = PrefixConfig.of(self.config.get("prefix"))
        self.response_length: int = self.rollout_config.response_length
        self.demonstrations = DemonstrationTokenizer(self.tokenizer, self.response_length)
        self._prompts: OrderedDict[str, list[int]] = OrderedDict()

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """One rollout.

        Args:
            sampling_params: verl's sampling parameters.
            kwargs: the row's columns, and verl's `raw_prompt`, `uid`, `session_id`, `global_steps`, `index`.

        Returns:
            Output whose `response_ids` are prefix then continuation, within `rollout.response_length`, EOS included.
        """
        prompt_ids = self._prompt_ids(kwargs)
        draw, prefix_ids = self._prefix(kwargs)
        metrics: dict[str, Any] = {}
        with simple_timer("generate_sequences", metrics):
            generated = await self.server_manager.generate(
                request_id=f"det-{priority}" if self.rollout_config.get("full_determinism") else uuid4().hex,
                prompt_ids=prompt_ids + prefix_ids,
                # The prefix counts against the limit, so that the policy's EOS always fits.
                sampling_params={**sampling_params, "max_tokens": self.response_length - len(prefix_ids)},
                priority=int(priority),
            )
        metrics["num_preempted"] = generated.num_preempted if generated.num_preempted is not None else -1

        continuation = list(generated.token_ids)
        response_ids = prefix_ids + continuation
        hit_limit = len(response_ids) >= self.response_length and response_ids[-1] != self.tokenizer.eos_token_id
        log_probs = None
        if generated.log_probs is not None:
            # The rollout engine did not sample the prefix; the trainer puts the old policy's values here.
            log_probs = [0.0] * len(prefix_ids) + list(generated.log_probs)
        output = PrefixAgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_mask=[int(self.prefix_config.loss.update_prefix)] * len(prefix_ids) + [1] * len(continuation),
            response_logprobs=log_probs,
            routed_experts=generated.routed_experts,
            num_turns=2,
            metrics=metrics,
            extra_fields={**generated.extra_fields, "turn_scores": [], "tool_rewards": []},
            prefix_len=len(prefix_ids),
        )
        output.extra_fields[RECORD] = prefix_record(draw, hit_limit=hit_limit)
        return output

    def _prompt_ids(self, row: dict[str, Any]) -> list[int]:
        """Prompt ids, built once per prompt of the batch. The n rollouts of a group share them."""
        uid = row["uid"]
        if uid not in self._prompts:
            ids = self.continuous_token_builder.build_initial_tokens(list(row["raw_prompt"]))
            self._prompts[uid] = self._cap_text_prompt_length(list(ids))
            if len(self._prompts) > _CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        return self._prompts[uid]

    def _prefix(self, row: dict[str, Any]) -> tuple[PrefixDraw | None, list[int]]:
        config, session = self.prefix_config, int(row["session_id"])
        if session >= config.sampling.rollouts:
            return None, []
        demonstrations = self.demonstrations.usable(row.get(config.demonstrations.column))
        if not demonstrations:
            return None, []
        draw = draw_prefix(
            config,
            step=int(row["global_steps"]),
            row_index=row["index"],
            session_id=session,
            demo_lens=[len(ids) for ids in demonstrations],
        )
        return draw, [] if draw is None else list(demonstrations[draw.demo_index][: draw.prefix_len])


_instances: dict[int, tuple[Any, PrefixAgentLoop]] = {}


def shared_agent_loop(**kwargs: Any) -> PrefixAgentLoop:
    """The worker's agent loop. verl instantiates one per rollout; building the chat-template machinery anew each time
    costs more than a short rollout, and an agent loop keeps no state of a rollout, so one per worker serves them all.
    """
    client = kwargs["server_manager"]
    if id(client) not in _instances:
        # The client is kept with its loop, so that its id is not given to another one.
        _instances[id(client)] = (client, PrefixAgentLoop(**kwargs))
    return _instances[id(client)][1]


def register() -> None:
    """Register `prefix_agent` in verl's registry of agent loops (idempotent)."""
    target = f"{__name__}.{shared_agent_loop.__name__}"
    verl_agent_loop._agent_loop_registry[AGENT_NAME] = {"_target_": target}
