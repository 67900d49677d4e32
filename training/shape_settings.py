"""The settings that say along what a cut goes, how much of each axis stays, and what chooses it.

The recipe inherits them.
"""

from __future__ import annotations

from typing import Any

import pydantic

from pat_serve.cut.axes import AXES, HIDDEN
from pat_serve.shapes.shape import parse_shape
from pat_serve.training.choices import CHOICE_NAMES


class ShapeSettings(pydantic.BaseModel):
    """Each is a flag of `pat-train`, a line of a recipe and an entry of `PatConfig` of the same name."""

    # The axes that `ratio` goes along; the stream alone where there are none.
    axes: tuple[str, ...] = ()
    # Counts to end with by axis, and what chooses them where it is not the default (training/choices/).
    shape: dict[str, int] = pydantic.Field(default_factory=dict)
    choose: dict[str, str] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _method_follows_shape(cls, settings: object) -> object:
        """Choose the method `cut` where the stream stays whole, since PAT has nothing to do there."""
        if not isinstance(settings, dict) or settings.get("method") is not None:
            return settings
        if settings.get("search_minutes") or settings.get("speedup"):
            # The shape that is found decides the method.
            return settings
        shape, axes = settings.get("shape") or {}, settings.get("axes") or ()
        cut = set(parse_shape(shape) if isinstance(shape, str) else shape) | set(_split(axes))
        return {**settings, "method": "cut"} if cut and HIDDEN not in cut else settings

    @property
    def inner_axes(self) -> list[str]:
        """Every axis that is cut but the stream's, in order."""
        return [axis for axis in AXES if axis != HIDDEN and axis in {*self.shape, *self.axes}]

    @pydantic.field_validator("axes", mode="before")
    @classmethod
    def _parse_axes(cls, axes: object) -> object:
        """Split the axes, which a flag gives as a text: `layers,ffn`."""
        return _split(axes)

    @pydantic.field_validator("axes")
    @classmethod
    def _known_axes(cls, axes: tuple[str, ...]) -> tuple[str, ...]:
        if stray := [axis for axis in axes if axis not in AXES]:
            raise ValueError(f"axes among {', '.join(AXES)}, and {stray[0]!r} is none")
        if len(set(axes)) < len(axes):
            raise ValueError("every axis once")
        return axes

    @pydantic.field_validator("shape", mode="before")
    @classmethod
    def _parse_shape(cls, shape: object) -> object:
        """Parse the shape, which a flag gives as a text."""
        return parse_shape(shape) if isinstance(shape, str) else shape

    @pydantic.field_validator("choose", mode="before")
    @classmethod
    def _parse_choose(cls, choose: object) -> object:
        """Parse the choices, which a flag gives as a text: `layers=last,ffn=energy`."""
        if not isinstance(choose, str):
            return choose
        pairs = [part.partition("=")[::2] for part in choose.split(",") if part.strip()]
        if len({axis.strip() for axis, _ in pairs}) < len(pairs):
            raise ValueError("every axis once")
        return {axis.strip(): name.strip() for axis, name in pairs}

    @pydantic.model_validator(mode="after")
    def _known_choices(self) -> ShapeSettings:
        from pat_serve.training.methods import METHODS

        method = METHODS.get(getattr(self, "method", ""))
        cut = set(self.inner_axes) or set(method.cut_by_default if method else ())
        if not self.axes and (getattr(self, "search_minutes", 0) or getattr(self, "speedup", None)):
            # The shape that is found may cut any of them.
            cut = set(AXES) - {HIDDEN}
        if stray := sorted(set(self.choose) - cut):
            raise ValueError(f"choose says how to cut an axis of shape or axes, and {stray[0]} is none")
        for axis, name in self.choose.items():
            if name not in CHOICE_NAMES[axis]:
                raise ValueError(f"choose {axis}={' or '.join(CHOICE_NAMES[axis])}")
        return self


def _split(axes: object) -> Any:
    return tuple(name.strip() for name in axes.split(",") if name.strip()) if isinstance(axes, str) else axes
