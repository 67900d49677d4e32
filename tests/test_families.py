"""Every model family from its base to its export: trained, rewritten, loaded by stock transformers, compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.axes import HIDDEN
from pat_serve.cut.hybrid import LEAST_SCALE, HybridFold
from pat_serve.cut.rotation import rotate_model
from pat_serve.errors import BrokenPlan, PatServeError, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.export.run.reader import open_run
from pat_serve.families.architectures import EMBEDDING, FAMILIES, HEAD
from pat_serve.run.plan import PruningPlan
from pat_serve.training.config import TrainRecipe
from pat_serve.training.run import resume, start
from tests.conftest import tiny_recipe
from tests.random_runs import PROMPT, random_run
from tests.test_export_parity import both_logits
from tests.tiny_models import save_tiny_family

# A large eps shows a norm that was forgotten; 1e-5 would hide it.
LARGE_EPS = {"rms_norm_eps": 1e-2}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("llama", {"num_key_value_heads": 4}),
    "Llama 3.1": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "head_dim": 32},
    ),
    "Llama 3.2, tied": ("llama", {"tie_word_embeddings": True, **LARGE_EPS}),
    "Yi": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    "Mistral": ("mistral", {"sliding_window": 16, "head_dim": 32, **LARGE_EPS}),
    "Qwen2.5": ("qwen2", LARGE_EPS),
    "Qwen2.5, tied": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {"head_dim": 32, **LARGE_EPS}),
    "Qwen3, tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True, "use_sliding_window": True}),
    "Gemma": ("gemma", {"head_dim": 32, **LARGE_EPS}),
    "Phi-3": ("phi3", {"sliding_window": 16, **LARGE_EPS}),
}
# The others differ from one of these by nothing that training sees; test_equal_in_float64 has them all.
TRAINED = [name for name in BASES if name not in ("Llama 2", "Qwen2.5, tied", "Qwen3")]
TIED = [name for name, (model_type, settings) in BASES.items() if settings.get("tie_word_embeddings")] + ["Gemma"]


def make_base(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    model_type, settings = BASES[name]
    return save_tiny_family(folder, model_type, dtype=dtype, **settings)


def short_recipe(base: Path, rows: Path, **overrides: Any) -> TrainRecipe:
    """12 steps, the fewest that PAT takes."""
    settings = {"max_steps": 12, "save_steps": 100, "batch_size": 2, "gradient_accumulation_steps": 1}
    recipe: TrainRecipe = tiny_recipe(base, rows, **(settings | overrides))
    return recipe


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorms compute in float32 whatever the dtype; here they keep float64, by the same formulas."""
    import transformers.models as models

    for model_type, prefix in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"),
                               ("gemma", "Gemma"), ("phi3", "Phi3")):  # fmt: skip
        modeling = getattr(getattr(models, model_type), f"modeling_{model_type}")
        offset = FAMILIES[model_type].norm_offset

        def forward(self: Any, x: torch.Tensor, offset: float = offset) -> torch.Tensor:
            eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
            return (offset + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

        monkeypatch.setattr(getattr(modeling, f"{prefix}RMSNorm"), "forward", forward)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_reader_names_the_norm_that_feeds_it(model_type: str):
    family = FAMILIES[model_type]
    norms = {spec.module for spec in family.tensors if spec.hidden_norm}
    for spec in family.tensors:
        reads = spec.hidden_dimension == 1 and not spec.writes_residual
        assert (spec.norm in norms) if reads else (spec.norm is None), spec.module
    assert {spec.norm for spec in family.tensors} - {None} == norms


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_the_stock_classes_own(model_type: str):
    """A field that config.json leaves out has transformers' own default."""
    stock, family = CONFIG_MAPPING[model_type](), FAMILIES[model_type]
    plain = {"head_dim": stock.hidden_size // stock.num_attention_heads, "tie_word_embeddings": False}
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        expected = family.defaults.get(name, plain.get(name, stock.num_attention_heads))
        assert getattr(stock, name, expected) == expected, name


@pytest.mark.parametrize("name", TRAINED)
def test_trained_exported_and_equal(name: str, rows: Path, tmp_path: Path):
    base = make_base(tmp_path / "base", name)
    start(short_recipe(base, rows), tmp_path / "run")
    done = export_run(tmp_path / "run", tmp_path / "out")
    assert done.parity is not None
    assert done.parity.logits_std > 0.1
    assert done.parity.max_abs_over_std < 2e-5
    wide, narrow = both_logits(tmp_path / "run", done.out, torch.float32)
    assert (wide - narrow).abs().max() / wide.std() < 2e-5

    before, after = (json.loads((path / "config.json").read_text()) for path in (base, done.out))
    assert after["hidden_size"] == 48
    assert after["tie_word_embeddings"] == (name in TIED)
    for setting in ("rope_parameters", "sliding_window", "use_sliding_window", "layer_types"):
        if BASES[name][0] != "qwen2":
            assert after.get(setting) == before.get(setting), setting
    model, report = AutoModelForCausalLM.from_pretrained(done.out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == done.record["architecture"] == after["architectures"][0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gemma_in_16_bit_is_rescaled_for_the_factor_that_16_bit_models_use(dtype: str, tmp_path: Path):
    """sqrt(48) and sqrt(64) are 6.9375 and 8 in bfloat16, 0.14 % from their exact ratio."""
    base = make_base(tmp_path / "base", "Gemma")
    run = random_run(tmp_path / "run", base)
    done = export_run(run, tmp_path / "out", dtype=dtype)
    plan = PruningPlan.load(run)
    fold, kept = plan.folds[EMBEDDING], plan.cuts[HIDDEN].kept
    raw = load_file(base / "model.safetensors")[f"{EMBEDDING}.weight"].double()
    moved = ((raw + raw @ fold.l0_RD.double().T @ fold.l1_DR.double().T) * fold.scale_D)[:, kept]
    factor = {"bfloat16": 8 / 6.9375, "float32": 8 / 48**0.5}[dtype]
    written = load_file(done.out / "model.safetensors")[f"{EMBEDDING}.weight"].double()
    assert float((written * moved).sum() / moved.square().sum()) == pytest.approx(factor, rel=1e-4)
    assert done.parity is not None
    assert f"as {dtype} rounds it" in done.parity.notes[0]
    stock = AutoModelForCausalLM.from_pretrained(done.out, dtype="auto").model.embed_tokens
    assert stock.embed_scale.to(stock.weight.dtype).item() == torch.tensor(48**0.5).to(getattr(torch, dtype)).item()


@pytest.mark.parametrize(("name", "tied"), [(name, "untie") for name in BASES] + [(name, "keep") for name in TIED])
def test_equal_in_float64(name: str, tied: str, tmp_path: Path, float64_norms: None):
    """A random plan, far from where training starts."""
    base = make_base(tmp_path / "base", name, torch.float64)
    run = random_run(tmp_path / "run", base)
    if tied == "keep":
        make_embedding_diagonal(run, torch.linspace(LEAST_SCALE, 2, 64, dtype=torch.float64))
    out = export_run(run, tmp_path / "out", parity=False).out
    assert (f"{HEAD}.weight" in load_file(out / "model.safetensors")) == (tied == "untie")
    wide, narrow = both_logits(run, out, torch.float64)
    assert wide.dtype == narrow.dtype == torch.float64
    assert wide.std() > 0.1
    assert (wide - narrow).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["Qwen2.5", "Qwen3, tied", "Gemma", "Phi-3"])
def test_a_rotation_keeps_the_function_and_exports(name: str, tmp_path: Path, float64_norms: None):
    base = make_base(tmp_path / "base", name, torch.float64)
    checkpoint = open_checkpoint(str(base))
    rotation_DD = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    with torch.no_grad():
        before = model(input_ids=PROMPT).logits
        rotate_model(model, checkpoint.family, checkpoint.num_layers, rotation_DD)
        assert (model(input_ids=PROMPT).logits - before).abs().max() < 1e-8
    run = random_run(tmp_path / "run", base)
    dataclasses.replace(PruningPlan.load(run), rotation=rotation_DD).save(run)
    wide, narrow = both_logits(run, export_run(run, tmp_path / "out", parity=False).out, torch.float64)
    assert (wide - narrow).abs().max() < 1e-8


SUBSETS = {
    "attention's queries": ["q_proj"],
    "one writer": ["down_proj"],
    "the MLP's readers": ["gate_proj", "up_proj"],
    "one module of one layer": r".*layers\.1\.self_attn\.o_proj",
    "all": None,
}


@pytest.mark.parametrize(
    ("name", "dtype", "subset"),
    [
        ("Llama 3.2, tied", "bfloat16", "attention's queries"),
        ("Mistral", "float16", "one writer"),
        ("Qwen2.5", "bfloat16", "the MLP's readers"),
        ("Qwen3", "float16", "one module of one layer"),
        ("Gemma", "bfloat16", "one writer"),
        ("Phi-3", "float16", "all"),
    ],
)
def test_16_bit_files_of_every_family_with_lora_on_any_linears(name: str, dtype: str, subset: str, tmp_path: Path):
    """benchmarks/parity_table.py has every family in every dtype."""
    targets = SUBSETS[subset]
    lora = {"target_modules": targets} if targets else {}
    done = export_run(
        random_run(tmp_path / "run", make_base(tmp_path / "base", name), lora=lora), tmp_path / "out", dtype=dtype
    )
    assert done.parity is not None
    exact, random, files, floor, own = done.parity.comparisons
    assert [c.dtype for c in done.parity.comparisons] == ["float32", "float32", "float32", dtype, dtype]
    assert exact.figures.max_abs_over_std < 2e-5
    assert exact.greedy is not None
    assert exact.greedy.equal == exact.greedy.prompts
    # Rounding moves a logit, as a random one does, and as far as the trained model's own.
    assert 1e-4 < files.figures.max_abs_over_std < 0.3
    assert files.figures.mean_kl_nats < 9 * random.figures.mean_kl_nats
    assert own.figures.mean_kl_nats < 9 * floor.figures.mean_kl_nats


def _told(lora: dict[str, Any]) -> str:
    """The option that a refusal has to name; none for modules, which are the adapter's tensors."""
    [option] = lora
    return "" if option == "target_modules" else option


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"alora_invocation_tokens": [1]},
        # These change the base before the training begins; the adapter alone is an update of another model.
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=lambda lora: next(iter(lora)),
)
@pytest.mark.filterwarnings("ignore")
def test_other_adapters_are_refused(lora: dict[str, Any], tmp_path: Path):
    run = random_run(tmp_path / "run", save_tiny_family(tmp_path / "base", "llama"), lora=lora)
    with pytest.raises(PatServeError, match=rf"expected .*{_told(lora)}.* found"):
        export_run(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_rank_stabilized_adapter_is_merged_by_its_own_scaling(tmp_path: Path):
    run = random_run(
        tmp_path / "run", make_base(tmp_path / "base", "Mistral"), lora={"use_rslora": True, "lora_alpha": 3}
    )
    done = export_run(run, tmp_path / "out")
    assert done.parity is not None
    assert done.parity.max_abs_over_std < 2e-5


def make_embedding_diagonal(run: Path, scale_D: torch.Tensor) -> None:
    plan = PruningPlan.load(run)
    nothing = torch.zeros(0, 64, dtype=scale_D.dtype)
    diagonal = HybridFold(l0_RD=nothing, l1_DR=nothing.T, scale_D=scale_D)
    plan = dataclasses.replace(plan, folds={**plan.folds, EMBEDDING: diagonal})
    plan.save(run)


def test_a_scale_that_the_head_cannot_divide_by_is_refused(tmp_path: Path):
    run = random_run(tmp_path / "run", make_base(tmp_path / "base", "Gemma"))
    make_embedding_diagonal(run, torch.full((64,), 1e-3))
    with pytest.raises(BrokenPlan, match=r"found 0\.001.*--tied-embeddings untie"):
        open_run(run)


def test_training_bounds_the_scale_of_a_tied_embedding(rows: Path, tmp_path: Path):
    base = make_base(tmp_path / "base", "Llama 3.2, tied")
    recipe = short_recipe(base, rows, learning_rate=0.5, tied_embeddings="keep")
    start(recipe, tmp_path / "run")
    fold = PruningPlan.load(tmp_path / "run").folds[EMBEDDING]
    assert fold.rank == 0
    assert float(fold.scale_D.min()) == pytest.approx(LEAST_SCALE)


def test_a_tied_run_resumes_from_its_checkpoint(rows: Path, tmp_path: Path):
    """The operator of rank 0 has tensors without an element, which a checkpoint must carry too."""
    run = tmp_path / "run"
    start(short_recipe(make_base(tmp_path / "base", "Llama 3.2, tied"), rows, save_steps=6), run)
    uninterrupted = load_file(run / "plan.safetensors")
    (run / "plan.json").unlink()
    shutil.rmtree(run / "checkpoints/step-12")
    resume(run)
    resumed = load_file(run / "plan.safetensors")
    assert resumed.keys() == uninterrupted.keys()
    for name, tensor in uninterrupted.items():
        torch.testing.assert_close(resumed[name], tensor)


def test_untied_on_request(rows: Path, tmp_path: Path):
    base = make_base(tmp_path / "base", "Llama 3.2, tied")
    start(short_recipe(base, rows, tied_embeddings="untie"), tmp_path / "run")
    done = export_run(tmp_path / "run", tmp_path / "out")
    head = load_file(done.out / "model.safetensors")[f"{HEAD}.weight"]
    kept = PruningPlan.load(tmp_path / "run").cuts[HIDDEN].kept
    assert torch.equal(head, load_file(base / "model.safetensors")[f"{EMBEDDING}.weight"][:, kept])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tied_embeddings": "untie", "hio_rank": 0}, "--tied-embeddings: expected an operator.*Add --hio-rank 8"),
        ({"lora_head": True}, "--lora-head: expected a head of its own.*--tied-embeddings untie with --hio-rank 8"),
        ({"lora_head": True, "tied_embeddings": "untie", "hio_rank": 0}, "--lora-head: expected a head of its own"),
        ({"lora_head": True, "method": "lora"}, "--lora-head: .*--rotate loss and a method that prunes"),
    ],
)
def test_a_head_that_no_export_could_have_is_refused_before_the_training(
    settings: dict[str, object], message: str, rows: Path, tmp_path: Path
):
    base = make_base(tmp_path / "base", "Llama 3.2, tied")
    with pytest.raises(UsageError, match=message):
        start(short_recipe(base, rows, **settings), tmp_path / "run")


