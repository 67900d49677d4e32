import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pat_serve.errors import BrokenCheckpoint, EngineError, MissingModel, PatServeError, UsageError
from pat_serve.export.formats.schemes import SCHEMES, Scheme, quantization_config
from pat_serve.machine import hardware
from pat_serve.server.bench.model_source import ModelSource, check_dtype, resolve, shipped_config, shipped_shapes
from pat_serve.server.bench.speedup.checks import (
    check_memory,
    check_pair,
    check_settings,
    least_output_tokens,
)
from pat_serve.server.bench.speedup.grid import Regime
from pat_serve.server.bench.speedup.rounds import round_prompts
from pat_serve.server.bench.speedup.settings import SpeedupSettings
from pat_serve.server.engine import memory
from pat_serve.server.engine.memory import MAX_STEP_TOKENS, engine_memory_bytes
from tests.tiny_models import tiny_config


def shape_folder(folder: Path, **overrides: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(**overrides).to_dict()))
    return folder


def find(name: object, scratch: Path, *, load_format: str = "dummy", layers: int | None = None) -> ModelSource:
    return resolve(str(name), flag="--baseline", load_format=load_format, layers=layers, scratch=scratch)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"claim": 0.0}, "--claim"),
        ({"claim": float("nan")}, "--claim"),
        ({"margin": -0.01}, "--margin"),
        ({"margin": 0.5}, "--margin"),
        ({"margin": float("nan")}, "--margin"),
        ({"batch_size": 0}, "--batch-size"),
        ({"prompt_tokens": 0}, "--prompt-tokens"),
        ({"rounds": 4}, "--rounds"),
        ({"regimes": ()}, "--regime"),
        ({"output_tokens": 1}, "--output-tokens"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, "--seed"),
        ({"output_tokens": 4, "batch_size": 32, "prompt_tokens": 2048}, "--output-tokens"),
    ],
)
def test_senseless_settings_are_refused(change: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        check_settings(SpeedupSettings.model_validate(change))


@pytest.mark.parametrize(
    ("batch", "prompt"), [(1, 128), (8, 2048), (16, 2048), (32, 1024), (32, 2048), (256, 512), (128, 2048), (64, 2048)]
)
def test_the_least_output_still_has_a_step_in_which_all_decode(batch: int, prompt: int) -> None:
    """Against a step by step simulation of vLLM's scheduler: running requests first, then waiting prompts, in order."""
    output = least_output_tokens(batch, prompt)
    prefilled, produced, steps_together = [0] * batch, [0] * batch, 0
    while min(produced) < output:
        budget = MAX_STEP_TOKENS
        alive = [index for index in range(batch) if produced[index] < output]
        decoding = [index for index in alive if prefilled[index] == prompt]
        steps_together += len(decoding) == batch
        for index in alive:
            taken = min(1 if prefilled[index] == prompt else prompt - prefilled[index], budget)
            if not taken:
                break
            budget -= taken
            if prefilled[index] < prompt:
                prefilled[index] += taken
            produced[index] += prefilled[index] == prompt
    assert steps_together >= 1


def test_prefill_alone_needs_no_output_tokens() -> None:
    check_settings(SpeedupSettings.model_validate({"regimes": ["prefill"], "output_tokens": 1}))


def test_shipped_shapes_are_cut_in_a_copy(tmp_path: Path) -> None:
    floats = [name for name in shipped_shapes() if not name.endswith(("-int8", "-int4", "-fp8"))]
    assert floats == ["llama2-7b", "llama2-7b-groups25", "llama2-7b-layers25", "llama2-7b-mix25", "llama2-7b-pat25"]
    source = find("llama2-7b-pat25", tmp_path, layers=3)
    written = json.loads((tmp_path / "config.json").read_text())
    assert source.path == str(tmp_path)
    assert source.shape.layers == written["num_hidden_layers"] == 3
    assert (source.shape.hidden, source.shape.head_dim, source.shape.heads) == (3072, 128, 32)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("name", ["llama2-7b", "llama2-7b-groups25"])
def test_a_quantized_shape_is_what_an_export_of_it_has(name: str, scheme: Scheme) -> None:
    plain, stored = shipped_config(name), shipped_config(f"{name}-{scheme.name}")
    assert plain is not None
    assert stored == {**plain, "quantization_config": quantization_config(scheme)}


def test_four_bits_in_float32_are_refused_before_an_engine_dies_of_it(tmp_path: Path, monkeypatch) -> None:
    stored = find("llama2-7b-int4", tmp_path)
    with pytest.raises(UsageError, match=r"since llama2-7b-int4 has 4-bit weights and no CPU kernel in float32"):
        check_dtype(stored, "float32")
    check_dtype(stored, "bfloat16")
    check_dtype(find("llama2-7b-int8", tmp_path), "float32")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_dtype(stored, "float32")


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = shape_folder(tmp_path / "model")
    assert find(folder, tmp_path).path == str(folder)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "load_format", "layers", "error", "message"),
    [
        ("llama2-7b", "dummy", 33, UsageError, "1 to 32"),
        ("llama2-7b", "dummy", 0, UsageError, "--layers"),
        ("llama2-7b", "auto", None, MissingModel, "--load-format dummy"),
        ("./no/such/folder", "auto", None, MissingModel, "no such folder"),
    ],
)
def test_models_that_cannot_be_timed(
    name: str, load_format: str, layers: int | None, error: type[PatServeError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        find(name, tmp_path, load_format=load_format, layers=layers)


def test_folders_that_cannot_be_timed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingModel, match=r"without one"):
        find(tmp_path / "empty", tmp_path)
    folder = shape_folder(tmp_path / "shape")
    with pytest.raises(MissingModel, match="without weight files"):
        find(folder, tmp_path, load_format="auto")
    (folder / "model.safetensors").touch()
    with pytest.raises(UsageError, match="--load-format dummy"):
        find(folder, tmp_path, load_format="auto", layers=1)
    (folder / "config.json").write_text('{"hidden_size": 64')
    with pytest.raises(BrokenCheckpoint, match="JSON"):
        find(folder, tmp_path)
    (folder / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(BrokenCheckpoint, match="num_attention_heads"):
        find(folder, tmp_path)


def test_pairs_that_cannot_get_the_same_work(tmp_path: Path) -> None:
    dense = find(shape_folder(tmp_path / "a"), tmp_path)
    other_words = find(shape_folder(tmp_path / "b", vocab_size=400), tmp_path)
    settings = SpeedupSettings()
    check_pair(dense, dense, settings)
    with pytest.raises(UsageError, match="vocab_size of 400"):
        check_pair(dense, other_words, settings)
    with pytest.raises(UsageError, match="at most 256"):
        check_pair(dense, dense, settings.model_copy(update={"prompt_tokens": 250}))


def test_two_engines_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = find("llama2-7b", tmp_path)
    huge = dataclasses.replace(source, shape=dataclasses.replace(source.shape, layers=100_000))
    with pytest.raises(EngineError, match="--layers 2,6"):
        check_memory(huge, source, SpeedupSettings(), "float32")
    # Weights alone are 27 GB in float32, and half of that in bfloat16.
    assert engine_memory_bytes(source.shape, SpeedupSettings().full_batches[0], "float32") > 4 * source.shape.parameters
    assert (
        engine_memory_bytes(source.shape, SpeedupSettings().full_batches[0], "bfloat16") > 2 * source.shape.parameters
    )


def test_on_a_gpu_its_own_memory_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, settings = find("llama2-7b", tmp_path), SpeedupSettings()
    on_cpu = engine_memory_bytes(source.shape, settings.full_batches[0], "bfloat16")
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 1 << 20)
    monkeypatch.setattr(memory, "free_gpu_bytes", lambda: 80 << 30)
    # Nothing repacks its weights there.
    saved = on_cpu - engine_memory_bytes(source.shape, settings.full_batches[0], "bfloat16")
    assert saved == pytest.approx(0.4 * 2 * source.shape.parameters)
    check_memory(source, source, settings, "bfloat16")
    monkeypatch.setattr(memory, "free_gpu_bytes", lambda: 24 << 30)
    with pytest.raises(EngineError, match=r"GiB of GPU memory in bfloat16, found 24\.0 GiB available"):
        check_memory(source, source, settings, "bfloat16")


def test_prompts_are_fresh_in_each_round_and_repeatable() -> None:
    settings = SpeedupSettings(batch_size=2, prompt_tokens=50)
    first, second = round_prompts(settings, 384, 0), round_prompts(settings, 384, 1)
    assert [len(prompt) for prompt in first] == [50, 50]
    assert all(0 <= token < 384 for prompt in first for token in prompt)
    assert first == round_prompts(settings, 384, 0)
    assert not {tuple(prompt[:16]) for prompt in first} & {tuple(prompt[:16]) for prompt in second}
    assert first != round_prompts(settings.model_copy(update={"seed": 1}), 384, 0)


def test_prompts_repeat_where_decode_alone_is_judged() -> None:
    settings = SpeedupSettings(batch_size=2, prompt_tokens=50, regimes=(Regime.DECODE,))
    assert settings.repeats_prompts
    assert round_prompts(settings, 384, -3) == round_prompts(settings, 384, 7)
    assert not settings.model_copy(update={"regimes": (Regime.PREFILL, Regime.DECODE)}).repeats_prompts


def test_serving_dtype() -> None:
    assert hardware.serving_dtype("bfloat16") == "bfloat16"
    assert hardware.serving_dtype("auto") in hardware.DTYPE_BYTES
    with pytest.raises(UsageError, match="--dtype"):
        hardware.serving_dtype("int3")


def test_machine_description() -> None:
    machine = hardware.describe()
    assert machine["cpu_cores"] == len(hardware.compute_cores())
    assert len(hardware.compute_cores()) >= 1
    assert hardware.available_memory_bytes() > 0
