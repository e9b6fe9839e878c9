"""Writing: a refit is a transaction that ends in a new version, or in nothing.

`Refit` is what a trainer sees. Its life is kept in `transaction.py`, what it writes and how in `writing.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from weightstore import wire
from weightstore.casts import Cast
from weightstore.connection import Connection
from weightstore.errors import UsageError
from weightstore.mapping import ArenaMapping
from weightstore.report import RefitReport
from weightstore.transaction import MOVES, State, Transaction
from weightstore.types import TensorRecord, TensorSpec
from weightstore.writing import Writing

if TYPE_CHECKING:
    import torch

    from weightstore.lora.put import Given
    from weightstore.names import NameMap, Plan
    from weightstore.reader import Lease

__all__ = ["MOVES", "Refit", "State"]


class Refit:
    """A write transaction; made by `Store.refit`. Commits at the end of its `with` block, or aborts if the
    block raises. Thread-safe; copies run in the thread that puts.

    Tensors may be torch's (CPU or CUDA, any stride), numpy's, anything with DLPack, and DTensors: of those
    each rank of a shared refit writes what it holds, of what several ranks hold each a share, and nothing is
    gathered. A tensor of another dtype than stored is cast on the device where it is (see `Store.refit`).

    Every method that writes raises, changing nothing:
        CoverageError: names that are unknown, undeclared, given twice, or of another shape or kind of dtype
            than stored; all of them, before a byte moves.
        CastRefused: values that would overflow the stored dtype; all their names, before a byte moves.
        InvalidTensor: a value the store cannot hold, or of which it cannot tell what it is a part of.
        UsageError: a sharded tensor in a refit with a single writer.
        ArenaFull: no place for it.
        RefitClosed: committed or aborted already.
        RefitAborted: another rank ended it.
        StoreGone: the connection ended, and the refit with it.

    Attributes:
        model, tag: what is written.
        base: number of the version it starts from; 0 for none.
        names: the map that names go through, given or published; None if there is none.
    """

    def __init__(
        self,
        connection: Connection,
        request: wire.OpenRefit,
        opened: wire.RefitOpened,
        mapping: ArenaMapping,
        started: float,
        ended: Callable[[Refit], None],
        names: NameMap | None,
        cast: Cast,
        lease: Callable[[str], Lease],
    ) -> None:
        """`ended` is told once nothing of the refit can be landing any more; `lease` is that of a tag of the
        model."""
        self.model = request.model
        self.tag = request.tag
        self.base = opened.base
        self._mapping = mapping
        self._started = started
        self.names = names
        self._lease = lease
        self._life = Transaction(connection, request, opened, mapping, lambda: ended(self))
        self._writing = Writing(self._life, request, opened, mapping, names, cast)
        self._report: RefitReport | None = None

    # -- writing -----------------------------------------------------------------------------------

    def put(self, name: str, tensor: Any, *, replicated: bool = False) -> None:
        """Write one tensor; see `put_many`."""
        self.put_many(((name, tensor),), replicated=replicated)

    def put_many(
        self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], *, replicated: bool = False
    ) -> None:
        """Write many tensors with one round trip at most. Values over the same memory are stored once.

        Args:
            replicated: of a shared refit, all ranks give these, with the same values: each writes a share
                (rows of large tensors; small ones are one rank's). Otherwise a plain tensor is written by
                the rank that gives it, which must be one. DTensors say themselves how they lie.
        """
        self._writing.put(tensors, replicated)

    def put_module(
        self, module: torch.nn.Module, prefix: str = "", *, replicated: bool | None = None
    ) -> None:
        """Write all parameters and persistent buffers of `module` under their state_dict names.

        FSDP2's modules are resharded first; what they shard is written by the rank that holds it.

        Args:
            replicated: whether all ranks of a shared refit have the plain tensors of `module`, as under
                data parallelism (None: they do). False where each rank has other modules.
        """
        from weightstore.sources import module_tensors, reshard

        reshard(module)
        self.put_many(module_tensors(module, prefix), replicated=replicated is not False)

    def put_part(self, name: str, tensor: Any, at: Sequence[int]) -> None:
        """Write a part of a tensor: `tensor`'s elements from index `at` on, as ranks do that shard by means
        of their own. All parts, of all ranks, must make up the tensor exactly once.

        `name` and `at` are the stored tensor's: as `view`, `reserve` and `wrote` this goes past the name map.
        A tensor that the base version lacks must have been given its full shape with `reserve`.
        """
        self._writing.put_part(name, tensor, at)

    def put_lora(
        self,
        adapter: Mapping[str, Any],
        *,
        config: Any = None,
        alpha: float | str | None = None,
        prefix: str = "",
        adapter_name: str | None = None,
        base_tag: str = "ref",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[str]:
        """Merge a LoRA on write: base + alpha / r · B·A for every weight it adapts; returns their names.

        The base is always that of `base_tag`, so steps accumulate no rounding. In a partial refit that starts
        there too (``store.refit(…, base="ref", partial=True)``) all other weights are the base's. In a shared
        refit each rank, given the same adapter, merges a share.

        Args:
            adapter: PEFT's or diffusers' state dict of the adapter.
            config: its `peft.LoraConfig`, or the dict of that, for its alphas.
            alpha: instead of `config`: for all modules; "rank" for scale 1.
            prefix: put before module names, as `put_module` does: ``transformer.``
            adapter_name: which one, if the state dict holds several.
            dtype: to compute in; None for float32. The sum is rounded to the stored dtype once.
            device: to compute on; None for the adapter's own, or a GPU if there is one.

        Raises, besides what every writing method does:
            CoverageError: modules without a stored weight, or with one of another shape; with likely names.
            UsageError: something else than a plain LoRA (DoRA, biases, …), by name; nothing that tells the
                scale; or adapters in the base, to which this one would be added.
            UnknownTag: no `base_tag`; make it with ``store.tag(model, "ref", …)``.
        """
        from weightstore.lora.put import put_lora

        given = self._adapter(adapter, config, alpha, prefix, adapter_name, dtype)
        return put_lora(self._writing.adapting(self.names, self._lease), given, base_tag, device)

    def put_adapter(
        self,
        adapter: Mapping[str, Any],
        *,
        config: Any = None,
        alpha: float | str | None = None,
        prefix: str = "",
        adapter_name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[str]:
        """Write a LoRA as it is: A, B and scale become tensors of the version, in the component ``lora``, and
        engine hooks add them to the weights on their device; returns the names of those weights.

        Needs ``store.refit(…, base="ref", partial=True, extend=True)``. Arguments and errors are those of
        `put_lora`, and given the same `dtype` the engine's weights are the same bit for bit (if the same
        kind of device computes them).
        """
        from weightstore.lora.put import put_adapter

        given = self._adapter(adapter, config, alpha, prefix, adapter_name, dtype)
        return put_adapter(self._writing.adapting(self.names, self._lease), given)

    @staticmethod
    def _adapter(
        adapter: Mapping[str, Any],
        config: Any,
        alpha: float | str | None,
        prefix: str,
        name: str | None,
        dtype: torch.dtype | None,
    ) -> Given:
        import torch

        from weightstore.lora.put import Given

        return Given(adapter, config, alpha, prefix, name, dtype or torch.float32)

    def view(self, name: str, spec: TensorSpec | torch.Tensor | None = None) -> torch.Tensor:
        """A writable tensor on the arena itself, to be filled before `commit` and not touched after it.

        It counts as written. Its content is undefined, except in an in-place refit. `spec`, needed for
        a tensor the base lacks, is a TensorSpec or any tensor (also on meta) of that dtype and shape.
        """
        return self._writing.view(name, spec)

    def reserve(self, specs: Iterable[TensorSpec]) -> list[TensorRecord]:
        """Places for tensors to come, in one round trip; each must be written before the commit. Strides of
        tensors that the base has are the base's."""
        return self._writing.reserve(specs)

    @property
    def places(self) -> list[TensorRecord]:
        """Where tensors go that have a place already: all that is declared, and what was reserved or put."""
        return list(self._writing.ledger.places.values())

    def plan(self, tensors: Any, prefix: str = "") -> Plan:
        """What would become of `tensors` if exactly they were put: a dry run, for which nothing is copied.

        Args:
            tensors: a state dict, pairs of name and tensor, an `nn.Module` or TensorSpecs; they may be on
                meta, or sharded.
            prefix: put before their names, as `put_module` does.

        Raises:
            InvalidTensor: something the store cannot hold.
        """
        from weightstore.names import AS_STORED, plan
        from weightstore.names.given import given_of

        return plan(self.names or AS_STORED, given_of(tensors, prefix), self._writing.stored)

    @property
    def mapping(self) -> ArenaMapping:
        """The arena, writable, for writers that do without tensors: fill `reserve`d places, then say so
        with `wrote`."""
        self._life.begin_view()
        return self._mapping

    def wrote(self, names: Iterable[str]) -> None:
        """These tensors' places have been filled through `mapping`. Names tied to them need not be named."""
        self._writing.wrote(names)

    # -- ending ------------------------------------------------------------------------------------

    def commit(self) -> int:
        """Make the new version and move the tag; its number. Shared refits wait here for all ranks.

        With ``skip_unchanged`` the version is made, and followers are offered it, also if nothing has
        changed: it then shares every byte with its base.

        Raises:
            CoverageError: tensors are missing, or a name rule matched nothing; the refit of a lone writer is
                still open.
            RefitAborted, RefitClosed: it ended without a version.
            StoreGone: the store went away; ``details["outcome"]`` is "unknown" if the commit was on its way.
        """
        ledger = self._writing.ledger
        version = self._life.commit(self._writing.check_used, ledger.writes)
        seconds = time.perf_counter() - self._started
        self._report = RefitReport(
            self.model, self.tag, version, self.base, ledger.tensors, ledger.nbytes, seconds, ledger.unchanged
        )
        return version

    def abort(self, reason: str = "") -> None:
        """End without a version; every rank's refit ends. Views must not be in use any more. Idempotent.

        Raises:
            RefitClosed: it was committed.
        """
        self._life.abort(reason)

    @property
    def report(self) -> RefitReport:
        """What was written. Raises UsageError before the commit."""
        if self._report is None:
            what, state = self._life.what, self.state.value
            raise UsageError(f"{what} is {state}; there is a report once it is committed")
        return self._report

    @property
    def state(self) -> State:
        return self._life.state

    @property
    def lost(self) -> bool:
        """Whether the connection it was opened on has ended, and the refit with it."""
        return self._life.lost

    @property
    def viewed(self) -> bool:
        """Whether somebody was given memory to write to, which no one here can wait for."""
        return self._life.viewed

    def drain(self) -> None:
        """Wait until no copy into the arena is under way. DeviceError if one from a device failed."""
        self._life.drain()

    def __enter__(self) -> Refit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self.state is State.OPEN:
                try:
                    self.commit()
                except BaseException as failure:
                    if self.state is State.OPEN:
                        self.abort(str(failure))
                    raise
        elif self.state is not State.COMMITTED:
            self.abort(f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        return f"<{self._life.what}: {self.state.value}>"
