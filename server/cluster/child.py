"""Run a command as the child of a Ray replica. The child is told to end when the replica does, however that ends.

    python -m pat_serve.server.cluster.child PARENT_PID COMMAND ...

A replica that is killed, or whose node is lost, has no chance to stop its server, which would go on with the model in
memory beside the replica that takes its place.
"""

from __future__ import annotations

import os
import signal
import sys

from pat_serve.server.start.supervisor import end_with_parent


def main() -> None:
    """Prepare this process, and become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    # The command would inherit the signals that Ray's workers block or ignore.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    # exec keeps this setting. The kernel watches the thread that started this process: the replica's loop, which stays.
    end_with_parent()
    # The replica may have died before the kernel was told.
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
