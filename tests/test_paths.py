"""Where caches go, and paths as text, bytes and URIs."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from dm_generations.archive import Archive
from dm_generations.errors import UserError
from dm_generations.paths import cache_dir, sanitize_file_name, sqlite_uri
from dm_generations.runtime import compile_cache


def has_no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.skipif(os.name != "posix", reason="XDG_CACHE_HOME is not for Windows")
def test_the_cache_is_private(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_dir("xla")
    assert folder == tmp_path.resolve() / "dm-generations" / "xla"
    folder.chmod(0o755)
    assert cache_dir("xla").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.name != "posix", reason="needs owners and modes of files")
def test_a_cache_of_another_user_or_one_that_others_can_write_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_dir("xla")
    folder.chmod(0o770)
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        cache_dir("xla")
    folder.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        cache_dir("xla")


@pytest.mark.skipif(os.name != "posix", reason="needs owners and modes of files")
@pytest.mark.parametrize(("mode", "is_refused"), [(0o777, True), (0o770, True), (0o1777, False), (0o755, False)])
def test_no_folder_on_the_way_can_be_replaced_by_others(tmp_path, monkeypatch, mode, is_refused):
    """Whoever writes to one could put another folder in the place of ours, except where the sticky bit is set."""
    monkeypatch.setattr("sys.platform", "linux")
    shared = tmp_path / "shared"
    (shared / "mine" / "deeper").mkdir(parents=True)
    shared.chmod(mode)
    link = tmp_path / "link"
    link.symlink_to(shared / "mine")
    for base in (shared / "mine" / "deeper", link / "deeper", link):
        monkeypatch.setenv("XDG_CACHE_HOME", str(base))
        if is_refused:
            with pytest.raises(UserError, match=f"{shared} .*XDG_CACHE_HOME"):
                cache_dir("xla/machine")
        else:
            found = cache_dir("xla/machine")
            assert found.is_relative_to(shared) and not found.is_symlink()
            assert {folder.stat().st_mode & 0o777 for folder in (found, *found.parents[:2])} == {0o700}


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", has_no_home)
    with pytest.raises(UserError, match="no home folder; set HOME"):
        cache_dir("xla")


def test_without_a_home_programs_are_not_cached_and_work_goes_on(monkeypatch, caplog):
    import jax

    monkeypatch.setattr(Path, "home", has_no_home)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compile_cache.enable()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert "XDG_CACHE_HOME" in caplog.text


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        (PurePosixPath("/a b/ä?#%.db"), "file:///a%20b/%C3%A4%3F%23%25.db?mode=ro"),
        (PurePosixPath("//a.db"), "file:////a.db?mode=ro"),
        (PureWindowsPath(r"C:\a b\c.db"), "file:///C:/a%20b/c.db?mode=ro"),
        (PureWindowsPath(r"Z:\c.db"), "file:///Z:/c.db?mode=ro"),  # a mapped drive
        (PureWindowsPath(r"\\server\share\c.db"), "file:////server/share/c.db?mode=ro"),
    ],
)
def test_the_uri_of_an_archive_has_no_host(path, uri):
    assert sqlite_uri(path, "mode=ro") == uri


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX")
@pytest.mark.parametrize(
    "name", [b"\xff\xe9.db", b"?mode=rw#.db", b"%2e%00.db", b"a\nb.db", "\u00e9\U0001f951.db".encode()]
)
def test_archives_of_any_name_are_opened(tmp_path, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    with Archive.create(path):
        pass
    for mode in ("r", "w"):
        with Archive.open(path, mode) as archive:
            assert archive.count() == 0
    assert os.listdir(os.fsencode(tmp_path)) == [name]


@pytest.mark.parametrize("text", ["0 con", "0/../\\..", '0:a|b?*<>"', "0 a. ", "0\ud800\x00\x1b[2J"])
def test_file_names_are_safe_on_windows_too(text):
    name = sanitize_file_name(text, ".png")
    assert not set(name) & set('/\\:*?"<>|\0\x1b')
    assert PureWindowsPath(name).name == name
    name.encode()
