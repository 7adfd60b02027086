"""Some of a model's seeds, in several layers at once: what they are, and what one may ask of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from kasmina_ext.grafting import GraftingStrategy, strategy_number
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle, TransitionRules, Verdict
from kasmina_ext.report import counted
from kasmina_ext.seed_arguments import batch_values, on_device
from kasmina_ext.state_layout import NO_ID, StateVar

_S = ExtendedLifecycle
_APPLIED, _ILLEGAL, _TOO_FEW = int(Verdict.APPLIED), int(Verdict.ILLEGAL_TRANSITION), int(Verdict.TOO_FEW_EPOCHS)
_REMOVED = (_S.CANCELLED, _S.ROLLED_BACK, _S.CULLED)
"""Where a seed goes that is removed; the later, the rather."""
_MAX_SEEDS = 10  # named in a line

Rules = TransitionRules | None


class Verdicts(Sequence[Verdict]):
    """What became of each request, in the order of the selection's ids. Looking at one waits for the device.

    True if all were applied; printed, a line for each verdict that there is.
    """

    def __init__(self, ids: Tensor, codes: Tensor) -> None:
        self.ids = ids
        """int64 ``[U]`` on the CPU: the seeds."""
        self.codes = codes
        """int32 ``[U]`` of :class:`~kasmina_ext.lifecycle.Verdict`, where the seeds are."""

    @property
    def applied(self) -> Tensor:
        """bool ``[U]``. Does not wait."""
        return self.codes == _APPLIED

    @cached_property
    def _verdicts(self) -> list[Verdict]:
        return [Verdict(code) for code in self.codes.tolist()]

    @overload
    def __getitem__(self, index: int) -> Verdict: ...
    @overload
    def __getitem__(self, index: slice) -> list[Verdict]: ...
    def __getitem__(self, index: int | slice) -> Verdict | list[Verdict]:
        return self._verdicts[index]

    def __len__(self) -> int:
        return len(self.ids)

    def __bool__(self) -> bool:
        return all(verdict is Verdict.APPLIED for verdict in self._verdicts)

    def __str__(self) -> str:
        lines = []
        for verdict in sorted(set(self._verdicts)):
            seeds = [
                str(seed) for seed, found in zip(self.ids.tolist(), self._verdicts, strict=True) if found is verdict
            ]
            named = ", ".join(seeds[:_MAX_SEEDS]) + (", ..." if len(seeds) > _MAX_SEEDS else "")
            what = verdict.name if verdict is Verdict.APPLIED else f"{verdict.name} ({verdict.message})"
            lines.append(f"{what}: {counted(len(seeds), 'seed')}, {named}")
        return "\n".join(lines) or "no requests"

    __repr__ = __str__


class Part(NamedTuple):
    """The seeds of a selection that are in one layer."""

    layer: KasminaLayer
    local: Tensor
    """int32 ``[u]`` on the layer's device: their numbers in it."""
    positions: Tensor
    """int64 ``[u]`` on the CPU: where they are in the selection."""


