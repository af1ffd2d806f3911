"""Takes and tries locks as it is told, on a file that others lock too.

Reads lines of a name and an action, and says the name and what came of it: `got`, `refused` or `done`.
"""
import fcntl
import os
import struct
import subprocess
import sys

fd = os.open(sys.argv[1], os.O_RDWR)
out = os.fdopen(3, "w")
# Files for flock(2), by how they are open.
FILES = {"flock": fd, "reader": os.open(sys.argv[1], os.O_RDONLY), "writer": os.open(sys.argv[1], os.O_WRONLY)}
others = []
KINDS = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK, "free": fcntl.F_UNLCK}


def act(action):
    if action[0] in FILES:
        kind = {"read": fcntl.LOCK_SH, "write": fcntl.LOCK_EX, "free": fcntl.LOCK_UN}[action[1]]
        return lambda: fcntl.flock(FILES[action[0]], kind | fcntl.LOCK_NB)
    if action[0] == "look":
        return lambda: os.close(os.open(sys.argv[1], os.O_RDONLY))
    if action[0] == "inherit":
        # The child closes what it has inherited.
        return lambda: subprocess.run(["/bin/true"], check=True)
    if action[0] == "other":
        file, kind = os.open(sys.argv[1], os.O_RDWR), KINDS[action[1]]
        lock = struct.pack("hhqqi4x", kind, os.SEEK_SET, int(action[2]), int(action[3]), 0)
        others.append(file)
        return lambda: fcntl.fcntl(file, fcntl.F_SETLK, lock)
    command = fcntl.F_SETLKW if action[0] == "wait" else fcntl.F_SETLK
    kind, start, length = KINDS[action[1]], int(action[2]), int(action[3])
    return lambda: fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))


def say(text):
    out.write(f"\036announce {text}\036\n")
    out.flush()


say("ready")
for line in sys.stdin:
    name, *action = line.split()
    if action == ["end"]:
        break
    try:
        act(action)()
        say(f"{name} got")
    except BlockingIOError:
        say(f"{name} refused")
