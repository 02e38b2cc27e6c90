"""Waits for the checkers of `imgpull check` and starts those that had to wait for a place.

Rule 1: a checker has ended, and is reaped, before its place is given to the next one.
"""

from collections.abc import Sequence

import trio

from broker import worker
from broker.errors import ImgpullError
from broker.filecheck import Layer


def run(layers: Sequence[Layer], at_once: int) -> None:
    """See every layer to its end; how each ended is kept in it."""
    try:
        trio.run(_run, layers, at_once)
    except BaseExceptionGroup as group:
        from broker.machine.signals import leaves  # only now: it loads the whole state machine

        raise next(leaves(group)) from group


async def _run(layers: Sequence[Layer], at_once: int) -> None:
    slots = trio.CapacityLimiter(at_once)
    scopes = [trio.CancelScope() for _ in layers]
    async with trio.open_nursery() as nursery:
        for layer in layers:  # in order: whoever waits for a lower layer knows that it has a place already
            await slots.acquire_on_behalf_of(layer.number)
            nursery.start_soon(_work, layers, scopes, layer, slots)


async def _work(
    layers: Sequence[Layer], scopes: Sequence[trio.CancelScope], layer: Layer, slots: trio.CapacityLimiter
) -> None:
    """See one layer to its end, then let those above it go on, or stop them."""
    try:
        with scopes[layer.number - 1] as scope:
            if layer.started is None and layer.error is None and not scope.cancel_called:
                layer.start()
            if layer.started is not None:
                layer.take(await worker.supervise(layer.started))
    except ImgpullError as error:
        layer.error = error
    finally:
        slots.release_on_behalf_of(layer.number)
    if layer.accepted is None:
        for scope in scopes[layer.number :]:
            scope.cancel()
    else:
        for above in layers[layer.number :]:
            above.let_go()
