"""The settings that one method has and others have not: a class beside the method, an entry of the recipe, flags.

A method names its class in `Method.settings`. Each field is then a flag of `pat-train --method NAME` with the field's
description as its help, and a line under `settings` in a recipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Self

import pydantic

from pat_serve.errors import UsageError

if TYPE_CHECKING:
    from pat_serve.training.config import TrainRecipe


class OwnSettings(pydantic.BaseModel):
    """Settings of one method; a method without any has this class."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def of(cls, recipe: TrainRecipe) -> Self:
        """The settings in a recipe of the method."""
        return cls.model_validate(recipe.settings)


class MethodSettings(pydantic.BaseModel):
    """The part of a recipe that belongs to its method alone; the recipe inherits it."""

    # By name, with every default filled in, so that a recipe repeats a run whatever the defaults become.
    settings: dict[str, Any] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_the_defaults_of_the_method(cls, settings: object) -> object:
        """Lay what is given over the method's own defaults."""
        from pat_serve.training.methods import METHODS

        if not isinstance(settings, dict) or (method := METHODS.get(str(settings.get("method")))) is None:
            return settings
        # A file's `null` says nothing.
        return settings | {name: default for name, default in method.defaults.items() if settings.get(name) is None}

    @pydantic.model_validator(mode="after")
    def _check_settings(self) -> Self:
        """Check the settings against the class of the recipe's method.

        Raises:
            UsageError: one is unknown to the method, or out of range.
        """
        from pat_serve.training.methods import METHODS

        # An unknown method has its own error, once somebody asks for its class.
        if (method := METHODS.get(getattr(self, "method", ""))) is not None:
            # The recipe is frozen for everybody else.
            self.__dict__["settings"] = checked_settings(method.settings, self.settings, method.name)
        return self


def checked_settings(kind: type[OwnSettings], settings: dict[str, Any], method: str) -> dict[str, Any]:
    """The settings of a method as a recipe keeps them.

    Args:
        kind: the method's class of settings.
        settings: by name, as flags or a file give them.
        method: its name, for messages.

    Raises:
        UsageError: one is unknown to the method, or out of range.
    """
    try:
        return kind.model_validate(settings).model_dump(mode="json")
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields) or "none"
            raise UsageError(
                f"--{flag_name(name)}",
                expected=f"a setting of --method {method}: {known}",
                found=name,
                fix=f"{meant(name, kind.model_fields)}Leave it out, or choose the method that has it.",
            ) from error
        raise UsageError(
            f"--{flag_name(name)}" if name else f"--method {method}",
            expected=fault["msg"].removeprefix("Value error, ").removeprefix("Input should be "),
            found=str(fault.get("input")) if name else str(settings),
            fix=f"See pat-train --method {method} --help.",
        ) from error


def meant(unknown: str, names: Iterable[str]) -> str:
    """A question after the name that somebody probably meant; empty without one."""
    near = get_close_matches(unknown, [*names], n=1)
    return f"Did you mean {near[0]}? " if near else ""


def flag_name(setting: str) -> str:
    """The flag of a setting, without its dashes."""
    return setting.replace("_", "-")
