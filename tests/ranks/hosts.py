"""Rank functions for ranks on hosts of their own."""

from __future__ import annotations

import http.client
import socket
from typing import Any

import psutil
import torch

import distckpt


def host() -> dict[str, Any]:
    """This rank's host, and for every Ray node on it whether it waits for its cluster as long as training does."""
    raylets = [process for process in psutil.process_iter() if process.name() == "raylet"]
    waiting = ["RAY_gcs_rpc_server_reconnect_timeout_s" in process.environ() for process in raylets]
    return {"name": socket.gethostname(), "nodes_that_wait": waiting}


def open_doors() -> list[str]:
    """What on this host answers to anybody, token or not, among all that other hosts can reach."""
    reached = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    outside = [each for each in reached if each.laddr.ip.removeprefix("::ffff:") != "127.0.0.1"]
    return [each for each in map(_answer, outside) if each]


def _answer(listening: Any) -> str:
    host = "127.0.0.1" if listening.laddr.ip in ("::", "0.0.0.0") else listening.laddr.ip
    connection = http.client.HTTPConnection(host, listening.laddr.port, timeout=5)
    try:
        connection.request("GET", "/metrics")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return ""  # not by HTTP
    finally:
        connection.close()
    return "" if status == http.HTTPStatus.UNAUTHORIZED else f"{psutil.Process(listening.pid).name()} says {status}"


def save_error(directory: str) -> dict[str, str]:
    """How a save into a directory fails."""
    with distckpt.CheckpointManager(distckpt.Checkpoint(state={"a": torch.arange(5.0)}), directory) as manager:
        error = manager.save(1).exception(30)
    return {"kind": type(error).__name__, "text": str(error)}
