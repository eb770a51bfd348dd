"""Run a Ray cluster on this machine, of nodes with one CPU each; print its address. Ends with stdin.

Lines of stdin are orders, answered by a line: "add" starts a node, "lose" kills the processes of the last one.
"""

import contextlib
import sys

from ray.cluster_utils import Cluster

SIZES = {"num_cpus": 1, "object_store_memory": 200 << 20, "include_dashboard": False}
TRIES = 5


def start() -> Cluster:
    """Start a cluster; on a busy machine Ray may find that its own processes take too long."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(Exception):
            return Cluster(initialize_head=True, head_node_args=SIZES)
    return Cluster(initialize_head=True, head_node_args=SIZES)


def main() -> None:
    cluster = start()
    nodes = []
    try:
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line.strip() == "add":
                nodes.append(cluster.add_node(**SIZES))
            else:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            print(line.strip(), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
