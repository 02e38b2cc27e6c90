"""Headers, extensions and the end: every byte of the stream is understood or the archive is refused.

The attacks are named for what they exploit in some reader; each must be refused by its own rule, in the strict reader,
before libarchive has a say.
"""

from __future__ import annotations

import pytest

from tests.unpriv.checking import check, tightened
from tests.unpriv.tarbytes import (
    BLOCK,
    END,
    base256,
    directory,
    hardlink,
    head,
    long_name,
    member,
    padded,
    pax,
    raw_pax,
    record,
    symlink,
    tar,
)

INNER = member(b"smuggled", b"!")  # a body that is a member itself
LONGEST = b"/".join([b"n" * 255] * 16)  # 4,095 bytes
OK = member(b"ok", b"ok\n")
BIG = 0o77777777777 + 1  # 8 GiB: the first size that eleven octal digits cannot hold

REFUSED = {
    # smuggling: readers differ in whether the body is skipped or read as members
    "symlink_with_a_body": (member(b"l", INNER, b"2", link=b"t"), "size_on_bodyless"),
    "hard_link_with_a_body": (OK + member(b"h", INNER, b"1", link=b"ok"), "size_on_bodyless"),
    "directory_with_a_body": (member(b"d", INNER, b"5"), "size_on_bodyless"),
    "fifo_with_a_body": (member(b"f", INNER, b"6"), "size_on_bodyless"),
    "device_with_a_body": (member(b"c", INNER, b"3", major=1, minor=3), "size_on_bodyless"),
    "file_with_a_slash": (member(b"f/", INNER), "trailing_slash"),
    "old_directory_with_a_body": (member(b"f/", INNER, b"\0"), "size_on_bodyless"),
    "directory_with_a_pax_size": (pax((b"size", b"1024")) + head(b"d", b"5") + INNER, "pax_conflict"),
    "pax_size_hides_a_body": (pax((b"size", b"0")) + member(b"f", INNER), "pax_conflict"),
    "pax_size_over_zero": (pax((b"size", b"%d" % len(INNER))) + head(b"f") + INNER, "pax_conflict"),
    "pax_size_on_a_long_name": (pax((b"size", b"9")) + long_name(b"n" * 120) + OK, "extension_mixed"),
    "old_gnu_volume": (member(b"V", INNER, b"V"), "type_unknown"),
    "gnu_multi_volume": (member(b"M", b"x", b"M"), "type_unknown"),
    "gnu_rename_script": (member(b"N", b"Rename a to b\n", b"N"), "type_unknown"),
    "gnu_dump_directory": (member(b"D", b"\0", b"D"), "type_unknown"),
    "solaris_extended_header": (member(b"X", record(b"path", b"p"), b"X") + OK, "type_unknown"),
    "solaris_acl": (member(b"A", b"x", b"A"), "type_unknown"),
    "inode_metadata": (member(b"I", b"x", b"I"), "type_unknown"),
    "contiguous_file": (member(b"f", b"x", b"7"), "type_unknown"),
    "unknown_type": (member(b"f", b"x", b"Z"), "type_unknown"),
    "newline_as_type": (member(b"f", b"x", b"\n"), "type_unknown"),
    "high_bit_type": (member(b"f", b"x", b"\x80"), "type_unknown"),
    # numbers
    "size_with_hexadecimal": (member(b"f", size=b"0x200"), "number_malformed"),
    "size_with_a_gap": (member(b"f", size=b"0000000 2000"), "number_malformed"),
    "size_with_eights": (member(b"f", size=b"00000000080"), "number_malformed"),
    "size_behind_a_nul": (member(b"f", size=b"0000\x00000001"), "number_malformed"),
    "size_with_a_sign": (member(b"f", size=b"-0000000512"), "number_negative"),
    "size_with_a_plus": (member(b"f", size=b"+0000000512"), "number_malformed"),
    "size_with_underscores": (member(b"f", size=b"0000_000_12"), "number_malformed"),
    "size_blank": (member(b"f", size=b" " * 12), "number_malformed"),
    "size_blank_before_a_body": (member(b"f", b"1", size=bytes(12)), "header_checksum"),
    "size_negative_in_base256": (member(b"f", size=base256(-512, 12)), "number_negative"),
    "size_beyond_64_bits": (member(b"f", size=base256(1 << 70, 12)), "number_too_large"),
    "size_beyond_the_file_system": (member(b"f", size=base256(1 << 45, 12)), "file_too_large"),
    "base256_with_another_first_byte": (member(b"f", uid=b"\x81" + bytes(7)), "number_malformed"),
    "owner_by_name": (member(b"f", uid=b"nobody"), "number_malformed"),
    "owner_blank": (member(b"f", uid=b" " * 7), "number_malformed"),
    "time_blank": (member(b"f", mtime=b" " * 12), "number_malformed"),
    "owner_negative": (member(b"f", uid=base256(-1, 8)), "number_negative"),
    "mode_negative": (member(b"f", mode=base256(-1, 8)), "number_negative"),
    "mode_blank": (member(b"f", mode=b" " * 8), "number_malformed"),
    "time_garbage": (member(b"f", mtime=b"yesterday"), "number_malformed"),
    "device_garbage": (member(b"f", major=b"one"), "number_malformed"),
    "checksum_wrong": (OK + member(b"f", checksum=b"000000\0 "), "header_checksum"),
    "checksum_signed": (OK + member(b"\xff" * 9, checksum=b"%06o\0 " % 1000), "header_checksum"),
    "checksum_in_base256": (
        member(b"f", checksum=base256(sum(member(b"f", checksum=b" " * 8)[:512]), 8)),
        "number_malformed",
    ),
    "checksum_garbage": (OK + member(b"f", checksum=b"checksum"), "number_malformed"),
    # other layouts
    "unknown_magic": (member(b"f", magic=b"USTAR\x0000"), "header_magic"),
    "half_a_magic": (member(b"f", magic=b"ustar 00"), "header_magic"),
    "another_version": (member(b"f", magic=b"ustar\x0001"), "header_magic"),
    "star_trailer": (member(b"f", pad=b"\0" * 8 + b"tar\0"), "header_reserved"),
    "version_7_with_a_prefix": (member(b"f", magic=bytes(8), prefix=b"p"), "header_reserved"),
    "version_7_with_an_owner_name": (member(b"f", magic=bytes(8), uname=b"root"), "header_reserved"),
    "gnu_with_a_prefix": (member(b"f", magic=b"ustar  \0", prefix=b"p" * 40), "header_reserved"),
    "gnu_time_garbage": (member(b"f", magic=b"ustar  \0", prefix=b"name"), "number_malformed"),
    "name_behind_a_nul": (member(b"good\0evil"), "header_text"),
    "link_name_behind_a_nul": (symlink(b"l", b"good\0evil"), "header_text"),
    "prefix_behind_a_nul": (member(b"f", prefix=b"good\0evil"), "header_text"),
    "prefix_that_begins_with_a_nul": (member(b"f", prefix=b"\0evil"), "header_text"),
    # PAX grammar
    "pax_record_too_short": (raw_pax(b"5 path=abc\n") + OK, "pax_record_malformed"),
    "pax_record_too_long": (raw_pax(b"99 path=abc\n") + OK, "pax_record_malformed"),
    "pax_record_of_no_length": (raw_pax(b"0 path=abc\n") + OK, "pax_record_malformed"),
    "pax_record_with_a_sign": (raw_pax(b"+12 path=abc\n") + OK, "pax_record_malformed"),
    "pax_record_without_a_length": (raw_pax(b"path=abc\n") + OK, "pax_record_malformed"),
    "pax_record_with_two_blanks": (raw_pax(b"12  path=ab\n") + OK, "pax_record_malformed"),
    "pax_record_with_a_tab": (raw_pax(b"12 \tpath=ab\n") + OK, "pax_record_malformed"),
    "pax_record_without_a_newline": (raw_pax(b"11 path=abcX") + OK, "pax_record_malformed"),
    "pax_record_without_a_value": (raw_pax(b"8 path \n") + OK, "pax_record_malformed"),
    "pax_record_without_a_key": (raw_pax(b"6 =ab\n") + OK, "pax_record_malformed"),
    "pax_record_with_a_nul_in_its_key": (raw_pax(b"11 pa\0th=a\n") + OK, "pax_record_malformed"),
    "pax_record_with_leading_zeros": (raw_pax(b"0012 path=ab\n") + OK, "pax_record_malformed"),
    "pax_record_padded_with_nuls": (raw_pax(record(b"path", b"p") + bytes(8)) + OK, "pax_record_malformed"),
    "pax_record_of_many_digits": (raw_pax(b"9" * 30 + b" path=p\n") + OK, "pax_record_malformed"),
    "pax_two_paths": (pax((b"path", b"a"), (b"path", b"b")) + OK, "pax_key_repeated"),
    "pax_two_attributes": (
        pax((b"SCHILY.xattr.user.a", b"1"), (b"SCHILY.xattr.user.a", b"2")) + OK,
        "pax_key_repeated",
    ),
    "pax_path_empty": (pax((b"path", b"")) + OK, "path_empty"),
    "pax_path_with_a_nul": (pax((b"path", b"good\0evil")) + OK, "path_has_nul"),
    "pax_linkpath_with_a_nul": (pax((b"linkpath", b"a\0b")) + symlink(b"l", b"x"), "path_has_nul"),
    "pax_owner_empty": (pax((b"uid", b"")) + OK, "number_malformed"),
    "pax_owner_by_name": (pax((b"uid", b"wheel")) + OK, "number_malformed"),
    "pax_owner_with_an_exponent": (pax((b"uid", b"1e3")) + OK, "number_malformed"),
    "pax_owner_negative": (pax((b"uid", b"-1")) + OK, "number_negative"),
    "pax_owner_in_other_digits": (pax((b"uid", "١٢".encode())) + OK, "number_malformed"),
    "pax_size_negative": (pax((b"size", b"-1")) + OK, "number_negative"),
    "pax_size_with_a_fraction": (pax((b"size", b"3.0")) + OK, "number_malformed"),
    "pax_size_beyond_64_bits": (pax((b"size", b"9" * 25)) + OK, "number_too_large"),
    "pax_time_not_a_number": (pax((b"mtime", b"nan")) + OK, "number_malformed"),
    "pax_time_infinite": (pax((b"mtime", b"inf")) + OK, "number_malformed"),
    "pax_time_in_scientific_form": (pax((b"mtime", b"1e9")) + OK, "number_malformed"),
    "pax_access_time_garbage": (pax((b"atime", b"now")) + OK, "number_malformed"),
    "pax_owner_contradicts": (pax((b"uid", b"1000")) + OK, "pax_conflict"),
    "pax_group_contradicts": (pax((b"gid", b"0")) + member(b"f", gid=5), "pax_conflict"),
    "pax_charset_unknown": (pax((b"hdrcharset", b"EBCDIC")) + OK, "pax_value_malformed"),
    "pax_owner_name_with_a_nul": (pax((b"uname", b"a\0b")) + OK, "pax_value_malformed"),
    "pax_device_numbers": (pax((b"SCHILY.devmajor", b"8")) + OK, "pax_key_forbidden"),
    "pax_file_flags": (pax((b"SCHILY.fflags", b"immutable")) + OK, "pax_key_forbidden"),
    "pax_dump_directory": (pax((b"GNU.dumpdir", b"Yx\0")) + OK, "pax_key_forbidden"),
    "pax_volume": (pax((b"GNU.volume.label", b"x")) + OK, "pax_key_forbidden"),
    "pax_reserved_word": (pax((b"security.selinux", b"x")) + OK, "pax_key_forbidden"),
    "pax_keyword_in_capitals": (pax((b"PATH", b"x")) + OK, "pax_key_forbidden"),
    "pax_keyword_with_a_space": (pax((b"size ", b"3")) + OK, "pax_key_forbidden"),
    "pax_global_path": (pax((b"path", b"p"), kind=b"g") + OK, "pax_global"),
    "pax_global_size": (pax((b"size", b"0"), kind=b"g") + OK, "pax_global"),
    "pax_global_owner": (pax((b"uid", b"0"), kind=b"g") + OK, "pax_global"),
    "pax_global_malformed": (raw_pax(b"x", b"g") + OK, "pax_record_malformed"),
    # sparse files, four ways
    "sparse_old_gnu": (member(b"s", b"x", b"S", magic=b"ustar  \0"), "sparse_file"),
    "sparse_old_gnu_with_a_map": (
        member(b"s", b"x", b"S", magic=b"ustar  \0", prefix=bytes(41) + b"1" * 22),
        "sparse_file",
    ),
    "sparse_posix_type": (member(b"s", b"x", b"S"), "sparse_file"),
    "sparse_pax_0": (pax((b"GNU.sparse.size", b"9"), (b"GNU.sparse.numblocks", b"0")) + OK, "sparse_file"),
    "sparse_pax_1": (pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + OK, "sparse_file"),
    "sparse_name_alone": (pax((b"GNU.sparse.name", b"other")) + OK, "sparse_file"),
    "sparse_star": (pax((b"SCHILY.realsize", b"1000000")) + OK, "sparse_file"),
    # extension headers and what they belong to
    "two_pax_headers": (pax((b"path", b"a")) + pax((b"path", b"b")) + OK, "extension_repeated"),
    "two_long_names": (long_name(b"a" * 120) + long_name(b"b" * 120) + OK, "extension_repeated"),
    "two_long_links": (long_name(b"a", b"K") + long_name(b"b", b"K") + symlink(b"l", b"x"), "extension_repeated"),
    "pax_then_long_name": (pax((b"path", b"a")) + long_name(b"b" * 120) + OK, "extension_mixed"),
    "long_name_then_pax": (long_name(b"b" * 120) + pax((b"path", b"a")) + OK, "extension_mixed"),
    "thirty_two_comments": (pax((b"comment", b"x"), kind=b"g") * 32 + OK, "extension_repeated"),
    "comment_between_pax_and_its_member": (
        pax((b"path", b"a")) + pax((b"comment", b"c"), kind=b"g") + OK,
        "extension_mixed",
    ),
    "comment_between_a_long_name_and_its_member": (
        long_name(b"b" * 120) + pax((b"comment", b"c"), kind=b"g") + OK,
        "extension_mixed",
    ),
    "pax_header_then_the_end": (OK + pax((b"path", b"a")), "extension_orphaned"),
    "long_name_too_long": (long_name(b"n/" * 2048) + OK, "path_too_deep"),
    "longest_name_and_one_more": (long_name(b"n" + LONGEST) + OK, "component_too_long"),
    "long_name_twice_too_long": (long_name(b"n/" * 4096) + OK, "extension_too_large"),
    "long_name_then_the_end": (OK + long_name(b"a" * 120), "extension_orphaned"),
    "long_name_of_four_gib": (head(b"././@LongLink", b"L", size=base256(4 << 30, 12)) + OK, "extension_too_large"),
    "pax_header_of_four_gib": (head(b"x", b"x", size=base256(4 << 30, 12)) + OK, "extension_too_large"),
    "long_name_empty": (member(b"././@LongLink", b"", b"L") + OK, "long_name_malformed"),
    "long_name_of_a_nul": (member(b"././@LongLink", b"\0", b"L") + OK, "long_name_malformed"),
    "long_name_with_a_nul": (member(b"././@LongLink", b"good\0evil\0", b"L") + OK, "long_name_malformed"),
    # a link's target on what is no link
    "file_with_a_link_name": (member(b"f", link=b"/etc/shadow"), "names_only_link"),
    "file_with_a_pax_link_path": (pax((b"linkpath", b"/etc/shadow")) + member(b"f"), "names_only_link"),
    "directory_with_a_long_link": (long_name(b"/etc", b"K") + directory(b"d"), "names_only_link"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, rule = REFUSED[name]
    result = check(tar(data))
    assert result.rule == rule, result.report
    assert result.manifest == b""


ENDS = {
    "nothing": (b"", "archive_empty"),
    "no_end": (OK, "archive_end_missing"),
    "half_an_end": (OK + bytes(BLOCK), "archive_end_missing"),
    "one_zero_block_only": (bytes(BLOCK), "archive_end_missing"),
    "a_zero_block_and_some_bytes": (OK + bytes(BLOCK + 100), "archive_truncated"),
    "one_zero_block_then_a_member": (OK + bytes(BLOCK) + OK + END, "archive_trailing_data"),
    "another_archive_behind": (tar(OK) + tar(OK), "archive_trailing_data"),
    "one_byte_far_behind": (tar(OK) + bytes(3 << 20) + b"\1", "archive_trailing_data"),
    "cut_in_a_header": (OK + OK[:100], "archive_truncated"),
    "cut_in_data": (member(b"f", b"x" * 5000)[:3000], "archive_truncated"),
    "cut_behind_data": (member(b"f", b"x" * 100)[: BLOCK + 100], "archive_truncated"),
    "cut_in_an_extension": (pax((b"path", b"p" * 900))[:1000], "archive_truncated"),
    "cut_behind_an_extension": (pax((b"path", b"p")), "archive_truncated"),
    "a_script_first": (padded(b"#!/bin/sh\n") + tar(OK), "archive_not_tar"),
    "plain_text": (b"hello\n", "archive_truncated"),
    "a_zip": (b"PK\x03\x04" + bytes(2000), "compression_undeclared"),
    "a_gzip": (b"\x1f\x8b\x08" + bytes(2000), "compression_undeclared"),
    "an_iso_image": (bytes(32 << 10) + b"\1CD001" + bytes(2000), "archive_trailing_data"),
}


@pytest.mark.parametrize("name", ENDS)
def test_where_an_archive_begins_and_ends(name: str) -> None:
    data, rule = ENDS[name]
    assert check(data).rule == rule


ACCEPTED = {
    "empty_layer": END,
    "zeros_to_the_record": tar(OK) + bytes(10_240),
    "zeros_that_fill_no_block": tar(OK) + bytes(100),
    "version_7": tar(member(b"ok", b"ok\n", b"\0", magic=bytes(8))),
    "version_7_with_device_numbers": tar(member(b"ok", b"ok\n", b"0", magic=bytes(8), major=0, minor=0)),
    "old_gnu": tar(member(b"ok", b"ok\n", magic=b"ustar  \0")),
    "old_gnu_with_times": tar(member(b"ok", b"ok\n", magic=b"ustar  \0", prefix=b"14524770000\0" * 2)),
    "version_of_nuls": tar(member(b"ok", b"ok\n", magic=b"ustar\0\0\0", prefix=b"")),
    "version_of_spaces": tar(member(b"ok", b"ok\n", magic=b"ustar\0  ")),
    "numbers_of_nuls": tar(
        member(b"ok", b"ok\n", uid=bytes(8), gid=bytes(8), mtime=bytes(12)), directory(b"d", size=bytes(12))
    ),
    "pax_unknown_plain_word": tar(pax((b"colour", b"red")), member(b"ok", b"ok\n")),
    "blank_device_numbers": tar(member(b"ok", b"ok\n", major=bytes(8), minor=b" " * 8)),
    "numbers_with_spaces": tar(member(b"ok", b"ok\n", mode=b"   644 \0", uid=b"     0 \0", size=b"          3 ")),
    "numbers_without_an_end": tar(member(b"ok", b"ok\n", size=b"000000000003", mtime=b"014524770000")),
    "numbers_in_base256": tar(member(b"ok", b"ok\n", size=base256(3, 12), uid=base256(0, 8))),
    "checksum_of_another_form": tar(
        member(b"ok", b"ok\n", checksum=b"%7o\0" % sum(member(b"ok", b"ok\n", checksum=b" " * 8)[:512]))
    ),
    "type_bits_in_the_mode": tar(member(b"ok", b"ok\n", mode=0o100644)),
    "garbage_in_the_padding": tar(member(b"ok", b"ok\n")[: BLOCK + 3] + b"\xaa" * 509),
    "pax_size_that_agrees": tar(pax((b"size", b"3")), OK),
    "pax_owner_that_agrees": tar(pax((b"uid", b"0"), (b"gid", b"0")), OK),
    "pax_owner_that_does_not_fit": tar(pax((b"uid", b"3000000")), member(b"ok", b"ok\n", uid=0)),
    "pax_owner_saturated": tar(pax((b"uid", b"3000000")), member(b"ok", b"ok\n", uid=0o7777777)),
    "git_archive_comment": tar(pax((b"comment", b"0123456789abcdef"), kind=b"g"), OK),
    "comment_then_pax": tar(pax((b"comment", b"c"), kind=b"g"), pax((b"comment", b"c")), OK),
    "comment_at_the_end": tar(OK, pax((b"comment", b"c"), kind=b"g")),
    "pax_of_vendors": tar(
        pax((b"MSWINDOWS.fileattr", b"32"), (b"APK-TOOLS.checksum.SHA1", b"0" * 40), (b"SCHILY.nlink", b"1")), OK
    ),
    "pax_empty": tar(raw_pax(b""), OK),
    "longest_name_with_a_dot_before_it": tar(OK, long_name(b"./" + LONGEST), member(b"n" * 100, b"1")),
    "long_name_that_was_not_needed": tar(long_name(b"ok"), OK),
    "long_name_without_a_nul": tar(member(b"././@LongLink", b"ok", b"L"), OK),
    "long_name_with_two_nuls": tar(member(b"././@LongLink", b"ok\0\0", b"L"), OK),
    "long_name_and_link": tar(OK, long_name(b"h" * 150, b"L"), long_name(b"ok", b"K"), hardlink(b"h" * 100, b"ok")),
    "old_directory": tar(member(b"d/", b"", b"\0"), OK),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    result = check(ACCEPTED[name])
    assert result.accepted, result.report
    assert "ok" in result.paths() or name == "empty_layer"


def test_a_size_beyond_eight_gib_may_stand_in_pax_alone() -> None:
    """GNU tar and Go leave 0, bsdtar a base-256 number in the header; here the file is cut, so the data is missing."""
    for size in (0, 0o77777777777, base256(BIG, 12)):
        result = check(tar(pax((b"size", b"%d" % BIG)), head(b"f", size=size)))
        assert result.rule == "archive_truncated", size


def test_chunks_may_end_anywhere_between_blocks() -> None:
    """Headers, extensions and data across the boundary of chunks come out the same; so does libarchive."""
    long = b"/".join([b"d" * 200] * 8)
    for shift in range(-6, 3):
        fill = member(b"fill", bytes((1 << 20) + shift * BLOCK - BLOCK))
        result = check(tar(fill, pax((b"path", long), (b"comment", b"c" * 2000)), member(b"x", b"y" * 3000), OK))
        assert result.accepted, (shift, result.report)
        assert result.paths()[long.decode()]["size"] == 3000


def test_place_of_a_refusal() -> None:
    violation = check(tar(OK, OK.replace(b"ok", b"no", 1), head(b"bad\n\x1b[31m", checksum=b"000000\0 "))).report[
        "violations"
    ][0]
    assert violation["entry"] == 2 and violation["offset"] == 1024  # the second header's sum is wrong, too
    violation = check(tar(OK, member(b"../\x1b[31m\n"))).report["violations"][0]
    assert (violation["rule"], violation["entry"], violation["offset"]) == ("path_escapes_root", 2, 1024)
    assert violation["name"] == "../\\x1b[31m\\x0a"


def test_all_violations_of_meaning_are_listed_and_then_those_of_framing() -> None:
    bad = tar(
        member(b"../a"), OK, member(b"b", uid=base256(1 << 33, 8)), OK, symlink(b"c", b""), member(b"d", kind=b"Z")
    )
    result = check(bad, all_violations=True)
    assert result.rules == [
        "path_escapes_root",
        "id_out_of_range",
        "duplicate_entry",
        "symlink_target_invalid",
        "type_unknown",
    ]
    assert result.report["complete"] is False
    result = check(tar(member(b"../a"), OK, OK), all_violations=True)
    assert result.rules == ["path_escapes_root", "duplicate_entry"]
    assert result.report["complete"] is True


def test_the_list_of_violations_is_bounded() -> None:
    result = check(tar(*[member(b"../a")] * 500), all_violations=True)
    assert len(result.rules) == 100
    assert result.report["complete"] is False


LIMITED = {
    "entries": ({"archive": {"entries": 2}}, tar(OK, member(b"b"), member(b"c")), "entries_too_many"),
    "file_bytes": ({"archive": {"file_bytes": 2}}, tar(OK), "file_too_large"),
    "extension_bytes": (
        {"archive": {"extension_bytes": 100}},
        tar(pax((b"comment", b"c" * 200)), OK),
        "extension_too_large",
    ),
    "extensions": (
        {"archive": {"extensions": 1}},
        tar(pax((b"comment", b"c"), kind=b"g") * 2, OK),
        "extension_repeated",
    ),
    "pax_record_bytes": (
        {"archive": {"pax_record_bytes": 100}},
        tar(pax((b"comment", b"c" * 200)), OK),
        "pax_record_too_large",
    ),
    "pax_records": (
        {"archive": {"pax_records": 2}},
        tar(pax(*[(b"V.%d" % n, b"") for n in range(3)]), OK),
        "pax_record_too_large",
    ),
    "names_bytes": (
        {"archive": {"names_bytes": 100}},
        tar(*[member(b"n" * 40 + b"%d" % n) for n in range(3)]),
        "names_too_large",
    ),
    "max_id": ({"archive": {"max_id": 99}}, tar(member(b"f", uid=100)), "id_out_of_range"),
    "component_bytes": ({"names": {"component_bytes": 5}}, tar(member(b"abcdef")), "component_too_long"),
    "path_bytes": ({"names": {"path_bytes": 8}}, tar(member(b"./abcd/.efgh")), "path_too_long"),
    "depth": ({"names": {"depth": 3}}, tar(member(b"a/b/c/d")), "path_too_deep"),
    "link_target_bytes": ({"names": {"link_target_bytes": 3}}, tar(symlink(b"l", b"abcd")), "symlink_target_invalid"),
    "payload_bytes": ({"stream": {"payload_bytes": 1000}}, tar(OK), "payload_too_large"),
    "blob_bytes": ({"stream": {"blob_bytes": 1000}}, tar(OK), "blob_too_large"),
    "wall_clock_s": ({"run": {"wall_clock_s": 0}}, tar(OK), "wall_clock_exceeded"),
    "cpu_s": ({"run": {"cpu_s": 0}}, tar(OK), "cpu_time_exceeded"),
    "xattr_count": (
        {"xattrs": {"count": 1}},
        tar(pax((b"SCHILY.xattr.user.a", b"1"), (b"SCHILY.xattr.user.b", b"1")), OK),
        "xattr_too_large",
    ),
    "xattr_value_bytes": (
        {"xattrs": {"value_bytes": 1}},
        tar(pax((b"SCHILY.xattr.user.a", b"11")), OK),
        "xattr_too_large",
    ),
    "xattr_entry_bytes": (
        {"xattrs": {"entry_bytes": 20}},
        tar(pax((b"SCHILY.xattr.user.a", b"11")), OK),
        "xattr_too_large",
    ),
    "xattr_name_bytes": (
        {"xattrs": {"name_bytes": 5}},
        tar(pax((b"SCHILY.xattr.user.ab", b"1")), OK),
        "xattr_not_allowed",
    ),
}


@pytest.mark.parametrize("name", LIMITED)
def test_limit(name: str) -> None:
    tables, data, rule = LIMITED[name]
    assert check(data).accepted
    assert check(data, limits=tightened(**tables)).rule == rule
