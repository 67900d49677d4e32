"""Whatever interrupts an export, its output is complete or absent, and the next run cleans up.

Real processes: an exception still runs `finally` blocks, SIGKILL does not.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pat_serve.run.plan import file_sha256
from tests.export_children import Children
from tests.test_export_parity import random_run
from tests.tiny_models import save_tiny_llama

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def children(run: Path) -> Iterator[Children]:
    children = Children(warm=run)
    yield children
    children.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_tiny_llama(tmp_path_factory.mktemp("bases") / "base")
    return random_run(tmp_path_factory.mktemp("runs") / "run", base)


@pytest.fixture(scope="module")
def complete(run: Path, children: Children, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that nothing has interrupted."""
    out = tmp_path_factory.mktemp("complete") / "out"
    assert children.run(ckpt=run, out=out)["code"] == 0
    return out


def same(out: Path, complete: Path) -> bool:
    """Every file of a complete export, the weights bit for bit."""
    names = {path.name for path in complete.iterdir()}
    whole = names == {path.name for path in out.iterdir()} and file_sha256(out / WEIGHTS) == file_sha256(
        complete / WEIGHTS
    )
    # Those with a date in them are at least there as a whole.
    return whole and all((out / name).stat().st_size == (complete / name).stat().st_size for name in names)


def moments(total: int, count: int) -> list[int]:
    """The first and the last events, and some between them, by a seeded draw."""
    chosen = {0, 1, *range(max(0, total - count // 2), total)}
    rest = [moment for moment in range(total) if moment not in chosen]
    return sorted(chosen | set(random.Random(0).sample(rest, min(len(rest), count - len(chosen)))))


@pytest.mark.parametrize("force", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_at_any_moment(force: bool, run: Path, complete: Path, children: Children, tmp_path: Path):
    """With --force an earlier export stands there: at every moment it is that one or the new one, never neither."""
    out = tmp_path / "out"
    if force:
        shutil.copytree(complete, out)
        (out / "earlier").touch()
    whole = children.run(ckpt=run, out=out, force=force)
    assert (whole["code"], whole["left"]) == (0, ["out"])
    assert same(out, complete)
    ended = []
    for moment in moments(whole["events"], 8):
        shutil.rmtree(out)
        if force:
            shutil.copytree(complete, out)
            (out / "earlier").touch()
        killed = children.run(ckpt=run, out=out, force=force, kill_at=moment)
        assert killed["code"] == -9, killed
        ended.append((out / "earlier").exists() if force else not out.exists())
        if (out / "earlier").exists():
            (out / "earlier").unlink()
        assert same(out, complete) if out.exists() else not force
        again = children.run(ckpt=run, out=out, force=True)
        assert (again["code"], again["left"]) == (0, ["out"]), (moment, again)
    assert ended[0], "killed at once it has not begun"
    if force:
        assert not ended[-1], "killed at the end it is done, but for what it replaced"


def test_killed_by_the_clock(run: Path, complete: Path, children: Children, tmp_path: Path):
    out = tmp_path / "out"
    for _ in range(4):
        children.run(ckpt=run, out=out, kill_after_s=random.uniform(0, 0.3))
        assert not out.exists() or same(out, complete)
        shutil.rmtree(out, ignore_errors=True)
    assert children.run(ckpt=run, out=out)["left"] == ["out"]


def test_a_living_export_is_not_swept_up(run: Path, complete: Path, children: Children, tmp_path: Path):
    """The late one has written everything when the other begins, wins and ends: it must not replace it."""
    out = tmp_path / "work/out"
    children.send(ckpt=run, out=out, count=2, late=0, gate=tmp_path / "gate")
    late, other = children.answer()
    assert (other["code"], late["code"]) == (0, 2)
    assert "OutputExists" in late["message"]
    assert late["left"] == ["out"]
    assert same(out, complete)


@pytest.mark.parametrize("force", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_several_at_once(force: bool, run: Path, complete: Path, children: Children, tmp_path: Path):
    out = tmp_path / "out"
    if force:
        shutil.copytree(complete, out)
    children.send(ckpt=run, out=out, count=3, force=force)
    codes = [answer["code"] for answer in children.answer()]
    assert set(codes) <= {0, 2}
    assert 0 in codes
    assert force or codes.count(0) == 1
    assert same(out, complete)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_file_that_may_not_grow(share: float, run: Path, complete: Path, children: Children, tmp_path: Path):
    """RLIMIT_FSIZE: the write itself fails, as on a full disk."""
    limit = int((complete / WEIGHTS).stat().st_size * share)
    failed = children.run(ckpt=run, out=tmp_path / "out", fsize=limit)
    assert failed["code"] == 1
    assert failed["message"].startswith("DiskFull: ")
    assert failed["left"] == []


IN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    mount = "mount -t tmpfs -o size=64k tmpfs /mnt"
    return subprocess.run([*IN_NAMESPACE, "sh", "-c", mount], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces, to mount a small tmpfs without root")
def test_a_disk_that_is_full(run: Path, complete: Path, tmp_path: Path):
    """A real one: a tmpfs that holds half of the weights."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (complete / WEIGHTS).stat().st_size // 2
    mount = f'mount -t tmpfs -o size={size} tmpfs "{disk}" && exec "$@"'
    children = Children((*IN_NAMESPACE, "sh", "-c", mount, "sh"), warm=run)
    before = children.run(ckpt=run, out=disk / "out")
    late = children.run(ckpt=run, out=disk / "out", skip_dry_run=True)
    children.close()
    assert (before["code"], late["code"]) == (1, 1)
    assert "B of free space" in before["message"]
    assert "a disk that takes all files" in late["message"]
    assert late["message"].startswith("DiskFull: ")
    assert before["left"] == late["left"] == []
