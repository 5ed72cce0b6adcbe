"""Starts a Ray cluster, as small as Ray allows, in a process of its own, which ends when that is done."""

from __future__ import annotations

import socket
from pathlib import Path

OBJECT_STORE_BYTES = 100 << 20


def start(host: str, folder: str, spare: str) -> None:
    """Start a cluster's head at the address ``host``, "" for the one that Ray takes, and note its address in ``folder``.

    ``spare`` is "1" to do without what Ray lets be spared in no other way.
    """
    import ray.util
    from ray.cluster_utils import Cluster

    settings = {
        "node_ip_address": host or ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
        "num_cpus": 1,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "include_log_monitor": False,
        "no_monitor": True,
        "dashboard_agent_listen_port": 0,
    }
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if spare:
            # Ray starts its dashboard's process even where no dashboard is wanted, and waits for it for seconds. It goes on
            # without if the dashboard's port is taken.
            settings |= {"dashboard_host": "127.0.0.1", "dashboard_port": taken.getsockname()[1]}
        cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=settings)
    (Path(folder) / "address").write_text(str(cluster.address))
