"""The agent loop against a fake rollout server: what is generated from what, limits, schema, work done once."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop import agent_loop as verl_agent_loop
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.tensordict_utils import get_tensordict, list_of_dict_to_tensordict

from data_prep.testbed import task
from data_prep.testbed.tokenizer import build_tokenizer
from verl_prefix.agent_loop import PrefixAgentLoop, PrefixAgentLoopOutput, shared_agent_loop
from verl_prefix.config import PrefixConfig
from verl_prefix.names import AGENT_NAME
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
            "actor_rollout_ref": {
                "rollout": {"prompt_length": 16, "response_length": LIMIT, "calculate_log_probs": False}
            },
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


def test_without_log_probs_there_is_no_column_whichever_way_the_engine_says_so(tokenizer):
    server = Server()
    loop = make(tokenizer, server)
    for none in (None, []):
        server.generate = partial(_answer, none)
        output = run(loop, **row())
        assert output.prefix_len > 0
        assert output.response_logprobs is None


async def _answer(log_probs, *, sampling_params, **_):
    ids = [ord("0")] * sampling_params["max_tokens"]
    return SimpleNamespace(token_ids=ids, log_probs=log_probs, num_preempted=0, routed_experts=None, extra_fields={})


def test_an_engine_that_generates_more_than_asked_for_is_cut_at_the_limit(tokenizer):
    """verl's TensorRT-LLM server counts from the longest prompt, not from the end of the prefix."""
    output = run(make(tokenizer, Server(answer=[ord("0")] * (LIMIT + 5))), **row())
    assert output.prefix_len > 0
    assert len(output.response_ids) == len(output.response_mask) == len(output.response_logprobs) == LIMIT
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


def test_verl_reaches_the_shared_loop_without_hydra_and_other_loops_through_it(tokenizer, monkeypatch):
    """The same object, from the same arguments, as hydra itself would give."""
    entry = verl_agent_loop._agent_loop_registry[AGENT_NAME]
    given = parts(tokenizer, Server())

    async def build(config):
        return hydra.utils.instantiate(config=config, tools=None, **given)

    by_hydra = asyncio.run(build(dict(entry)))  # equal, but not the entry itself
    assert isinstance(by_hydra, PrefixAgentLoop)

    def refuse(*args, **kwargs):
        raise AssertionError("hydra was asked")

    monkeypatch.setattr("hydra._internal.instantiate._instantiate2._instantiate_impl", refuse)
    assert asyncio.run(build(entry)) is by_hydra
    for other in (dict(entry), verl_agent_loop._agent_loop_registry["single_turn_agent"]):
        with pytest.raises(AssertionError, match="hydra was asked"):
            asyncio.run(build(other))


def test_an_output_is_what_a_validated_one_would_be(tokenizer):
    """The output is built without pydantic's validation: it has to pass it all the same, and store the same columns."""
    loop = make(tokenizer, Server())
    for kwargs in ({}, {"session": 1}):
        output = run(loop, **row(**kwargs))
        validated = PrefixAgentLoopOutput.model_validate(output.model_dump(exclude_unset=True))
        assert validated == output
        assert validated.model_fields_set == output.model_fields_set
        columns, expected = output.as_dict(), validated.as_dict()
        assert set(columns) == set(expected)
        for name, column in expected.items():
            if isinstance(column, torch.Tensor):
                assert column.dtype == columns[name].dtype
                assert column.equal(columns[name])


def test_rollouts_of_a_group_share_no_list(tokenizer):
    loop = make(tokenizer, Server())
    first, second = run(loop, **row(session=1)), run(loop, **row(session=2))
    first.prompt_ids.append(-1)
    assert second.prompt_ids[-1] != -1
    assert run(loop, **row(session=3)).prompt_ids == second.prompt_ids


def test_a_whole_demonstration_asks_the_engine_nothing(tokenizer):
    server = Server()
    loop = make(tokenizer, server, sampling={"law": "whole"})
    output = run(loop, **row(step=7))
    ids = tokenizer.encode(DEMONSTRATION, add_special_tokens=False)
    assert server.requests == []
    assert output.response_ids == [*ids, tokenizer.eos_token_id]
    assert output.prefix_len == len(output.response_ids) == len(output.response_mask)
    assert output.response_logprobs is None  # this configuration does not ask for them
    assert output.extra_fields["min_global_steps"] == output.extra_fields["max_global_steps"] == 6
    assert not output.extra_fields["prefix"]["hit_limit"]
    run(loop, **row(session=1))
    assert len(server.requests) == 1


def test_a_whole_demonstration_has_the_schema_of_a_rollout(tokenizer):
    loop = make(tokenizer, Server(log_probs=True), sampling={"law": "whole"})
    loop.rollout_config.calculate_log_probs = True
    whole, plain = (run(loop, **row(session=session)).as_dict() for session in (0, 1))
    assert set(whole) == set(plain)
    assert set(whole["extra_fields"]) == set(plain["extra_fields"])
    assert set(whole["metrics"]) == set(plain["metrics"])
    assert len(whole["rollout_log_probs"]) == len(whole["responses"])


def test_the_prompts_own_interval_bounds_the_prefix(tokenizer):
    loop = make(tokenizer, Server(), sampling={"law": "adaptive", "rollouts": 2, "shared": True})
    length = len(tokenizer.encode(DEMONSTRATION, add_special_tokens=False))
    for low, high in ((0.0, 0.3), (0.6, 0.7)):
        for step in range(1, 20):
            outputs = [run(loop, **row(session=s, step=step, prefix_interval=[low, high])) for s in (0, 1)]
            assert outputs[0].prefix_len == outputs[1].prefix_len
            assert int(low * length) <= outputs[0].prefix_len <= high * length


def test_a_demonstration_that_is_marked_wrong_is_never_drawn(tokenizer):
    loop = make(tokenizer, Server())
    other = DEMONSTRATION[::-1]
    for step in range(1, 12):
        output = run(loop, **row(step=step, demos=[other, DEMONSTRATION], demos_correct=[False, True]))
        ids = tokenizer.encode(DEMONSTRATION, add_special_tokens=False)
        assert output.response_ids[: output.prefix_len] == ids[: output.prefix_len]
    assert run(loop, **row(demos_correct=[False])).prefix_len == 0


def test_hints_end_with_a_step(tokenizer):
    """Columns as verl hands them to the loop, the steps of a wrong demonstration before those of the right one."""
    loop = make(
        tokenizer,
        Server(),
        schedule={"kind": "constant", "initial": 0.5},
        sampling={"law": "binomial", "at_steps": True, "parts": 5},
    )
    columns = {
        "demos": [[DEMONSTRATION[::-1], DEMONSTRATION]],
        "demos_correct": [[False, True]],
        "demos_steps": [[[1], [2, 7, len(DEMONSTRATION)]]],
    }
    collated = get_tensordict(collate_fn([{name: cells[0] for name, cells in columns.items()}]))
    passed = {
        name: collated[name][0].data if hasattr(collated[name][0], "data") else collated[name][0] for name in columns
    }
    ids = tokenizer.encode(DEMONSTRATION, add_special_tokens=False)
    seen = set()
    for step in range(1, 30):
        output = run(loop, **row(step=step, **passed))
        assert output.response_ids[: output.prefix_len] == ids[: output.prefix_len]
        seen.add(output.prefix_len)
    assert seen == {0, 2, 7, len(ids) - 1}
