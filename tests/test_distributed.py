"""Two processes train what one does: data parallel and fully sharded, over gloo on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import TrainingArguments

from pat_serve.errors import UsageError
from pat_serve.export.exporter import export_run
from pat_serve.run.plan import PruningPlan
from pat_serve.training.ranks import refuse_zero3, use_one_device
from tests.test_turned_tie import tied_base
from tests.trainings import Trainings

CONFIGS = Path(__file__).parent.parent / "configs"
# No dropout, whose draws belong to a rank; rows of unequal lengths, so that a mean of means would show.
SETTINGS = {
    "max-steps": 13, "learning-rate": 1e-3, "lora-dropout": 0, "dtype": "float32", "logging-steps": 1,
    "save-steps": 5, "gradient-accumulation-steps": 2,
}  # fmt: skip

TERMS = ("loss", "cross_entropy", "distillation", "identity_loss", "count_loss", "push_loss", "grad_norm")


def arguments(base: Path, rows: Path, run: Path, batch_size: int) -> list[str]:
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
    where = ["--model", str(base), "--data", str(rows), "--out", str(run)]
    groups = ["--train-norms", "--lr-scale", "lora_b=2"]
    return ["--resume", "auto", *where, *flags, *groups, "--batch-size", str(batch_size)]


def launched(config: str) -> dict[str, str]:
    """The environment that `accelerate launch` makes of a shipped file."""
    given = ["--config_file", str(CONFIGS / config), "--num_processes", "2", "pat-train"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    environment = prepare_multi_gpu_env(parsed)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def curve(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in TERMS if name in line} for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def alone(trainings: Trainings, tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert trainings.run(arguments(tiny_base, rows, run, batch_size=4)) == 0, trainings.log.read_text()
    return run


@pytest.mark.parametrize("config", ["ddp.yaml", pytest.param("fsdp2.yaml", marks=pytest.mark.slow)])
def test_two_ranks_choose_and_train_the_smaller_model(
    config: str, trainings: Trainings, tiny_base: Path, rows: Path, tmp_path: Path
):
    # Each rank has a dense teacher beside the smaller model.
    shape = ["--shape", "ffn=96,kv_groups=1", "--refit", "full", "--distillation-weight", "0.5"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert trainings.run([*arguments(tiny_base, rows, one, batch_size=4), *shape]) == 0, trainings.log.read_text()
    command = [*arguments(tiny_base, rows, two, batch_size=2), *shape]
    assert trainings.run_ranks(command, launched(config)) == [0, 0], trainings.log.read_text()
    assert curve(two) == [pytest.approx(line, rel=1e-4) for line in curve(one)]
    ours, reference = PruningPlan.load(two), PruningPlan.load(one)
    assert {line: cut.kept.tolist() for line, cut in ours.cuts.items()} == {
        line: cut.kept.tolist() for line, cut in reference.cuts.items()
    }
    assert load_file(two / "weights/weights-00001.safetensors").keys() == {
        f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_ranks_turn_a_tied_base_and_fit_its_last_gain(
    config: str, trainings: Trainings, rows: Path, tmp_path: Path
):
    base, one, two = tied_base(tmp_path / "base"), tmp_path / "one", tmp_path / "two"
    shape = ["--shape", "hidden=48,ffn=96"]
    assert trainings.run([*arguments(base, rows, one, batch_size=4), *shape]) == 0, trainings.log.read_text()
    command = [*arguments(base, rows, two, batch_size=2), *shape]
    assert trainings.run_ranks(command, launched(config)) == [0, 0], trainings.log.read_text()
    assert curve(two) == [pytest.approx(line, rel=1e-4) for line in curve(one)]
    ours, reference = PruningPlan.load(two), PruningPlan.load(one)
    assert ours.tied
    assert reference.tied
    torch.testing.assert_close(ours.norms, reference.norms, rtol=0, atol=1e-5)
    outcome = export_run(two, tmp_path / "pruned")
    assert outcome.parity is not None
    assert json.loads((tmp_path / "pruned/config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_ranks_train_what_one_does(
    config: str, alone: Path, trainings: Trainings, tiny_base: Path, rows: Path, tmp_path: Path
):
    run = tmp_path / "run"
    command = arguments(tiny_base, rows, run, batch_size=2)
    assert trainings.run_ranks(command, launched(config)) == [0, 0], trainings.log.read_text()
    expected = curve(alone)
    assert len(expected) == 13
    assert curve(run) == [pytest.approx(line, rel=1e-4) for line in expected]
    # At the freeze every rank holds its mask against rank 0's (same_on_all), so one file speaks for both.
    ours, reference = PruningPlan.load(run), PruningPlan.load(alone)
    assert ours.cuts["hidden"].kept.tolist() == reference.cuts["hidden"].kept.tolist()
    sharded = (run / "checkpoints/step-13/optimizer_0").is_dir()
    assert sharded == (config == "fsdp2.yaml"), "FSDP alone shards the optimizer's state"
    outcome = export_run(run, tmp_path / "pruned")
    assert outcome.parity is not None

    # Back to the second checkpoint, as if the machine had died after it, and on.
    before = load_file(run / "plan.safetensors")
    for name in ("plan.json", "plan.safetensors", "checkpoints/step-13"):
        (run / name).rename(tmp_path / Path(name).name)
    assert trainings.run_ranks(command, launched(config)) == [0, 0], trainings.log.read_text()
    after = load_file(run / "plan.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert curve(run) == [pytest.approx(line, rel=1e-4) for line in expected]
    # The batch of a step would be another one.
    (run / "plan.json").unlink()
    assert trainings.run(command) == 1
    assert "processes" in trainings.log.read_text()


@pytest.mark.parametrize("config", ["ddp.yaml", pytest.param("fsdp2.yaml", marks=pytest.mark.slow)])
def test_two_ranks_train_one_mask_after_one_teacher(
    config: str, trainings: Trainings, tiny_base: Path, rows: Path, tmp_path: Path
):
    """The default is cut down before its first step; the published mask moves, here with a distance to the base."""
    # The base with its adapter and mask switched off is the teacher, so its norms are not trained.
    more = ["--preset", "paper", "--hio-rank", "8", "--distillation-weight", "0.5", "--no-train-norms"]
    more += ["--lr-scale", "hsm=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert trainings.run(arguments(tiny_base, rows, one, batch_size=4) + more) == 0, trainings.log.read_text()
    ranks = trainings.run_ranks(arguments(tiny_base, rows, two, batch_size=2) + more, launched(config))
    assert ranks == [0, 0], trainings.log.read_text()
    expected = curve(one)
    assert expected[0]["count_loss"] > 1
    assert expected[-1]["distillation"] > 1e-3
    assert curve(two) == [pytest.approx(line, rel=1e-4) for line in expected]
    kept = [PruningPlan.load(run).cuts["hidden"].kept.tolist() for run in (one, two)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("config", ["ddp.yaml", pytest.param("fsdp2.yaml", marks=pytest.mark.slow)])
def test_a_line_of_metrics_across_a_resume_is_of_all_ranks(
    config: str, trainings: Trainings, tiny_base: Path, rows: Path, tmp_path: Path
):
    """A checkpoint at step 5 lies between two lines, and the two ranks have seen other rows of steps 4 and 5."""
    run = tmp_path / "run"
    command = [*arguments(tiny_base, rows, run, batch_size=2), "--logging-steps", "3", "--keep-checkpoints", "3"]
    assert trainings.run_ranks(command, launched(config)) == [0, 0], trainings.log.read_text()
    expected = curve(run)
    # Back to the first checkpoint.
    for name in ("plan.json", "plan.safetensors", "checkpoints/step-13", "checkpoints/step-10"):
        (run / name).rename(tmp_path / Path(name).name)
    assert trainings.run_ranks(command, launched(config)) == [0, 0], trainings.log.read_text()
    assert curve(run) == [pytest.approx(line, rel=1e-6) for line in expected]


def test_one_mistake_is_one_message(trainings: Trainings, tiny_base: Path, rows: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").touch()
    command = arguments(tiny_base, rows, tmp_path / "run", batch_size=2)
    assert trainings.run_ranks(command, launched("ddp.yaml")) == [2, 2]
    assert trainings.log.read_text().count("a folder with something else") == 1


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_the_shipped_files_are_accelerates(config: str):
    loaded = load_config_from_file(str(CONFIGS / config))
    assert loaded.mixed_precision == "no"
    if config == "zero2.yaml":
        assert loaded.deepspeed_config["zero_stage"] == 2


@pytest.mark.parametrize("told", ["environment", "file"])
def test_zero3_is_refused(told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    refuse_zero3()
    if told == "environment":
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    else:
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(UsageError, match=r"ZeRO-3.*fsdp2\.yaml"):
        refuse_zero3()


def test_several_gpus_without_a_launcher_are_no_data_parallel(tmp_path: Path):
    settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, report_to=[])
    assert settings.n_gpu == 0
    settings._n_gpu = 4  # what transformers sets where four are visible
    assert settings.train_batch_size == 16
    assert use_one_device(settings) == 3
    assert settings.train_batch_size == 4
