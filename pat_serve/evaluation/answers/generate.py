"""A model writes answers, in stock transformers or in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pat_serve.checkpoints.locate import read_config
from pat_serve.errors import UsageError, first_line
from pat_serve.evaluation.lm_eval_tasks import quiet
from pat_serve.evaluation.subject import Subject
from pat_serve.files.strict_json import parse
from pat_serve.terminal.progress import track


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is written.

    Attributes:
        new_tokens: at most.
        temperature: 0 is greedy; nothing else shapes the distribution, whatever the model's generation config says.
        seed: of sampled answers.
    """

    new_tokens: int
    temperature: float = 0.0
    seed: int = 0


def generate(subject: Subject, prompts: Sequence[list[int]], decoding: Decoding) -> tuple[list[list[int]], list[bool]]:
    """Have a model answer prompts.

    Args:
        subject: the model.
        prompts: token ids of each.
        decoding: how the answers are written.

    Returns:
        token ids of each answer without its end token, and whether the model ended it by itself.

    Raises:
        UsageError: the model is a running server, or a prompt leaves no room for an answer.
    """
    if subject.folder is None:
        raise UsageError(
            subject.name,
            expected="a checkpoint: answers are compared token by token",
            found="a running server",
            fix="Leave --prompts and --arithmetic out for servers, or name the server's model.",
        )
    longest = max(map(len, prompts)) + decoding.new_tokens
    if subject.positions is not None and longest > subject.positions:
        raise UsageError(
            "--answer-tokens",
            expected=f"prompt and answer within {subject.positions} tokens, which {subject.name} was made for",
            found=f"{longest} tokens",
            fix="Lower it, or shorten the prompts.",
        )
    subject.require_rows([{"input_ids": prompt} for prompt in prompts])
    ends = end_ids(subject.folder)
    write = _by_vllm if subject.backend.backend == "vllm" else _by_transformers
    return _cut(write(subject, prompts, decoding, ends), ends)


def end_ids(folder: Path) -> list[int]:
    """Tokens that end a model's answer: of its generation config, else of its config."""
    path = folder / "generation_config.json"
    told: Any = None
    try:
        told = parse(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    except ValueError as error:
        raise UsageError(path, expected="JSON", found=first_line(error), fix="Mend or remove it.") from error
    if told is None:
        told = read_config(folder).get("eos_token_id")
    return [] if told is None else [told] if isinstance(told, int) else list(told)


def _cut(answers: list[list[int]], ends: Sequence[int]) -> tuple[list[list[int]], list[bool]]:
    cut, ended = [], []
    for answer in answers:
        at = next((at for at, token in enumerate(answer) if token in ends), None)
        cut.append(answer[:at])
        ended.append(at is not None)
    return cut, ended


def _by_vllm(
    subject: Subject, prompts: Sequence[list[int]], decoding: Decoding, ends: Sequence[int]
) -> list[list[int]]:
    llm = subject.lm.model
    wanted = []
    for number in range(len(prompts)):
        sampling = neutral_sampling(llm)
        sampling.temperature, sampling.max_tokens = decoding.temperature, decoding.new_tokens
        sampling.stop_token_ids = list(ends)
        if decoding.temperature:
            # A seed for each answer, so that an answer does not depend on the others in its batch.
            sampling.seed = decoding.seed + number
        wanted.append(sampling)
    with quiet():
        told = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], wanted, use_tqdm=False)
    return [list(request.outputs[0].token_ids) for request in told]


def neutral_sampling(llm: Any) -> Any:
    """Sampling parameters of a vLLM engine without what the model's generation config wants."""
    sampling = llm.get_default_sampling_params()
    sampling.top_p, sampling.top_k, sampling.min_p = 1.0, 0, 0.0
    sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty = 1.0, 0.0, 0.0
    sampling.temperature, sampling.max_tokens = 0.0, 1
    return sampling


def _by_transformers(
    subject: Subject, prompts: Sequence[list[int]], decoding: Decoding, ends: Sequence[int]
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig

    assert subject.folder is not None
    model, device = open_model(subject.folder, subject.backend.dtype)
    sampled: dict[str, Any] = {"temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=decoding.new_tokens, do_sample=decoding.temperature > 0, num_beams=1, use_cache=True,
        repetition_penalty=1.0, eos_token_id=list(ends) or None, pad_token_id=ends[0] if ends else 0,
        **(sampled if decoding.temperature else {}),
    )  # fmt: skip
    torch.manual_seed(decoding.seed)
    # Prompts of like length share a batch, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[at : at + subject.backend.batch_size] for at in range(0, len(order), subject.backend.batch_size)]
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in track(batches, f"answers of {subject.folder.name}", len(batches)):
        longest = max(len(prompts[index]) for index in batch)
        missing = [longest - len(prompts[index]) for index in batch]
        ids_BT = torch.tensor([[0] * count + prompts[index] for count, index in zip(missing, batch, strict=True)])
        mask_BT = torch.tensor([[0] * count + [1] * (longest - count) for count in missing])
        with torch.no_grad():
            whole_BT = model.generate(ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=settings)
        for index, ids_T in zip(batch, whole_BT[:, longest:].tolist(), strict=True):
            answers[index] = ids_T
    return answers


def open_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Load a checkpoint with stock transformers, on the GPU if there is one; returns it and its device."""
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    return model.eval().to(device), device
