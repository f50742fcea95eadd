"""SFT and DFT on verl's own SFT trainer: the loss, what it is averaged over, the seam, the examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import verl_prefix
from data_prep.testbed import task
from data_prep.testbed.tokenizer import build_tokenizer, prompt_ids
from verl_prefix import sft
from verl_prefix.demonstrations import DemonstrationTokenizer
from verl_prefix.exceptions import DemonstrationError, PrefixConfigError
from verl_prefix.sft_objective import TOKEN_LOSSES, sft_token_loss

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {"sft": "nll", "dft": "dft"}

# ---------------------------------------------------------------- the token losses


def direct(kind: str, log_probs: list[list[float]], masks: list[list[int]]) -> tuple[float, list[list[float]]]:
    """Loss and its gradient for ragged rows by definition, in float64, token by token."""
    tokens = sum(map(sum, masks))
    loss, gradients = 0.0, []
    for row, mask in zip(log_probs, masks, strict=True):
        gradients.append([])
        for log_prob, trained in zip(row, mask, strict=True):
            weight = {"nll": 1.0, "dft": float(torch.tensor(log_prob, dtype=torch.float64).exp())}[kind]
            loss -= trained * weight * log_prob / tokens
            gradients[-1].append(-trained * weight / tokens)
    return loss, gradients


@pytest.mark.parametrize("kind", TOKEN_LOSSES)
def test_token_loss_and_gradient(kind):
    log_prob = torch.tensor([-0.1, -2.0, -30.0, 0.0], dtype=torch.float64, requires_grad=True)
    sft_token_loss(log_prob, kind).sum().backward()
    loss, gradient = direct(kind, [log_prob.tolist()], [[1] * 4])
    assert float(sft_token_loss(log_prob.detach(), kind).sum()) == pytest.approx(4 * loss, rel=1e-12)
    assert log_prob.grad.tolist() == pytest.approx([4 * g for g in gradient[0]], rel=1e-12)


def test_gradient_of_dft_is_that_of_minus_p():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    log_prob = logits.log_softmax(-1)[:, 2]
    (dft,) = torch.autograd.grad(sft_token_loss(log_prob, "dft").sum(), logits, retain_graph=True)
    (minus_p,) = torch.autograd.grad(-log_prob.exp().sum(), logits)
    torch.testing.assert_close(dft, minus_p)


# ---------------------------------------------------------------- the mean, in verl's own loss function


def cut_into_micro_batches(rows: int, draw) -> list[list[int]]:
    order = draw(st.permutations(range(rows)))
    cuts = sorted(draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
    return [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]


@st.composite
def cut_batches(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    log_probs = [-3 * torch.rand(p + a, generator=generator, dtype=torch.float64) for p, a in shapes]
    return shapes, log_probs, cut_into_micro_batches(len(shapes), draw)


@pytest.mark.parametrize("kind", TOKEN_LOSSES)
@settings(max_examples=40, deadline=None)
@given(batch=cut_batches(), dp_size=st.sampled_from([1, 2]))
def test_loss_of_any_cut_is_the_global_token_mean(kind, batch, dp_size):
    """The micro-batches' losses add up to it and so do their gradients; data-parallel ranks are averaged by FSDP."""
    from verl.utils import tensordict_utils as tu

    from verl_prefix.sft_loss import reweighted_sft_loss, verl_sft_loss

    shapes, log_probs, micro_batches = batch
    # log_probs[t] is of token t + 1, so the trained ones are those of positions prompt - 1 ... end - 1
    masks = [[0] * (p - 1) + [1] * a + [0] for p, a in shapes]
    loss_fn = verl_sft_loss if kind == "nll" else partial(reweighted_sft_loss, kind=kind)
    leaves = [row.clone().requires_grad_() for row in log_probs]
    total = 0.0
    for rows in micro_batches:
        loss_mask = [torch.tensor([0] * shapes[i][0] + [1] * shapes[i][1]) for i in rows]
        data = tu.get_tensordict(
            {"loss_mask": torch.nested.as_nested_tensor(loss_mask, layout=torch.jagged)},
            {"pad_mode": "no_padding", "dp_size": dp_size, "batch_num_tokens": sum(a for _, a in shapes)},
        )
        flat = torch.cat([leaves[i] for i in rows])
        nested = torch.nested.nested_tensor_from_jagged(flat, data["loss_mask"].offsets())
        loss, _ = loss_fn(config=None, model_output={"log_probs": nested}, data=data, dp_group=None)
        loss.backward()
        total += float(loss.detach())
    want, gradients = direct(kind, [row.tolist() for row in log_probs], masks)
    assert total == pytest.approx(dp_size * want, rel=1e-9, abs=1e-12)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad.tolist() == pytest.approx([dp_size * g for g in gradient], rel=1e-9, abs=1e-12)


