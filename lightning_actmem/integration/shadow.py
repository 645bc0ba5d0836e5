"""The one place where the engine meets Lightning's loops: the strategy's ``training_step``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from lightning.pytorch.strategies import Strategy

from ..engine import ActMemEngine


class CompressedTrainingStep:
    """Has a strategy run ``training_step`` compressed, from now until `remove`.

    Every loop looks ``training_step`` up on the strategy and calls it once per closure, so an attribute of the
    instance that shadows the method is right for automatic and manual optimisation, accumulation, LBFGS, and for
    the trials of Lightning's tuners, which take all callbacks away. Evaluation uses other methods.

    ``teardown`` is shadowed too: it is the last that the trainer calls on every way out, also when a tuner's trial
    fails and the callbacks, away for the trial, never hear of it.

    Args:
        strategy: The trainer's strategy.
        engine: What the step is compressed by.
    """

    def __init__(self, strategy: Strategy, engine: ActMemEngine) -> None:
        self._strategy = strategy
        self._engine: ActMemEngine | None = engine
        shadows: dict[str, Callable[..., Any]] = {"training_step": self._training_step, "teardown": self._teardown}
        own = vars(strategy)
        self._methods = {name: getattr(strategy, name) for name in shadows}
        self._before = {name: own[name] for name in shadows if name in own}
        self._shadows = shadows
        own.update(shadows)

    def remove(self) -> None:
        """Put the strategy back as it was. What somebody has put on top in the meantime stays, and works as before."""
        own = vars(self._strategy)
        for name, method in self._shadows.items():
            if own.get(name) is method:
                del own[name]
        own.update({name: before for name, before in self._before.items() if name not in own})
        self._shadows = {}
        self._before = {}
        self._engine = None

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        training_step = self._methods["training_step"]
        if self._engine is None:
            return training_step(*args, **kwargs)
        # A `training_step(dataloader_iter)` fetches its batch itself: what the iterator holds is not the batch.
        inputs = None if args and isinstance(args[0], Iterator) else (args, kwargs)
        with self._engine.compress(self._strategy.lightning_module, inputs=inputs):
            return training_step(*args, **kwargs)

    def _teardown(self) -> None:
        teardown = self._methods["teardown"]
        self.remove()
        teardown()


def shadow(stack: ExitStack, target: Any, **methods: Callable[..., Any]) -> None:
    """Put methods of an instance in front of its class's, until the stack unwinds."""
    own = vars(target)
    for name, method in methods.items():
        if name in own:
            stack.callback(own.__setitem__, name, own[name])
        else:
            stack.callback(own.pop, name, None)
        own[name] = method
