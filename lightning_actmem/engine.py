"""The engine: one context manager around forward and loss. Works in plain PyTorch; knows nothing of Lightning."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_actmem_kernels import CodecSpec, resolve_backend

from .adapt.adapter import Adapter
from .adapt.by_sample import by_sample
from .adapt.linear import COVERED, ClosedForm
from .adapt.outputs import Outputs
from .adapt.replay import Replay
from .adapt.state import plan_of, plan_state
from .codecs import chooser_of, codecs_of, layer_codecs
from .config import ActMemConfig, ConfigLike
from .errors import ActMemError, ActMemWarning
from .methods import DerivativeChains, Gate, InvertedActivations, MethodsByPlace
from .report import StepReport, step_report
from .saved.attention import recomputed_attention
from .saved.borrowed import Borrowed
from .saved.hooks import SavedTensorHooks
from .saved.identify import Identifier
from .saved.ledger import Ledger
from .saved.offload import Offload
from .saved.patterns import Patterns
from .saved.probe import Rounding
from .saved.scope import LayerScope, is_compiled
from .saved.site import Site, mix64
from .saved.stack import HookStack, in_checkpoint
from .saved.store import Store
from .saved.tracker import OperationTracker
from .saved.transport import CudaTransport

# "derive" is none of these: nothing replaces the operation then.
_METHODS: dict[str, type[DerivativeChains | InvertedActivations]] = {
    "derivative": DerivativeChains,
    "inverted": InvertedActivations,
}


class ActMemEngine:
    """Stores what autograd saves in a few bits per element.

    Args:
        config: Settings: an `ActMemConfig`, a mapping, an OmegaConf node or the path of a YAML file.
        **fields: Single settings by name; they win over ``config``.

    Raises:
        ValueError: If a setting is unknown or not allowed.
        ActMemError: If a backend is asked for that is not there.

    Example:
        >>> engine = ActMemEngine(bits=4)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
        >>> x = torch.randn(512, 64)
        >>> with engine.compress(model, inputs=x):
        ...     loss = model(x).square().mean()
        >>> loss.backward()
        >>> engine.report().ratio > 7
        True
    """

    def __init__(self, config: ConfigLike = None, **fields: Any) -> None:
        self.config = ActMemConfig.load(config, **fields)
        self.rank = 0
        self.step = 0
        self.ledger = Ledger()
        self._tracker = OperationTracker()
        self._scope = LayerScope(self._suspended, self._name_classes)
        derive = not self.config.lossless if self.config.derive is None else self.config.derive
        if derive:
            self._tracker.replacements[F.scaled_dot_product_attention] = self._attention
        self._store = Store(self._scope, self.ledger, _backend(self.config.backend))
        if self.config.offload_bytes is not None:
            self._store.offload = Offload(self.ledger, self.config.offload_bytes, CudaTransport())
        #: Chooses the bits of every site, if the settings ask for it.
        self.adapter = Adapter(self, self.config) if self.config.adapts else None
        self._chooser = None if self.adapter is not None else chooser_of(self.config)
        self._store.watch = self._chooser if self.adapter is None else self.adapter.sizes
        self._identifier = Identifier(
            codecs_of(self.config, derive),
            self.config.min_elements,
            self.config.exact,
            layer_codecs(self.config, derive),
            self._tracker.declared,
        )
        self._store.keeps_width = self.adapter is not None
        self._store.split = by_sample if self.config.method == "actnn" else None
        self._hooks = SavedTensorHooks(self._tracker, self._scope, self._store, self._identifier, derive)
        self._stack = HookStack(self._hooks.pack, self._hooks.unpack, self._tracker)
        self._active = self._warned = False
        self._activations = Patterns(self.config.layer_activations)
        gate = Gate(self._may_replace, self.config.min_elements)
        used = {self.config.activations, *self.config.layer_activations.values()}
        methods = {name: method(self._tracker, self._store, gate) for name, method in _METHODS.items() if name in used}
        self._methods = MethodsByPlace(methods, self._activation_method)
        self._tracker.replacements.update(self._methods.replacements)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as settings and state: hooks and what they refer to are made anew there."""
        return _made_again, (self.config, self.rank, self.state_dict())

    @contextmanager
    def compress(self, module: nn.Module | None = None, *, inputs: Any = None) -> Iterator[None]:
        """Pack what autograd saves inside this context.

        Put forward and loss inside, and backward outside or inside as you like. A nested call is the same as one.

        Args:
            module: The model: its parameters and buffers are never packed, and its submodules name the sites.
                Without it everything is packed that is not an ``nn.Parameter`` or a view or cast of one.
            inputs: The batch in any nesting: it stays alive anyway, so it is not packed. When this is not given,
                every tensor without gradient that enters an operation is taken for input.

        Yields:
            Nothing.

        Raises:
            ActMemError: If a ``torch.func`` transform runs inside without `paused`; or if tensors are to be moved to
                the host and neither model nor tensors are on a CUDA device.
        """
        if self._active or in_checkpoint() or self._is_wholly_compiled(module):
            yield
            return
        if self._store.offload is not None:
            self._store.offload.check(module)
        self._warn_of_compiled_parts(module)
        borrowed = Borrowed(module, inputs)
        self._active = True
        try:
            self.step += 1
            if self._chooser is not None:
                self._store.plan = self._chooser.read()
            self._hooks.start_step(borrowed, mix64(self.config.seed, self.rank, self.step))
            with self._scope.installed(module), self._stack.installed():
                yield
        except RuntimeError as error:
            if "saved tensor hooks" in str(error) and "torch.func" in str(error):
                raise ActMemError(
                    "torch.func transforms (grad, vjp, jacrev, ...) cannot run while activations are compressed. "
                    "Put them into `with engine.paused():` (the callback and the strategies have paused() too)."
                ) from error
            raise
        finally:
            self._active = False
            with ExitStack() as ends:  # each runs whatever the others do
                if self.adapter is not None:
                    ends.callback(self.adapter.sizes.end_step, self.ledger)
                ends.callback(self._methods.end_step)
                ends.callback(self._hooks.end_step)

    def check_device(self, device: torch.device) -> None:
        """Make sure that training on a device can do what the settings ask for.

        Args:
            device: Where the model will be.

        Raises:
            ActMemError: If tensors are to be moved to the host, and the device is not a CUDA device.
        """
        if self._store.offload is not None:
            self._store.offload.check_device(device)

    def paused(self) -> AbstractContextManager[None]:
        """Leave autograd alone inside this context: for ``torch.func`` transforms and the like.

        Does nothing when compression is not active, or is suspended by other hooks (inside a checkpoint).
        """
        return self._suspended()

    @property
    def plan(self) -> Mapping[Site, CodecSpec | None]:
        """The codec of single sites, where one has been chosen; ``None`` keeps the tensor as it is."""
        return self._store.plan

    @plan.setter
    def plan(self, plan: Mapping[Site, CodecSpec | None]) -> None:
        self._store.plan = dict(plan)

    def probe(
        self,
        loss: Callable[[], Tensor],
        module: nn.Module | None = None,
        *,
        inputs: Any = None,
        number: int = 0,
        compact: bool = False,
    ) -> Replay:
        """Run forward and loss with everything stored as it is, for backward passes that round what they are told to.

        Sites, sharing and derivation are as in a training step under the present `plan`; the engine's own figures and
        its noise stay as they are.

        Args:
            loss: Runs forward and loss on a part of a batch, and returns the loss.
            module: As for `compress`.
            inputs: As for `compress`.
            number: Tells the noise of several probes in one step apart.
            compact: Whether to store at 8 bits what may be packed, instead of exactly.

        Returns:
            The graph.
        """
        prober = ActMemEngine(self._probe_config())
        prober._warned = True
        prober._chooser = None
        store = prober._store
        store.plan = self.plan
        # The complement gives other noise than that of any training step.
        noise = mix64(~self.config.seed, self.rank, self.step, number)
        store.watch = rounding = Rounding(noise, prober.ledger, store.cache, _backend(prober.config.backend), compact)
        closed_form = ClosedForm(rounding, store.shared)
        for function in COVERED:
            prober._tracker.replacements.setdefault(function, closed_form.run)
        outputs = Outputs(rounding)
        following = outputs if self.config.method == "actnn" else nullcontext()  # it holds gradients, for ActNN only
        with prober.compress(module, inputs=inputs), following:
            return Replay(loss(), rounding, closed_form, outputs)

    def _probe_config(self) -> ActMemConfig:
        """The same settings, without a second warning of a missing Triton; a part of a batch stays on the device."""
        backend = "torch" if self.config.backend == "auto" and find_spec("triton") is None else self.config.backend
        return dataclasses.replace(self.config, backend=backend, offload=False)

    def report(self, *, table: bool = True) -> StepReport:
        """Return what the last step has stored.

        Args:
            table: Whether to fill ``bytes_by_kind`` and ``rows`` too; the rest is cheap enough for every step.
        """
        return step_report(self.ledger, table=table)

    def restart_adapter(self) -> None:
        """Forget what adaptations have measured, and their plan; does nothing where the bits do not adapt."""
        if self.adapter is not None:
            self.adapter = Adapter(self, self.config)
            self._store.watch = self.adapter.sizes
            self.plan = {}

    def release(self) -> None:
        """Let go of the model of the last step, so that it can be freed while this engine lives on."""
        self._scope.release()
        if self._store.offload is not None:
            self._store.offload.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain numbers and strings, loadable with ``weights_only=True``."""
        state: dict[str, Any] = {"version": 1, "step": self.step}
        if self._chooser is not None:
            state["codecs"] = self._chooser.state_dict()
        else:
            state["plan"] = plan_state(self.plan)
        if self.adapter is not None:
            state["adapter"] = self.adapter.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken: the same noise follows.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it comes from a newer version of this package.
        """
        if state.get("version") != 1:
            raise ValueError(
                f"ActMem state must be of version 1, got {state.get('version')!r}. "
                "Update lightning-actmem to the version that wrote the checkpoint, or newer."
            )
        self.step = int(state["step"])
        measured = state.get("adapter")
        if self._chooser is not None and "codecs" in state:
            self._chooser.load_state_dict(state["codecs"])
        elif "plan" in state and (measured is None if self.adapter is None else self.adapter.suits(measured)):
            self.plan = plan_of(state["plan"])
        if self.adapter is not None and measured is not None:
            self.adapter.load_state_dict(measured)

    def _name_classes(self, classes: dict[str, str]) -> None:
        self._identifier.name_classes(classes)
        self._activations.name_classes(classes)

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        if not self._active:
            yield
            return
        with self._stack.suspended():
            yield

    def _attention(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Recompute attention in backward, unless somebody else's hooks decide what it saves."""
        if self._stack.is_innermost() and forward_ad._current_level < 0:
            return recomputed_attention(function, arguments, keywords)
        return function(*arguments, **keywords)

    def _may_replace(self, operation: str) -> bool:
        """Whether what an operation saves comes to these hooks, and may be rounded."""
        if forward_ad._current_level >= 0:  # a replacement has no forward-mode derivative
            return False
        return self._stack.is_innermost() and not self._identifier.keeps(operation, self._scope.stack[-1])

    def _activation_method(self, operation: str) -> str:
        """Return what an operation keeps where the model is now: one of `config.ACTIVATIONS`."""
        return self._activations.find(self._scope.stack[-1].layer, operation) or self.config.activations

    def _is_wholly_compiled(self, module: nn.Module | None) -> bool:
        if module is None or not is_compiled(module):
            return False
        self._warn_compiled(f"{type(module).__name__} is compiled as a whole: nothing of it is packed.")
        return True

    def _warn_of_compiled_parts(self, module: nn.Module | None) -> None:
        if self._warned or module is None:
            return
        compiled = self._scope.compiled_layers(module)
        if compiled:
            self._warn_compiled(f"compiled modules are not packed, the rest is: {', '.join(compiled[:5])}.")

    def _warn_compiled(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"ActMem: {what} What a compiled graph saves cannot be packed by hooks yet: its backward would "
                "unpack everything at once. Leave torch.compile off to pack these activations.",
                ActMemWarning,
                stacklevel=4,
            )


def _made_again(config: ActMemConfig, rank: int, state: dict[str, Any]) -> ActMemEngine:
    engine = ActMemEngine(config)
    engine.rank = rank
    engine.load_state_dict(state)
    return engine


def _backend(name: str) -> str | None:
    if name == "auto":
        if torch.cuda.is_available() and find_spec("triton") is None:
            warnings.warn(
                "ActMem: there is a GPU but Triton is not installed, so PyTorch code packs instead: the same bits, "
                "more slowly. Run `pip install 'triton>=3.2'`.",
                ActMemWarning,
                stacklevel=3,
            )
        return None
    if name == "triton":
        resolve_backend("triton", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return name
