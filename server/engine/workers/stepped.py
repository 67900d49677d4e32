"""A vLLM engine in this very process, stepped by hand so that every step has its timestamps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pat_serve.scores import LISTED_TOKENS, ListedScores, ScoreRequest, Scores
from pat_serve.server.analysis.trace import BatchTrace, RequestTrace, prompts_digest
from pat_serve.server.engine.draft import speculative_config
from pat_serve.server.engine.offline import offline_llm, own_products, submit
from pat_serve.server.engine.workers.probe import MachineRates, Product, measure_rates


class SteppedEngine:
    """An engine for one batch at a time: token ids in, token ids out.

    The process needs VLLM_ENABLE_V1_MULTIPROCESSING=0 in its environment, so that a step runs in the process itself.

    Args:
        model: folder or hub id; a folder with a config.json is enough for load_format "dummy".
        dtype: of weights and KV cache.
        load_format: "auto" or "dummy" (random weights).
        batch_size: most requests at once.
        max_model_tokens: prompt and output of one request.
        max_step_tokens: most tokens in one step, over all requests.
        kv_cache_bytes: size of the KV cache.
        enforce_eager: run without torch.compile.
        seed: of dummy weights.
        read_prefix_cache: reuse the keys and values of an equal earlier prompt.
        draft: folder or hub id of a smaller model that proposes tokens; None without.
        draft_tokens: tokens that the draft proposes in a step.
    """

    def __init__(
        self,
        *,
        model: str,
        dtype: str,
        load_format: str,
        batch_size: int,
        max_model_tokens: int,
        max_step_tokens: int,
        kv_cache_bytes: int,
        enforce_eager: bool,
        seed: int,
        read_prefix_cache: bool = False,
        draft: str | None = None,
        draft_tokens: int = 0,
    ) -> None:
        self._llm = offline_llm(
            model,
            skip_tokenizer_init=True,
            dtype=dtype,
            load_format=load_format,
            max_num_seqs=batch_size,
            max_model_len=max_model_tokens,
            max_num_batched_tokens=max_step_tokens,
            kv_cache_memory_bytes=kv_cache_bytes,
            # Two engines share a GPU's memory, and vLLM refuses to start where less than this share is free.
            gpu_memory_utilization=0.45,
            enable_prefix_caching=read_prefix_cache,
            # A step must return its own tokens and leave nothing under way when the other engine's turn comes.
            async_scheduling=False,
            enforce_eager=enforce_eager,
            seed=seed,
            speculative_config=None if draft is None else speculative_config(draft, draft_tokens),
        )
        self._dtype = dtype
        self._batch: _Batch | None = None

    def probe(self, rows: int) -> MachineRates:
        """Measure what the machine reads and multiplies, with this engine's own matrices and kernels among others.

        Args:
            rows: rows of activations in the products by which operations are counted.
        """
        assert self._batch is None, "the last batch is not finished"
        products = [
            Product(columns=columns, weights=weights, run=run) for columns, weights, run in own_products(self._llm)
        ]
        return measure_rates(self._dtype, products=products, rows=rows)

    def prefill(self, prompts: Sequence[Sequence[int]], *, output_tokens: int) -> None:
        """Submit all prompts at once, greedy and without an end-of-text; step until each has its first token.

        Args:
            prompts: token ids, one sequence for each request.
            output_tokens: of each request, exactly.
        """
        assert self._batch is None, "the last batch is not finished"
        self._batch = _Batch(len(prompts), output_tokens)
        for i, prompt in enumerate(prompts):
            submit(self._llm, str(i), prompt, output_tokens=output_tokens)
        while not self._batch.all_begun:
            self._batch.step(self._llm.llm_engine)

    def decode(self, steps: int) -> None:
        """Make so many steps, or fewer if the batch is finished before."""
        assert self._batch is not None, "no batch"
        for _ in range(steps):
            if not self._llm.llm_engine.has_unfinished_requests():
                break
            self._batch.step(self._llm.llm_engine)

    def take_trace(self) -> BatchTrace | None:
        """Take the trace of a finished batch, and make room for the next; None while the batch is unfinished.

        Raises:
            RuntimeError: the engine finished the batch with too few tokens.
        """
        assert self._batch is not None, "no batch"
        if self._llm.llm_engine.has_unfinished_requests():
            return None
        trace = self._batch.trace()
        self._batch = None
        return trace

    def serve(
        self, prompts: Sequence[Sequence[int]], *, output_tokens: int, concurrency: int
    ) -> tuple[list[RequestTrace], list[list[int]]]:
        """Keep so many requests in flight until all are answered: when one ends, the next is submitted.

        Args:
            prompts: token ids, one sequence for each request.
            output_tokens: of each request, exactly.
            concurrency: requests at once; the engine must be made for so many.

        Returns:
            timestamps and token ids of each request.
        """
        assert self._batch is None, "the last batch is not finished"
        engine = self._llm.llm_engine
        submitted_s: list[float] = []
        tokens_s: list[list[float]] = [[] for _ in prompts]
        token_ids: list[list[int]] = [[] for _ in prompts]
        finished = 0
        while finished < len(prompts):
            while len(submitted_s) < min(finished + concurrency, len(prompts)):
                index = len(submitted_s)
                submitted_s.append(time.monotonic())
                submit(self._llm, str(index), prompts[index], output_tokens=output_tokens)
            outputs = engine.step()
            now_s = time.monotonic()
            for output in outputs:
                index = int(output.request_id)
                token_ids[index] = list(output.outputs[0].token_ids)
                # A step gives several tokens where a draft has proposed them.
                tokens_s[index].extend([now_s] * (len(token_ids[index]) - len(tokens_s[index])))
                finished += output.finished
        traces = [
            RequestTrace(submitted_s=begun_s, tokens_s=tuple(times))
            for begun_s, times in zip(submitted_s, tokens_s, strict=True)
        ]
        return traces, token_ids

    def score(self, request: ScoreRequest) -> Scores:
        """Judge prompts and continue others, all at once."""
        assert self._batch is None, "the last batch is not finished"
        for i, prompt in enumerate(request.prompts):
            submit(self._llm, f"judged-{i}", prompt, output_tokens=1, prompt_logprobs=LISTED_TOKENS)
        for i, prompt in enumerate(request.continued):
            submit(self._llm, f"continued-{i}", prompt, output_tokens=request.new_tokens)
        done: dict[str, Any] = {}
        while self._llm.llm_engine.has_unfinished_requests():
            done |= {output.request_id: output for output in self._llm.llm_engine.step() if output.finished}
        return Scores(
            prompts=[_listed(done[f"judged-{i}"].prompt_logprobs[1:]) for i in range(len(request.prompts))],
            continuations=[list(done[f"continued-{i}"].outputs[0].token_ids) for i in range(len(request.continued))],
        )


def _listed(positions: Sequence[Any]) -> ListedScores:
    """Turn vLLM's dictionaries into lists, one for each position but the first, which nothing predicts."""
    ranked = [sorted(position.items(), key=lambda item: item[1].rank) for position in positions]
    return ListedScores(
        token_ids=[[token for token, _ in position] for position in ranked],
        logprobs=[[score.logprob for _, score in position] for position in ranked],
    )