# ---------------------------------------------------------------- the same through verl's trainer, engine and optimizer

DEMONSTRATIONS = ["abcdefghijklmnopqrstuvwxyz"[: 2 + 3 * i] for i in range(8)]
LEARNING_RATE = 0.1
# what recipes/sft_cpu.sh sets for the CPU, one plain gradient step on the whole file
ONE_STEP = [
    "trainer.device=cpu",
    "engine.strategy=fsdp2",
    "+engine.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    "engine.use_torch_compile=false",
    "+model.override_config.attn_implementation=sdpa",
    "model.enable_gradient_checkpointing=false",
    "data.num_workers=0",
    f"data.train_batch_size={len(DEMONSTRATIONS)}",
    "data.max_length=64",
    "trainer.total_training_steps=1",
    "trainer.logger=[]",
    "trainer.resume_mode=disable",
    "checkpoint.save_contents=[]",
    "optim.optimizer=SGD",
    f"optim.lr={LEARNING_RATE}",
    "optim.weight_decay=0",
    "optim.clip_grad=1e6",
]
CUTS = {
    **{
        f"micro_batches_of_{size}": [
            "model.use_remove_padding=false",
            "data.use_dynamic_bsz=false",
            f"data.micro_batch_size_per_gpu={size}",
        ]
        for size in (1, 2, 8)
    },
    "packed": ["model.use_remove_padding=true", "data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=70"],
    "packed_whole": ["model.use_remove_padding=true", "data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=999"],
}
#: loss, gradients and parameters in fp32 against float64
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random model and eight demonstrations of 2 to 23 tokens, with prompts of different lengths."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": [{"role": "user", "content": "q" * (1 + i % 3)}], "demos": [demonstration]}
        for i, demonstration in enumerate(DEMONSTRATIONS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def run_variants(folder: Path, ranks: int, cuts: dict[str, list[str]]) -> dict[tuple[str, str], dict]:
    variants = {
        f"{preset}/{cut}": {"preset": preset, "overrides": [*ONE_STEP, *overrides]}
        for preset in PRESETS
        for cut, overrides in cuts.items()
    }
    (folder / f"variants_{ranks}.json").write_text(json.dumps(variants))
    out = folder / f"results_{ranks}.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [ROOT / "tests/sft_variants.py", folder, out, folder / f"variants_{ranks}.json"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VERL_PLATFORM": "cpu"},
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return {tuple(name.split("/")): result for name, result in torch.load(out).items()}


@pytest.fixture(scope="module")
def results(tiny):
    one = run_variants(tiny, 1, CUTS)
    two = run_variants(tiny, 2, {"two_ranks": CUTS["micro_batches_of_1"], "two_ranks_packed": CUTS["packed"]})
    return one | two


