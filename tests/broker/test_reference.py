from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import ImgpullError, UsageError
from broker.reference import NAME, Reference, clean_name, media_of, order_layers, single_layer


@dataclass(frozen=True)
class Object:
    key: str
    size: int = 512


FAMILY = Reference.parse("s3://bucket/images/golang")


def family(*names: str) -> list[Object]:
    return [Object(f"images/golang/{name}") for name in names]


def test_family_with_and_without_slash_are_one_reference() -> None:
    assert Reference.parse("s3://bucket/images/golang/") == FAMILY
    assert FAMILY.family
    assert str(FAMILY) == "s3://bucket/images/golang"
    assert FAMILY.prefix == "images/golang/"


def test_tarball_is_no_family() -> None:
    found = Reference.parse("s3://bucket/images/golang/2.tar")
    assert not found.family
    assert str(found) == "s3://bucket/images/golang/2.tar"
    assert found.default_name == "golang-2"


def test_prefix_that_ends_in_tar_is_a_family_when_written_with_slash() -> None:
    found = Reference.parse("s3://bucket/odd.tar/")
    assert found.family
    assert Reference.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "golang",
        "http://bucket/x",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3://-/x",
        "s3://b/x",
        "s3://bu cket/x",
        "s3://bucket/a\nb",
        "s3://bucket/" + "x" * 1025,
    ],
)
def test_what_is_no_reference_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        Reference.parse(text)


@given(st.text(min_size=1, max_size=60))
def test_canonical_form_reads_back_as_itself(key: str) -> None:
    try:
        found = Reference.parse(f"s3://bucket/{key}")
    except UsageError:
        return
    assert Reference.parse(str(found)) == found


def test_layers_are_ordered_as_numbers() -> None:
    shuffled = family(*(f"{n}.tar" for n in (10, 2, 1, 9, 3, 8, 4, 7, 5, 6)))
    assert [n.number for n in order_layers(FAMILY, shuffled)] == list(range(1, 11))


def test_compressions_may_be_mixed_in_a_family() -> None:
    found = order_layers(FAMILY, family("1.tar", "2.tar.gz", "3.tar.zst", "4.tgz"))
    assert [n.media for n in found] == ["tar", "tar+gzip", "tar+zstd", "tar+gzip"]


def test_folder_marker_of_s3_consoles_is_no_stray_key() -> None:
    assert len(order_layers(FAMILY, [Object("images/golang/", 0), *family("1.tar")])) == 1


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["2.tar", "3.tar"], "layer 1 is missing"),
        (["1.tar", "3.tar"], "layer 2 is missing"),
        (["1.tar", "1.tar.gz"], "layer 1 is there twice"),
        (["1.tar", "README"], "stray key 'images/golang/README'"),
        (["1.tar", "01.tar"], "stray key 'images/golang/01.tar'"),
        (["0.tar", "1.tar"], "stray key 'images/golang/0.tar'"),
        (["1.tar", "2.zip"], "stray key 'images/golang/2.zip'"),
        (["1.tar", "sub/2.tar"], "stray key 'images/golang/sub/2.tar'"),
        (["1.tar", "٢.tar"], "stray key"),
        (["1.tar", "2.tar "], "stray key"),
    ],
)
def test_gap_duplicate_and_stray_key_are_named(names: list[str], word: str) -> None:
    with pytest.raises(ImgpullError) as caught:
        order_layers(FAMILY, family(*names))
    assert caught.value.problem.code == "not-an-image"
    assert word in caught.value.problem.why


def test_key_outside_the_prefix_is_stray() -> None:
    with pytest.raises(ImgpullError, match="not the layers"):
        order_layers(FAMILY, [Object("1.tar")])


def test_empty_family_is_no_such_object() -> None:
    with pytest.raises(ImgpullError) as caught:
        order_layers(FAMILY, [])
    assert caught.value.problem.exit_code == 66


def test_single_layer_takes_its_compression_from_the_name() -> None:
    ref = Reference.parse("s3://bucket/a/root.tar.zst")
    assert single_layer(ref, Object("a/root.tar.zst"))[0].media == "tar+zstd"


@pytest.mark.parametrize("name", ["x.tar", "X.TAR", "x.tar.gz", "x.tgz", "x.tar.zst", "x.tar.xz", "x.tbz2"])
def test_known_suffixes_declare_a_compression(name: str) -> None:
    assert media_of(name) is not None


@pytest.mark.parametrize("name", ["x", "x.zip", "x.gz", "tar", "x.rpm", "x.tar.lrz", "x.mtree"])
def test_other_names_declare_none(name: str) -> None:
    assert media_of(name) is None


@given(st.text())
def test_every_text_becomes_a_name_that_root_accepts(text: str) -> None:
    assert NAME.fullmatch(clean_name(text))


def test_cleaned_names_of_different_texts_differ() -> None:
    assert clean_name("a b") != clean_name("a/b")
