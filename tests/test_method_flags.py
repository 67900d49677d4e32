"""`pat-train --method NAME`: a flag for each of the method's own settings, and a help without the others'."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from pat_serve.cli.method_flags import named_method
from pat_serve.cli.train import main
from pat_serve.cut.axes import HIDDEN
from pat_serve.training.methods import METHODS


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pat-train", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("name", METHODS)
def test_help_of_a_method_shows_its_settings_and_no_other_methods(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, "--method", name, "--help") == 0
    shown = set(re.findall(r"^\W*(--[a-z0-9-]+)", capsys.readouterr().out, re.M))
    own = {f"--{setting.replace('_', '-')}" for setting in METHODS[name].settings.model_fields}
    assert own <= shown
    unused = {f"--{setting.replace('_', '-')}" for setting in METHODS[name].unused}
    assert not unused & shown
    # A cut of the stream is asked for where the method makes one, and counts where it cuts.
    assert ("--hidden-size" in shown) == (METHODS[name].prunes and HIDDEN in METHODS[name].axes)
    assert ("--axes" in shown) == METHODS[name].prunes
    others = {
        f"--{setting.replace('_', '-')}" for method in METHODS.values() for setting in method.settings.model_fields
    }
    assert not (others - own) & shown


def test_help_tells_the_methods_own_defaults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run(monkeypatch, "--method", "spp", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate. [default: 0.004]" in text


def test_a_flag_reaches_the_recipe_and_its_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    given = ("--model", "m", "--data", "d", "--out", str(tmp_path / "run"))
    assert run(monkeypatch, "--method", "one-shot", *given, "--sparsity", "1.5") == 2
    assert "--sparsity: expected less than 0.95, found 1.5" in capsys.readouterr().err


@pytest.mark.parametrize("named", [(), ("--method", "lora"), ("--method", "search")])
@pytest.mark.parametrize("flags", [("--sparsity", "0.5"), ("--refine=dsnot",)])
def test_a_flag_of_another_method_is_told_in_one_line(
    named: tuple[str, ...],
    flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    assert run(monkeypatch, *named, "--model", "m", "--data", "d", "--out", str(tmp_path / "run"), *flags) == 2
    flag, method = flags[0].partition("=")[0], named[1] if named else "pat"
    assert capsys.readouterr().err == (
        f"pat-train: {flag}: expected a flag of --method {method}, found a setting of --method one-shot. "
        "Leave it out, or give --method one-shot.\n"
    )


def test_a_flag_of_nobody_is_the_parsers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, "--sparsityy", "1") == 2
    assert "No such option: --sparsityy" in capsys.readouterr().err


def test_a_recipe_names_the_method_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"method": "one-shot", "model": "m", "data": "d", "settings": {"pattern": "2:4"}}))
    assert named_method(["--config", str(recipe)]) == "one-shot"
    assert named_method([f"--config={recipe}", "--method=lora"]) == "lora"
    assert named_method(["--out", "x"]) is None
    out = str(tmp_path / "run")
    assert run(monkeypatch, "--config", str(recipe), "--out", out, "--sparsity", "0.6") == 2
    assert "no sparsity beside pattern 2:4" in capsys.readouterr().err
