"""The agent loop against a fake rollout server: what is generated from what, limits, schema, work done once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from data_prep.testbed import task
from data_prep.testbed.tokenizer import build_tokenizer
from verl_prefix.agent_loop import PrefixAgentLoop, shared_agent_loop
from verl_prefix.config import PrefixConfig
from verl_prefix.sampling import draw_prefix

LIMIT = 32
PROBLEM = task.Problem(3, "agbhci")
DEMONSTRATION = task.render_solution(PROBLEM)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


class Server:
    """Answers every request with as many `0`s as asked for, or `answer`; keeps the requests."""

    def __init__(self, answer=None, log_probs=True):
        self.requests, self.answer, self.log_probs = [], answer, log_probs

    async def generate(self, *, prompt_ids, sampling_params, request_id, priority):
        self.requests.append({"prompt_ids": prompt_ids, **sampling_params})
        ids = self.answer if self.answer is not None else [ord("0")] * sampling_params["max_tokens"]
        return SimpleNamespace(
            token_ids=ids,
            log_probs=[-1.0] * len(ids) if self.log_probs else None,
            num_preempted=None,
            routed_experts=None,
            extra_fields={"global_steps": 0, "min_global_steps": 0, "max_global_steps": 0},
        )


def parts(tokenizer, server, **prefix):
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"rollout": {"prompt_length": 16, "response_length": LIMIT}},
            "data": {},
            "prefix": OmegaConf.structured(PrefixConfig.of(prefix)),
        }
    )
    return {
        "trainer_config": DictConfigWrap(config),
        "server_manager": server,
        "tokenizer": tokenizer,
        "processor": None,
        "dataset_cls": None,
        "data_config": DictConfigWrap(config.data),
        "hf_model_type": "qwen2",
    }


def row(session=0, step=1, demos=(DEMONSTRATION,), **more):
    made = {
        "raw_prompt": [{"role": "user", "content": task.render_prompt(PROBLEM)}],
        "uid": "u",
        "session_id": session,
        "global_steps": step,
        "index": 5,
    }
    return made | ({} if demos is None else {"demos": list(demos)}) | more


def run(loop, **kwargs):
    return asyncio.run(loop.run({"temperature": 1.0, "logprobs": True}, **kwargs))


def make(tokenizer, server, **prefix):
    async def build():
        return PrefixAgentLoop(**parts(tokenizer, server, **prefix))

    return asyncio.run(build())


def test_prefix_is_cut_on_ids_and_generation_goes_on_from_it(tokenizer):
    server = Server()
    loop = make(tokenizer, server)
    ids = tokenizer.encode(DEMONSTRATION, add_special_tokens=False)
    prompt = tokenizer.apply_chat_template(row()["raw_prompt"], add_generation_prompt=True, return_dict=False)
    for step in (1, 250, 500):
        draw = draw_prefix(PrefixConfig(), step=step, row_index=5, session_id=0, demo_lens=[len(ids)])
        output = run(loop, **row(step=step))
        request = server.requests[-1]
        assert output.prefix_len == draw.prefix_len
        assert request["prompt_ids"] == prompt + ids[: draw.prefix_len]
        assert request["max_tokens"] == LIMIT - draw.prefix_len
        assert output.prompt_ids == prompt
        assert output.response_ids[: draw.prefix_len] == ids[: draw.prefix_len]
        assert output.response_mask == [1] * len(output.response_ids)
        assert output.response_logprobs == [0.0] * draw.prefix_len + [-1.0] * (LIMIT - draw.prefix_len)
        assert output.extra_fields["prefix"]["ratio"] == draw.ratio
        assert output.extra_fields["prefix"]["hit_limit"]


def test_eos_stays_inside_the_limit(tokenizer):
    longest = "0" * (LIMIT - 1)  # with its EOS, exactly the limit
    server = Server(answer=None)
    config = {"schedule": {"kind": "constant", "initial": 1.0}, "sampling": {"high": 1.0}}
    output = run(make(tokenizer, server, **config), **row(demos=[longest]))
    assert output.prefix_len == LIMIT - 2
    assert server.requests[0]["max_tokens"] == 2
    assert len(output.response_ids) == LIMIT
    ending = Server(answer=[ord("0"), tokenizer.eos_token_id])
    output = run(make(tokenizer, ending, **config), **row(demos=[longest]))
    assert output.response_ids[-1] == tokenizer.eos_token_id
    assert not output.extra_fields["prefix"]["hit_limit"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"demos": None},  # a validation row: its file has no such column
        {"demos": ()},
        {"demos": ("",)},
        {"demos": (7, None)},
        {"demos": ("0" * LIMIT,)},
        {"demos": ("12<|im_end|>34",)},
        {"session": 1},
    ],
)
def test_plain_rollouts(tokenizer, kwargs):
    server = Server()
    output = run(make(tokenizer, server), **row(**kwargs))
    assert output.prefix_len == 0
    assert server.requests[0]["max_tokens"] == LIMIT
    assert server.requests[0]["prompt_ids"] == output.prompt_ids
    assert output.extra_fields["prefix"]["demo_index"] == -1


def test_rows_have_one_schema(tokenizer):
    """TransferQueue takes the columns from the first row: a prefixed and a plain rollout have to agree."""
    loop = make(tokenizer, Server())
    fields = [run(loop, **row(**kwargs)).as_dict() for kwargs in ({}, {"session": 3}, {"demos": None})]
    assert len({frozenset(field) for field in fields}) == 1
    assert len({frozenset(field["extra_fields"]["prefix"]) for field in fields}) == 1
    stacked = list_of_dict_to_tensordict(fields)
    assert stacked["prefix_len"].dtype.is_floating_point is False
    assert stacked["prefix_len"].tolist()[1:] == [0, 0]
    assert stacked["prefix_len"].tolist()[0] > 0


def test_several_prefixed_rollouts_share_a_prefix_or_draw_their_own(tokenizer):
    sampling = {"rollouts": 3, "high": 0.95}
    schedule = {"kind": "constant", "initial": 0.05}
    for shared, distinct in ((True, 1), (False, 2)):
        loop = make(tokenizer, Server(), sampling={**sampling, "shared": shared}, schedule=schedule)
        lengths = [run(loop, **row(session=session)).prefix_len for session in range(4)]
        assert lengths[3] == 0
        assert len(set(lengths[:3])) >= distinct
        assert (len(set(lengths[:3])) == 1) == shared


def test_frozen_prefix_is_outside_the_response_mask(tokenizer):
    output = run(make(tokenizer, Server(), loss={"update_prefix": False}), **row())
    assert output.response_mask == [0] * output.prefix_len + [1] * (LIMIT - output.prefix_len)


def test_prompt_and_demonstration_are_tokenised_once_for_a_group(tokenizer):
    server, calls = Server(), []
    loop = make(tokenizer, server, sampling={"rollouts": 8})
    build = loop.continuous_token_builder.build_initial_tokens
    loop.continuous_token_builder.build_initial_tokens = lambda *a, **k: calls.append(1) or build(*a, **k)
    for session in range(8):
        run(loop, **row(session=session))
    assert len(calls) == 1
    assert loop.demonstrations.tokenised == 1


def test_without_rollout_log_probs(tokenizer):
    assert run(make(tokenizer, Server(log_probs=False)), **row()).response_logprobs is None


def test_a_worker_builds_one_agent_loop(tokenizer):
    async def build(server):
        return shared_agent_loop(**parts(tokenizer, server))

    first, second = Server(), Server()
    assert asyncio.run(build(first)) is asyncio.run(build(first))
    assert asyncio.run(build(second)) is not asyncio.run(build(first))
