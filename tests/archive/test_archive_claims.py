"""Words between programs that fill one archive: who draws what."""

import time

import pytest
from archive_kit import execute

from dm_generations.archive import Archive, ArchiveError


def test_claims_are_kept_per_owner_until_they_expire(tmp_path):
    until = time.time() + 100
    with Archive.create(tmp_path / "a.db") as archive:
        with archive.transaction():
            assert archive.claim([b"a", b"b"], "me", until) == [True, True]
            assert archive.claim([b"b", b"c"], "you", until) == [False, True]
            assert archive.claim([b"a"], "me", until + 1) == [True]
        assert archive.claims() == {b"a": "me", b"b": "me", b"c": "you"}
        with archive.transaction():
            archive.release_claims("me", [b"b", b"c"])  # c is not its own
        assert archive.claims() == {b"a": "me", b"c": "you"}
        with archive.transaction():
            archive.renew_claims("me", time.time() - 1)  # in the past: as if the time had run out
        assert archive.claims() == {b"c": "you"}
        with archive.transaction():
            assert archive.claim([b"a"], "you", until) == [True]
            archive.release_claims("you")
        assert execute(archive.path, "SELECT count(*) FROM claims") == [(0,)]


def test_claims_of_a_failed_transaction_are_not_taken(tmp_path):
    with Archive.create(tmp_path / "a.db") as archive:
        with pytest.raises(ValueError, match="stopped"), archive.transaction():
            archive.claim([b"a"], "me", time.time() + 100)
            raise ValueError("stopped")
        assert archive.claims() == {}
        with pytest.raises(ArchiveError, match="does not fit"), archive.transaction():
            archive.claim([b""], "me", time.time() + 100)
