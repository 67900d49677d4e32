"""An engine of known latency that speaks the worker's protocol: `python -m tests.fake_worker COMMAND_FD REPLY_FD`.

Its clock is made up, so nothing waits. Beside its config.json a model folder may have a fake.json; where the model is
cut, which copies its config.json alone, the same stands there under "fake":

    prefill_s, step_s   seconds of a prefill and of a decode step
    prefill_layer_s, step_layer_s   and of each layer beside that
    noise               standard deviation of each batch's logarithm
    drift               share by which every batch is slower than the one before
    stalls              numbers of the batches (warm-up counts) that take ten times as long
    dies_at             number of the batch at which the process ends
    fails_at            number of the batch at which it reports a failure
    other_prompts_at    number of the batch in which it works on other token ids than it was sent
    rates               bytes and FLOPs a second that each of its probes finds, the last for all that follow
    gpu_memory_bytes    what it says that it holds on a GPU
    accepted            with a draft: proposed tokens that each step keeps
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from pat_serve.server.analysis.trace import BatchTrace, RequestTrace, prompts_digest
from pat_serve.server.engine.workers.probe import MachineRates
from pat_serve.server.engine.workers.protocol import (
    Command,
    Failed,
    Prefill,
    Probe,
    Probed,
    Ready,
    Serve,
    Served,
    Start,
    Stepped,
)


class FakeEngine:
    """One engine and its made-up clock."""

    def __init__(self, start: Start) -> None:
        self._start, self._draw = start, random.Random(start.model)
        config, beside = json.loads((Path(start.model) / "config.json").read_text()), Path(start.model) / "fake.json"
        self._truth = json.loads(beside.read_text()) if beside.exists() else config["fake"]
        for name in ("prefill", "step"):
            self._truth[f"{name}_s"] += config["num_hidden_layers"] * self._truth.get(f"{name}_layer_s", 0.0)
        self._batches, self._probes, self._now_s = 0, 0, 100.0

    @property
    def gpu_memory_bytes(self) -> int | None:
        """The bytes that the test has set."""
        return self._truth.get("gpu_memory_bytes")

    def rates(self) -> MachineRates:
        """The rates that its next probe finds."""
        found = self._truth.get("rates", [[1e8, 1e10]])
        bytes_per_s, flops_per_s = found[min(self._probes, len(found) - 1)]
        self._probes += 1
        return MachineRates(dtype=self._start.dtype, bytes_per_s=bytes_per_s, flops_per_s=flops_per_s, cache_bytes=1)

    def next_batch(self) -> float:
        """Factor by which the coming batch is slower than the truth."""
        number, truth = self._batches, self._truth
        self._batches += 1
        if number == truth.get("dies_at"):
            os._exit(7)
        if number == truth.get("fails_at"):
            raise RuntimeError("the engine was told to fail")
        slower = self._draw.lognormvariate(0, truth.get("noise", 0.0)) * (1 + truth.get("drift", 0.0)) ** number
        return slower * (10 if number in truth.get("stalls", ()) else 1)

    def batch(self, command: Prefill) -> BatchTrace:
        """All timestamps of a batch at once; the decode commands that follow only wait for its last step."""
        other = [[0]] if self._batches == self._truth.get("other_prompts_at") else []
        slower, size = self.next_batch(), len(command.prompts)
        starts, ends, submitted_s = [], [], self._now_s
        for index in range(command.output_tokens):
            starts.append(self._now_s)
            self._now_s += slower * (self._truth["step_s"] if index else self._truth["prefill_s"])
            ends.append(self._now_s)
        return BatchTrace(
            batch_size=size,
            submitted_s=submitted_s,
            steps_started_s=tuple(starts),
            steps_ended_s=tuple(ends),
            steps_tokens=(size,) * command.output_tokens,
            first_token_step=0,
            prompts_sha256=prompts_digest(command.prompts + other),
            prompt_tokens=max(map(len, command.prompts)),
        )

    def serve(self, command: Serve) -> Served:
        """Waves of requests; with a draft every step gives the accepted tokens and one more."""
        per_step = 1 + (self._truth.get("accepted", 0) if self._start.draft else 0)
        requests, token_ids = [], []
        for first in range(0, len(command.prompts), command.concurrency):
            slower, submitted_s = self.next_batch(), self._now_s
            times = [submitted_s + slower * self._truth["prefill_s"]]
            while len(times) < command.output_tokens:
                times += [times[-1] + slower * self._truth["step_s"]] * per_step
            times = times[: command.output_tokens]
            self._now_s = times[-1]
            for prompt in command.prompts[first : first + command.concurrency]:
                requests.append(RequestTrace(submitted_s=submitted_s, tokens_s=tuple(times)))
                wrong = self._start.draft is not None and self._truth.get("changes_output", False)
                token_ids.append([(sum(prompt) + index + wrong) % 384 for index in range(command.output_tokens)])
        return Served(requests=requests, token_ids=token_ids)


def main() -> None:
    """Obey commands until the pipe closes."""
    command_fd, reply_fd = (int(argument) for argument in sys.argv[1:3])
    engine: FakeEngine | None = None
    trace: BatchTrace | None = None
    steps_left = 0
    with os.fdopen(command_fd, encoding="utf-8") as commands, os.fdopen(reply_fd, "w", encoding="utf-8") as replies:
        for line in commands:
            command = Command.validate_json(line)
            reply: Ready | Stepped | Probed | Served | Failed
            try:
                if isinstance(command, Start):
                    engine = FakeEngine(command)
                    reply = Ready(start_s=0.1, peak_memory_bytes=1, gpu_memory_bytes=engine.gpu_memory_bytes)
                elif isinstance(command, Probe):
                    assert engine is not None
                    reply = Probed(rates=engine.rates())
                elif isinstance(command, Serve):
                    assert engine is not None
                    reply = engine.serve(command)
                elif isinstance(command, Prefill):
                    assert engine is not None
                    trace, steps_left = engine.batch(command), command.output_tokens - 1
                    reply = Stepped(trace=None if steps_left else trace)
                else:
                    steps_left -= min(steps_left, getattr(command, "steps", 0))
                    reply = Stepped(trace=None if steps_left else trace)
            except RuntimeError as error:
                reply = Failed(error=f"RuntimeError: {error}")
            replies.write(reply.model_dump_json() + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
