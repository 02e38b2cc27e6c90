"""One session that makes the helper do everything it can, for tests that watch it from outside."""

import os
from pathlib import Path

from tests.privhelper.client import Helper, Layer


def everything(helper: Helper, layer: Layer, folder: Path) -> None:
    """Ask every request of the table, with its refusals; the pool is as before afterwards."""
    payload = layer.write_payload(folder)
    upper = Layer(layer.id())
    usr = upper.directory(0, "usr", op="meta")
    upper.add(op="remove", into=usr, name="su", dir=False)
    upper.directory(usr, "new")
    upper.symlink(usr, "theirs-link", "../etc", uid=1000, gid=1000)
    wrong = Layer(layer.id())
    wrong.file(0, "etc", b"in the way")
    assert helper.ask("stat", layer=layer.id())["state"] == "absent"
    assert helper.commit(layer.manifest(), payload)["existed"] is False
    assert helper.commit(layer.manifest(), payload)["existed"] is True
    assert helper.commit(upper.manifest(), upper.write_payload(folder))["existed"] is False
    assert helper.commit(wrong.manifest(), wrong.write_payload(folder))["rule"] == "tree_conflict"
    os.close(helper.ask("manifest", layer=upper.id())["fds"][0])
    assert helper.ask("verify", layer=layer.id())["type"] == "ok"
    assert helper.ask("activate", layer=upper.id(), name="rw", mode="rw", size=20 << 30)["type"] == "ok"
    os.close(helper.ask("activate", layer=upper.id(), name="ro", mode="ro", size=0)["fds"][0])
    assert len(helper.ask("list")["items"]) == 4
    assert helper.ask("remove", layer=upper.id())["code"] == "in_use"
    for name in ("rw", "ro"):
        assert helper.ask("deactivate", name=name)["type"] == "ok"
    for made in (upper, layer):
        assert helper.ask("remove", layer=made.id())["removed"] is True
    assert helper.ask("reconcile")["actions"] == []
