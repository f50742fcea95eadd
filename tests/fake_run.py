"""One training step in this process: verl's own driver, agent loop worker, replay buffer and reward manager between a
fake store, a fake rollout server and fake workers. Faults are injected into the fakes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transfer_queue
from tensordict import NonTensorStack, TensorDict
from tests_support import compose_in_process
from transfer_queue import KVBatchMeta
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
from verl.utils.dataset.rl_dataset import collate_fn
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

from data_prep.testbed import task
from data_prep.testbed.tokenizer import build_tokenizer

PROMPTS, N, LIMIT = 2, 4, 32
PROBLEMS = [task.Problem(3, "agbhci"), task.Problem(2, "abcdef")]
TEXTS = [task.render_prompt(problem) for problem in PROBLEMS]


class Store:
    """TransferQueue's key-value functions on a dictionary: {partition: {key: (tag, fields)}}."""

    def __init__(self, monkeypatch):
        self.partitions = defaultdict(dict)
        for name in ("kv_list", "kv_clear", "kv_batch_put", "kv_batch_get"):
            monkeypatch.setattr(transfer_queue, name, getattr(self, name))
        monkeypatch.setattr(transfer_queue, "async_kv_put", self.async_kv_put)
        monkeypatch.setattr(transfer_queue, "async_kv_batch_put", self.async_kv_batch_put)

    def kv_list(self, partition_id=None):
        return {p: {key: dict(tag) for key, (tag, _) in rows.items()} for p, rows in self.partitions.items()}

    def kv_clear(self, keys, partition_id):
        for key in keys:
            del self.partitions[partition_id][key]

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        for place, key in enumerate(keys):
            tag, columns = self.partitions[partition_id].setdefault(key, ({}, {}))
            tag.update(tags[place] if tags else {})
            for name in fields.keys() if fields is not None else ():
                value = fields[name][place]
                columns[name] = getattr(value, "data", value) if not isinstance(value, torch.Tensor) else value
        tags = [self.partitions[partition_id][key][0] for key in keys]
        return KVBatchMeta(partition_id=partition_id, keys=list(keys), tags=tags)

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        rows = [self.partitions[partition_id][key][1] for key in keys]
        found = {name: [row[name] for row in rows] for name in select_fields or rows[0] if name in rows[0]}
        return TensorDict({name: _column(values) for name, values in found.items()}, batch_size=len(keys))

    async def async_kv_put(self, key, partition_id, fields=None, tag=None):
        self.kv_batch_put([key], partition_id, fields, [tag])

    async def async_kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        self.kv_batch_put(keys, partition_id, fields, tags)


def _column(values):
    if not isinstance(values[0], torch.Tensor):
        return NonTensorStack(*values)
    if values[0].dim() == 0:
        return torch.stack(values)
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)


class Request(NamedTuple):
    """prompt: its number. plain: the rollout has no prefix. first: of this prompt."""

    prompt: int
    plain: bool
    first: bool


