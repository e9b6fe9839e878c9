"""The store as trainers, engines and tools see it.

Composes the link to the service with what is held through it (leases, refits). Importing this module
imports neither torch nor numpy; tensors do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from weightstore import wire
from weightstore.casts import Cast, check_mode
from weightstore.connection import Connection
from weightstore.errors import LeaseLost, UnknownModel, UsageError
from weightstore.leases import Leases
from weightstore.link import Link
from weightstore.mapping import ArenaMapping
from weightstore.paths import socket_path
from weightstore.preparing import prepare
from weightstore.reader import Lease
from weightstore.refits import Refits
from weightstore.sharding import rank_of
from weightstore.trainer import Refit
from weightstore.types import DEFAULT_TAG

if TYPE_CHECKING:
    import torch

    from weightstore.names import NameMap

R = TypeVar("R", bound=wire.Reply)

PATIENCE = 5.0
"""Seconds a store has to answer the greeting, and to answer late where it keeps time itself."""


def connect(path: str | os.PathLike[str] | None = None, timeout: float = PATIENCE) -> Store:
    """Connect to the store at `path`, else ``$WEIGHTSTORE_SOCKET``, else the default socket.

    Args:
        path: the store's Unix socket.
        timeout: seconds the store has to answer. Where nobody listens, this fails at once.

    Raises:
        StoreGone: no store there.
        StoreSilent: one that does not answer.
        AccessDenied: it serves another user.
        UsageError: a path no socket can have.
        ProtocolError, ArenaUnusable: another version of weightstore, or no store at all.
    """
    store = Store(socket_path(path), timeout)
    try:
        store.link.connect()
    except BaseException:
        store.close()
        raise
    return store


class Store:
    """A connection to a store, and everything held through it. Thread-safe; not usable after fork().

    When the store goes away, requests raise StoreGone after one attempt to reach it again; while leases
    are held, a background thread reconnects and renews them. Mapped weights stay readable throughout.

    Every method that asks the store may raise StoreGone, StoreSilent (it is connected and has not answered
    for half a minute), and UsageError once closed.

    Attributes:
        socket: path of the store's socket.
        link: the connection underneath, for tools.
    """

    def __init__(self, socket: str, timeout: float = PATIENCE) -> None:
        """Does not connect yet; use `weightstore.connect`."""
        self.socket = socket
        self._leases = Leases()
        self.link = Link(
            socket, timeout, on_unasked=self._leases.said, greet=self._greet, wanted=lambda: self._leases.any
        )
        self._refits = Refits(self.link)

    # -- reading and writing -----------------------------------------------------------------------

    def lease(
        self,
        model: str,
        tag: str = DEFAULT_TAG,
        *,
        version: int | None = None,
        follow: bool = False,
        on_offer: Callable[[Lease], None] | None = None,
    ) -> Lease:
        """Hold `version`, or what `tag` names; ``with store.lease(…) as snapshot`` reads it.

        Args:
            follow: be offered what the tag names later (see `Lease`).
            on_offer: called with the lease, on the connection's thread, when an offer is pending.

        Raises:
            UnknownModel, UnknownTag, UnknownVersion: nothing by that name.
            TagTorn: an in-place refit of it has not committed.
        """
        return self._leases.open(self.link, model, tag, version, follow, on_offer)

    def refit(
        self,
        model: str,
        tag: str = DEFAULT_TAG,
        *,
        components: Sequence[str] | None = None,
        base: int | str | None = None,
        partial: bool = False,
        extend: bool = False,
        fresh: bool = False,
        in_place: bool = False,
        skip_unchanged: bool = False,
        key: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        timeout: float = 600.0,
        names: NameMap | None = None,
        cast: Cast = "safe",
    ) -> Refit:
        """Begin writing a new version of `model`, to be named `tag`.

        Args:
            components: the components to be written, each completely; None for all.
            base: the version to start from, or a tag that names it; None for the tag's own, else `latest`'s.
            partial: any subset of those components' tensors may be written.
            extend: tensors that the base lacks may be written too.
            fresh: start from nothing: the version holds exactly what is written.
            in_place: overwrite the base's bytes, for hosts without room for a second copy.
            skip_unchanged: leave tensors where the base has them if the same bytes are given: they take no
                new space, and engines copy nothing. Compared are tensors that one rank writes whole.
            key: writers that give the same key share one refit, which commits when all have.
            rank, world_size: of a shared refit; None for those of torch.distributed.
            timeout: seconds the ranks of a shared refit have, from its beginning to the last commit.
            names: how names of tensors that are put become stored names (`weightstore.NameMap`). None for
                the map published with the model (see `publish_names`), whose rules then need not match, or
                no map if there is none. ``NameMap()`` only strips wrappers, ``NameMap(strip=False)`` takes
                names as they are.
            cast: what becomes of tensors of another dtype than stored. ``"safe"``: cast on their device,
                bit for bit as ``tensor.to(dtype)``, unless floats would become integers (or the like) or a
                value would overflow; ``"any"``: cast whatever it is; ``"never"``: refused.

        Raises:
            RefitConflict: a refit of this model and tag is open.
            UnknownModel: components of a model that has no version (and the refit is not fresh).
            CoverageError, UnknownTag, UnknownVersion, UsageError: a declaration that cannot be met.
            VersionInUse: in place, and somebody reads or names those bytes.
            TagTorn: would inherit half-written bytes.
            ArenaFull: no room.
        """
        if isinstance(components, str):
            raise UsageError(f"components is a list of names: [{components!r}]")
        cast = check_mode(cast)
        rank, world_size = rank_of(key, rank, world_size)
        with ExitStack() as meanwhile:
            if isinstance(base, str):
                # Leased, so that the version cannot be freed between looking it up and starting from it.
                base = meanwhile.enter_context(self.lease(model, base)).version
            return self._refits.open(
                wire.OpenRefit(
                    id=0,
                    model=model,
                    tag=tag,
                    base=base,
                    components=None if components is None else list(components),
                    partial=partial,
                    extend=extend,
                    fresh=fresh,
                    in_place=in_place,
                    skip_unchanged=skip_unchanged,
                    key=key,
                    rank=rank,
                    world_size=world_size,
                    timeout=float(timeout),
                ),
                names,
                cast,
                lambda other: self.lease(model, other),
            )

    def prepare(
        self,
        model: str,
        tag: str = DEFAULT_TAG,
        *,
        components: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        timeout: float = 30.0,
    ) -> int:
        """Have ready what the first refits of these components would otherwise wait for.

        That is room in the arena for a second version of them, for which the host's memory is taken now; and
        for a trainer with its tensors on a CUDA `device` the registering of both places with the driver, in
        this process, by a thread in the background. Call it once, when the model has a version, in each
        process that will put: it opens a refit and gives it up. Readers notice nothing, but engines that
        follow the tag pin the room as well, in the background. It is of no use to in-place refits.

        Args:
            timeout: seconds to wait while a refit of the tag is open, or the tag is being prepared.

        Returns:
            Bytes that a version of the components takes.

        Raises:
            UnknownModel: it has no version yet.
            RefitConflict: a refit of the tag was open all that time.
            ArenaFull: there is no room for a second version.
            UnknownTag, TagTorn, CoverageError, UsageError: as in `refit`; and no such device.
        """
        return prepare(self, model, tag, components, device, timeout)

    @property
    def mapping(self) -> ArenaMapping:
        """The arena, mapped read-only."""
        return self.link.mapping

    # -- models, versions, tags --------------------------------------------------------------------

    def status(self) -> wire.Status:
        """Models, versions, tags, leases, refits and arena use."""
        return self._ask(wire.GetStatus(id=0), wire.Status)

    def models(self) -> list[str]:
        """Those that have a version."""
        return [model.name for model in self.status().models if model.versions]

    def tags(self, model: str) -> dict[str, int]:
        """The version each tag of `model` names. Raises UnknownModel."""
        models = self.status().models
        for found in models:
            if found.name == model and found.versions:
                return dict(found.tags)
        known = ", ".join(found.name for found in models if found.versions) or "none"
        raise UnknownModel(f"the store has no model {model!r}; it has {known}", model=model)

    def wait_for(
        self, model: str, tag: str = DEFAULT_TAG, after: int = 0, timeout: float | None = None
    ) -> int:
        """Wait until `tag` names a version above `after`, and return that. The model need not exist yet.

        Waiting uses a connection of its own, so other threads are not held up. With ``timeout=0`` it only
        asks, on the main connection: offers that the store made before are known here afterwards.

        Raises:
            StoreTimeout: not within `timeout` seconds; StoreSilent: the store did not even say so.
        """
        request = wire.WaitFor(id=0, model=model, tag=tag, after=after, timeout=timeout)
        if timeout == 0:
            return self._ask(request, wire.VersionIs).version
        late = None if timeout is None else timeout + self.link.patience
        with self.link.separate() as connection:
            return connection.request(request, wire.VersionIs, timeout=late).version

    def tag(self, model: str, tag: str, version: int | str) -> int:
        """Make `tag` name `version`, a number or another tag's name; returns the number.

        Raises:
            UnknownModel, UnknownTag, UnknownVersion, TagTorn: nothing to be named.
            RefitConflict: a refit of the tag is open.
        """
        number, source = (version, DEFAULT_TAG) if isinstance(version, int) else (None, version)
        # Leased meanwhile, so that the version cannot be freed between looking it up and naming it.
        with self.lease(model, source, version=number) as snapshot:
            request = wire.SetTag(id=0, model=model, tag=tag, version=snapshot.version)
            self._ask(request, wire.Done)
            return snapshot.version

    def remove_tag(self, model: str, tag: str) -> None:
        """Raises UnknownModel, UnknownTag, RefitConflict."""
        self._ask(wire.RemoveTag(id=0, model=model, tag=tag), wire.Done)

    def remove_model(self, model: str) -> None:
        """Remove all tags of `model` and its name map; leased versions stay until released.

        Raises:
            UnknownModel, RefitConflict.
        """
        self._ask(wire.RemoveModel(id=0, model=model), wire.Done)

    def publish_names(self, model: str, names: NameMap | None) -> None:
        """Keep `names` with `model`, for every later refit that is given no map; None takes it back.

        An engine whose names are not its trainers' publishes how they become its own. The model need not
        have a version yet. The map is the model's, not a version's, outlives the store process, replaces
        the last one at once, and goes when the model is removed or its last version is freed. A refit that
        is open goes on with the map it began with.

        Raises:
            UsageError: no map, or one of more than 1 MiB of JSON.
            ArenaFull: no room for it.
        """
        text = None
        if names is not None:
            from weightstore.names.published import encode_published

            text = encode_published(model, names)
        self._ask(wire.PublishNames(id=0, model=model, names=text), wire.Done)

    def names(self, model: str) -> NameMap | None:
        """The map published with `model`; None where none is, also for a model that the store lacks.

        Raises:
            UsageError: it is of a kind that this version of weightstore cannot read.
        """
        text = self._ask(wire.GetNames(id=0, model=model), wire.NamesAre).names
        if text is None:
            return None
        from weightstore.names.published import decode_published

        return decode_published(model, text)

    def verify(self, model: str, tag: str | None = None, *, version: int | None = None) -> wire.Verified:
        """Have the store recompute the checksums of `version`, or of what `tag` names (None: the default
        tag), and compare them; `corrupt` lists what differs.

        Raises:
            UnknownModel, UnknownTag, UnknownVersion, TagTorn.
        """
        request = wire.VerifyVersion(id=0, model=model, tag=tag or DEFAULT_TAG, version=version)
        return self.link.connect().request(request, wire.Verified)

    # -- life --------------------------------------------------------------------------------------

    def close(self) -> None:
        """End every lease and open refit and hang up. Tensors taken earlier keep their pages mapped, but
        the store may write new versions over them. Idempotent; does nothing in a forked child."""
        if not self.link.forked:
            self._leases.lose_all(LeaseLost("the store was closed by this process"))
            self.link.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "connected" if self.link.connection is not None else "not connected"
        return f"<Store at {self.socket}, {state}>"

    def _ask(self, message: wire.Request, expect: type[R]) -> R:
        """What a store answers at once."""
        return self.link.connect().request(message, expect, timeout=self.link.patience)

    def _greet(self, connection: Connection, same_arena: bool) -> None:
        """A new connection: renew what the last one held."""
        if same_arena:
            self._leases.renew(connection, self.link.timeout)
        else:
            self._leases.lose_all(
                LeaseLost(
                    f"the store at {self.socket} came back with another arena; load its models again, then "
                    "open a new lease (an engine: close its hook and attach again)"
                )
            )
        self._refits.settle(connection)