def reference(folder: Path, kind: str, parts: list[list[int]]) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Token-summed loss and gradients of each part of the batch in float64: one sequence at a time, no padding."""
    model = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, attn_implementation="eager")
    rows = pq.read_table(folder / "train.parquet").to_pylist()
    losses, gradients = [], []
    for part in parts:
        model.zero_grad()
        total = 0.0
        for i in part:
            prompt = [*rows[i]["prompt"][0]["content"].encode(), 257]
            answer = [*rows[i]["demos"][0].encode(), 258]
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            for position, token in enumerate(answer, start=len(prompt) - 1):
                p = log_probs[position, token]
                total = total + {"nll": -p, "dft": -p.detach().exp() * p}[kind]
        total.backward()
        losses.append(float(total.detach()))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return losses, gradients


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_one_step_does_not_depend_on_the_cut_of_the_batch(preset, results, tiny):
    """Micro-batch size, gradient accumulation, packing, data-parallel ranks: one loss, one gradient, one update."""
    everything = [list(range(len(DEMONSTRATIONS)))]
    tokens = sum(len(demonstration) + 1 for demonstration in DEMONSTRATIONS)
    (loss,), (gradients,) = reference(tiny, PRESETS[preset], everything)
    start = dict(Qwen2ForCausalLM.from_pretrained(tiny / "model", dtype=torch.float64).named_parameters())
    cuts = {cut: result for (name, cut), result in results.items() if name == preset}
    assert set(cuts) == {*CUTS, "two_ranks", "two_ranks_packed"}
    for result in cuts.values():
        assert result["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        norm = sum(float((g / tokens).square().sum()) for g in gradients.values()) ** 0.5
        assert result["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert set(result["gradients"]) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(result["gradients"][name].double(), gradient / tokens, **TOLERANCE)
            updated = start[name].detach() - LEARNING_RATE * gradient / tokens
            torch.testing.assert_close(result["parameters"][name].double(), updated, **TOLERANCE)


@pytest.mark.slow
def test_the_published_bugs_would_be_seen(tiny):
    """Both of arXiv 2604.23747 move the gradient of this batch by far more than the tolerance of the test above."""
    whole = list(range(len(DEMONSTRATIONS)))
    micro_batches = [whole[i : i + 2] for i in range(0, len(whole), 2)]
    _, (right,) = reference(tiny, "nll", [whole])
    _, parts = reference(tiny, "nll", micro_batches)
    counts = [sum(len(DEMONSTRATIONS[i]) + 1 for i in part) for part in micro_batches]
    name = "model.layers.0.mlp.up_proj.weight"
    truth = right[name] / sum(counts)
    first_only = parts[0][name] / sum(counts)
    mean_of_means = sum(part[name] / count for part, count in zip(parts, counts, strict=True)) / len(parts)
    for wrong in (first_only, mean_of_means):
        assert float((wrong - truth).norm() / truth.norm()) > 0.1


# ---------------------------------------------------------------- the seam


def settings_of(loss="dft", **more):
    return OmegaConf.create(
        {
            "sft": {"loss": loss},
            "data": {"train_batch_size": 8, "custom_cls": {"name": None}},
            "engine": {"strategy": "fsdp2"},
            "trainer": {"device": "cpu"},
            **more,
        }
    )


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (settings_of("dtf"), "sft.loss"),
        (settings_of(None), "sft.loss"),
        (settings_of(sft="dft"), "sft"),
        (settings_of(sft={"loss": "dft", "los": 1}), "sft.los"),
        (settings_of(actor_rollout_ref={}), "sft"),
    ],
)
def test_an_unusable_section_is_refused(config, key):
    with pytest.raises(PrefixConfigError) as error:
        sft.check(config)
    assert error.value.key == key
    assert error.value.mend


def test_selecting_puts_the_loss_where_verls_trainers_look_for_it():
    code = """
import verl
from verl.utils import device
from verl.workers.utils import losses
from omegaconf import OmegaConf
own = losses.sft_loss
def settings(**sft):
    rest = dict(data=dict(train_batch_size=8, custom_cls=dict(name=None)), engine=dict(strategy="fsdp2"))
    return OmegaConf.create(dict(trainer=dict(device="cpu"), **rest, **sft))
