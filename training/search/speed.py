"""The shape for a speed, by a probe of this machine and a rule; nothing is cut or measured for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.cut.axes import FFN, LAYERS
from pat_serve.errors import UsageError
from pat_serve.machine.hardware import DTYPE_BYTES, serving_dtype
from pat_serve.machine.probed_costs import probed_costs
from pat_serve.shapes.candidates import counts_for_speedup, exported_sizes, share_cut
from pat_serve.shapes.sizes import ModelSizes
from pat_serve.shapes.step_cost import decode_work
from pat_serve.terminal.progress import say
from pat_serve.training.config import LEAST_LAYERS, TrainRecipe
from pat_serve.training.search.candidates import CONTEXT_TOKENS, Candidate, Target, ceiling
from pat_serve.training.search.found import Search


def shape_for_speed(recipe: TrainRecipe) -> Search:
    """The smallest cut that is expected to be as fast as a recipe asks for; a search that has tried nothing.

    Along the recipe's axes, where it names some. Otherwise layers alone, or layers and FFN channels where these cut
    fewer parameters: a layer takes the fixed work of its step with it, which a model of thin layers feels most. A base
    of few layers loses FFN channels alone.

    Args:
        recipe: one that asks for a speed.

    Raises:
        UsageError: no cut is so fast.
    """
    target, checkpoint = Target.of(recipe), open_checkpoint(recipe.model, recipe.revision)
    assert target.speedup is not None
    base, speedup = checkpoint.sizes, expected_speedup(checkpoint.sizes)
    mixes = [recipe.axes] if recipe.axes else [(LAYERS,), (LAYERS, FFN)] if base.layers >= LEAST_LAYERS else [(FFN,)]
    found = []
    for axes in mixes:
        shape = counts_for_speedup(base, checkpoint.family, target.speedup, axes, speedup, config=checkpoint.config)
        if shape:
            sizes = exported_sizes(base, shape)
            cut = share_cut(base, sizes)
            found.append(Candidate(shape=shape, cut=cut, ceiling=ceiling(base, sizes), speedup=speedup(sizes)))
    if not found:
        raise out_of_reach(target, mixes)
    found.sort(key=lambda one: one.cut)
    best, other = found[0], found[-1]
    say(
        f"--speedup {target.speedup:g} takes --shape {best.told()}: {_figures(best)} (batch 1, {CONTEXT_TOKENS} tokens)"
    )
    if other is not best:
        say(f"--speedup {target.speedup:g} could take --shape {other.told()}: {_figures(other)}")
    return Search(target=target, axes=recipe.axes, minutes=0.0, shape=best.shape, tried=[])


def out_of_reach(target: Target, mixes: Sequence[Sequence[str]] = ()) -> UsageError:
    """The error of a size or a speed that no shape has.

    Args:
        target: that was asked for.
        mixes: of axes that were looked at; none where all were.
    """
    among = " or ".join(" and ".join(axes) for axes in mixes) or "every axis"
    return UsageError(
        "--ratio" if target.ratio is not None else "--speedup",
        expected="a share of all parameters that a shape comes near to"
        if target.ratio is not None
        else f"a speed that a cut of at most 60 % of {among} is expected to have here",
        found=str(target.ratio if target.ratio is not None else target.speedup),
        fix="Ask for less, name other --axes, or give a --shape; pat-shapes lists what is there.",
    )


def expected_speedup(base: ModelSizes) -> Callable[[ModelSizes], float]:
    """Probe this machine for the speed-up of other sizes. Where the probe tells nothing, bytes alone count."""
    dtype = serving_dtype()
    try:
        found = probed_costs(base, dtype)
    except UsageError as error:
        say(f"speeds are ceilings, since the probe of this machine found {error.found}")
        return lambda sizes: ceiling(base, sizes)
    if found.remark:
        say(found.remark)

    def seconds(sizes: ModelSizes) -> float:
        work = decode_work(sizes, batch_size=1, context_tokens=CONTEXT_TOKENS, dtype_bytes=DTYPE_BYTES[dtype])
        return found.costs.seconds(work)

    return lambda sizes: seconds(base) / seconds(sizes)


def _figures(candidate: Candidate) -> str:
    return (
        f"expected to decode {candidate.speedup:.2f}x as fast ({candidate.ceiling:.2f}x by its bytes), with "
        f"{candidate.cut:.1%} of the parameters cut"
    )
