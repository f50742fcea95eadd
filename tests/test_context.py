"""extend-context: what transformers reads from the copy, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import AutoConfig, Qwen2Config
from typer.testing import CliRunner

from verl_prefix import context
from verl_prefix.cli import app
from verl_prefix.exceptions import PrefixConfigError

#: as published with Qwen2.5-Math (transformers 4)
OLD = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
#: as transformers 5 saves it
NEW = Qwen2Config(hidden_size=64, max_position_embeddings=4096, rope_parameters={"rope_theta": 10000.0}).to_dict()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OLD))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "linked").symlink_to("model.safetensors")
    return folder


@pytest.mark.parametrize("config", [OLD, NEW, {**NEW, "rope_theta": 10000.0}], ids=["v4", "v5", "both"])
def test_transformers_reads_the_longer_context(config, tmp_path):
    before = copy.deepcopy(config)
    changed = context.extended(config, rope_theta=40000.0, positions=16384)
    assert config == before, "the given one is left alone"
    (tmp_path / "config.json").write_text(json.dumps(changed))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.max_position_embeddings == 16384
    assert loaded.rope_parameters["rope_theta"] == 40000.0
    assert loaded.rope_parameters["rope_type"] == "default"
    untouched = {"max_position_embeddings", "rope_theta", "rope_parameters", "sliding_window"}
    assert {k: v for k, v in changed.items() if k not in untouched} == {
        k: v for k, v in config.items() if k not in untouched
    }


def test_no_spelling_is_added_that_was_not_there():
    assert "rope_parameters" not in context.extended(OLD, rope_theta=4e4, positions=16384)
    assert "rope_theta" not in context.extended(NEW, rope_theta=4e4, positions=16384)


def test_command_links_the_weights(model, tmp_path):
    out = tmp_path / "sub/long"
    result = CliRunner().invoke(app, ["extend-context", str(model), str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads((out / "config.json").read_text())
    assert (written["rope_theta"], written["max_position_embeddings"], written["sliding_window"]) == (4e4, 16384, 16384)
    assert (out / "model.safetensors").is_symlink()
    assert (out / "linked").read_bytes() == (out / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((model / "config.json").read_text()) == OLD
    assert {file.name for file in out.parent.iterdir()} == {"long"}, "no scratch folder is left"


def test_an_existing_folder_is_not_overwritten(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    result = CliRunner().invoke(app, ["extend-context", str(model), str(out)])
    assert result.exit_code == 2
    assert "exists" in result.output
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"max_position_embeddings": 32768}, "positions"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_theta": 1e4}, "rope_scaling"),
        ({"rope_theta": None}, "rope_theta"),
    ],
)
def test_what_it_cannot_extend_is_refused(change, names, model, tmp_path):
    config = {k: v for k, v in {**OLD, **change}.items() if v is not None}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PrefixConfigError, match=names):
        context.extend(model, tmp_path / "out", rope_theta=4e4, positions=16384)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(PrefixConfigError, match=r"config\.json"):
        context.extend(tmp_path, tmp_path / "out", rope_theta=4e4, positions=16384)


def test_verls_override_does_not_reach_the_rotary_base():
    """Why the copy is needed: contract with verl 0.9.1 and transformers 5."""
    from verl.utils.model import update_model_config

    config = Qwen2Config.from_dict(OLD)
    update_model_config(config, {"rope_theta": 40000.0})
    assert config.rope_parameters["rope_theta"] == 10000
    with pytest.raises(AttributeError):
        update_model_config(config, {"rope_parameters": {"rope_theta": 40000.0}})
