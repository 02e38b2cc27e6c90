"""What the helper asks of a store: numbered block devices that are cheap copies of one another.

Rule 1: a device is a number from the ledger, never reused; 0 is the formatted base made when the pool was created.
Rule 2: a store answers from the kernel and the disk, never from memory of its own; it holds no state between calls.
Rule 3: "it exists already" is an error here. Only deleting or deactivating what is absent is fine.
Rule 4: only an inactive device is an origin, so no device is ever suspended and a crash leaves nothing frozen.

The caller serialises: every call that changes the pool is made under the ledger's pool lock and between its intent and
its fact; activate, deactivate and settle are made under the lock of that device's number.

A store is made of ``settings``, its table of policy/helper.toml as the administrator's file overrides it, and
``state_dir``, the helper's own directory (root, 0700). Making it does nothing yet.
"""

from typing import Final, NamedTuple, Protocol

from privhelper.errors import AnswerError

BASE: Final = 0
READY: Final = "ready"


class StoreError(AnswerError):
    """A step on the store failed. ``code`` is fault, busy, no_room, pool or refused."""


class PoolStatus(NamedTuple):
    """How the pool is, as the kernel tells at this moment. Bytes are 0 where a state leaves them unknown."""

    state: str  # ready, absent, read_only, needs_check, out_of_data or failed
    data_bytes: int = 0
    data_used_bytes: int = 0
    metadata_bytes: int = 0  # 0 where the store has no separate metadata (reflink)
    metadata_used_bytes: int = 0
    block_bytes: int = 4096  # what a copied block costs: a thin block, or a file system block
    identity: str = ""  # a random text written when the pool was created; the ledger remembers it
    transaction: int = 0  # thin's transaction id; 0 for ever in reflink
    advice: str = ""  # for people: the way out of a state that is not ready


class Store(Protocol):
    """One pool. Every method may raise StoreError (or OSError, which the caller reports as fault)."""

    @property
    def kind(self) -> str:
        """Return "reflink" or "thin"."""

    def status(self) -> PoolStatus:
        """Return how the pool is; raises nothing for a pool that is absent or broken."""

    def create(self, dev: int, origin: int) -> None:
        """Make ``dev`` a copy of ``origin``, which is inactive; ``dev`` must not exist."""

    def delete(self, dev: int) -> None:
        """Free an inactive device; absent is fine."""

    def devices(self) -> set[int]:
        """Return the numbers that the pool really holds, without BASE; under the pool lock."""

    def resize(self, dev: int, size_bytes: int) -> None:
        """Make an inactive device larger; never smaller, the file system in it is left as it is."""

    def size_bytes(self, dev: int) -> int:
        """Return how large the block device is or will be when active."""

    def activate(self, dev: int, read_only: bool) -> str:
        """Return the path of the block device, made sure to be what it should be; active already is an error."""

    def grant(self, path: str, uid: int, writable: bool) -> None:
        """Let one user, and no one else but root, open the node of an active device."""

    def mount_read_only(self, dev: int) -> int:
        """Return a detached read-only mount of a device that is active read-only, or not active.

        By a block device that its user, who may have been given the node, cannot change meanwhile.
        """

    def deactivate(self, dev: int) -> None:
        """Take the block device away; absent is fine. Raises StoreError("busy") when somebody keeps it open."""

    def active(self) -> dict[int, str]:
        """Return each active device of this pool and its path, asked of the kernel; no path where one is half made."""

    def settle(self, dev: int) -> None:
        """Make a finished, inactive device durable."""

    def advance(self, expected: int) -> int:
        """Move the pool's transaction id from ``expected`` to the next and return that; 0 in reflink.

        The ledger wrote its intent with ``expected`` before the change of the pool and writes its fact with the
        returned number after. Raises StoreError("pool") when the pool had another number: somebody else writes to it.
        """
