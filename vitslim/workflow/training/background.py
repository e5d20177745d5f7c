"""One file writer beside the training: a checkpoint is written while the next updates run."""

import threading
from collections.abc import Callable


class Background:
    """Runs one job at a time in a thread; the next one waits for it.

    A job that fails with OSError, such as a full disk, is told to `failed` and no reason to stop.
    Any other error is raised where the next job comes or the work ends.

    Args:
        failed: Called with the error, in the thread that trains.
    """

    def __init__(self, failed: Callable[[OSError], None]) -> None:
        self._failed = failed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Waits for the job before, then starts this one."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits for the job that runs, if any, and tells how it failed, if it did."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, OSError):
            self._failed(error)
        elif error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
