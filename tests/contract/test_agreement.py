"""Both sides of the privilege boundary judge the same manifests.

Root's verdict on each vector is tested in tests/privhelper/test_manifest.py. Here is the other side: the checker reads
the manifests of lower layers, which root has sealed before, to learn their merged tree.

Rule: it refuses nothing that root accepts. Where root refuses and it does not, the vector's name is below, with why.
"""

from typing import Final

import pytest

from tests.contract.manifests import VECTORS, Vector
from unpriv.blob import MemoryBlob
from unpriv.lower import Lower
from unpriv.rulebook import RejectedError

# Values that do not change which names a tree has. Root has refused them before there was a layer to stand on.
ROOT_ALONE: Final = {
    "what the user namespace cannot keep": {"uid_above_the_map", "gid_above_the_map", "xattr_capability_revision_3"},
    "limits of policy/helper.toml": {"depth_65"},
}  # fmt: skip


def is_taken(vector: Vector) -> bool:
    """Tell whether the checker takes this for the manifest of a layer."""
    try:
        Lower(with_places=False, tick=lambda: None).add(MemoryBlob(vector.manifest))
    except RejectedError:
        return False
    return True


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_checker_and_root_agree(vector: Vector) -> None:
    is_root_alone = any(vector.name in names for names in ROOT_ALONE.values())
    assert is_taken(vector) == (vector.accepted or is_root_alone)


def test_every_exception_is_a_vector_that_root_refuses() -> None:
    assert set().union(*ROOT_ALONE.values()) <= {vector.name for vector in VECTORS if not vector.accepted}
