"""A server with two engines, a page and a card; each module of this folder has one of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import HANG_S, KEY, Server, running, tail
from tests.tiny_models import save_tiny_llama

MAX_MODEL_LEN = 8192
PROMPT = "Return a new dictionary"
# Both models carry it in their folders, as an export and its parent do.
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
CARD = """---
license: apache-2.0
---
# A narrow model

Some **strong** text, [a paper](https://arxiv.org/abs/2408.14721), [a trap](javascript:document.title='owned') and
<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>.

| tensor | width |
|---|---|
| `o_proj` | 32 |
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("dense") / "dense", max_position_embeddings=MAX_MODEL_LEN)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in place of the shared one: half as wide a model beside its baseline, with a page for browsers."""
    with running_pair(dense, tmp_path_factory.mktemp("pair")) as server:
        yield server
        # Both engines end with the server.
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.terminate()
        assert server.process.wait(HANG_S) == 0, tail(server.log)
        assert psutil.wait_procs(family, timeout=HANG_S)[1] == []


def running_pair(dense: Path, folder: Path) -> AbstractContextManager[Server]:
    model = save_tiny_llama(folder / "pruned", hidden_size=32, max_position_embeddings=MAX_MODEL_LEN)
    (model / "README.md").write_text(CARD)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    flags = ["--baseline", str(dense), "--dtype", "float32", "--kv-cache-gib", "0.05"]
    return running(model, folder / "log.txt", *flags, "--api-key", f"tests={KEY}", "--public-page")
