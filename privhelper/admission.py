"""Who may have how much: what is refused before anything is created.

Rule 1: quotas and the pool's room are checked in the transaction that writes the intent, so nothing is given twice.
Rule 2: a refusal says with figures what was asked and what there is. Root (uid 0) has no quota.
Rule 3: every number is of policy/helper.toml.
"""

import os
from collections.abc import Mapping
from typing import Any, Final

from privhelper.errors import AnswerError
from privhelper.ledger import Ledger
from privhelper.manifest import Header
from privhelper.stores.base import PoolStatus

_LAYER_BYTES: Final = "SELECT coalesce(sum(charge), 0) FROM device WHERE kind = 'layer' AND uid = ?"
_MANIFEST_BYTES: Final = (
    "SELECT coalesce(sum(charge - reserved), 0) FROM device WHERE state IN ('creating', 'created', 'populated')"
)
_ACTIVATIONS: Final = "SELECT count(*) FROM device WHERE kind = 'activation' AND uid = ?"
_ACTIVATION_BYTES: Final = (
    "SELECT coalesce(sum(size), 0) FROM device WHERE kind = 'activation' AND mode = 'rw' AND uid = ?"
)


class Admission:
    """The limits of policy/helper.toml as they stand against one user and one ledger."""

    def __init__(self, settings: Mapping[str, Any], ledger: Ledger, uid: int) -> None:
        self._settings, self._ledger, self._uid = settings, ledger, uid
        self._costs: Mapping[str, int] = settings["admission"]

    def cost(self, header: Header) -> int:
        """Return the bytes that a layer reserves: its content, and what the file system makes of each operation."""
        return header.content_bytes + header.entries * self._costs["entry_bytes"] + self._costs["layer_bytes"]

    def reserved_bytes(self) -> int:
        """Return what running commits have reserved."""
        return int(self._ledger.one("SELECT coalesce(sum(reserved), 0) FROM device WHERE kind = 'layer'")[0])

    def check_layer(self, status: PoolStatus, reserved: int, manifest_bytes: int, folder: str) -> None:
        """Admit one more layer of this user's: its bytes in the pool, its manifest in a folder beside the ledger."""
        self._check_quota("layer_bytes", _LAYER_BYTES, reserved + manifest_bytes)
        self._check_room(status, reserved)
        self._check_folder(folder, manifest_bytes)

    def check_activation(self, status: PoolStatus, writable_bytes: int) -> None:
        """Admit one more device of this user's. It costs nothing yet, but a full pool gives none."""
        self._check_quota("activations", _ACTIVATIONS, 1)
        self._check_quota("activation_bytes", _ACTIVATION_BYTES, writable_bytes)
        self._check_room(status, 0)

    def check_inside(self, root: int, header: Header) -> None:
        """Refuse, before the first write, what does not fit the file system of an image; ``root`` is in it."""
        figures = os.fstatvfs(root)
        needed = header.content_bytes + header.entries * self._costs["entry_bytes"]
        free = figures.f_bavail * figures.f_frsize
        if needed > free or header.entries > figures.f_ffree:
            raise AnswerError(
                "no_room", "the layer does not fit the file system of an image", needed_bytes=needed,
                free_bytes=free, needed_inodes=header.entries, free_inodes=figures.f_ffree,
            )  # fmt: skip

    def _check_quota(self, name: str, query: str, more: int) -> None:
        limit, used = self._settings["quota"][name], int(self._ledger.one(query, self._uid)[0])
        if self._uid != 0 and used + more > limit:
            text = f"quota {name}: {used} used, {more} asked, {limit} allowed"
            raise AnswerError("refused", text, "quota", used=used, asked=more, limit=limit)

    def _check_folder(self, folder: str, more: int) -> None:
        """Keep the disk under the ledger from being filled with manifests, those of running commits among them."""
        figures = os.statvfs(folder)
        free, needed = figures.f_bavail * figures.f_frsize, more + int(self._ledger.one(_MANIFEST_BYTES)[0])
        if needed + self._costs["state_reserve_bytes"] > free:
            raise AnswerError("no_room", "not enough free for the manifest", needed_bytes=needed, free_bytes=free)

    def _check_room(self, status: PoolStatus, needed: int) -> None:
        """Refuse what would bring the pool into its reserve, for data and for metadata."""
        reserved = self.reserved_bytes()
        kept = status.data_bytes * self._costs["data_reserve_percent"] // 100
        free = status.data_bytes - status.data_used_bytes - reserved - kept
        kept = status.metadata_bytes * self._costs["metadata_reserve_percent"] // 100
        metadata_free = status.metadata_bytes - status.metadata_used_bytes - kept
        blocks = (needed + reserved) // status.block_bytes + 1
        metadata_needed = blocks * self._costs["metadata_bytes_per_block"] if status.metadata_bytes else 0
        if needed > free or free <= 0 or metadata_needed > metadata_free:
            raise AnswerError(
                "no_room", "not enough free in the pool; nothing was written", needed_bytes=needed,
                free_bytes=max(free, 0), reserved_bytes=reserved, needed_metadata_bytes=metadata_needed,
                free_metadata_bytes=max(metadata_free, 0),
            )  # fmt: skip
