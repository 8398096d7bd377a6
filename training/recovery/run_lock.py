"""Only one training at a time writes to a run directory."""

from __future__ import annotations

import errno
from types import TracebackType

from filelock import FileLock, Timeout

from onecurve.training.errors import BadInput
from onecurve.training.process import is_main_process
from onecurve.training.run_directory import RunDirectory

# The system releases the lock of a killed training when its last process has closed the file. Data loader workers notice
# within five seconds that their parent is dead.
_TIMEOUT_SECONDS = 10.0

# check_writable reports these.
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR})


class RunLock:
    """A lock of a run directory, held by rank 0 until it leaves the context or its process ends, however it ends.

    The lock is on a file in the directory, which stays there. Other machines see the lock if the network file system
    supports locks.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        # Without `flock`, filelock would fall back to a marker file, which a killed training leaves behind.
        self._lock = FileLock(run.lock, fallback_to_soft=False)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock.is_locked

    def acquire(self) -> None:
        """Lock the run directory on rank 0, if it exists.

        Raises:
            BadInput: another training holds the lock.
        """
        if self.is_held or not is_main_process() or not self._run.path.is_dir():
            return
        try:
            self._lock.acquire(timeout=_TIMEOUT_SECONDS, poll_interval=0.1)
        except Timeout:
            raise BadInput(
                f"output_dir {str(self._run.path)!r}: another training is running there; wait until it ends, stop it "
                f"with `touch {self._run.stop}`, or choose another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                print(
                    f"{self._run.path}: this file system has no locks ({error.strerror}): make sure that no other training "
                    "is started in it",
                    flush=True,
                )

    def __enter__(self) -> RunLock:
        """Acquire the lock if there is a run. Looking at a folder without a run leaves no file in it."""
        if self._run.config.exists():
            self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()
