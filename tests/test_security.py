"""What data, checkpoints and logs must not be able to do: run code, name paths, or show secrets."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests_support import compose_in_process
from typer.testing import CliRunner

import data_prep.tokens
from data_prep.cli import app as data_app
from verl_prefix import doctor, redaction, startup, tokenizers
from verl_prefix.exceptions import PrefixConfigError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(file for package in ("verl_prefix", "data_prep") for file in (ROOT / package).rglob("*.py"))

#: modules that run what they read
_UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
_RUNNING_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
_RUNNING_CALLS |= {"torch.load", "numpy.load", "np.load", "sympify", "sympy.sympify", "parse_expr", "runpy.run_path"}
_LOADERS = {"from_pretrained", "from_config", "hf_tokenizer", "hf_processor", "load_dataset"}


def findings(source: str) -> list[str]:
    """Lines of `source` with a way to run what a file holds, or to let out the whole environment."""
    found = []
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in _UNPICKLERS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in _RUNNING_CALLS:
                found.append(f"{node.lineno}: calls {name}")
            if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
                found.append(f"{node.lineno}: {name} with shell or allow_pickle")
            asked = ("False", "trust_remote_code", "model.trust_remote_code")  # the second: a parameter, checked below
            allowed = {"load_dataset": (None,)}.get(name.rpartition(".")[2], asked)
            if name.rpartition(".")[2] in _LOADERS and given.get("trust_remote_code") not in allowed:
                found.append(f"{node.lineno}: {name} without trust_remote_code=False")
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            given = dict(zip(positional[len(positional) - len(node.defaults) :], node.defaults, strict=True))
            given |= {
                argument: default
                for argument, default in zip(node.kwonlyargs, node.kw_defaults, strict=True)
                if default
            }
            for argument, default in given.items():
                if argument.arg == "trust_remote_code" and ast.unparse(default) != "False":
                    found.append(f"{argument.lineno}: trust_remote_code is on by default")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
            # one variable by its name, never the mapping as a whole, except as a child's environment
            user = parents[node]
            given_on = isinstance(parents.get(user), ast.keyword) and parents[user].arg == "env"
            if (
                not given_on
                and not isinstance(user, ast.Subscript)
                and not (isinstance(user, ast.Attribute) and user.attr == "get")
            ):
                found.append(f"{node.lineno}: the whole environment")
    return found


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_shipped_code_runs_what_it_reads(file):
    assert findings(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(row['answer'])",
        "torch.load(file)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(command, shell=True)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "datasets.load_dataset(name, trust_remote_code=True)",
        "def load(path, trust_remote_code=True): pass",
        "def load(path, *, trust_remote_code=None): pass",
        "print(dict(os.environ))",
        "print({**os.environ})",
        "for name in os.environ: print(name)",
    ],
)
def test_the_audit_notices(source):
    assert findings(source)


# --- code beside a model


@pytest.fixture
def model(tmp_path):
    """A model folder whose tokenizer and configuration are code of its own, which leaves a file when it runs."""
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    code = (
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\n"
        "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "evil.py").write_text(code)
    mapping = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": mapping}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": mapping["AutoTokenizer"]}})
    )
    return folder, canary


def check_model(folder: Path, trust: bool) -> None:
    model = {"path": str(folder), "hf_config_path": None, "trust_remote_code": trust, "override_config": {}}
    lengths = {"max_prompt_length": 1, "max_response_length": 1}
    given = {"actor_rollout_ref": {"model": model}, "trainer": {"device": "cuda"}, "data": lengths}
    startup._check_model(OmegaConf.create(given))


def test_a_models_own_code_does_not_run_unless_asked(model, monkeypatch, tmp_path):
    folder, canary = model
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for load, error in ((tokenizers.load, PrefixConfigError), (data_prep.tokens.load, ValueError)):
        with pytest.raises(error):
            load(str(folder))
    with pytest.raises(ValueError, match="trust_remote_code"):
        check_model(folder, trust=False)
    assert not canary.exists()
    check_model(folder, trust=True)
    assert canary.exists()


# --- text in data


HOSTILE = (
    "__import__('os').system('touch {canary}')",
    "\\text{{__import__('os').system('touch {canary}')}}",
    "open('{canary}','w')",
    "().__class__.__base__.__subclasses__()",
    "\\input{{|touch {canary}}}",
)


def test_an_answer_is_never_run(tmp_path):
    from verl_prefix.reward import compute_score

    canary = tmp_path / "canary"
    for hostile in HOSTILE:
        text = hostile.format(canary=canary)
        for answer, truth in ((text, "1"), ("1", text)):
            assert compute_score("x", f"\\boxed{{{answer}}}", truth)["score"] == 0.0
    assert not canary.exists()


def test_text_in_data_names_no_path(tmp_path):
    """Every cell tries to be a path; a conversion and a look at its result leave the named output files only."""
    inside, outside = tmp_path / "work", tmp_path / "outside"
    inside.mkdir()
    path = f"../{outside.name}/escaped"
    columns = {"data_source": path, "ability": str(outside / "absolute"), "uid": path, "index": path, "id": path}
    row = {**columns, "q": f"Where is {path}?", "a": "7", "d": f"{outside}/x \\boxed{{7}}"}
    (inside / "rows.jsonl").write_text(json.dumps(row) + "\n")
    out = inside / "out.parquet"
    named = ("--prompt-column", "q", "--answer-column", "a", "--demonstration-column", "d")
    command = ("convert", "--source", str(inside / "rows.jsonl"), *named, "--out", str(out))
    done = CliRunner().invoke(data_app, command)
    assert done.exit_code == 0, done.output
    assert not outside.exists()
    assert {file.name for file in tmp_path.iterdir()} == {"work"}
    made = {file.name for file in inside.iterdir()} - {"rows.jsonl"}
    assert made
    assert all(name.startswith("out") for name in made)


# --- secrets


def test_neither_banner_nor_warnings_nor_refusals_show_a_secret(capsys, monkeypatch):
    secret = "S3CRET-wandb-key"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("HF_TOKEN", secret)
    config = compose_in_process(
        "+prefix=prefix_rft",
        f"+ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY={secret}",
        f"+trainer.api_key={secret}",
    )
    said = [startup.banner(config), *startup._check_trainer(config, startup.PrefixConfig.of(config.prefix))]
    config.actor_rollout_ref.rollout.multi_turn.enable = True
    with pytest.raises(PrefixConfigError) as refused:
        startup.check(config)
    said += [str(refused.value), repr(refused.value), *capsys.readouterr()]
    assert config.trainer.api_key == secret
    assert not [text for text in said if secret in text]


def test_a_secret_in_the_configuration_is_warned_of(capsys):
    """verl prints it: the plugin can only say so."""
    config = compose_in_process(
        "+prefix=grpo", "+trainer.api_key=S3CRET", "+ray_kwargs.ray_init.runtime_env.env_vars.HF_TOKEN=S3CRET"
    )
    found = startup._check_secrets(config)
    assert [warning.split()[0] for warning in found] == [
        "ray_kwargs.ray_init.runtime_env.env_vars.HF_TOKEN",
        "trainer.api_key",
    ]
    assert not [warning for warning in found if "S3CRET" in warning]
    assert redaction.secrets(
        {"a": {"auth_token": "x", "token": "", "prompt_key": "prompt", "stop_token_ids": "1"}}
    ) == ["a.auth_token"]


def test_doctor_shows_no_secret(monkeypatch):
    secret = "S3CRET"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    cheap = [doctor.python, doctor.versions, doctor.entry_point, doctor.disk, doctor.shared_memory, doctor.memory]
    found = doctor.findings(cheap)
    assert len(found) > len(cheap)
    assert secret not in json.dumps([finding.as_dict() for finding in found])