@pytest.mark.parametrize(("method", "tied"), [("pat", "keep"), ("pat", "untie"), ("lora", "untie")])
def test_the_tie_is_no_setting_where_there_is_none(method: str, tied: str, tiny_base: Path, rows: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"--tied-embeddings.*its own tensor"):
        start(tiny_recipe(tiny_base, rows, method=method, tied_embeddings=tied), tmp_path / "run")


def test_a_rotated_model_cannot_stay_tied(rows: Path, tmp_path: Path):
    base = make_base(tmp_path / "base", "Llama 3.2, tied")
    with pytest.raises(UsageError, match="--rotate unties"):
        start(short_recipe(base, rows, rotate="energy", tied_embeddings="keep"), tmp_path / "run")


def test_a_dense_export_stays_in_its_own_class(rows: Path, tmp_path: Path):
    """A Qwen2 that keeps its width stays a Qwen2, with every tensor that was not adapted bit for bit the base's."""
    base = make_base(tmp_path / "base", "Qwen2.5, tied")
    start(short_recipe(base, rows, method="lora", max_steps=2), tmp_path / "run")
    out = export_run(tmp_path / "run", tmp_path / "out").out
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2"
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor in ("model.norm.weight", f"{EMBEDDING}.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(before[tensor], after[tensor])


def test_qwen3_says_what_its_head_norms_see(tmp_path: Path):
    run = random_run(tmp_path / "run", make_base(tmp_path / "base", "Qwen3"))
    done = export_run(run, tmp_path / "out")
    assert "see the changed rms_norm_eps" in done.record["parity"]["notes"][0]
    assert "see the changed rms_norm_eps" in (done.out / "README.md").read_text()