device.auto_set_device(settings()); print("untouched", losses.sft_loss is own)
device.auto_set_device(settings(sft=dict(loss="dft"))); print(losses.sft_loss.keywords)
device.auto_set_device(settings(sft=dict(loss="dft")))
from verl_prefix.sft_loss import verl_sft_loss; print("on verl's own", verl_sft_loss is own)
import pickle; again = pickle.loads(pickle.dumps(losses.sft_loss)); print("pickled", again.keywords)
device.auto_set_device(settings(sft=dict(loss="nll"))); print("back", losses.sft_loss is own)
try:
    device.auto_set_device(settings(sft=dict(loss="dtf")))
except ValueError as error:
    print("refused", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[verl_prefix")]
    kind = "{'kind': 'dft'}"
    assert lines[:5] == ["untouched True", kind, "on verl's own True", f"pickled {kind}", "back True"], done.stderr
    assert lines[5].startswith("refused sft.loss='dtf'")
    assert done.stdout.count("SFT trainer | loss dft") == 2


def test_verls_trainers_still_look_the_loss_up_when_they_build_the_engine():
    """The seam stands on this; a name bound at import would train with verl's loss, silently."""
    import inspect

    from verl.trainer import sft_trainer, sft_trainer_ray

    for module in (sft_trainer, sft_trainer_ray):
        build = inspect.getsource(module.SFTTrainer._build_engine)
        assert "from verl.workers.utils.losses import sft_loss" in build
        assert "partial(sft_loss, config=None)" in build
        assert "auto_set_device(config)" in inspect.getsource(module)


@pytest.mark.parametrize(("preset", "loss"), PRESETS.items())
def test_preset_composes_on_verls_trainer(preset, loss):
    command = [sys.executable, "-m", "verl.trainer.sft_trainer", f"+sft={preset}", "data.seed=3", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    config = OmegaConf.create(done.stdout)
    assert config.sft == {"loss": loss}
    assert config.data.custom_cls == {"path": "pkg://verl_prefix.sft_dataset", "name": "DemonstrationDataset"}
    assert (config.data.demos_key, config.data.seed) == ("demos", 3)
    head = (Path(verl_prefix.__file__).parent / f"conf/sft/{preset}.yaml").read_text().splitlines()[:3]
    assert head[0] == "# @package _global_"
    assert "arXiv" in head[1]


# ---------------------------------------------------------------- the examples

# Qwen's: a default system turn, newlines behind header and turn; white space stripped as in some others
QWEN_TEMPLATE = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\nBe good.<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
PROBLEMS = [task.Problem(3, "agbhci"), task.Problem(5, "llkkji")]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def data_section(**changes):
    made = {
        "truncation": "error",
        "pad_mode": "no_padding",
        "max_length": 64,
        "prompt_key": "prompt",
        "demos_key": "demos",
        "demos_correct_key": "demos_correct",
        "messages_key": "messages",
        "apply_chat_template_kwargs": {},
        "seed": 0,
    }
    return OmegaConf.create(made | changes)


def dataset(path, rows, tokenizer, max_samples=-1, **changes):
    from verl_prefix.sft_dataset import DemonstrationDataset

    pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet")
    return DemonstrationDataset(
        str(path / "train.parquet"), tokenizer=tokenizer, config=data_section(**changes), max_samples=max_samples
    )


def as_sets(examples):
    return {(tuple(e["input_ids"].tolist()), tuple(e["loss_mask"].tolist())) for e in examples}


def rl_row(problem, *demonstrations):
    return {"prompt": [{"role": "user", "content": task.render_prompt(problem)}], "demos": list(demonstrations)}


def in_rl(tokenizer, prompt, demonstration):
    """Ids and mask as RL's agent loop would make them of prompt, whole demonstration and EOS."""
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    builder = create_continuous_token_builder(
        tokenizer, hf_model_type="qwen2", chat_template_kwargs={}, mm_processor_kwargs={}, processor=None
    )
    head = list(builder.build_initial_tokens(prompt))
    answer = [*DemonstrationTokenizer(tokenizer, 64).classify(demonstration), tokenizer.eos_token_id]
    return (*head, *answer), (0,) * len(head) + (1,) * len(answer)


@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE], ids=["testbed", "qwen"])
def test_examples_are_rls_tokens(tmp_path, template):
    tokenizer = build_tokenizer(256)
    tokenizer.chat_template = template or tokenizer.chat_template
    rows = [rl_row(problem, task.render_solution(problem)) for problem in PROBLEMS]
    rows += [rl_row(PROBLEMS[0], "\n two lines\nand a space ", "another way"), rl_row(PROBLEMS[1])]
    made = dataset(tmp_path, rows, tokenizer, max_length=256)
    want = {in_rl(tokenizer, row["prompt"], demonstration) for row in rows for demonstration in row["demos"]}
    assert as_sets(made) == want
    for example in made:
        assert example["position_ids"].tolist() == list(range(len(example["input_ids"])))
        assert {tensor.dtype for tensor in example.values()} == {torch.int64}
        assert int(example["input_ids"][-1]) == tokenizer.eos_token_id


def test_on_the_testbed_the_trained_text_is_the_demonstration(tmp_path, tokenizer):
    demonstration = task.render_solution(PROBLEMS[0])
    (example,) = dataset(tmp_path, [rl_row(PROBLEMS[0], demonstration)], tokenizer)
    trained = example["loss_mask"].bool()
    assert tokenizer.decode(example["input_ids"][trained]) == demonstration + "<|im_end|>"
    assert example["input_ids"][~trained].tolist() == prompt_ids(tokenizer, task.render_prompt(PROBLEMS[0]))


def test_verls_own_dataset_trains_other_tokens(tmp_path, tokenizer):
    """Why there is a dataset here: verl's renders a closed turn, and trains on the newline behind it."""
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    demonstration = task.render_solution(PROBLEMS[0])
    row = rl_row(PROBLEMS[0])
    turns = [*row["prompt"], {"role": "assistant", "content": demonstration}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "messages.parquet")
    config = OmegaConf.create({"pad_mode": "no_padding", "max_length": 64, "truncation": "error"})
    example = MultiTurnSFTDataset([str(tmp_path / "messages.parquet")], tokenizer, config)[0]
    trained = tokenizer.decode(example["input_ids"][example["loss_mask"].bool()])
    assert trained == demonstration + "<|im_end|>\n"


def test_conversations_give_the_same_examples(tmp_path, tokenizer):
    rl = [rl_row(problem, task.render_solution(problem)) for problem in PROBLEMS]
    turns = [[*row["prompt"], {"role": "assistant", "content": row["demos"][0]}] for row in rl]
    from_rl = as_sets(dataset(tmp_path, rl, tokenizer))
    assert as_sets(dataset(tmp_path, [{"messages": messages} for messages in turns], tokenizer)) == from_rl


@pytest.mark.parametrize("roles", [["user"], ["assistant"], ["user", "assistant", "user", "assistant"], []])
def test_other_conversations_are_refused(tmp_path, tokenizer, roles):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    bad = [{"role": role, "content": "some text"} for role in roles]
    with pytest.raises(DemonstrationError, match="row 1"):
        dataset(tmp_path, [{"messages": good}, {"messages": bad}], tokenizer)


def test_what_rl_cannot_use_is_left_out_and_counted(tmp_path, tokenizer, capsys):
    fits, too_long = "x" * 54, "x" * 55  # 8 characters and a marker of prompt, EOS
    rows = [
        rl_row(PROBLEMS[0], fits),
        rl_row(PROBLEMS[0], too_long),
        rl_row(PROBLEMS[0], " "),
        rl_row(PROBLEMS[0], "x"),
    ]
    (example,) = dataset(tmp_path, rows, tokenizer)
    assert len(example["input_ids"]) == 64
    printed = capsys.readouterr().out
    assert "1 demonstrations, 55 trained tokens" in printed
    for reason in ("1 does not fit", "1 is empty", "1 has fewer than 2 tokens", "data.max_length"):
        assert reason in printed


def test_files_without_anything_to_train_on_are_refused(tmp_path, tokenizer):
    with pytest.raises(DemonstrationError, match="every cell is empty"):
        dataset(tmp_path, [{**rl_row(PROBLEMS[0]), "demos": None}], tokenizer)
    with pytest.raises(DemonstrationError, match="1 does not fit"):
        dataset(tmp_path, [rl_row(PROBLEMS[0], "x" * 99)], tokenizer)
    with pytest.raises(DemonstrationError, match="data.demos_key"):
        dataset(tmp_path, [{"question": "?"}], tokenizer)


@pytest.mark.parametrize(("key", "value"), [("truncation", "right"), ("truncation", "left"), ("pad_mode", "right")])
def test_cutting_and_padding_are_refused(tmp_path, tokenizer, key, value):
    with pytest.raises(PrefixConfigError) as error:
        dataset(tmp_path, [rl_row(PROBLEMS[0], "abc")], tokenizer, **{key: value})
    assert error.value.key == f"data.{key}"


def test_the_seed_orders_the_examples(tmp_path, tokenizer):
    rows = [rl_row(PROBLEMS[0], f"demonstration {i}") for i in range(20)]

    def order(seed, max_samples=-1):
        made = dataset(tmp_path, rows, tokenizer, seed=seed, max_samples=max_samples)
        return [tuple(example["input_ids"].tolist()) for example in made]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))
    assert order(1, max_samples=5) == order(1)[:5]