class Server:
    """The rollout engine.

    Attributes:
        answer: Request -> text, or None for no token at all; or it raises.
        log_prob: of each token.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.answer, self.log_prob, self.requests = tokenizer, lambda request: "0", -1.0, []

    async def generate(self, *, prompt_ids, sampling_params, request_id, priority):
        room = sampling_params["max_tokens"]
        prompt = next(i for i, text in enumerate(TEXTS) if text in self.tokenizer.decode(prompt_ids))
        request = Request(prompt, plain=room == LIMIT, first=all(r.prompt != prompt for r in self.requests))
        self.requests.append(request)
        text = self.answer(request)
        ids = [] if text is None else [*self.tokenizer.encode(text), self.tokenizer.eos_token_id][:room]
        return SimpleNamespace(
            token_ids=ids,
            log_probs=[self.log_prob] * len(ids),
            num_preempted=None,
            routed_experts=None,
            extra_fields={"global_steps": 0, "min_global_steps": 0, "max_global_steps": 0},
        )


class Workers:
    """The training engine, of one worker and one mini-batch, whose update is verl's own FSDP code on one weight.

    Attributes:
        log_prob, entropy: what it computes for one token of the batch; -1 and 0.5 for the others.
        loss: factor of the loss.
        updates: how many it was asked for.
        trained: columns of the last batch, by the rollout's key.
    """

    _dispatch_info = {"actor": [0]}

    def __init__(self, store):
        self.store, self.log_prob, self.entropy, self.loss, self.updates = store, -1.0, 0.5, 1.0, 0
        self.module = torch.nn.Linear(1, 1, bias=False)

    def compute_log_prob(self, batch):
        lengths = [len(self.store.partitions[batch.partition_id][key][1]["input_ids"]) for key in batch.keys]
        columns = {}
        for name, usual, last in (("log_probs", -1.0, self.log_prob), ("entropy", 0.5, self.entropy)):
            rows = [torch.full((length,), usual) for length in lengths]
            rows[0][-2] = last  # entry t predicts token t + 1: the last one
            columns[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return self.store.kv_batch_put(batch.keys, batch.partition_id, TensorDict(columns, batch_size=len(batch)))

    def update_actor(self, batch):
        self.updates += 1
        self.trained = {key: self.store.partitions[batch.partition_id][key][1] for key in batch.keys}
        optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        loss = self.module.weight.sum() * self.loss
        loss.backward()
        engine = SimpleNamespace(
            module=self.module,
            optimizer=optimizer,
            optimizer_config=SimpleNamespace(clip_grad=1.0),
            scaler=None,
            _qat_enabled=False,
        )
        norm = FSDPEngine.optimizer_step(engine)
        return {"metrics": {"grad_norm": [norm], "pg_loss": [loss.item()], "mfu": [0.0]}}


class FakeRun:
    """A run that has not taken a step yet.

    Args:
        score: reward function, called as verl calls it.
        rows: changes to the training rows, one dict per prompt.
        overrides: of verl's configuration.
    """

    def __init__(self, monkeypatch, folder, *overrides, preset="prefix_rft", score=None, rows=({}, {})):
        self.tokenizer = build_tokenizer()
        self.store = Store(monkeypatch)
        self.server, self.workers = Server(self.tokenizer), Workers(self.store)
        self.score = score or (lambda **_: {"score": 1.0, "acc": 1.0})
        self.config = compose_in_process(
            f"+prefix={preset}",
            f"data.train_batch_size={PROMPTS}",
            f"data.max_response_length={LIMIT}",
            "data.max_prompt_length=16",
            f"actor_rollout_ref.rollout.n={N}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
            f"trainer.rollout_data_dir={folder}",
            *overrides,
        )
        trainer = self.trainer = get_trainer_cls(self.config.trainer.v1.trainer_mode)(self.config)
        trainer.tokenizer, trainer.global_steps = self.tokenizer, 1
        trainer.timing_raw, trainer.curr_step_profile = {}, False
        trainer._init_dump_executor()
        chunk = self.config.data.get("gen_batch_size") or PROMPTS
        data = [
            {
                "raw_prompt": [{"role": "user", "content": task.render_prompt(problem)}],
                "index": number,
                "demos": [task.render_solution(problem)],
                "data_source": "test",
                "reward_model": {"ground_truth": "0"},
                "extra_info": {},
                **rows[number],
            }
            for number, problem in enumerate(PROBLEMS)
        ]
        trainer.train_dataloader_it = (
            collate_fn(data[start : start + chunk]) for start in itertools.cycle(range(0, PROMPTS, chunk))
        )
        trainer.agent_loop_manager = SimpleNamespace(generate_sequences=self._generate)
        trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[self])
        trainer.checkpoint_manager = SimpleNamespace(sleep_replicas=lambda: None, abort_replicas=lambda: None)
        trainer.actor_rollout_wg = self.workers

    @property
    def compute_score(self):
        """The reward worker's handle."""
        return SimpleNamespace(remote=self._compute_score)

    async def _compute_score(self, data):
        return await NaiveRewardManager(self.config, self.tokenizer, self.score).run_single(data)

    def _generate(self, batch):
        async def until_done():
            worker = object.__new__(AgentLoopWorkerTQ.__ray_metadata__.modified_class)
            vars(worker).update(
                config=self.config,
                llm_client=self.server,
                tokenizer=self.tokenizer,
                processor=None,
                hf_model_type="qwen2",
                dataset_cls=None,
                tools=None,
                mm_processor_kwargs={},
                distillation_enabled=False,
                reward_loop_worker_handles=[self],
                background_tasks=set(),
            )
            await worker.generate_sequences(batch)
            await asyncio.gather(*worker.background_tasks)

        asyncio.run(until_done())

    def step(self, save: bool = False) -> dict:
        """One step of `fit`, up to its metrics; a checkpoint, if asked for; and the rollout log, if there is one."""
        metrics: dict = {}
        self.trainer.on_step_begin()
        batch = self.trainer.step(metrics, self.trainer.timing_raw)
        if save:
            self.trainer._save_checkpoint()
        if folder := self.config.trainer.rollout_data_dir:
            self.trainer._log_rollout_data(batch, {}, folder)
            for future in self.trainer._dump_futures:
                future.exception()  # wait; what it raises is raised at the next step
        self.store.kv_clear(batch.keys, batch.partition_id)
        self.trainer.global_steps += 1
        return metrics