class Selection:
    """Seeds to ask something of, as in ``seeds[10:20].graft()``; its requests and answers are in the order of ``ids``.

    Requests go by the lifecycle's transitions, in as many steps as it takes, in one batch for each
    layer and step; nothing waits for the device. Each is applied whole or not at all: a verdict other
    than APPLIED says what stands in the way, and the seed is as it was. They are judged by every
    layer's own ``transition_rules`` if no ``rules`` are given;
    ``TransitionRules.strict().scaled(0)`` are the same transitions without least epochs. Of a seed that
    is named twice the last request counts.

    RuntimeError, before anything is written, where seeds would germinate in a bank that is parametrized.
    """

    def __init__(self, layers: Sequence[KasminaLayer], ids: Tensor) -> None:
        self.ids = ids
        """int64 ``[U]`` on the CPU."""
        self._first = layers[0]
        ends = torch.tensor([layer.num_seeds for layer in layers], device="cpu").cumsum(0)
        number = torch.bucketize(ids, ends, right=True)
        order = number.argsort(stable=True)
        counts = torch.bincount(number, minlength=len(layers))
        self._parts: list[Part] = []
        for index, positions in enumerate(order.split(counts.tolist())):
            if len(positions):
                layer = layers[index]
                local = (ids[positions] - (ends[index] - layer.num_seeds)).int()
                self._parts.append(Part(layer, on_device(layer.device, local), positions))

    @property
    def parts(self) -> list[Part]:
        """Layer by layer; where the layers are now."""
        return [part._replace(local=on_device(part.layer.device, part.local)) for part in self._parts]

    @property
    def _home(self) -> torch.device:
        return self._first.device

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Selection({counted(len(self), 'seed')} of {counted(len(self.parts), 'layer')})"

    @property
    def state(self) -> Tensor:
        """int32 ``[U]``: :class:`~kasmina_ext.lifecycle.ExtendedLifecycle`. Does not wait."""
        return self._gathered([part.layer.lifecycle_states[part.local] for part in self.parts])

    @property
    def alpha(self) -> Tensor:
        """float32 ``[U]``. Does not wait."""
        return self._gathered([part.layer._buffers["alpha"][part.local] for part in self.parts], torch.float32)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def germinate(
        self,
        strategy: GraftingStrategy | int | str | Iterable | Tensor | None = None,
        alpha: float | Iterable[float] | Tensor | None = None,
        *,
        rules: Rules = None,
    ) -> Verdicts:
        """DORMANT seeds get a neutral blueprint, of ``strategy`` where one is given, and become GERMINATED.

        ``alpha``, in [0, 1], is written where the request is applied; a layer's ``alpha_schedule`` sets it
        anew at the grafting. Both are one for all or one for each. ValueError for a name that is no strategy's and
        for what is no alpha, before anything is written; a number that is no strategy's is refused by the verdict.
        """
        strategies = None if strategy is None else batch_values(strategy, "strategies", strategy_number, like=self.ids)
        alphas = None if alpha is None else self._checked_alphas(alpha)
        return self._advance(_S.GERMINATED, rules=rules, strategies=strategies, alphas=alphas)

    def graft(self, *, rules: Rules = None) -> Verdicts:
        """On to GRAFTING, where a seed takes part in the output and its blueprint learns: from DORMANT (then with a neutral
        blueprint), GERMINATED and TRAINING.
        """
        return self._advance(_S.GRAFTING, rules=rules)

    def fossilize(self, *, rules: Rules = None) -> Verdicts:
        """For good: on to FOSSILIZED, from GRAFTING and what comes after it. Its blueprint learns no more.

        By the layers' own rules a seed has to stay in STABILIZATION for some epochs, so from there at
        the earliest.
        """
        return self._advance(_S.FOSSILIZED, start=_S.GRAFTING, rules=rules)

    def advance(self, state: ExtendedLifecycle | int | str, *, rules: Rules = None) -> Verdicts:
        """On to any state of a life, DORMANT to FOSSILIZED, from any before it."""
        target = ExtendedLifecycle.parse(state)
        if target not in range(_S.GERMINATED, _S.FOSSILIZED + 1):
            raise ValueError(f"a seed advances to GERMINATED ... FOSSILIZED, not to {target.name}")
        return self._advance(target, rules=rules)

    def cull(self, *, rules: Rules = None) -> Verdicts:
        """Out of the network: to CULLED or, where the rules have no way there from a seed's state, to ROLLED_BACK or
        CANCELLED.
        """

        def request(part: Part) -> Tensor:
            table = _table(part.layer, rules)
            lifecycle, epochs = _lifecycle_and_epochs(part)
            known = lifecycle.clamp(0, len(_S) - 1).long()
            targets = torch.full_like(lifecycle, int(_S.CULLED))
            for ready in (False, True):  # one that it may enter now, or else one that it could enter later
                for state in _REMOVED:
                    least = table[known, int(state)]
                    allowed = (least >= 0) & (epochs >= least) if ready else least >= 0
                    targets = torch.where(allowed, int(state), targets)
            return part.layer.request_state_transitions(part.local, targets, rules=table, keep_blueprints=True)

        return self._each(request)

    def recycle(self) -> Verdicts:
        """Seeds that were removed (CULLED, CANCELLED, ROLLED_BACK) become DORMANT."""
        return self._each(lambda part: part.layer.recycle(part.local))

    # ---- how ---------------------------------------------------------------------------------------------------------

    def _advance(
        self,
        target: ExtendedLifecycle,
        start: ExtendedLifecycle = _S.DORMANT,
        *,
        rules: Rules = None,
        strategies: Tensor | None = None,
        alphas: Tensor | None = None,
    ) -> Verdicts:
        if start < _S.GERMINATED:
            for part in self.parts:
                part.layer.check_own_bank()

        def request(part: Part) -> Tensor:
            own = None if strategies is None else on_device(part.layer.device, strategies[part.positions])
            codes = _along_the_way(part, start, target, _table(part.layer, rules), own)
            if alphas is not None:
                values = on_device(part.layer.device, alphas[part.positions])
                _write_where(part.layer._buffers["alpha"], part.local, codes == _APPLIED, values)
            return codes

        return self._each(request)

    def _each(self, request: Callable[[Part], Tensor]) -> Verdicts:
        with torch.no_grad():
            return Verdicts(self.ids, self._gathered([request(part) for part in self.parts]))

    def _gathered(self, values: Sequence[Tensor], dtype: torch.dtype = torch.int32) -> Tensor:
        """``[U]`` in the order of the ids, of one ``[u]`` for each part."""
        if not values:
            return torch.empty(0, dtype=dtype, device=self._home)
        joined = torch.cat([on_device(self._home, value) for value in values])
        back = torch.cat([part.positions for part in self.parts]).argsort()
        return joined[on_device(self._home, back)]

    def _checked_alphas(self, alpha: Any) -> Tensor:
        """float32 ``[U]`` on the CPU."""
        if isinstance(alpha, Iterable) and not hasattr(alpha, "__array__"):
            alpha = list(alpha)
        try:
            values = torch.as_tensor(alpha, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError) as error:
            raise TypeError(f"alpha must be a number in [0, 1] or one for each seed: {error}") from None
        wrong = ~((values >= 0) & (values <= 1))  # NaN is wrong, too
        if wrong.any():
            raise ValueError(f"alpha must be in [0, 1], got {values[wrong][0].item()}")
        if values.dim() and values.numel() != len(self):
            raise ValueError(f"{values.numel()} values of alpha for {len(self)} seeds")
        return values.flatten().expand(len(self))