# ---------------------------------------------------------------- end to end


def recipe(script: str, *arguments: object) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", f"recipes/{script}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "EVALUATE": "no"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def logged(file: Path) -> dict[int, dict]:
    return {entry["step"]: entry["data"] for entry in map(json.loads, file.read_text().splitlines())}


@pytest.mark.slow
@pytest.mark.e2e
def test_the_cpu_recipe_trains_with_both_losses(testbed, tmp_path):
    small = ("data.train_batch_size=16", "data.max_token_len_per_gpu=256")
    recipe("sft_cpu.sh", testbed, tmp_path / "sft", 2, 0, *small)
    recipe("sft_cpu.sh", testbed, tmp_path / "dft", 2, 0, *small, "sft.loss=dft")
    sft_log, dft_log = (logged(tmp_path / name / "metrics.jsonl") for name in ("sft", "dft"))
    assert set(sft_log) == set(dft_log) == {1, 2}
    for step in (1, 2):
        # the same tokens under the same model at first; p <= 1 makes DFT's loss the smaller one
        assert sft_log[step]["train/global_tokens"] == dft_log[step]["train/global_tokens"] == 16 * 36
        assert 0 < dft_log[step]["train/loss"] < sft_log[step]["train/loss"]
    for name, loss in (("sft", "nll"), ("dft", "dft")):
        assert f"SFT trainer | loss {loss}" in (tmp_path / name / "console.log").read_text()
        exported, base = (load_file(folder / "model/model.safetensors") for folder in (tmp_path / name, testbed))
        assert exported.keys() == base.keys()
        assert {weight.dtype for weight in exported.values()} == {torch.float32}
        assert not any(torch.equal(exported[key], base[key]) for key in base if "proj.weight" in key)


@pytest.mark.slow
@pytest.mark.e2e
def test_rl_starts_from_what_sft_made(testbed, tmp_path):
    small = [
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.rollout.n=4",
        f"data.val_files={testbed}/val_small.parquet",
    ]
    # forty steps are enough to see the demonstrated facts in held-out problems, which the base model never solves
    printed = recipe("sft_then_rl_cpu.sh", testbed, tmp_path, 40, 1, 0, *small)
    assert "[1/2] SFT, 40 steps" in printed
    rl = logged(tmp_path / "rl/metrics.jsonl")
    assert rl[0]["val-core/chain_hard/acc/mean@1"] > 0.05
    assert rl[1]["training/rollout_actor_probs_pearson_corr"] > 0.999
    # phase 1 is not repeated
    printed = recipe("sft_then_rl_cpu.sh", testbed, tmp_path, 40, 0, 0, *small, "--cfg", "job")
    assert "model is there" in printed
