"""Device-mapper by ioctl on /dev/mapper/control: no dmsetup, no library, no message text to parse for errors.

Rule 1: the kernel's errno is the error, as OSError; no caller ever looks at text to learn what went wrong.
Rule 2: a device is named by its name in, and told from others by its uuid out; its node is /dev/dm-MINOR, checked.
Rule 3: udev is told to keep its hands off (no probing, no links), and nobody waits for it: there is no cookie to leak.

See <linux/dm-ioctl.h> and the kernel's Documentation/admin-guide/device-mapper/. Devices and tables survive the process
that made them, so every caller must be ready to find what a killed predecessor left.
"""

import errno
import fcntl
import os
import stat
import struct
import time
from typing import Final, NamedTuple

SECTOR_BYTES: Final = 512
CONTROL: Final = "/dev/mapper/control"

# struct dm_ioctl: version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name,
# uuid; all of the machine's own byte order.
_HEADER: Final = struct.Struct("=3IIIIiIIIQ128s129s7x")
_TARGET: Final = struct.Struct("=QQiI16s")  # struct dm_target_spec: sector_start, length, status, next, target_type
_ENTRY: Final = struct.Struct("=QI")  # struct dm_name_list: dev, next; then the name
_START: Final = _HEADER.size
_BUFFER_BYTES: Final = 1 << 14

# _IOWR(DM_IOCTL, number, struct dm_ioctl)
_COMMANDS: Final = {
    name: (3 << 30) | (_HEADER.size << 16) | (0xFD << 8) | number
    for name, number in {
        "list": 2, "create": 3, "remove": 4, "resume": 6, "info": 7, "load": 9, "status": 12, "message": 14,
    }.items()
}  # fmt: skip
_READ_ONLY: Final = 1 << 0
_STATUS_TABLE: Final = 1 << 4
_BUFFER_FULL: Final = 1 << 8
_NO_FLUSH: Final = 1 << 11

# event_nr of resume and remove: DM_UDEV_DISABLE_{DM,SUBSYSTEM,DISK,OTHER}_RULES and DM_UDEV_PRIMARY_SOURCE, cookie 0.
_UDEV_HANDS_OFF: Final = 0x4F << 16


class Info(NamedTuple):
    """What the kernel tells of a device."""

    device: int  # as st_rdev
    open_count: int
    uuid: str


class Target(NamedTuple):
    """The one line of a table: all devices here have exactly one."""

    length_bytes: int
    kind: str
    parameters: str


