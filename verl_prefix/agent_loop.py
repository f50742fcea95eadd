"""Seam: the agent loop `prefix_agent`. One rollout: prompt, maybe a demonstration's prefix, the policy's continuation.

The prefix stands at the head of the response, cut on token ids. Its length travels as the column `prefix_len`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any
from uuid import uuid4

import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
from verl.utils.profiler import simple_timer
from verl.utils.rollout_trace import rollout_trace_op

from verl_prefix.config import PrefixConfig
from verl_prefix.demonstrations import DemonstrationTokenizer, offered
from verl_prefix.sampling import PrefixDraw, cut_prefix, prefix_record, wants_prefix

#: key of the rollout's prefix record in verl's `extra_fields`
RECORD = "prefix"
#: column (2,) that the trainer adds to the prompts for `prefix.sampling.law=adaptive`
INTERVAL = "prefix_interval"
_CACHED_PROMPTS = 256


class PrefixAgentLoopOutput(AgentLoopOutput):
    """verl's output with the prefix length as a column of its own, so that it reaches trainer and loss as a tensor."""

    prefix_len: int = 0

    def as_dict(self) -> dict[str, Any]:
        if self.reward_score is None and "reward_extra_info" in self.extra_fields:
            # verl would store the row without its reward, and fail on the whole batch; raised here, it drops the row.
            raise TypeError("the reward function returned None for the score of this rollout")
        output = super().as_dict()
        # Every row has to have the same columns; the first one decides which.
        output["prefix_len"] = torch.tensor(self.prefix_len, dtype=torch.int64)
        return output


class PrefixAgentLoop(AgentLoopBase):
    """Single-turn rollout with an optional prefix. One instance serves every rollout of its worker.

    Rows without a usable demonstration, sessions beyond `prefix.sampling.rollouts` and validation rows (whose file has
    no demonstration column) are plain rollouts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prefix_config = PrefixConfig.of(self.config.get("prefix"))
        # OmegaConf looks a key up in tens of microseconds; these are asked for in every rollout.
        self.response_length: int = self.rollout_config.response_length
        self.full_determinism = bool(self.rollout_config.get("full_determinism"))
        self.demonstrations = DemonstrationTokenizer(self.tokenizer, self.response_length)
        self._prompts: OrderedDict[str, list[int]] = OrderedDict()

    @rollout_trace_op
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
        if draw is not None and draw.is_whole:
            return self._whole(kwargs, prompt_ids, draw, prefix_ids)
        metrics: dict[str, Any] = {}
        room = self.response_length - len(prefix_ids)  # so that the policy's EOS always fits
        with simple_timer("generate_sequences", metrics):
            generated = await self.server_manager.generate(
                request_id=f"det-{priority}" if self.full_determinism else uuid4().hex,
                prompt_ids=prompt_ids + prefix_ids,
                sampling_params={**sampling_params, "max_tokens": room},
                priority=int(priority),
            )
        metrics["num_preempted"] = generated.num_preempted if generated.num_preempted is not None else -1

        # verl's TensorRT-LLM server goes by a limit of its own, which knows of no prefix.
        continuation = list(generated.token_ids[:room])
        response_ids = prefix_ids + continuation
        hit_limit = len(response_ids) >= self.response_length and response_ids[-1] != self.tokenizer.eos_token_id
        return self._output(
            prompt_ids,
            response_ids,
            prefix_len=len(prefix_ids),
            # verl's asynchronous client answers [] where none were asked for
            log_probs=list(generated.log_probs[:room]) if generated.log_probs else None,
            record=prefix_record(draw, hit_limit=hit_limit, no_demonstration=draw is None and self._wanted(kwargs)),
            routed_experts=generated.routed_experts,
            metrics=metrics,
            extra_fields=generated.extra_fields,
        )

    def _whole(
        self, row: dict[str, Any], prompt_ids: list[int], draw: PrefixDraw, response_ids: list[int]
    ) -> AgentLoopOutput:
        """The demonstration and its EOS as the response. The rollout engine is not asked."""
        version = int(row["global_steps"]) - 1  # as if sampled from the current weights: verl counts staleness by it
        return self._output(
            prompt_ids,
            response_ids,
            prefix_len=len(response_ids),
            log_probs=[] if self.rollout_config.calculate_log_probs else None,
            record=prefix_record(draw, hit_limit=False),
            routed_experts=None,
            metrics={"generate_sequences": 0.0, "num_preempted": -1},
            extra_fields={"global_steps": version, "min_global_steps": version, "max_global_steps": version},
        )

    def _output(
        self,
        prompt_ids: list[int],
        response_ids: list[int],
        *,
        prefix_len: int,
        log_probs: list[float] | None,
        record: dict[str, Any],
        metrics: dict[str, Any],
        routed_experts: Any,
        extra_fields: dict[str, Any],
    ) -> AgentLoopOutput:
        update_prefix = int(self.prefix_config.loss.update_prefix)
        # Not validated again: the ids are the tokenizer's and verl's own `TokenOutput`s, and looking at each of
        # thousands of tokens in four lists costs more than the rest of this method.
        return PrefixAgentLoopOutput.model_construct(
            prompt_ids=list(prompt_ids),
            response_ids=response_ids,
            response_mask=[update_prefix] * prefix_len + [1] * (len(response_ids) - prefix_len),
            # The rollout engine did not sample the prefix; the trainer puts the old policy's values here.
            response_logprobs=None if log_probs is None else [0.0] * prefix_len + list(log_probs),
            num_turns=2,
            metrics=AgentLoopMetrics(**metrics),
            routed_experts=routed_experts,
            extra_fields={**extra_fields, "turn_scores": [], "tool_rewards": [], RECORD: record},
            prefix_len=prefix_len,
        )

    def _prompt_ids(self, row: dict[str, Any]) -> list[int]:
        """Prompt ids, built once per prompt of the batch. The n rollouts of a group share them."""
        uid = row["uid"]
        if uid not in self._prompts:
            ids = self.continuous_token_builder.build_initial_tokens(list(row["raw_prompt"]))
            self._prompts[uid] = self._cap_text_prompt_length(list(ids))
            if len(self._prompts) > _CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        return self._prompts[uid]

    def _wanted(self, row: dict[str, Any]) -> bool:
        """Whether this rollout was to have a prefix."""
        return wants_prefix(
            self.prefix_config,
            step=int(row["global_steps"]),
            row_index=row["index"],
            session_id=int(row["session_id"]),
        )

    def _prefix(self, row: dict[str, Any]) -> tuple[PrefixDraw | None, list[int]]:
        columns = self.prefix_config.demonstrations
        marks = row.get(columns.correct_column)
        return cut_prefix(
            self.prefix_config,
            self.demonstrations,
            offered(row.get(columns.column), marks),
            steps=offered(row.get(columns.steps_column), marks),
            step=int(row["global_steps"]),
            row_index=row["index"],
            session_id=int(row["session_id"]),
            interval=tuple(map(float, row[INTERVAL])) if INTERVAL in row else (0.0, 1.0),
        )


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
