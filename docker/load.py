"""Put load on a server with vLLM's own benchmark: python load.py URL [--requests N] [--rate PER_SECOND].

Prompts are random tokens. The `vllm` command asks for a distribution of that name, which its CPU build does not have.
"""

from __future__ import annotations

import argparse
import os

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pat_serve.machine.local_addresses import keep_local_addresses_direct

own = argparse.ArgumentParser(description=__doc__)
own.add_argument("url")
own.add_argument("--model", default="/model")
own.add_argument("--requests", type=int, default=200)
own.add_argument("--rate", type=float, default=2.0)
own.add_argument("--prompt-tokens", type=int, default=64)
own.add_argument("--output-tokens", type=int, default=64)
asked = own.parse_args()
keep_local_addresses_direct(os.environ)

parser = FlexibleArgumentParser()
add_cli_args(parser)
flags = [
    "--base-url", asked.url, "--model", asked.model, "--backend", "openai", "--endpoint", "/v1/completions",
    "--dataset-name", "random", "--random-input-len", str(asked.prompt_tokens),
    "--random-output-len", str(asked.output_tokens), "--ignore-eos", "--num-prompts", str(asked.requests),
    "--request-rate", str(asked.rate), "--disable-tqdm",
]  # fmt: skip
main(parser.parse_args(flags))
