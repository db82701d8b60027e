"""The folder of parts: whose it is, and that it goes when there is nothing in it."""

from __future__ import annotations

import pytest

from megatron_r1.errors import FolderBusy
from megatron_r1.preprocess.plan import _lock, _take, release_parts


def test_who_waited_for_a_folder_that_is_gone_does_not_write_there(tmp_path):
    folder = tmp_path / "o.parts"
    first = _lock(folder)
    with (folder / ".lock").open("a+") as second:
        with pytest.raises(FolderBusy, match="is being written by process"):
            _take(second, folder / ".lock")
        release_parts(first)
        assert not folder.exists()
        with pytest.raises(FolderBusy, match="has just finished"):
            _take(second, folder / ".lock")
        third = _lock(folder)
        with pytest.raises(FolderBusy, match="has just finished"):
            _take(second, folder / ".lock")
        (folder / "00000-000000.part").touch()
        release_parts(third)
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "00000-000000.part"]
