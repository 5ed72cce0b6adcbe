"""What the shared cluster's nodes start in place of ``setup_worker.py``: it has a warm process fork the worker, and ends.

It runs once for each worker, so it imports next to nothing.
"""

import os
import socket
import sys

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.connect(os.environ["DISTCKPT_TEST_WORKERS"])
        words = [str(len(sys.argv)), *sys.argv[1:], *(f"{name}={value}" for name, value in os.environ.items())]
        told = "\0".join(words).encode()
        socket.send_fds(asking, [len(told).to_bytes(8, "big")], [0, 1, 2])
        asking.sendall(told)
        asking.recv(1)  # it has been forked
