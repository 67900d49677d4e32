"""The flags of one method: `pat-train --method NAME` takes those of its settings, and its help leaves out others."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Sequence, Set
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from pat_serve.cut.axes import AXES, HIDDEN
from pat_serve.errors import UsageError

# The method of a command line that names none.
UNNAMED = "pat"

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from pat_serve.training.methods import Method


def with_method_flags(command: Callable[..., None], arguments: Sequence[str]) -> Callable[..., None]:
    """The command with a flag for each setting of the method that its arguments name; without one, as it is.

    The values come in the context's `params`, beside the command's own.

    Args:
        command: of typer's kind, with every option in an `Annotated`.
        arguments: of the command line, without the program's name.
    """
    name = named_method(arguments)
    signature = inspect.signature(command, eval_str=True)
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")} - {"--help"}
    unknown = given - {decl for one in signature.parameters.values() for decl in _declared(one)}
    if name is None and not unknown:
        # A method is torch's; a command line that names none, nor a flag of any, is spared that.
        return command
    from pat_serve.training.methods import METHODS

    method = METHODS.get(name or UNNAMED)
    if method is None:
        return command
    own = [_flag(setting, field, method) for setting, field in method.settings.model_fields.items()]
    own += [_of_others(setting, method) for setting in _settings_of_others(unknown, method)]
    shown = [_of_method(one, method) if name else one for one in signature.parameters.values()]

    @wraps(command)
    def narrowed(**values: Any) -> None:
        command(**{one: value for one, value in values.items() if one in signature.parameters})

    # Typer reads the flags from this attribute, which mypy does not know of a function.
    narrowed.__signature__ = signature.replace(parameters=[*shown, *own])  # type: ignore[attr-defined]
    narrowed.__doc__ = _told(method) if name else command.__doc__
    narrowed.__annotations__ = {one.name: one.annotation for one in [*shown, *own]}
    return narrowed


def named_method(arguments: Sequence[str]) -> str | None:
    """The method that a command line names, by its flag or in its recipe; None where neither does."""
    found = _value(arguments, "--method")
    config = _value(arguments, "--config")
    if found is None and config is not None:
        from pat_serve.training.recipe_file import read_recipe

        try:
            named = read_recipe(Path(config)).get("method")
        except UsageError:
            return None  # the command says what is wrong with the file
        found = named if isinstance(named, str) else None
    return found


def _value(arguments: Sequence[str], flag: str) -> str | None:
    found = None
    for at, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == flag and at + 1 < len(arguments):
            found = arguments[at + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.removeprefix(f"{flag}=")
    return found


def _flag(name: str, field: FieldInfo, method: type[Method]) -> inspect.Parameter:
    kind = bool if field.annotation is bool else str
    option = typer.Option(
        help=f"{field.description or ''}{default_of(field)}",
        metavar=None if kind is bool else _metavar(field.annotation),
        rich_help_panel=f"Settings of --method {method.name}",
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def default_of(field: FieldInfo) -> str:
    """A setting's default as its help tells it; nothing where the description does."""
    if field.default is None:
        return ""
    return f" [default: {str(field.default).lower() if field.annotation is bool else field.default}]"


def _declared(parameter: inspect.Parameter) -> Iterator[str]:
    """All spellings of a parameter's flag."""
    flag = f"--{parameter.name.replace('_', '-')}"
    yield from (flag, f"--no{flag[1:]}")
    for option in get_args(parameter.annotation)[1:]:
        for declared in getattr(option, "param_decls", None) or ():
            yield from declared.split("/")


def _settings_of_others(flags: Set[str], method: type[Method]) -> list[str]:
    """Settings of other methods alone that are among some flags."""
    from pat_serve.training.methods import METHODS

    names = dict.fromkeys(setting for other in METHODS.values() for setting in other.settings.model_fields)
    foreign = [name for name in names if name not in method.settings.model_fields]
    dashed = {name: name.replace("_", "-") for name in foreign}
    return [name for name in foreign if flags & {f"--{dashed[name]}", f"--no-{dashed[name]}"}]


def _of_others(setting: str, method: type[Method]) -> inspect.Parameter:
    """A flag that says whose it is, where the parser would not know it."""
    from pat_serve.training.methods import METHODS

    owners = [other for other in METHODS.values() if setting in other.settings.model_fields]
    dashed = setting.replace("_", "-")

    def refuse(value: object) -> None:
        if value is not None:
            raise UsageError(
                f"--no-{dashed}" if value is False else f"--{dashed}",
                expected=f"a flag of --method {method.name}",
                found="a setting of " + ", ".join(f"--method {other.name}" for other in owners),
                fix=f"Leave it out, or give --method {owners[0].name}.",
            )

    kind = bool if owners[0].settings.model_fields[setting].annotation is bool else str
    option = typer.Option(hidden=True, callback=refuse)
    return inspect.Parameter(
        setting, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _metavar(annotation: Any) -> str:
    """`S|M` of a choice, `FLOAT` of a number."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(kinds[0]) is Literal:
        return "|".join(map(str, get_args(kinds[0])))
    names = {int: "INTEGER", float: "FLOAT"}
    return names.get(kinds[0], "TEXT")


def _told(method: type[Method]) -> str:
    """The head of the method's help, with an example that it takes."""
    headline = (method.__doc__ or "").partition("\n")[0]
    asked = ""
    if method.prunes and not method.cut_by_default:
        axes = ",".join(axis for axis in AXES if axis in method.axes)
        asked = " --ratio 0.25" if HIDDEN in method.axes else f" --ratio 0.25 --axes {axes}"
    example = f"pat-train --method {method.name} --model base/ --data train.jsonl{asked} --out run/"
    return f"{headline}\n\nExample: `{example}`\n\nthen `pat-export --ckpt run/ --out pruned/`."


def refused_with(method: type[Method]) -> frozenset[str]:
    """Settings that the check of what is cut refuses with a method, whatever they say."""
    if not method.prunes:
        return frozenset({"hidden_size", "shape", "axes", "ratio", "choose", "search_minutes", "speedup"})
    return (
        frozenset()
        if HIDDEN in method.axes
        else frozenset({"hidden_size", "quantize_base", "search_minutes", "speedup"})
    )


def _of_method(parameter: inspect.Parameter, method: type[Method]) -> inspect.Parameter:
    """A flag of all methods as one of them has it: left out of the help, or with a default of its own."""
    hidden = method.unused | refused_with(method)
    if parameter.name not in hidden | method.defaults.keys():
        return parameter
    kind, given = get_args(parameter.annotation)
    option = copy.copy(given)
    option.hidden = parameter.name in hidden
    if parameter.name in method.defaults:
        told = re.sub(r" *\[default: .*\]$", "", option.help or "")
        option.help = f"{told} [default: {method.defaults[parameter.name]}]"
    return parameter.replace(annotation=Annotated[kind, option])
