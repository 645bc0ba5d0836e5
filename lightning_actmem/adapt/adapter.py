"""The adapter: measures, allocates, and remembers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_actmem_kernels import CodecSpec

from ..config import ActMemConfig
from ..errors import ActMemWarning
from ..saved.probe import SiteUse
from ..saved.site import Site
from .allocate import Choice, fewest_bytes, least_variance
from .law import Law, Measured
from .measurement import Measurement, Measuring, merged
from .published import ActNN, Gact
from .replay import Replay
from .schedule import Target
from .sensitivity import Sensitivities
from .sizes import Sizes

Plan = Mapping[Site, CodecSpec | None]
# What a budget allows is to hold for every batch until the next adaptation. Measured on a transformer's first 500 steps
# with 100 between two adaptations: fresh batches find up to 1.5 times the noise that the adaptation has found.
_MARGIN = 0.65
# Settings that measurements and plans depend on.
_SETTINGS = ("method", "codec", "bits", "attention_bits", "loss_bits", "group_size", "rounding", "activations")
_SLACK = 1 + 1e-6  # sums of rounded numbers
_FIXED_PASSES = 2  # per sub-batch: the exact gradient, and the whole plan at once


class Host(Protocol):
    """The engine, as far as an adapter needs it."""

    plan: Plan

    def probe(
        self,
        loss: Callable[[], Tensor],
        module: nn.Module | None = None,
        *,
        inputs: Any = None,
        number: int = 0,
        compact: bool = False,
    ) -> Replay:
        """Run forward and loss with everything stored as it is."""
        ...


@dataclass(frozen=True)
class Change:
    """A site that is stored in another way from now on.

    Args:
        site: The site.
        before: Its codec until now; ``None`` is exact.
        after: Its codec from now on.
        noise_before: What the old codec adds to the gradient's variance, relative to the minibatch gradient's own.
        noise_after: The same for the new one.
        bytes_before: Bytes that it took.
        bytes_after: Bytes that it takes.
    """

    site: Site
    before: CodecSpec | None
    after: CodecSpec | None
    noise_before: float
    noise_after: float
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        """Return what changes and why."""
        return (
            f"{self.site}: {self._name(self.before)} -> {self._name(self.after)} "
            f"(noise {self.noise_before:.2g} -> {self.noise_after:.2g}, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes)"
        )

    def _name(self, spec: CodecSpec | None) -> str:
        """Name a codec, and its groups where they are all that changes."""
        name = name_of(spec)
        if spec is None or name_of(self.before) != name_of(self.after):
            return name
        mean = " with their mean" if spec.centre else ""
        return f"{name} in groups of {spec.group_size}{mean}"


class Adapter:
    """Chooses the codec and the bits of every site from what its rounding really does to the gradient.

    `measure` on parts of a batch, then `allocate`. Noise is always relative: the variance that rounding adds, over the
    variance that the minibatch gradient has by itself. The ratio is the same for a batch and its parts.

    Args:
        host: The engine.
        config: Its settings.
    """

    def __init__(self, host: Host, config: ActMemConfig) -> None:
        self.sizes = Sizes()
        #: Joins the ranks: given a rank's measurement, returns those of all ranks in the same order on each.
        self.gather: Callable[[Measurement], Sequence[Measurement]] | None = None
        #: Adaptations measured so far.
        self.count = 0
        #: Variance of the gradient of one part of a batch, as measured last; 1 before the first time.
        self.gradient_variance = 1.0
        #: Noise of the whole plan as measured last, and what had been predicted for the same plan.
        self.measured_noise: float | None = None
        self.expected_noise: float | None = None
        #: Bytes that the last measurement's probes have held at most.
        self.probe_bytes = 0
        #: Whether to store no more bytes than without adaptation: what a batch size has been found to fit with.
        self.capped = False
        self.sensitivities = Sensitivities()
        self._host = host
        self._config = config
        self._warned = False
        laws: dict[str, Law] = {"actmem": Measured(), "actnn": ActNN(), "gact": Gact()}
        self._law = laws[config.method]

    @property
    def predicted_noise(self) -> float | None:
        """Noise of the present plan by the sum over its sites; ``None`` before the first measurement."""
        if not self.sensitivities.averages:
            return None
        return sum(self._noise_of(site, self._current(site, use)) or 0.0 for site, use in self.sizes.uses.items())

    def measure(
        self,
        module: nn.Module,
        closures: Sequence[Callable[[], Tensor]],
        *,
        inputs: Sequence[Any] | None = None,
        max_passes: int = 32,
        compact: bool = True,
    ) -> Measurement:
        """Measure what rounding adds to the gradient, on disjoint parts of a batch.

        Parameters, ``.grad``, optimizer and hooks of gradient accumulators stay as they are. What the forward pass
        itself changes (batch-norm statistics, random state, metrics) is the caller's to put back.

        Args:
            module: The model.
            closures: Each runs forward and loss on its own part of a batch and returns the loss; at least two parts
                of the same size. They are run one after the other, each graph is freed before the next begins.
            inputs: The inputs of each closure, as for ``engine.compress``.
            max_passes: Backward passes in all.
            compact: Whether probes keep what may be packed at 8 bits instead of exactly. A part of a quarter of the
                batch then takes no more memory than a training step at 2 bits.

        Returns:
            What was measured, on all ranks.

        Raises:
            ValueError: If there are fewer than two closures, too few passes, or nothing to measure.
        """
        count = len(closures)
        if count < 2:
            raise ValueError(
                f"closures must hold at least 2 losses on different parts of a batch, got {count}. The gradient's own "
                "variance shows in their difference."
            )
        passes = max_passes - _FIXED_PASSES * count
        if passes < 1:
            raise ValueError(
                f"max_passes must be above {_FIXED_PASSES * count} for {count} closures, got {max_passes}. "
                "Each takes an exact pass and one with the whole plan."
            )
        measuring = Measuring([parameter for parameter in module.parameters() if parameter.requires_grad])
        targets: list[Target] | None = None
        for number, closure in enumerate(closures):
            given = None if inputs is None else inputs[number]
            probe = self.count * count + number
            replay = self._host.probe(closure, module, inputs=given, number=probe, compact=compact)
            if not self.sizes.uses:
                self.sizes.uses = dict(replay.uses)
            choices = {site: self._candidates(site, use) for site, use in replay.uses.items()}
            plan = {site: spec for site, use in replay.uses.items() if (spec := self._current(site, use)) is not None}
            if not replay.uses:
                raise ValueError(
                    f"closures must save tensors of min_elements={self._config.min_elements} or more, got "
                    "none that large. Take larger parts of the batch, or lower min_elements."
                )
            measuring.begin(replay, plan)
            found = self._law.without_replay(replay, choices)
            measuring.add(found)
            if targets is None:
                others = {site: specs for site, specs in choices.items() if site not in found}
                targets = self._law.targets(others, self.sensitivities, passes)
            # Repeated targets fall on different closures.
            share = -(-len(targets) // count)
            measuring.replay(replay, targets[number * share : (number + 1) * share], choices)
            del replay
        measurement = measuring.result()
        if self.gather is not None:
            measurement = merged(self.gather(measurement))
        self._take(measurement)
        return measurement

    def allocate(self) -> list[Change]:
        """Choose every site's codec by what has been measured, and set the engine's plan.

        Sites that have not been measured keep the default.

        Returns:
            What changes.
        """
        uses = {site: use for site, use in self.sizes.uses.items() if site in self.sensitivities.averages}
        options = [self._choices(site, use) for site, use in uses.items()]
        chosen = self._chosen(options, uses)
        self._warn_if_missed(chosen, uses)
        before = self._host.plan
        plan = {site: choice.spec for site, choice in zip(uses, chosen, strict=True) if not uses[site].pinned}
        changes = [
            Change(
                site,
                old := self._current(site, uses[site]),
                new,
                self._noise_of(site, old) or 0.0,
                self._noise_of(site, new) or 0.0,
                uses[site].stored_bytes(old),
                uses[site].stored_bytes(new),
            )
            for site, new in plan.items()
            if new != self._current(site, uses[site])
        ]
        self._host.plan = {**before, **plan}
        self.sizes.renew()
        return changes

    def state_dict(self) -> dict[str, Any]:
        """Return the sensitivities and what else has been measured: lists, texts and numbers."""
        return {
            "settings": self._settings(),
            "count": self.count,
            "sensitivities": self.sensitivities.state(),
            "gradient_variance": self.gradient_variance,
            "measured_noise": self.measured_noise,
            "expected_noise": self.expected_noise,
            "sizes": self.sizes.state(),
        }

    def suits(self, state: Mapping[str, Any] | None) -> bool:
        """Return whether a state was made under these settings: else neither it nor its plan holds."""
        return state is not None and state.get("settings") == self._settings()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken, if it `suits`; else measure afresh."""
        if not self.suits(state):
            return
        self.count = int(state["count"])
        self.sensitivities.load(state["sensitivities"])
        self.gradient_variance = float(state["gradient_variance"])
        self.measured_noise = state["measured_noise"]
        self.expected_noise = state["expected_noise"]
        self.sizes.load(state["sizes"])

    def _chosen(self, options: list[list[Choice]], uses: Mapping[Site, SiteUse]) -> list[Choice]:
        config = self._config
        limit_bytes = config.budget_bytes
        if limit_bytes is not None:
            limit_bytes -= self._other_bytes(uses)
        default_bytes = sum(use.stored_bytes(use.default) for use in uses.values())
        if self.capped:
            limit_bytes = default_bytes if limit_bytes is None else min(limit_bytes, default_bytes)
        if config.noise is not None:
            chosen = fewest_bytes(options, self._allowed_noise(config.noise))
            if limit_bytes is None or sum(choice.stored_bytes for choice in chosen) <= limit_bytes:
                return chosen
        return least_variance(options, default_bytes if limit_bytes is None else limit_bytes)

    def _other_bytes(self, uses: Mapping[Site, SiteUse]) -> int:
        """Return what is stored beside what may be chosen now."""
        others = (
            use.stored_bytes(self._current(site, use)) for site, use in self.sizes.uses.items() if site not in uses
        )
        return self.sizes.fixed_bytes + sum(others)

    def _warn_if_missed(self, chosen: Sequence[Choice], uses: Mapping[Site, SiteUse]) -> None:
        """Say once where the fewest bytes are above the budget, or the least noise above what is allowed."""
        if self._warned or not self._knows_all(uses):
            return  # what has not been measured yet, as a site or with 1 bit, may still shrink
        budget, allowed = self._config.budget_bytes, self._config.noise
        stored_bytes = self._other_bytes(uses) + sum(choice.stored_bytes for choice in chosen)
        noise = sum(choice.variance for choice in chosen)
        if budget is not None and stored_bytes > budget:
            missed = (
                f"budget={self._config.budget!r} asks for at most {budget:,} bytes, and {stored_bytes:,} is the least "
                f"there is, {self.sizes.fixed_bytes:,} of them outside the choice of codecs. Allow more, take a "
                "smaller batch, or lower attention_bits and loss_bits"
            )
        elif budget is None and allowed is not None and not self.capped and noise > _SLACK * allowed:
            missed = (
                f"noise={allowed:g} is asked for, and {noise:.3g} is the least there is with these codecs. Allow more, "
                'or take codec="auto" and activations="derive"'
            )
        else:
            return
        self._warned = True
        warnings.warn(f"ActMem: {missed}. This is said once.", ActMemWarning, stacklevel=3)

    def _knows_all(self, uses: Mapping[Site, SiteUse]) -> bool:
        """Whether these are all sites, and of each what every width does has been measured or follows."""
        if len(uses) < len(self.sizes.uses):
            return False
        for site, use in uses.items():
            specs = self._candidates(site, use)
            known = [spec for spec in specs if self._noise_of(site, spec) is not None]
            if {spec.bits for spec in known} < {spec.bits for spec in specs}:
                return False
        return True

    def _settings(self) -> list[Any]:
        places = self._config.layer_bits, self._config.layer_activations
        return [*(getattr(self._config, name) for name in _SETTINGS), *(dict(place) for place in places)]

    def _allowed_noise(self, noise: float) -> float:
        """Allow less than the budget, and less still where more has been measured than predicted."""
        if not self.measured_noise or not self.expected_noise:
            return _MARGIN * noise
        return _MARGIN * noise * min(1.0, self.expected_noise / self.measured_noise)

    def _candidates(self, site: Site, use: SiteUse) -> list[CodecSpec]:
        return [use.default] if use.pinned else self._law.candidates(site, use, self._config)

    def _choices(self, site: Site, use: SiteUse) -> list[Choice]:
        if use.pinned:
            return [Choice(use.default, use.stored_bytes(use.default), self._noise_of(site, use.default) or 0.0)]
        # What stands in for an operation's own tensors is encoded in any case.
        choices = [] if use.default.codec == "fixed" else [Choice(None, use.stored_bytes(None), 0.0)]
        for spec in self._candidates(site, use):
            noise = self._noise_of(site, spec)
            if noise is not None:
                choices.append(Choice(spec, use.stored_bytes(spec), noise))
        return choices

    def _take(self, measurement: Measurement) -> None:
        self.count += 1
        if not measurement.is_finite:
            return  # float16 has overflowed: the present bits stay
        own = sum(measurement.distances) / len(measurement.distances)
        if own > 0:
            self.gradient_variance = own
        # Relative to what was found with them: gradients shrink in the course of a training, and on parts with large
        # ones rounding errors are large too. Averages of either by itself have told a third too little noise.
        for (site, spec), errors in measurement.errors.items():
            self.sensitivities.add(site, spec, [error / self.gradient_variance for error in errors], self.count)
        self.measured_noise = sum(measurement.totals) / len(measurement.totals) / self.gradient_variance
        self.expected_noise = self.predicted_noise
        self.probe_bytes = measurement.probe_bytes

    def _current(self, site: Site, use: SiteUse) -> CodecSpec | None:
        return self._host.plan.get(site, use.default)

    def _noise_of(self, site: Site, spec: CodecSpec | None) -> float | None:
        return self._law.variance(self.sensitivities, site, spec)


def name_of(spec: CodecSpec | None) -> str:
    """Return a codec's name as in the table (``"uniform-4"``, ``"exact"``)."""
    return "exact" if spec is None else spec.label
