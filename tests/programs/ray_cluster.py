"""Run a Ray cluster on this machine, of nodes with one CPU each; print its address. Ends with stdin.

Lines of stdin are orders, answered by a line: "add" starts a node, "lose" kills the processes of the last one.
"""

import contextlib
import socket
import sys

from ray.cluster_utils import Cluster

SIZES = {"num_cpus": 1, "object_store_memory": 200 << 20, "include_dashboard": False}
# A node that does not know these ports ends if its own processes have not told them within 15 seconds.
PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
TRIES = 5


def node_args() -> dict[str, int | bool]:
    """Return the arguments of a node, with ports that are free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        return SIZES | {name: each.getsockname()[1] for name, each in zip(PORTS, sockets, strict=True)}


def start() -> Cluster:
    """Start a cluster; on a busy machine Ray may find that its own processes take too long."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(Exception):
            return Cluster(initialize_head=True, head_node_args=node_args())
    return Cluster(initialize_head=True, head_node_args=node_args())


def main() -> None:
    cluster = start()
    nodes = []
    try:
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line.strip() == "add":
                nodes.append(cluster.add_node(**node_args()))
            else:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            print(line.strip(), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
