"""What dm.py packs and unpacks, against the layout of <linux/dm-ioctl.h>; no kernel is asked.

The ioctl itself is proven on a real kernel by tests/vm.
"""

import errno
import os
import struct
from collections.abc import Callable
from typing import Any

import pytest

from privhelper import dm

HEADER_BYTES = 312  # sizeof(struct dm_ioctl)
OFFSETS = {
    "data_size": 12,
    "data_start": 16,
    "target_count": 20,
    "open_count": 24,
    "flags": 28,
    "event_nr": 32,
    "dev": 40,
}
NAME, UUID, DATA = 48, 176, 312


def field(buffer: bytes | bytearray, name: str) -> int:
    return int(struct.unpack_from("=Q" if name == "dev" else "=I", buffer, OFFSETS[name])[0])


def text(buffer: bytes | bytearray, offset: int) -> str:
    return bytes(buffer[offset : buffer.index(0, offset)]).decode()


Answer = Callable[[int, bytearray], None]


class Kernel:
    """Stands where fcntl.ioctl was: keeps what was asked and answers as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, bytes]] = []
        self.answers: dict[int, list[Answer | int]] = {}
        monkeypatch.setattr(dm, "CONTROL", os.devnull)
        monkeypatch.setattr("privhelper.dm.fcntl.ioctl", self.ioctl)

    def ioctl(self, fd: int, request: int, buffer: bytearray, mutate: bool) -> int:
        self.asked.append((request & 0xFF, bytes(buffer)))
        assert mutate
        assert request == 0xC138FD00 | (request & 0xFF)  # _IOWR(0xfd, number, 312 bytes)
        answers = self.answers.get(request & 0xFF)
        answer = answers.pop(0) if answers else None
        if isinstance(answer, int):
            raise OSError(answer, os.strerror(answer))
        if answer:
            answer(request, buffer)
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def test_the_header_has_the_size_and_the_offsets_of_the_kernels_structure(kernel: Kernel) -> None:
    dm.DeviceMapper().info("imgpull-7")
    number, buffer = kernel.asked[0]
    assert number == 7
    assert struct.unpack_from("=III", buffer) == (4, 0, 0)
    assert (field(buffer, "data_size"), field(buffer, "data_start")) == (len(buffer), HEADER_BYTES)
    assert (text(buffer, NAME), text(buffer, UUID)) == ("imgpull-7", "")


def test_create_loads_one_target_resumes_it_and_tells_udev_to_keep_away(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dm, "node", lambda device: f"node of {device:x}")
    path = dm.DeviceMapper().create("n", "u", dm.Target(10 << 30, "thin", "254:1 7"), read_only=True)
    assert path == "node of 0"
    assert [number for number, _ in kernel.asked] == [
        3,
        9,
        6,
        7,
    ]  # create, load, resume (suspend without its flag), status
    created, loaded, resumed = (buffer for _, buffer in kernel.asked[:3])
    assert (text(created, NAME), text(created, UUID)) == ("n", "u")
    assert (field(loaded, "target_count"), field(loaded, "flags")) == (1, 1)
    start, sectors, status, step, kind = struct.unpack_from("=QQiI16s", loaded, DATA)
    assert (start, sectors, status, kind.rstrip(b"\0")) == (0, (10 << 30) // 512, 0, b"thin")
    assert step % 8 == 0
    assert text(loaded, DATA + 40) == "254:1 7"
    assert field(resumed, "flags") == 0
    assert field(resumed, "event_nr") == 0x4F0000


def test_a_device_whose_table_is_refused_is_removed_again(kernel: Kernel) -> None:
    kernel.answers[9] = [errno.ENODATA]
    with pytest.raises(OSError, match="load n") as caught:
        dm.DeviceMapper().create("n", "u", dm.Target(1 << 20, "thin", "254:1 7"))
    assert caught.value.errno == errno.ENODATA
    assert [number for number, _ in kernel.asked] == [3, 9, 4]


def test_create_of_a_name_in_use_is_an_error_and_removes_nothing(kernel: Kernel) -> None:
    kernel.answers[3] = [errno.EBUSY]
    with pytest.raises(OSError, match="create n"):
        dm.DeviceMapper().create("n", "u", dm.Target(1 << 20, "linear", "7:0 0"))
    assert [number for number, _ in kernel.asked] == [3]


def test_a_message_is_sector_zero_and_a_terminated_text(kernel: Kernel) -> None:
    dm.DeviceMapper().message("pool", "create_snap 8 7")
    number, buffer = kernel.asked[0]
    assert number == 14
    assert buffer[DATA : DATA + 8] == bytes(8)
    assert text(buffer, DATA + 8) == "create_snap 8 7"


def test_a_message_is_never_sent_twice_even_if_the_answer_did_not_fit(kernel: Kernel) -> None:
    kernel.answers[14] = [buffer_full]
    dm.DeviceMapper().message("pool", "create_snap 8 7")
    assert len(kernel.asked) == 1


def test_names_asks_again_with_a_larger_buffer_until_the_list_fits(kernel: Kernel) -> None:
    kernel.answers[2] = [buffer_full, name_list(["imgpull-pool", "somebody's", "imgpull-12"])]
    assert dm.DeviceMapper().names() == ["imgpull-pool", "somebody's", "imgpull-12"]
    first, second = (len(buffer) for _, buffer in kernel.asked)
    assert second == 2 * first


def test_an_empty_list_of_names_is_no_name(kernel: Kernel) -> None:
    kernel.answers[2] = [name_list([])]
    assert dm.DeviceMapper().names() == []


def test_status_returns_length_kind_and_text(kernel: Kernel) -> None:
    kernel.answers[12] = [one_target(4096, b"thin-pool", b"3 40/256 7/2048 - rw")]
    assert dm.DeviceMapper().status("pool") == dm.Target(4096 * 512, "thin-pool", "3 40/256 7/2048 - rw")


def test_a_device_without_a_live_table_has_no_status(kernel: Kernel) -> None:
    with pytest.raises(OSError, match="expected one target") as caught:
        dm.DeviceMapper().status("half-made")
    assert caught.value.errno == errno.ENODATA


@pytest.mark.parametrize(("major", "minor"), [(254, 2), (254, 255), (254, 256), (253, 0xFFFFF), (0xFFF, 0x12345)])
def test_info_decodes_large_device_numbers(kernel: Kernel, major: int, minor: int) -> None:
    def answer(request: int, buffer: bytearray) -> None:
        huge = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
        struct.pack_into("=Q", buffer, OFFSETS["dev"], huge)
        struct.pack_into("=i", buffer, OFFSETS["open_count"], 3)
        buffer[UUID : UUID + 5] = b"abcd\0"

    kernel.answers[7] = [answer]
    assert dm.DeviceMapper().info("n") == dm.Info(os.makedev(major, minor), 3, "abcd")


def test_find_takes_only_absence_for_absence(kernel: Kernel) -> None:
    kernel.answers[7] = [errno.ENXIO, errno.EPERM]
    assert dm.DeviceMapper().find("n") is None
    with pytest.raises(PermissionError):
        dm.DeviceMapper().find("n")


def test_remove_tries_again_while_somebody_has_it_open_and_takes_absence_for_done(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privhelper.dm.time.sleep", lambda seconds: None)
    kernel.answers[4] = [errno.EBUSY, errno.EBUSY, errno.ENXIO]
    dm.DeviceMapper().remove("n", timeout_s=60)
    assert len(kernel.asked) == 3


def test_remove_gives_up_at_its_deadline_with_the_kernels_error(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("privhelper.dm.time.sleep", lambda seconds: None)
    monkeypatch.setattr("privhelper.dm.time.monotonic", lambda: float(next(clock)))
    kernel.answers[4] = [errno.EBUSY] * 10
    with pytest.raises(OSError, match="remove n") as caught:
        dm.DeviceMapper().remove("n", timeout_s=5)
    assert caught.value.errno == errno.EBUSY
    assert len(kernel.asked) == 6


@pytest.mark.parametrize("arguments", [{"name": "n" * 128}, {"name": "n", "uuid": "u" * 129}])
def test_a_name_that_the_kernel_would_cut_off_never_reaches_it(kernel: Kernel, arguments: dict[str, Any]) -> None:
    with pytest.raises(OSError, match="too long"):
        dm.DeviceMapper().create(arguments["name"], arguments.get("uuid", ""), dm.Target(512, "error", ""))
    assert kernel.asked == []


def test_a_node_that_is_not_the_device_is_refused() -> None:
    with pytest.raises(OSError, match="dm-"):
        dm.node(os.makedev(254, 1_000_000))


def test_a_regular_file_in_the_nodes_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as file:
        found = os.fstat(file.fileno())  # a character device: the very number does not help
    monkeypatch.setattr("privhelper.dm.os.lstat", lambda path: found)
    with pytest.raises(OSError, match="not block device"):
        dm.node(found.st_rdev)


def buffer_full(request: int, buffer: bytearray) -> None:
    struct.pack_into("=I", buffer, OFFSETS["flags"], 1 << 8)


def name_list(names: list[str]) -> Answer:
    def answer(request: int, buffer: bytearray) -> None:
        offset = DATA
        if not names:
            struct.pack_into("=QI", buffer, offset, 0, 0)
        for name in names:
            raw = name.encode() + b"\0"
            # The name, then from 5.0 on an event number and flags on the next multiple of 8.
            step = (12 + len(raw) + 7 & ~7) + 8
            struct.pack_into("=QI", buffer, offset, 0xFE02, 0 if name == names[-1] else step)
            buffer[offset + 12 : offset + 12 + len(raw)] = raw
            offset += step

    return answer


def one_target(sectors: int, kind: bytes, parameters: bytes) -> Answer:
    def answer(request: int, buffer: bytearray) -> None:
        struct.pack_into("=I", buffer, OFFSETS["target_count"], 1)
        struct.pack_into("=QQiI16s", buffer, DATA, 0, sectors, 0, 0, kind)
        buffer[DATA + 40 : DATA + 41 + len(parameters)] = parameters + b"\0"

    return answer
