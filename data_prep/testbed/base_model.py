"""The base model of the testbed: a 0.16 M Qwen2 that knows how to write a solution and not the facts in it.

Pretraining sees prompt and response exactly as verl will present them (chat template, response, end of turn), with the
loss on the response. Unknown operations get uniform results, so the model learns their format and nothing else. Two
phases, each ended by what the model can do and never by a step count:

1. learn: until at temperature 1 more than `learn_above` of the easy problems come out right, and unknown results follow
   the misconception (`PretrainConfig.habit`) with at least `habit_above` of its share;
2. blur: with a share `noise` of all known results made wrong, until easy is within `easy_range`. That leaves
   reinforcement learning something to gain.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from data_prep.testbed import task
from data_prep.testbed.grader import compute_score
from data_prep.testbed.tokenizer import assert_round_trip, build_tokenizer, prompt_ids, token_ids

Report = Callable[[str, int, float, dict[str, float] | None], None]
"""Called as report(phase, step, loss, accuracy or None)."""


class GateNotReachedError(RuntimeError):
    """Pretraining used up its steps without reaching the wanted accuracy.

    Usual causes: settings other than the defaults (in particular tied embeddings or `initializer_range=0.02`, with
    which this model learns nothing), or a learning rate too high for the seed.
    """


@dataclass(frozen=True)
class PretrainConfig:
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    hard_share: float = 0.5
    """Share of pretraining problems with unknown operations."""
    habit: float = 0.4
    """Share of unknown results that follow a fixed misconception. With none, the model learns to ignore the argument of
    an unknown operation, and no method gets it to use a demonstrated fact on another problem."""
    learn_above: float = 0.9
    habit_above: float = 0.9
    """Without this gate it is chance how far the misconception was learned, and with it how fast any method learns."""
    learn_max_steps: int = 3000
    noise: float = 0.2
    blur_min_steps: int = 100
    blur_max_steps: int = 600
    easy_range: tuple[float, float] = (0.15, 0.35)
    hard_below: float = 0.01
    check_every: int = 50
    check_problems: int = 256


def model_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        dtype="float32",
    )


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(model_config(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    return model


def sequence_ids(tokenizer: PreTrainedTokenizerBase, problem: task.Problem, results: list[int]) -> list[int]:
    """Prompt and response as verl presents them. All sequences are equally long, so a batch needs no padding."""
    response = token_ids(tokenizer, task.render_solution(problem, results))
    return prompt_ids(tokenizer, task.render_prompt(problem)) + response + [tokenizer.eos_token_id]


class Sequences:
    """Pretraining batches without the cost of a chat template per row: tokenised as one text, checked once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random, held_back: Collection[task.Problem]):
        self.tokenizer, self.rng, self.held_back = tokenizer, rng, held_back
        message = [{"role": "user", "content": "@"}]
        rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        self.head, self.tail = rendered.split("@")
        problem = task.sample_problem(rng, "hard")
        if self.encode([(problem, task.solve(problem))]) != [sequence_ids(tokenizer, problem, task.solve(problem))]:
            raise AssertionError("Tokenising prompt and response together differs from tokenising them apart.")

    def encode(self, solved: list[tuple[task.Problem, list[int]]]) -> list[list[int]]:
        end = self.tokenizer.eos_token
        texts = [
            f"{self.head}{task.render_prompt(problem)}{self.tail}{task.render_solution(problem, results)}{end}"
            for problem, results in solved
        ]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def batch(self, size: int, hard_share: float, noise: float, habit: float) -> torch.Tensor:
        solved = []
        while len(solved) < size:
            problem = task.sample_problem(self.rng, "hard" if self.rng.random() < hard_share else "easy")
            if problem not in self.held_back:
                solved.append((problem, task.imitate(problem, self.rng, noise, habit)))
        return torch.tensor(self.encode(solved))


