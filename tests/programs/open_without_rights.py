"""Opens and writes archives of the current folder as a user who may not write there. Prints a line for each try."""

import os

from dm_generations.archive import Archive, ArchiveError

Archive.open("a.db").close()  # imports now what is imported late: the other user may not read this Python
if os.geteuid() == 0:
    os.setuid(65534)  # root can write anywhere


def try_out(action) -> None:
    try:
        with action() as archive:
            print(archive.count())
    except ArchiveError as error:
        print(error)


try_out(lambda: Archive.open("a.db"))
try_out(lambda: Archive.open("a.db", "w"))
try_out(lambda: Archive.create("b.db"))
try_out(lambda: Archive.open("logged.db"))
