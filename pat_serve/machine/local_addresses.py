"""Keep requests to this machine itself away from proxies, whatever the environment says.

A company's `http_proxy` is meant for the world outside. It cannot reach a server that listens on this machine alone,
and answers 403 or 502 in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from urllib.parse import urlsplit

LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
# Libraries differ in which of them they read, and which one wins.
_VARIABLES = ("no_proxy", "NO_PROXY")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
# httpx makes ready for every proxy of the environment before it looks at an address, and knows not all that desktops
# write there (socks://), or wants a package for them (socks5://).
UNUSABLE_PROXY = (ImportError, ValueError)


def keep_local_addresses_direct(environment: MutableMapping[str, str]) -> None:
    """Except this machine's addresses from every proxy, for this process and its children.

    httpx, requests, aiohttp, urllib and their users read the same variables. Without a proxy nothing is set.

    Args:
        environment: the process's own.
    """
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return
    given = next((environment[name] for name in _VARIABLES if environment.get(name)), "")
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    if "*" in hosts:
        return
    direct = ",".join([*hosts, *(host for host in LOCAL if host not in hosts)])
    for name in _VARIABLES:
        environment[name] = direct


def is_local(url: str) -> bool:
    """The address is one of this machine's own, by name."""
    try:
        return urlsplit(url).hostname in LOCAL
    except ValueError:
        return False


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that speaks to this machine alone."""
    return {name: value for name, value in environment.items() if name.lower() not in _PROXIES}