def _table(layer: KasminaLayer, rules: Rules) -> Tensor:
    """int32 ``[11, 11]`` on the layer's device."""
    if not isinstance(rules, (TransitionRules, type(None))):
        raise TypeError(f"rules must be TransitionRules, as TransitionRules.strict(), got {type(rules).__name__}")
    return (layer.transition_rules if rules is None else rules).on(layer.device)


def _lifecycle_and_epochs(part: Part) -> tuple[Tensor, Tensor]:
    state = part.layer._buffers["state"]
    return state[StateVar.LIFECYCLE_STATE][part.local], state[StateVar.EPOCHS_IN_STATE][part.local]


def _along_the_way(
    part: Part,
    start: ExtendedLifecycle,
    target: ExtendedLifecycle,
    table: Tensor,
    strategies: Tensor | None,
) -> Tensor:
    """Verdicts of going from each seed's state, ``start`` at the earliest, to ``target``, state by state."""
    lifecycle, epochs = _lifecycle_and_epochs(part)
    on_the_way = (lifecycle >= int(start)) & (lifecycle < int(target))
    codes = torch.where(on_the_way, _APPLIED, _ILLEGAL).int()
    steps = range(int(start), int(target))
    for state in steps:  # the whole way first: a seed must not stop where it can go no further
        least = table[state, state + 1]
        has_had = torch.where(lifecycle == state, epochs, 0)  # none in states that it is yet to enter
        blocked = torch.where(least < 0, _ILLEGAL, torch.where(has_had < least, _TOO_FEW, _APPLIED)).int()
        codes = torch.where((codes == _APPLIED) & (lifecycle <= state), blocked, codes)
    for state in steps:
        goes = (codes == _APPLIED) & (lifecycle <= state)
        germinates = state + 1 == _S.GERMINATED
        verdicts = part.layer.request_state_transitions(
            torch.where(goes, part.local, NO_ID),
            state + 1,
            strategies=strategies if germinates else None,
            rules=table,
        )
        codes = torch.where(goes, verdicts, codes)
    return codes


def _write_where(target: Tensor, ids: Tensor, chosen: Tensor, values: Tensor) -> None:
    """``target[ids] = values`` where ``chosen [u]``; the others may name the same elements."""
    size = target.size(0)
    wide = torch.cat((target, target.new_zeros(1)))
    wide[torch.where(chosen, ids.long(), size)] = values
    target.copy_(wide[:size])
