"""One model over another's answers, token by token: what would it have written, and how far apart are the two?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pat_serve.evaluation.answers.generate import neutral_sampling, open_model
from pat_serve.evaluation.lm_eval_tasks import quiet
from pat_serve.evaluation.subject import Subject
from pat_serve.terminal.progress import track


@dataclass(frozen=True, kw_only=True)
class Forced:
    """A model over given answers.

    Attributes:
        equal: of each answer, the share of tokens that the model's greedy choice equals.
        kl_nats: of each answer, the mean over its tokens of KL(first model || this model); None by vLLM, which does not
            give whole distributions.
    """

    equal: list[float]
    kl_nats: list[float] | None


def force(subject: Subject, first: Subject, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Forced:
    """Run a model over the first model's answers.

    Args:
        subject: the model.
        first: the model that wrote the answers.
        prompts: token ids of each.
        answers: token ids of each, at least one.
    """
    if subject.backend.backend == "vllm":
        return Forced(equal=_by_vllm(subject, prompts, answers), kl_nats=None)
    return _by_transformers(subject, first, prompts, answers)


def _by_vllm(subject: Subject, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
    llm = subject.lm.model
    sampling = neutral_sampling(llm)
    sampling.prompt_logprobs = 1
    # A model has its own answers in its cache, and vLLM leaves the probabilities of what it reads there unfilled.
    sampling.skip_reading_prefix_cache = True
    inputs = [{"prompt_token_ids": [*prompt, *answer]} for prompt, answer in zip(prompts, answers, strict=True)]
    with quiet():
        told = llm.generate(inputs, sampling, use_tqdm=False)
    return [
        sum(_is_greedy(at, token) for at, token in zip(request.prompt_logprobs[len(prompt) :], answer, strict=True))
        / len(answer)
        for request, prompt, answer in zip(told, prompts, answers, strict=True)
    ]


def _is_greedy(logprobs: Any, token: int) -> bool:
    """Tell whether no token is likelier. vLLM ranks equally likely tokens alike."""
    return bool(logprobs[token].logprob >= max(each.logprob for each in logprobs.values()))


def _by_transformers(
    subject: Subject, first: Subject, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> Forced:
    import torch
    import torch.nn.functional as F

    assert subject.folder is not None
    assert first.folder is not None
    model, device = open_model(subject.folder, subject.backend.dtype)
    parent, _ = open_model(first.folder, first.backend.dtype)
    equal: list[float] = []
    kl: list[float] = []
    for prompt, answer in track(zip(prompts, answers, strict=True), "agreement", len(prompts)):
        ids_1T = torch.tensor([[*prompt, *answer]], device=device)
        here = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            own_TV = model(ids_1T).logits[0, here].float()
            parent_TV = parent(ids_1T).logits[0, here].float()
        equal.append(float((own_TV.argmax(-1).cpu() == torch.tensor(answer)).double().mean()))
        # A model may have padded rows that the other has not.
        shared = min(own_TV.shape[-1], parent_TV.shape[-1])
        log_p_TV = F.log_softmax(parent_TV[:, :shared], dim=-1)
        log_q_TV = F.log_softmax(own_TV[:, :shared], dim=-1)
        kl.append(float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).double().mean()))
    return Forced(equal=equal, kl_nats=kl)
