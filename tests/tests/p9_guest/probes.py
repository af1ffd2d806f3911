"""What a program may rely on: each probe works in an empty folder of its own, as root.

    probes.py FOLDER

prints a line for each one: its name, and ok or FAILED; why it failed stands behind it.
"""
import errno
import fcntl
import mmap
import os
import shutil
import signal
import socket
import stat
import struct
import sys
import traceback

NOBODY = 65534
PROBES = []


def probe(function):
    PROBES.append(function)
    return function


def put(path, data=b"data", mode=0o644):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    os.write(fd, data)
    os.close(fd)


def get(path):
    with open(path, "rb") as file:
        return file.read()


def fails(number, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except OSError as error:
        assert error.errno == number, error
    else:
        assert False, f"it succeeded instead of {errno.errorcode[number]}"


def child(function):
    """Runs a function in a process of its own, which ends well or fails the probe."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os.write(write, traceback.format_exc().encode())
            os._exit(1)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(read, "rb") as file:
        assert status == 0, file.read().decode() or status


def as_nobody(function, groups=()):
    def act():
        os.setgroups(groups)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        function()
    child(act)


# Contents


@probe
def write_and_read():
    put("f", b"x" * 100_000)
    assert get("f") == b"x" * 100_000
    assert os.stat("f").st_size == 100_000


@probe
def pieces_at_odd_places():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    for at in (0, 1, 4095, 4096, 4097, 511_975, 511_976, 1_000_001):
        os.pwrite(fd, struct.pack("<Q", at), at)
        assert os.pread(fd, 8, at) == struct.pack("<Q", at), at
    assert os.fstat(fd).st_size == 1_000_009
    assert os.pread(fd, 100, 1_000_001) == struct.pack("<Q", 1_000_001)
    assert os.pread(fd, 1, 2_000_000) == b""
    os.close(fd)
    assert get("f")[100_000:100_010] == bytes(10)


@probe
def beyond_four_gibibytes():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"far", 5 << 30)
    os.fsync(fd)
    assert os.pread(fd, 4, 5 << 30) == b"far"
    assert os.fstat(fd).st_size == (5 << 30) + 3
    assert os.fstat(fd).st_blocks < 1000
    os.close(fd)


@probe
def append_by_two():
    one, two = (os.open("f", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for _ in range(2))
    os.write(one, b"one")
    os.write(two, b"two")
    os.write(one, b"three")
    os.close(one), os.close(two)
    assert get("f") == b"onetwothree"


@probe
def truncation():
    put("f", b"0123456789")
    os.truncate("f", 4)
    assert get("f") == b"0123"
    os.truncate("f", 8)
    assert get("f") == b"0123\0\0\0\0"
    os.close(os.open("f", os.O_WRONLY | os.O_TRUNC))
    assert os.stat("f").st_size == 0


@probe
def exclusive_creation():
    put("f")
    fails(errno.EEXIST, os.open, "f", os.O_CREAT | os.O_EXCL)
    os.symlink("absent", "l")
    fails(errno.EEXIST, os.open, "l", os.O_CREAT | os.O_EXCL)


@probe
def direct():
    memory = mmap.mmap(-1, 65536)
    memory.write(os.urandom(65536))
    fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    assert os.writev(fd, [memory]) == 65536
    back = mmap.mmap(-1, 65536)
    assert os.preadv(fd, [back], 0) == 65536
    os.close(fd)
    assert back[:] == memory[:] == get("f")


@probe
def synced():
    fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_SYNC)
    os.write(fd, b"data")
    os.fsync(fd)
    os.fdatasync(fd)
    os.close(fd)
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


@probe
def read_only_descriptors():
    put("f")
    fd = os.open("f", os.O_RDONLY)
    fails(errno.EBADF, os.write, fd, b"x")
    os.close(fd)
    fails(errno.EISDIR, os.open, ".", os.O_WRONLY)


@probe
def private_mapping():
    put("f", b"a" * 10_000)
    fd = os.open("f", os.O_RDWR)
    with mmap.mmap(fd, 10_000, flags=mmap.MAP_PRIVATE) as memory:
        assert memory[9_999] == ord("a")
        memory[0] = ord("b")
    os.close(fd)
    assert get("f")[0] == ord("a")


@probe
def shared_mapping():
    put("f", b"a" * 10_000)
    fd = os.open("f", os.O_RDWR)
    with mmap.mmap(fd, 10_000, flags=mmap.MAP_SHARED) as memory:
        memory[5_000:5_004] = b"here"
        memory.flush()
    os.close(fd)
    assert get("f")[4_999:5_005] == b"aherea"


@probe
def run_a_program():
    shutil.copy("/usr/bin/true", "program")
    child(lambda: os.execv("./program", ["program"]))
    put("script", b"#!/bin/sh\nexit 0\n", 0o755)
    child(lambda: os.execv("./script", ["script"]))
    put("text", b"#!/bin/sh\nexit 0\n", 0o644)
    fails(errno.EACCES, os.execv, "./text", ["text"])


# Names


@probe
def many_entries():
    names = {f"{number:05}-{'x' * 50}" for number in range(1_500)}
    for name in names:
        os.mknod(name)
    assert set(os.listdir(".")) == names
    seen = set()
    with os.scandir(".") as entries:
        for index, entry in enumerate(entries):
            assert entry.name not in seen
            seen.add(entry.name)
            if index % 2:
                os.unlink(entry.name)
    assert seen == names
    assert len(os.listdir(".")) == 750


@probe
def strange_names():
    for name in (b"\xff\xfe", b"a\nb", b" ", b"-", b"\\", b"x" * 255, "ü".encode(), b"...", b"%s"):
        put(name, name)
        assert get(name) == name
        assert name in os.listdir(b".")
    fails(errno.ENAMETOOLONG, put, "x" * 256)


@probe
def deep_paths():
    for _ in range(40):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    put("f")
    assert get("f") == b"data"
    for _ in range(40):
        os.chdir("..")
    shutil.rmtree("d" * 200)


@probe
def renames():
    put("a", b"a"), put("b", b"b")
    os.rename("a", "b")
    assert get("b") == b"a" and os.listdir(".") == ["b"]
    os.mkdir("d"), os.mkdir("e")
    put("e/f")
    fails(errno.ENOTEMPTY, os.rename, "d", "e")
    fails(errno.EISDIR, os.rename, "b", "d")
    fails(errno.ENOTDIR, os.rename, "d", "b")
    fails(errno.EINVAL, os.rename, "e", "e/inside")
    os.rename("e", "d")
    assert os.listdir("d") == ["f"]


@probe
def rename_above_an_open_file():
    os.makedirs("a/b")
    put("a/b/f", b"before")
    fd = os.open("a/b/f", os.O_RDWR)
    os.rename("a", "z")
    os.write(fd, b"after!")
    os.fchmod(fd, 0o600)
    assert stat.S_IMODE(os.stat("z/b/f").st_mode) == 0o600
    os.close(fd)
    assert get("z/b/f") == b"after!"


@probe
def a_folder_in_use_is_replaced():
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    os.rename("d", "old")
    os.mkdir("d")
    put("d/new")
    inside = os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    os.close(inside), os.close(fd)
    assert os.listdir("old") == ["made"] and os.listdir("d") == ["new"]


@probe
def links():
    put("a")
    os.link("a", "b")
    assert os.stat("a").st_nlink == os.stat("b").st_nlink == 2
    assert os.stat("a").st_ino == os.stat("b").st_ino
    os.unlink("a")
    assert get("b") == b"data" and os.stat("b").st_nlink == 1
    fails(errno.EEXIST, os.link, "b", "b")
    os.mkdir("d")
    fails(errno.EPERM, os.link, "d", "e")


@probe
def symbolic_links():
    os.mkdir("d")
    put("d/f")
    os.symlink("d/f", "l")
    assert os.readlink("l") == "d/f" and get("l") == b"data"
    assert stat.S_ISLNK(os.lstat("l").st_mode) and os.lstat("l").st_size == 3
    fails(errno.ELOOP, os.open, "l", os.O_RDONLY | os.O_NOFOLLOW)
    os.symlink("loop", "loop")
    fails(errno.ELOOP, os.stat, "loop")
    os.symlink("x" * 1000, "long")
    assert os.readlink("long") == "x" * 1000
    fails(errno.ENAMETOOLONG, os.stat, "long/f")


@probe
def folders():
    os.mkdir("d", 0o700)
    assert os.stat(".").st_nlink in (1, 3)
    put("d/f")
    fails(errno.ENOTEMPTY, os.rmdir, "d")
    fails(errno.ENOTDIR, os.rmdir, "d/f")
    fails(errno.EISDIR, os.unlink, "d")
    os.unlink("d/f")
    os.rmdir("d")
    fails(errno.ENOENT, os.stat, "d")


@probe
def special_files():
    os.mkfifo("fifo")
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    server.listen()
    kinds = {name: stat.S_IFMT(os.lstat(name).st_mode) for name in os.listdir(".")}
    assert kinds == {"fifo": stat.S_IFIFO, "null": stat.S_IFCHR, "socket": stat.S_IFSOCK}, kinds
    assert os.stat("null").st_rdev == os.makedev(1, 3)
    client = socket.socket(socket.AF_UNIX)
    client.connect("socket")
    client.close(), server.close()
    child_done = os.fork()
    if child_done == 0:
        with open("fifo", "wb") as file:
            file.write(b"through")
        os._exit(0)
    assert get("fifo") == b"through"
    os.waitpid(child_done, 0)


# Files that have no name any more


@probe
def unlinked_read_and_write():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.unlink("f")
    os.write(fd, b"data")
    assert os.pread(fd, 10, 0) == b"data"
    os.ftruncate(fd, 2)
    assert os.fstat(fd).st_size == 2
    os.utime(fd, (1, 1))
    assert os.fstat(fd).st_mtime == 1
    os.close(fd)


@probe
def unlinked_fchmod():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.unlink("f")
    os.fchmod(fd, 0o640)
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
    os.close(fd)


@probe
def unlinked_fchown():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.unlink("f")
    os.fchown(fd, 5, 6)
    assert (os.fstat(fd).st_uid, os.fstat(fd).st_gid) == (5, 6)
    os.close(fd)


@probe
def unlinked_xattr():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.unlink("f")
    os.setxattr(fd, "user.key", b"value")
    assert os.getxattr(fd, "user.key") == b"value"
    os.close(fd)


@probe
def unlinked_reopened():
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"data")
    os.unlink("f")
    assert get(f"/proc/self/fd/{fd}") == b"data"
    os.close(fd)


@probe
def renamed_over_while_open():
    put("old", b"old!"), put("new", b"brand new")
    fd = os.open("old", os.O_RDWR)
    number = os.fstat(fd).st_ino
    os.rename("new", "old")
    assert os.fstat(fd).st_size == 4 and os.fstat(fd).st_ino == number
    assert os.read(fd, 10) == b"old!"
    os.close(fd)
    assert get("old") == b"brand new"


@probe
def removed_working_folder():
    os.mkdir("d")
    os.chdir("d")
    os.rmdir("../d")
    fails(errno.ENOENT, put, "f")


# Attributes


@probe
def modes():
    put("f", mode=0o600)
    os.chmod("f", 0o4755)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o4755
    os.umask(0o027)
    put("g", mode=0o666)
    os.umask(0o022)
    assert stat.S_IMODE(os.stat("g").st_mode) == 0o640


@probe
def owners():
    put("f")
    os.chown("f", 1, 2)
    assert (os.stat("f").st_uid, os.stat("f").st_gid) == (1, 2)
    os.symlink("f", "l")
    os.lchown("l", 3, 4)
    assert (os.lstat("l").st_uid, os.stat("l").st_uid) == (3, 1)


@probe
def who_makes_a_file_owns_it():
    os.chmod(".", 0o777)
    def act():
        put("f"), os.mkdir("d"), os.symlink("f", "l")
    as_nobody(act)
    assert {os.lstat(name).st_uid for name in ("f", "d", "l")} == {NOBODY}


@probe
def the_group_of_a_folder_is_inherited():
    os.chown(".", 0, 7)
    os.chmod(".", 0o2777)
    put("f"), os.mkdir("d")
    assert os.stat("f").st_gid == os.stat("d").st_gid == 7
    assert os.stat("d").st_mode & stat.S_ISGID


@probe
def strangers_are_kept_out():
    put("secret", mode=0o600)
    os.mkdir("closed", 0o700)
    put("closed/f", mode=0o666)
    os.mkdir("sticky")
    os.chmod("sticky", 0o1777)
    put("sticky/f")
    def act():
        fails(errno.EACCES, get, "secret")
        fails(errno.EACCES, get, "closed/f")
        fails(errno.EACCES, put, "f")
        fails(errno.EPERM, os.chmod, "secret", 0o777)
        fails(errno.EPERM, os.unlink, "sticky/f")
    as_nobody(act)


@probe
def supplementary_groups_count():
    put("f", mode=0o640)
    os.chown("f", 0, 77)
    as_nobody(lambda: get("f"), groups=(77,))
    as_nobody(lambda: fails(errno.EACCES, get, "f"))


@probe
def writing_clears_the_suid_bit():
    put("f")
    os.chmod("f", 0o6777)
    def act():
        fd = os.open("f", os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
    as_nobody(act)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o777, oct(os.stat("f").st_mode)


@probe
def giving_away_clears_the_suid_bit():
    put("f")
    os.chmod("f", 0o4755)
    os.chown("f", 1, 1)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o755


@probe
def times():
    put("f")
    before = os.stat("f")
    os.utime("f", (1_000_000_000, 2_000_000_000))
    after = os.stat("f")
    assert (after.st_atime, after.st_mtime) == (1_000_000_000, 2_000_000_000)
    assert after.st_ctime_ns >= before.st_ctime_ns
    os.mkdir("d")
    os.utime("d", (1, 1))
    put("d/f")
    assert os.stat("d").st_mtime > 1


@probe
def sizes_of_the_file_system():
    data = os.statvfs(".")
    assert data.f_blocks > data.f_bavail > 0 and data.f_bsize > 0 and data.f_namemax == 255


# Extended attributes


@probe
def xattrs():
    put("f")
    os.setxattr("f", "user.one", b"1")
    os.setxattr("f", "user.two", b"2" * 1000)
    assert os.getxattr("f", "user.two") == b"2" * 1000
    assert {name for name in os.listxattr("f") if name.startswith("user.")} == {"user.one", "user.two"}
    os.removexattr("f", "user.one")
    fails(errno.ENODATA, os.getxattr, "f", "user.one")
    fails(errno.ENODATA, os.removexattr, "f", "user.one")
    fails(errno.EEXIST, os.setxattr, "f", "user.two", b"", os.XATTR_CREATE)
    fails(errno.ENODATA, os.setxattr, "f", "user.one", b"", os.XATTR_REPLACE)


@probe
def empty_xattr():
    put("f")
    os.setxattr("f", "user.empty", b"")
    assert os.getxattr("f", "user.empty") == b""
    assert "user.empty" in os.listxattr("f")


@probe
def xattr_of_a_folder():
    os.mkdir("d")
    os.setxattr("d", "user.key", b"value")
    assert os.getxattr("d", "user.key") == b"value"


@probe
def trusted_xattr():
    put("f")
    os.setxattr("f", "trusted.key", b"value")
    assert os.getxattr("f", "trusted.key") == b"value"
    as_nobody(lambda: fails(errno.ENODATA, os.getxattr, "f", "trusted.key"))


@probe
def capability_xattr():
    put("f")
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    os.setxattr("f", "security.capability", capability)
    assert os.getxattr("f", "security.capability") == capability
    with open("f", "ab") as file:
        file.write(b"changed")
    fails(errno.ENODATA, os.getxattr, "f", "security.capability")


@probe
def acl():
    put("f", mode=0o600)
    def entry(tag, permissions, who=0xFFFFFFFF):
        return struct.pack("<HHI", tag, permissions, who)
    value = struct.pack("<I", 2) + entry(1, 6) + entry(2, 4, NOBODY) + entry(4, 0) + entry(16, 4) + entry(32, 0)
    os.setxattr("f", "system.posix_acl_access", value)
    assert os.getxattr("f", "system.posix_acl_access") == value
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o640


# Locks


def lock(fd, kind, start=0, length=0, command=fcntl.F_SETLK):
    return fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))


@probe
def record_locks():
    put("f", b"x" * 100)
    fd = os.open("f", os.O_RDWR)
    lock(fd, fcntl.F_WRLCK, 10, 10)
    def act():
        other = os.open("f", os.O_RDWR)
        fails(errno.EAGAIN, lock, other, fcntl.F_RDLCK, 15, 1)
        lock(other, fcntl.F_WRLCK, 20, 10)
        kind, _, start, length, pid = struct.unpack("hhqqi4x", lock(other, fcntl.F_WRLCK, 0, 0, fcntl.F_GETLK))
        assert (kind, start, length) == (fcntl.F_WRLCK, 10, 10), (kind, start, length)
        assert pid == os.getppid()
    child(act)
    lock(fd, fcntl.F_UNLCK, 10, 5)
    def part():
        other = os.open("f", os.O_RDWR)
        lock(other, fcntl.F_RDLCK, 10, 5)
        fails(errno.EAGAIN, lock, other, fcntl.F_RDLCK, 15, 1)
    child(part)
    os.close(fd)


@probe
def locks_end_with_their_process():
    put("f")
    child(lambda: lock(os.open("f", os.O_RDWR), fcntl.F_WRLCK))
    fd = os.open("f", os.O_RDWR)
    lock(fd, fcntl.F_WRLCK)
    os.close(fd)


@probe
def whole_file_locks():
    put("f")
    fd = os.open("f", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    def act():
        fails(errno.EAGAIN, fcntl.flock, os.open("f", os.O_RDWR), fcntl.LOCK_SH | fcntl.LOCK_NB)
    child(act)
    fcntl.flock(fd, fcntl.LOCK_UN)
    child(lambda: fcntl.flock(os.open("f", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB))
    os.close(fd)


@probe
def waiting_for_a_lock():
    put("f")
    fd = os.open("f", os.O_RDWR)
    lock(fd, fcntl.F_WRLCK)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        other = os.open("f", os.O_RDWR)
        os.write(write, b"w")
        lock(other, fcntl.F_WRLCK, command=fcntl.F_SETLKW)
        os._exit(0)
    os.read(read, 1)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.close(fd)
    signal.alarm(90)
    assert os.waitpid(pid, 0)[1] == 0
    signal.alarm(0)


@probe
def a_killed_waiter_gets_no_lock():
    put("f")
    fd = os.open("f", os.O_RDWR)
    lock(fd, fcntl.F_WRLCK)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        other = os.open("f", os.O_RDWR)
        os.write(write, b"w")
        lock(other, fcntl.F_WRLCK, command=fcntl.F_SETLKW)
        os._exit(0)
    os.read(read, 1)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    os.close(fd)
    child(lambda: lock(os.open("f", os.O_RDWR), fcntl.F_WRLCK))


def main():
    top = os.path.abspath(sys.argv[1])
    os.umask(0o022)
    for function in PROBES:
        folder = os.path.join(top, function.__name__)
        os.mkdir(folder)
        os.chdir(folder)
        try:
            function()
            print(function.__name__, "ok", flush=True)
        except BaseException:
            words = traceback.format_exc().strip().splitlines()
            print(function.__name__, "FAILED", *("\n\t" + word for word in words[1:]), flush=True)


main()
