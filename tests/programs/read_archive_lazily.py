"""List the archive that ships by the Python API, and fail if that imports a large package."""

import sys

from dm_generations import Archive

if __name__ == "__main__":
    with Archive.open("archive/emoji.db") as archive:
        assert len(archive.images(prompt="a rocket")) > 0
        assert archive.groups(score="10..")
        assert "emoji.db" in repr(archive) and "<table>" in archive._repr_html_()
        assert "a rocket" in repr(archive.images(prompt="a rocket")[0])
    assert not {"jax", "numpy", "PIL", "pandas", "pyarrow"} & set(sys.modules)
