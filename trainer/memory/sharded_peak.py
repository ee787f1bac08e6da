"""What FSDP2 holds while a pass runs, mark by mark; no torch. Component of `strategy_peak.py`."""

from collections.abc import Collection, Mapping, Sequence

from trainer.memory.holdings import Holding, Ledger, ParameterSize


class _Pool:
    """Memory of one of FSDP2's own streams: what is freed there goes back to all, or to that stream alone."""

    def __init__(self, ledger: Ledger, part: str, keeps: bool) -> None:
        self._ledger, self._part, self._keeps = ledger, part, keeps
        self._used = self._most = 0

    @property
    def unused(self) -> int:
        return max(0, self._most - self._used)

    def add(self, amount: int) -> None:
        self._used += amount
        if not self._keeps:
            self._ledger.add(self._part, amount)
        elif self._used > self._most:
            self._ledger.add(self._part, self._used - self._most)
            self._most = self._used


class Sharded:
    """FSDP2: every worker keeps its share of each unit, and gathers whole units to compute with."""

    def __init__(
        self,
        ledger: Ledger,
        parameters: Sequence[ParameterSize],
        unit_of: Mapping[str, str],
        holding: Holding,
        embeddings: Collection[str],
    ) -> None:
        self._ledger, self._holding, self._embeddings = ledger, holding, embeddings
        self._unit_of = unit_of
        self._whole_bytes: dict[str, int] = {}  # bytes of each unit's whole weights
        self._trained: dict[str, int] = {}  # elements
        self._numel = {p.name: p.numel for p in parameters}
        shards = 0
        for parameter in parameters:
            unit, numel = unit_of.get(parameter.name, ""), parameter.padded_numel(holding.shares)
            whole = numel * holding.gathered_width(trains=parameter.trains)
            self._whole_bytes[unit] = self._whole_bytes.get(unit, 0) + whole
            shards += numel // holding.shares * holding.held_width(trains=parameter.trains)
            self._trained[unit] = self._trained.get(unit, 0) + (numel if parameter.trains else 0)
        mixed = holding.compute_bytes != holding.stored_bytes
        ledger.held["masters" if mixed else "weights"] += shards
        trained = sum(self._trained.values()) // holding.shares
        ledger.held["optimizer"] = round(holding.optimizer_bytes * trained) + holding.optimizer_everywhere_bytes
        self._mixed = mixed
        # The streams of all-gathers, and of reduce-scatters, whose results are the shards of the gradients.
        self._gathers = _Pool(ledger, "communication", holding.pools_by_stream)
        self._reductions = _Pool(ledger, "gradients", holding.pools_by_stream)
        # Of all-reduces among replicas: in the shares' own dtype, where that is another than the wire's.
        self._between = _Pool(ledger, "gradients", holding.pools_by_stream)
        self._partial: dict[str, int] = {}  # bytes of sums within the group that wait for a later pass's
        self._crossed = 0  # bytes of what is all-reduced, which FSDP2 holds until the backward pass ends
        self._crosses = True
        self._whole: set[str] = set()  # units that are gathered
        self._gathered_ahead: set[str] = set()
        self._order: list[str] = []
        self._previous_gather = 0
        self._reduce_input = 0
        self._unit_gradients: dict[str, int] = {}  # whole gradients in the compute dtype
        self._kept_gradients: dict[str, int] = {}  # whole gradients kept from pass to pass, in the reduce dtype
        self._shards: set[str] = set()  # units whose gradient shard is there
        self._reduces = self._releases = True
        self._ended: set[str] = set()  # units whose backward pass is over
        self._backward = False

    def begin_pass(self, index: int) -> None:
        last = index == self._holding.accumulation - 1
        self._reduces = self._holding.reduce_each_pass or last
        self._releases, self._crosses = self._holding.strategy == "zero3" or last, last
        self._ended.clear()
        self._order = []
        self._backward = False
        self._gather("")

    def at(self, kind: str, name: str) -> None:
        if kind == "forward" and not self._backward:
            if self._holding.strategy == "zero3" and self._order:
                self._release(self._order[-1])
            self._order.append(name)
            self._gather(name)
        elif kind == "after forward" and name in self._embeddings:
            self._release(name)
        elif kind == "end of forward":
            if self._holding.strategy == "zero3" and self._order:
                self._release(self._order[-1])
            self._gathers.add(-self._previous_gather)
            self._previous_gather, self._backward = 0, True
        elif kind == "before backward" and self._holding.strategy == "zero3" and name not in self._embeddings:
            self._gather_for_backward(name)
        elif kind == "gradient":
            unit = self._unit_of.get(name, "")
            size = self._numel[name] * self._holding.compute_bytes
            # Where gradients are kept in the wire's own dtype, a later pass adds to them in place.
            in_place = self._kept_gradients.get(unit, 0) and self._holding.reduce_bytes == self._holding.compute_bytes
            if not in_place:
                self._unit_gradients[unit] = self._unit_gradients.get(unit, 0) + size
                self._ledger.add("gradients", size)
        elif kind == "backward":
            self._end_unit(name)
        elif kind == "end of backward":
            for unit in self._whole_bytes:
                self._end_unit(unit)
            self._ledger.add("communication", -self._reduce_input)
            self._reductions.add(-self._crossed)
            self._reduce_input = self._crossed = 0

    def end_step(self) -> None:
        shards = sum(self._trained[unit] for unit in self._shards) // self._holding.shares
        self._shards_pool().add(-shards * self._holding.stored_bytes)
        self._shards.clear()

    def between_steps(self, gathers: bool) -> Mapping[str, int]:
        """What changes between steps; where weights are gathered, the streams' unused memory is given back before."""
        if not gathers:
            return {}
        whole = sum(self._whole_bytes.values())
        return {"weights": whole, "gradients": -self._reductions.unused - self._between.unused}

    def _shards_pool(self) -> _Pool:
        """Where shares of gradients lie."""
        casts = self._holding.reduce_bytes != self._holding.stored_bytes
        return self._between if casts and self._holding.replicas > 1 else self._reductions

    def _gather(self, unit: str) -> None:
        """All-gather into one flat buffer, then copy out; the buffer lives until the next gather's."""
        if unit in self._whole or unit not in self._whole_bytes:
            return
        flat = self._whole_bytes[unit]
        if self._holding.shares > 1:
            shard = flat // self._holding.shares if self._mixed else 0
            self._gathers.add(flat + shard)
            self._gathers.add(-shard - self._previous_gather)
            self._previous_gather = flat
        self._ledger.add("weights", flat)
        self._whole.add(unit)

    def _gather_for_backward(self, unit: str) -> None:
        for wanted in (unit, self._before(unit)):
            if wanted is None or wanted in self._whole or wanted in self._gathered_ahead:
                continue
            self._gathers.add(self._whole_bytes[wanted])
            self._gathered_ahead.add(wanted)
            if wanted == unit:
                self._copy_out(unit)
        self._copy_out(unit)

    def _copy_out(self, unit: str) -> None:
        if unit in self._gathered_ahead:
            self._gathered_ahead.remove(unit)
            flat = self._whole_bytes[unit]
            self._ledger.add("weights", flat)
            self._gathers.add(-flat)
            self._whole.add(unit)

    def _before(self, unit: str) -> str | None:
        place = self._order.index(unit) if unit in self._order else 0
        return self._order[place - 1] if place > 0 else None

    def _release(self, unit: str) -> None:
        if unit in self._whole and unit != "":
            self._whole.remove(unit)
            self._ledger.add("weights", -self._whole_bytes[unit])

    def _end_unit(self, unit: str) -> None:
        """After a unit's backward pass: let go of its whole weights, reduce its gradients to this worker's share."""
        if unit in self._ended or unit not in self._whole_bytes:
            return
        holding, ledger = self._holding, self._ledger
        self._ended.add(unit)
        if self._releases and unit in self._whole:
            self._whole.remove(unit)
            ledger.add("weights", -self._whole_bytes[unit])
        gradients = self._unit_gradients.pop(unit, 0)
        same = holding.reduce_bytes == holding.compute_bytes
        if not self._reduces:
            kept = self._kept_gradients.get(unit, 0)
            if same:
                self._kept_gradients[unit] = kept or gradients
            elif gradients:
                whole = gradients // holding.compute_bytes * holding.reduce_bytes
                ledger.add("gradients", 0 if kept else whole)
                ledger.add("gradients", -gradients)
                self._kept_gradients[unit] = whole
            return
        gradients += self._kept_gradients.pop(unit, 0)
        if not gradients:
            return
        ledger.add("communication", -self._reduce_input)
        self._reduce_input = self._trained[unit] * holding.reduce_bytes
        ledger.add("communication", self._reduce_input)
        ledger.add("gradients", -gradients)
        reduced = self._trained[unit] // holding.shares * holding.reduce_bytes
        shard = self._trained[unit] // holding.shares * holding.stored_bytes
        self._reductions.add(reduced)
        if holding.replicas > 1:
            self._cross(unit, reduced, shard)
            return
        if holding.reduce_bytes != holding.stored_bytes:
            self._reductions.add(shard)
            self._reductions.add(-shard)
        self._reductions.add(-reduced)
        if unit not in self._shards:
            self._shards.add(unit)
            self._reductions.add(shard)

    def _cross(self, unit: str, reduced: int, shard: int) -> None:
        """After a unit's gradients were added up within the group; in the last pass, replicas add up their sums."""
        partial = self._partial.pop(unit, 0)
        if not self._crosses:
            self._reductions.add(-partial)
            self._partial[unit] = reduced
            return
        self._shards.add(unit)
        if self._shards_pool() is self._between:
            self._between.add(shard)
            self._crossed += reduced
        self._reductions.add(-partial)