class _Batch:
    """The batch under way, and its steps so far."""

    def __init__(self, size: int, output_tokens: int) -> None:
        self._size, self._output_tokens = size, output_tokens
        self._tokens = [0] * size
        self._prompts: list[Sequence[int]] = [()] * size
        self._started_s: list[float] = []
        self._ended_s: list[float] = []
        self._step_tokens: list[int] = []
        self._first_token_step = -1
        self._submitted_s = time.monotonic()

    @property
    def all_begun(self) -> bool:
        return self._first_token_step >= 0

    def step(self, engine: Any) -> None:
        before = sum(self._tokens)
        self._started_s.append(time.monotonic())
        outputs = engine.step()
        self._ended_s.append(time.monotonic())
        for output in outputs:
            index = int(output.request_id)
            self._tokens[index] = len(output.outputs[0].token_ids)
            self._prompts[index] = output.prompt_token_ids
        self._step_tokens.append(sum(self._tokens) - before)
        if not self.all_begun and all(self._tokens):
            self._first_token_step = len(self._ended_s) - 1

    def trace(self) -> BatchTrace:
        if any(count != self._output_tokens for count in self._tokens):
            raise RuntimeError(f"the engine gave {self._tokens} tokens instead of {self._output_tokens} a request")
        return BatchTrace(
            batch_size=self._size,
            submitted_s=self._submitted_s,
            steps_started_s=tuple(self._started_s),
            steps_ended_s=tuple(self._ended_s),
            steps_tokens=tuple(self._step_tokens),
            first_token_step=self._first_token_step,
            prompts_sha256=prompts_digest(self._prompts),
            prompt_tokens=max(map(len, self._prompts)),
        )
