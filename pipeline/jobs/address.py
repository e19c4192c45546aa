"""RAY_ADDRESS: the running cluster that a job joins; looked for before Ray waits for it."""

import os
import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

from pipeline.errors import StageError
from pipeline.jobs.ray_private import found_on_this_machine

PATIENCE = 10.0  # seconds for a cluster to answer; Ray itself waits for many minutes
WAY_OUT = "or unset RAY_ADDRESS to compute on this machine alone"


def cluster_address() -> str | None:
    """The address of a cluster that answers, for ``ray.init``; None where a job starts its own.

    Raises:
        StageError: RAY_ADDRESS is no address, or nothing answers there within ten seconds.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return None
    place = place_of(address)
    host, port = _parts(place)
    try:
        with socket.create_connection((host, port), PATIENCE):
            pass
    except OSError as error:
        raise _silent(address, place, f"{error.strerror or error}") from error
    if os.environ.get("RAY_USE_TLS", "0") == "0":
        _shake_hands(address, place)
    return address


def place_of(address: str) -> str:
    """HOST:PORT of an address, which may be auto."""
    place = found_on_this_machine() if address == "auto" else address
    if place is None:
        raise StageError(
            "RAY_ADDRESS is auto and there is no Ray cluster on this machine; start one (`ray "
            f"start --head`), {WAY_OUT}"
        )
    return place


def is_loopback(place: str) -> bool:
    """Whether HOST:PORT can be reached from this machine only."""
    host, _ = _parts(place)
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parts(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
        if host and port and parts.netloc == address and not parts.username:
            return host, port
    except ValueError:  # such as a port out of range
        pass
    client = "; ray://, Ray's client, does not do" if address.startswith("ray://") else ""
    raise StageError(
        f"RAY_ADDRESS is {address!r}; allowed: HOST:PORT of a cluster's head node with a port from "
        f"1 to 65535, such as 10.0.0.5:6379, or auto for the cluster on this machine{client}; "
        f"mend it, {WAY_OUT}"
    )


def _shake_hands(address: str, place: str) -> None:
    """Whether what listens there speaks gRPC, as the head of a cluster does."""
    import grpc

    with grpc.insecure_channel(place, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(PATIENCE)
        except grpc.FutureTimeoutError as error:
            raise _silent(address, place, "what listens there is no Ray cluster") from error


def _silent(address: str, place: str, why: str) -> StageError:
    where = address if address == place else f"{address}, {place},"
    return StageError(
        f"RAY_ADDRESS is {where} and no cluster answers there ({why}); start that cluster, name "
        f"another, {WAY_OUT}"
    )