def response_loss(model: Qwen2ForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the response tokens, the end of turn included."""
    first = ids_BT.shape[1] - task.RESPONSE_TOKENS
    hidden_BTD = model.model(input_ids=ids_BT[:, :-1]).last_hidden_state[:, first - 1 :]
    logits_BTV = model.lm_head(hidden_BTD)
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, first:].flatten())


@torch.no_grad()
def sample(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: list[task.Problem], seed: int
) -> list[str]:
    """One response per problem at temperature 1, as verl samples them."""
    was_training = model.training
    model.eval()
    ids_BT = torch.tensor([prompt_ids(tokenizer, task.render_prompt(problem)) for problem in problems])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=task.RESPONSE_TOKENS,
        )
    model.train(was_training)
    return tokenizer.batch_decode(out_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)


def accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: list[task.Problem], seed: int, tries: int = 1
) -> float:
    """Share of right answers at temperature 1, over `tries` responses to each problem."""
    problems = problems * tries
    responses = sample(model, tokenizer, problems, seed)
    graded = [compute_score(None, text, task.ground_truth(p)) for text, p in zip(responses, problems, strict=True)]
    return sum(result["score"] for result in graded) / len(graded)


@torch.no_grad()
def misconception_share(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, count: int) -> float:
    """Mean probability of the misconception over the unknown results of `count` hard problems, each after a chain with
    random unknown results."""
    rng = random.Random(f"{seed}/misconceptions")
    problems = task.sample_distinct(rng, "hard", count)
    chains = [task.imitate(problem, rng) for problem in problems]
    ids_BT = torch.tensor([sequence_ids(tokenizer, *pair) for pair in zip(problems, chains, strict=True)])
    first = ids_BT.shape[1] - task.RESPONSE_TOKENS
    probability_BTV = torch.softmax(model(input_ids=ids_BT).logits, dim=-1)
    digit = {value: token_ids(tokenizer, task.DIGITS[value])[0] for value in range(task.MODULUS)}
    found = []
    for probability_TV, problem, chain in zip(probability_BTV, problems, chains, strict=True):
        for i, (operation, value) in enumerate(zip(problem.operations, [problem.start, *chain], strict=False)):
            if operation in task.UNKNOWN:  # the token before a result is its operation
                found.append(probability_TV[first + 2 * i, digit[task.misconception(operation, value)]].item())
    return sum(found) / len(found)


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    config: PretrainConfig | None = None,
    held_back: Collection[task.Problem] = (),
    report: Report | None = None,
) -> dict[str, Any]:
    """Train `model` in place through both phases; no problem in `held_back` is ever shown. Returns what happened."""
    config = config or PretrainConfig()
    report = report or (lambda *_: None)
    rng = random.Random(f"{seed}/pretrain")
    sequences = Sequences(tokenizer, rng, held_back)
    checks = {
        kind: task.sample_distinct(random.Random(f"{seed}/check/{kind}"), kind, config.check_problems, held_back)
        for kind in task.KINDS
    }
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    history: dict[str, Any] = {}
    # the uniform results hit it by chance
    wanted_habit = config.habit_above * (config.habit + (1 - config.habit) / task.MODULUS)

    def run(phase: str, noise: float, first_check: int, max_steps: int, done: Callable[[dict[str, float]], bool]):
        measured: dict[str, float] = {}
        for step in range(1, max_steps + 1):
            rate = min(1.0, step / config.warmup_steps) if phase == "learn" else 0.3
            for group in optimizer.param_groups:
                group["lr"] = rate * config.learning_rate
            loss = response_loss(model, sequences.batch(config.batch_size, config.hard_share, noise, config.habit))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            report(phase, step, loss.item(), None)
            if step >= first_check and step % config.check_every == 0:
                measured = {kind: accuracy(model, tokenizer, checks[kind], seed + step) for kind in task.KINDS}
                measured["misconception"] = misconception_share(model, tokenizer, seed, config.check_problems)
                report(phase, step, loss.item(), measured)
                if done(measured):
                    history[phase] = {"steps": step, **measured}
                    return
        raise GateNotReachedError(
            f"Phase {phase} ended after {max_steps} steps with {measured}; wanted: easy above {config.learn_above} and "
            f"misconception at least {wanted_habit:.2f} in phase learn, then easy in {config.easy_range} and hard at "
            f"most {config.hard_below} in phase blur. Try another seed, or restore the defaults of PretrainConfig."
        )

    model.train()
    run(
        "learn",
        0.0,
        config.check_every,
        config.learn_max_steps,
        lambda m: m["easy"] > config.learn_above and m["misconception"] >= wanted_habit,
    )
    low, high = config.easy_range
    run(
        "blur",
        config.noise,
        config.blur_min_steps,
        config.blur_max_steps,
        lambda m: low <= m["easy"] <= high and m["hard"] <= config.hard_below,
    )
    model.eval()
    return history


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Model, tokenizer and generation config in one folder, with the tokenizer read back and checked."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dtype = json.loads((Path(folder) / "config.json").read_text()).get("dtype")
    if dtype != "float32":
        raise AssertionError(f"{folder}/config.json: dtype is {dtype!r}, expected 'float32'.")
    assert_round_trip(folder)


def build(
    folder: str | Path, seed: int, config: PretrainConfig | None = None, report: Report | None = None
) -> dict[str, Any]:
    """Pretrain, save into `folder` and measure on the held-out problems. Returns a record for the manifest."""
    config = config or PretrainConfig()
    problems = task.splits(seed)
    held_back = frozenset(p for split in problems.values() for kind in split.values() for p in kind)
    tokenizer = build_tokenizer()
    model = new_model(tokenizer, seed)
    history = pretrain(model, tokenizer, seed, config, held_back, report)
    save(model, tokenizer, folder)
    return {
        "pretraining": asdict(config),
        "phases": history,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "val_accuracy": {kind: accuracy(model, tokenizer, problems["val"][kind], seed, tries=4) for kind in task.KINDS},
    }
