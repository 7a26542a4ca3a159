"""The one exception that means "the user can fix this"; everything else is a bug of ours."""

import errno


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and how to fix it.

    `soup_jax.cli.main` prints it in one line, without a traceback, and exits with status 2.
    """


class UnavailableError(UserError):
    """Storage that cannot be reached or does not let us in: no property of what lies there."""


class DamagedError(UserError):
    """What was read is not what was written."""


_MACHINE = {
    errno.ENOSPC: "the disk is full: make room, then the same command goes on",
    errno.EDQUOT: "the disk quota is used up: make room, then the same command goes on",
    errno.EFBIG: "the file may not grow further (ulimit -f, or the file system's limit)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EISDIR: "a folder is where a file belongs",
    errno.ENOTDIR: "a file is where a folder belongs",
    errno.EIO: "the disk or network file system fails (input/output error)",
    errno.ESTALE: "the network file system lost the file (stale handle)",
    errno.EMFILE: "too many open files (ulimit -n)",
}
# What libraries in C++ make of the same errors.
_WORDS = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "permission denied": errno.EACCES,
    "input/output error": errno.EIO,
    "stale file handle": errno.ESTALE,
    "too many open files": errno.EMFILE,
}


def explain(error: BaseException) -> str:
    """One sentence for a failure of the machine: no room, no permission, no memory. "" for others.

    Looks through the causes of the error, too.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        e = left.pop(0)
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        left += [e.__cause__, e.__context__, *getattr(e, "exceptions", ())]
        if isinstance(e, MemoryError):
            return "the machine is out of memory"
        if isinstance(e, OSError) and e.errno in _MACHINE:
            return f"{e.filename}: {_MACHINE[e.errno]}" if e.filename else _MACHINE[e.errno]
        text = str(e).lower()
        if "out of memory" in text or ("resource_exhausted" in text and "memory" in text):
            return (
                "the device is out of memory: lower --config.batch_size or evaluate.batch_size (of "
                "`generate`, --max_tokens), or see what `soup-jax plan` says"
            )
        for words, number in _WORDS.items():
            if words in text:
                return _MACHINE[number]
    return ""