class DeviceMapper:
    """The control device, open for the life of the process; every method raises OSError with the kernel's errno."""

    def __init__(self) -> None:
        self._control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)

    def create(self, name: str, uuid: str, target: Target, *, read_only: bool = False) -> str:
        """Make a device with a live table and return the path of its node; a name or uuid in use is EBUSY."""
        self._call("create", name, uuid=uuid)
        try:
            self.load(name, target, read_only=read_only)
            return node(self.info(name).device)
        except BaseException:
            self._call("remove", name, event=_UDEV_HANDS_OFF)
            raise

    def load(self, name: str, target: Target, *, read_only: bool = False) -> None:
        """Give a device a table and bring it to life; if it had one, its input and output waits meanwhile."""
        parameters = target.parameters.encode("ascii") + b"\0"
        parameters += b"\0" * (-len(parameters) % 8)
        sectors = target.length_bytes // SECTOR_BYTES
        line = _TARGET.pack(0, sectors, 0, _TARGET.size + len(parameters), target.kind.encode("ascii"))
        self._call("load", name, flags=_READ_ONLY if read_only else 0, targets=1, payload=line + parameters)
        self._call("resume", name, event=_UDEV_HANDS_OFF)

    def remove(self, name: str, timeout_s: float) -> None:
        """Remove a device; absent is fine. EBUSY is tried again until ``timeout_s`` is over, then raised."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self._call("remove", name, event=_UDEV_HANDS_OFF)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)
            else:
                return

    def info(self, name: str) -> Info:
        """Return what the kernel tells of a device."""
        return _info(self._call("info", name))

    def find(self, name: str) -> Info | None:
        """Return the same, or None if there is no such device."""
        try:
            return self.info(name)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    def names(self) -> list[str]:
        """Return the name of every device of the host."""
        reply = self._call("list", "")
        offset, found = _HEADER.unpack_from(reply)[4], []
        while True:
            device, step = _ENTRY.unpack_from(reply, offset)
            if device:  # an empty list is one entry with device number 0
                found.append(_text(reply, offset + _ENTRY.size))
            if not step:
                return found
            offset += step

    def status(self, name: str, *, flush: bool = False) -> Target:
        """Return the live table with its status; ``flush`` has a thin pool write data and metadata out first."""
        return _target(self._call("status", name, flags=0 if flush else _NO_FLUSH))

    def table(self, name: str) -> Target:
        """Return the live table as it was loaded."""
        return _target(self._call("status", name, flags=_STATUS_TABLE | _NO_FLUSH))

    def message(self, name: str, text: str) -> None:
        """Send a message to the target; that it succeeds does not prove that its effect is on disk."""
        self._call("message", name, payload=struct.pack("=Q", 0) + text.encode("ascii") + b"\0")

    def _call(
        self, command: str, name: str, *, uuid: str = "", flags: int = 0, event: int = 0, targets: int = 0,
        payload: bytes = b"",
    ) -> bytes:  # fmt: skip
        """Do one ioctl and return the kernel's buffer; only questions are asked again with a larger one."""
        raw_name, raw_uuid = name.encode("ascii"), uuid.encode("ascii")
        if len(raw_name) > 127 or len(raw_uuid) > 128:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
        size = max(_BUFFER_BYTES, _START + len(payload))
        while True:
            buffer = bytearray(size)
            _HEADER.pack_into(buffer, 0, 4, 0, 0, size, _START, targets, 0, flags, event, 0, 0, raw_name, raw_uuid)
            buffer[_START : _START + len(payload)] = payload
            try:
                fcntl.ioctl(self._control, _COMMANDS[command], buffer, True)
            except OSError as error:
                error.filename = f"device-mapper {command} {name}"
                raise
            if not _HEADER.unpack_from(buffer)[7] & _BUFFER_FULL or command not in ("list", "status"):
                return bytes(buffer)
            size *= 2


def node(device: int) -> str:
    """Return the path of a device's node, made sure to be that device: a path that merely exists proves nothing.

    devtmpfs makes the node before the ioctl that loads the table returns, so there is nothing to wait for.
    """
    path = f"/dev/dm-{os.minor(device)}"
    found = os.lstat(path)
    if not stat.S_ISBLK(found.st_mode) or found.st_rdev != device:
        raise OSError(errno.ENODEV, f"not block device {os.major(device)}:{os.minor(device)}", path)
    return path


def _info(reply: bytes) -> Info:
    fields = _HEADER.unpack_from(reply)
    # new_encode_dev() of the kernel: 12 bits of major between the low 8 and the high 12 bits of minor.
    device = os.makedev((fields[10] >> 8) & 0xFFF, (fields[10] & 0xFF) | ((fields[10] >> 12) & 0xFFF00))
    return Info(device, fields[6], fields[12].split(b"\0")[0].decode("ascii", "replace"))


def _target(reply: bytes) -> Target:
    fields = _HEADER.unpack_from(reply)
    if fields[5] != 1:
        raise OSError(errno.ENODATA, f"expected one target, found {fields[5]}")
    _, sectors, _, _, kind = _TARGET.unpack_from(reply, fields[4])
    text = _text(reply, fields[4] + _TARGET.size)
    return Target(sectors * SECTOR_BYTES, kind.split(b"\0")[0].decode("ascii", "replace"), text)


def _text(reply: bytes, offset: int) -> str:
    return reply[offset : reply.index(0, offset)].decode("ascii", "replace")
