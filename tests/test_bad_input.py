"""Every wrong input gives one clear error, the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import (
    BrokenCheckpoint,
    BrokenPlan,
    DataError,
    IllegalRatio,
    IllegalWidth,
    MissingModel,
    OutputExists,
    PatServeError,
    RunError,
    UnfinishedRun,
    UnknownTensor,
    UnsupportedModel,
    UsageError,
)
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan, file_sha256
from pat_serve.training.config import TrainRecipe
from pat_serve.training.run import start
from tests.conftest import tiny_recipe
from tests.tiny_models import save_tiny_llama


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def edit_config(base: Path, **changes: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


def edit_weights(base: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(base / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, base / "model.safetensors")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", ""])
def test_a_path_is_not_looked_for_on_the_hub(source: str):
    with pytest.raises(MissingModel, match=r"no such folder.*Check the path"):
        open_checkpoint(source)


def test_a_hub_id_without_network():
    with pytest.raises(MissingModel, match="HF_TOKEN"):
        open_checkpoint("nobody/no-such-model")


def test_a_folder_without_config(tmp_path: Path):
    with pytest.raises(MissingModel, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


def test_a_model_of_another_family(base: Path):
    edit_config(base, model_type="gpt2")
    with pytest.raises(UnsupportedModel, match=r"expected model_type .*llama.*found model_type 'gpt2'"):
        open_checkpoint(str(base))


def test_a_quantized_model(base: Path):
    edit_config(base, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModel, match="unquantized"):
        open_checkpoint(str(base))


def test_pickled_weights(base: Path):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="never loaded"):
        open_checkpoint(str(base))


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_a_truncated_shard(size: int, base: Path):
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        open_checkpoint(str(base))


def test_an_unknown_tensor(base: Path):
    edit_weights(base, **{"model.layers.0.mlp.router.weight": torch.zeros(4, 64)})
    with pytest.raises(UnknownTensor, match=r"mlp\.router"):
        open_checkpoint(str(base))


def test_a_missing_tensor(base: Path):
    edit_weights(base, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(BrokenCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        open_checkpoint(str(base))


def test_a_tensor_of_another_shape(base: Path):
    edit_config(base, intermediate_size=256)
    with pytest.raises(BrokenCheckpoint, match=r"of shape \(64, 256\)"):
        open_checkpoint(str(base))


def test_rotary_buffers_of_old_conversions_are_ignored(base: Path):
    edit_weights(base, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)})
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in open_checkpoint(str(base)).tensors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "x"}', "line 2: expected a text in the field 'output', found no such field"),
        ('{"instruction": "x", "output": "  "}', "line 2: expected a text in the field 'output'"),
        ('{"prompt": "x", "completion": null}', "line 2: expected a text in the field 'completion', found None"),
        ('{"question": "x"}', "line 2: expected the fields prompt/completion"),
        ('{"prompt": ', "line 2: expected a JSON object"),
        ("[1]", "line 2: expected a JSON object, found list"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
            "line 2: expected messages",
        ),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "chat template"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line: str, message: str, tiny_base: Path, tmp_path: Path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        start(tiny_recipe(tiny_base, data), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_no_data(tiny_base: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="at least one row"):
        start(tiny_recipe(tiny_base, tmp_path / "empty.jsonl"), tmp_path / "run")
    with pytest.raises(DataError, match="no such file"):
        start(tiny_recipe(tiny_base, tmp_path / "nothing.jsonl"), tmp_path / "run")


@pytest.mark.parametrize("ratio", [0.0, 0.7, -1.0])
def test_an_illegal_ratio(ratio: float, tiny_base: Path, rows: Path, tmp_path: Path):
    with pytest.raises(IllegalRatio):
        start(tiny_recipe(tiny_base, rows, ratio=ratio), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_illegal_width(tiny_base: Path, rows: Path, tmp_path: Path):
    with pytest.raises(IllegalWidth, match=r"Nearest legal widths: 40 \(.* parameters\), 48 \(.*56 \("):
        start(tiny_recipe(tiny_base, rows, hidden_size=50), tmp_path / "run")


def test_too_few_steps_for_the_schedule(tiny_base: Path, rows: Path, tmp_path: Path):
    message = r"--max-steps: expected at least 12 optimizer steps, in which --gate anneal closes, found 5\. Raise it\."
    with pytest.raises(UsageError, match=message):
        start(tiny_recipe(tiny_base, rows, max_steps=5), tmp_path / "run")


def test_prompts_that_fill_the_context(tiny_base: Path, rows: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--max-length-tokens"):
        start(tiny_recipe(tiny_base, rows, max_length_tokens=8), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "d"}, "model (recipe): expected a value, found none"),
        (
            {"model": "m", "data": "d", "learning_rat": 1},
            "learning_rat (recipe): expected a setting of recipes, found none of this name. Did you mean learning_rate",
        ),
        (
            {"model": "m", "data": "d", "method": "one-shot", "sparsity": 0.5},
            "none of this name. Write it under settings; it goes with `method: one-shot`.",
        ),
        ({"model": "m", "data": "d", "max_steps": -1}, "max_steps (recipe)"),
        ({"model": "m", "data": "d", "ratio": 0.2, "hidden_size": 48}, "not both"),
        ({"model": "m", "data": "d", "lr_scheduler": "nonsense"}, "lr_scheduler (recipe): expected one of linear"),
        ({"model": "m", "data": "d", "lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler (recipe): expected one of"),
        ({"model": "m", "data": "d", "seed": 2**32}, "seed (recipe)"),
        ({"model": "m", "data": "d", "epochs": float("inf")}, "epochs (recipe)"),
        ({1: 2}, "model (recipe)"),
        ({"model": "m", "data": "d", 1: 2}, "1 (recipe): expected a name, found 1"),
        ({"model": "m", "data": "d", "out": "run"}, "It is a flag of pat-train: --out."),
        ({"model": "m", "data": "d", "method": "one-shot", "settings": {"sparsty": 0.5}}, "Did you mean sparsity?"),
    ],
)
def test_a_bad_recipe(settings: dict[str, object], message: str):
    with pytest.raises(UsageError) as caught:
        TrainRecipe.build(settings, "recipe")
    assert message in str(caught.value)


def test_an_unfinished_run(run: Path, tmp_path: Path):
    (run / "plan.json").unlink()
    with pytest.raises(UnfinishedRun, match="its last checkpoint is step 24"):
        export_run(run, tmp_path / "out")


def test_not_a_run(tmp_path: Path):
    with pytest.raises(RunError, match="no such folder"):
        export_run(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content"),
    [("plan.json", "{"), ("plan.json", '{"version": 3}'), ("plan.safetensors", "damaged")],
)
def test_a_damaged_plan(file: str, content: str, run: Path, tmp_path: Path):
    (run / file).write_text(content)
    with pytest.raises(BrokenPlan, match=file):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_of_the_same_shape(run: Path, tmp_path: Path):
    other = save_tiny_llama(tmp_path / "other", seed=7)
    with pytest.raises(BrokenPlan, match="the file of the training"):
        export_run(run, tmp_path / "out", base=str(other))


def test_a_moved_base(run: Path, base: Path, tmp_path: Path):
    plan = json.loads((run / "plan.json").read_text())
    plan["base"]["source"] = str(tmp_path / "gone")
    (run / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(MissingModel, match="--base"):
        export_run(run, tmp_path / "out")
    assert export_run(run, tmp_path / "out", base=str(base)).out.is_dir()


def test_dora_is_refused_with_its_reason(run: Path, tmp_path: Path):
    path = run / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    plan = PruningPlan.load(run)
    replace(plan, adapter=plan.adapter | {path.name: file_sha256(path)}).save(run)
    with pytest.raises(UnsupportedModel, match="use_dora=True"):
        export_run(run, tmp_path / "out")


def test_an_output_that_exists(run: Path, rows: Path, tiny_base: Path, tmp_path: Path):
    out = export_run(run, tmp_path / "out").out
    with pytest.raises(OutputExists, match="--force"):
        export_run(run, out)
    with pytest.raises(OutputExists, match="--force"):
        start(tiny_recipe(tiny_base, rows), out)
    (out / "README.md").write_text("mine")
    export_run(run, out, force=True)
    assert (out / "README.md").read_text() != "mine"
    assert not list(tmp_path.glob(".*"))


def test_force_replaces_nothing_but_our_own_outputs(run: Path, rows: Path, base: Path, tmp_path: Path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (foreign, file, run, base):
        with pytest.raises(OutputExists):
            export_run(run, out, force=True, base=str(base))
    recipe = tiny_recipe(base, rows)
    for out in (foreign, file, base, base.parent, rows.parent):
        with pytest.raises(OutputExists):
            start(recipe, out, force=True)
    assert (foreign / "thesis.tex").read_text() == file.read_text() == "mine"
    assert (base / "model.safetensors").is_file()
    assert (run / "plan.json").is_file()


def test_a_forced_run_that_cannot_begin_keeps_the_old_one(
    run: Path, rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **_settings: object) -> None:
        raise RuntimeError("late")

    monkeypatch.setattr("pat_serve.training.model.ready.make_ready", fail)
    with pytest.raises(RuntimeError, match="late"):
        start(tiny_recipe(base, rows), run, force=True)
    assert (run / "plan.json").is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["emptied", "truncated", "rescaled"])
def test_a_damaged_adapter(damage: str, run: Path, tmp_path: Path):
    """The gate alone would not see it: it loads the same adapter that the export merges."""
    weights, config = run / "adapter/adapter_model.safetensors", run / "adapter/adapter_config.json"
    if damage == "emptied":
        save_file({}, weights)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1}))
    with pytest.raises(BrokenPlan, match="adapter"):
        export_run(run, tmp_path / "out")


@pytest.mark.parametrize("content", [None, "", "{"])
def test_lost_parity_prompts(content: str | None, run: Path, tmp_path: Path):
    path = run / "parity_prompts.jsonl"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(BrokenPlan, match="parity_prompts"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_ratio_for_a_method_that_does_not_prune(tiny_base: Path, rows: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--method lora cuts nothing"):
        start(tiny_recipe(tiny_base, rows, method="lora", ratio=0.25), tmp_path / "run")


def test_a_model_without_tokenizer(base: Path, rows: Path, tmp_path: Path):
    for path in base.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(MissingModel, match="tokenizer"):
        start(tiny_recipe(base, rows), tmp_path / "run")


@pytest.mark.parametrize("name", ["num_attention_heads", "vocab_size", "rms_norm_eps"])
def test_a_config_without_a_size(name: str, base: Path):
    config = json.loads((base / "config.json").read_text())
    del config[name]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenCheckpoint, match=name):
        open_checkpoint(str(base))


def test_a_row_that_is_no_utf_8(tiny_base: Path, tmp_path: Path):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff", "completion": "b"}\n')
    with pytest.raises(DataError, match="line 2: expected a JSON object"):
        start(tiny_recipe(tiny_base, data), tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--model", "./nowhere", "--data", "x.jsonl", "--out", "run"], 1, "./nowhere: expected"),
        (["train", "--model", "{base}", "--data", "x.jsonl", "--ratio", "0.9", "--out", "run"], 2, "--ratio: expected"),
        (["train", "--model", "{base}"], 2, "expected --out for a new run"),
        (["train", "--resume", "run", "--seed", "1"], 2, "--seed"),
        (["train", "--resume", "run", "--preset", "paper", "--force"], 2, "found --preset, --force"),
        (["train", "--resume", "run", "--recipe", "paper"], 2, "found --recipe"),
        (["train", "--preset", "best", "--out", "run"], 2, "--preset: expected default or paper, found best"),
        (["train", "--preset", "default", "--recipe", "paper", "--out", "run"], 2, "default, and --recipe paper"),
        (
            ["train", "--config", "{base}/model.safetensors", "--out", "run"],
            2,
            "model.safetensors: expected a YAML recipe",
        ),
        (["export", "--ckpt", "nowhere", "--out", "out"], 1, "nowhere: expected"),
        (["export", "--out", "out"], 2, "--ckpt"),
        (["eval", "./nowhere", "--data", "x.jsonl"], 1, "./nowhere: expected"),
    ],
)
def test_commands_exit_with_one_line(arguments: list[str], code: int, message: str, tiny_base: Path, tmp_path: Path):
    command, *rest = (argument.format(base=tiny_base) for argument in arguments)
    script = f"from pat_serve.cli.{command} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *rest], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path):
    script = "from pat_serve.cli.export import main; main()"
    arguments = ["--ckpt", "nowhere", "--out", "out", "--debug"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_every_error_names_object_expectation_finding_and_way_out():
    error = PatServeError("x", expected="a", found="b", fix="Do c.")
    assert str(error) == "x: expected a, found b. Do c."
