"""Fetches files from the web without trusting it: http(s) only, public addresses only, bounded in size and time."""
from __future__ import annotations

import ipaddress
import socket
import threading
from contextlib import suppress
from typing import ClassVar

import urllib3
from urllib3 import exceptions
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, LocationParseError, MaxRetryError
from urllib3.util import Retry, Timeout, parse_url

AGENT = "Mozilla/5.0 (compatible; dci-ico)"   # several image hosts refuse clients that do not name themselves
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 ones
CHUNK = 1 << 16


class Refused(Exception):
    """Why a file was not fetched, worded to follow its address ("answered 404")."""


class _Forbidden(Exception):
    """A connection to an address that is not public; not an HTTPError, so urllib3 does not try it again."""


def is_public(address: str) -> bool:
    """Says whether an IP address belongs to the public internet, seen through the ways IPv6 wraps an IPv4 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)       # its last 32 bits
        if wrapped is not None:
            return is_public(str(wrapped))
        if ip.teredo is not None:       # a tunnel to a private machine, or to any other
            return False
    return ip.is_global and not ip.is_multicast


class Deadline:
    """Ends the requests of one thread that trickle: time-outs per read alone would let them go on for ever."""

    def __init__(self, seconds: float):
        self.expired, self._held = False, []
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        _running.deadline = self        # the connection, made deep inside urllib3 by this thread, finds it there
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        _running.deadline = None
        for held in self._held:
            held.close()

    def hold(self, sock: socket.socket) -> None:
        """Takes a connection's socket at once, in a copy that stays when encryption takes the first one over."""
        self._held.append(sock.dup())
        if self.expired:                # while the connection was made, when there was no socket to end
            self._expire()

    def cancel(self) -> None:
        """Takes the end back."""
        self._timer.cancel()

    def _expire(self) -> None:
        self.expired = True
        for held in list(self._held):
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)


_running = threading.local()


class _Guarded:
    """Makes a urllib3 connection look before it connects and check whom it reached."""

    allow_private: ClassVar[bool]

    def connect(self) -> None:
        if _running.deadline.expired:
            raise TimeoutError
        if not self.allow_private:
            self._refuse_private(self._addresses())
        super().connect()
        if not self.allow_private:      # a name may resolve to another address the second time
            self._refuse_private({self.sock.getpeername()[0]})

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        _running.deadline.hold(sock)
        return sock

    def _addresses(self) -> set[str]:
        try:
            return {entry[4][0] for entry in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError):
            return set()                # connecting will fail too, in urllib3's words, and be tried again

    def _refuse_private(self, addresses: set[str]) -> None:
        private = sorted(address for address in addresses if not is_public(address))
        if private:
            self.close()
            raise _Forbidden(f"leads to the private address {private[0]}")


def guarded_pool(retries: Retry | bool, timeout: Timeout, allow_private: bool) -> urllib3.PoolManager:
    """Makes a pool whose connections keep to the running `Deadline`, and to public addresses unless told otherwise."""
    pool = urllib3.PoolManager(num_pools=64, retries=retries, timeout=timeout)
    pool.pool_classes_by_scheme = {
        "http": _guarded(HTTPConnectionPool, HTTPConnection, allow_private),
        "https": _guarded(HTTPSConnectionPool, HTTPSConnection, allow_private)}
    return pool


def _guarded(pool: type, connection: type, allow_private: bool) -> type:
    """Makes a connection pool class whose connections are guarded."""
    own = type(f"Guarded{connection.__name__}", (_Guarded, connection), {"allow_private": allow_private})
    return type(f"Guarded{pool.__name__}", (pool,), {"ConnectionCls": own})


class Downloader:
    """Fetches files over http(s); may be used from several threads.

    Private, loopback and link-local addresses are refused at first, after every redirect, and once connected.

    Args:
        max_bytes: files larger than this are refused, before or while they arrive.
        timeout: seconds to connect and between two reads; a whole request may take `limit` seconds.
        limit: seconds for one request.
        retries: how often a failed connection, read or busy server (429, 5xx) is tried again, with growing pauses.
        allow_private: also fetches from the machine itself and its network.
    """

    def __init__(self, max_bytes: int = 20_000_000, timeout: float = 10.0, limit: float = 30.0, retries: int = 2,
                 allow_private: bool = False):
        self.max_bytes, self.limit = max_bytes, limit
        retry = Retry(total=retries + 5, connect=retries, read=retries, status=retries, other=0, redirect=5,
                      status_forcelist=(429, 500, 502, 503, 504), backoff_factor=0.2, raise_on_status=False,
                      respect_retry_after_header=False)     # a server must not make us wait for hours
        self._pool = guarded_pool(retry, Timeout(connect=timeout, read=timeout), allow_private)
        # Nothing is inflated on arrival, and hosts are many, so connections are not kept.
        self._headers = {"User-Agent": AGENT, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}

    def fetch(self, url: str) -> bytes:
        """Returns the content of an address.

        Raises:
            Refused: it is no http(s) address, leads somewhere private, fails, is too large or too slow.
        """
        try:
            scheme, host = parse_url(url).scheme, parse_url(url).host
        except LocationParseError as error:
            raise Refused("is no web address") from error
        if scheme not in ("http", "https") or not host:
            raise Refused("is no http or https address")
        with Deadline(self.limit) as deadline:
            try:
                content = self._read(url)
            except _Forbidden as error:
                raise Refused(str(error)) from error
            except (HTTPError, OSError, ValueError) as error:
                if not deadline.expired:
                    raise Refused(f"failed ({why_failed(error)})") from error
                content = b""
        if deadline.expired:             # a file that breaks off may look whole
            raise Refused(f"took longer than {self.limit:g} s")
        return content

    def _read(self, url: str) -> bytes:
        response = self._pool.request("GET", url, headers=self._headers, preload_content=False, decode_content=False)
        try:
            if response.status != 200:
                raise Refused(f"answered {response.status}")
            # A server may announce less than it sends, or nothing, so what arrives is counted too.
            announced = response.headers.get("Content-Length", "")
            if announced.isdecimal() and int(announced) > self.max_bytes:
                raise Refused(f"is larger than {self.max_bytes:,} bytes")
            content = bytearray()
            while chunk := response.read(CHUNK, decode_content=False):
                content += chunk
                if len(content) > self.max_bytes:
                    raise Refused(f"is larger than {self.max_bytes:,} bytes")
            return bytes(content)
        finally:
            response.close()


def why_failed(error: BaseException) -> str:
    """Says in a few words why a request failed, without the object addresses that urllib3's messages hold."""
    reason = error
    if isinstance(error, MaxRetryError) and error.reason is not None:
        reason = error.reason                # what the last try failed for
    for kind, words in ((exceptions.LocationValueError, "it leads to an address that is not http or https"),
                        (exceptions.SSLError, "its certificate or encryption is not accepted"),
                        (exceptions.NewConnectionError, "no connection"),
                        ((exceptions.TimeoutError, TimeoutError), "no answer in time"),
                        (exceptions.ResponseError, str(reason)),
                        (HTTPError, "the connection broke off")):
        if isinstance(reason, kind):
            return words
    return getattr(reason, "strerror", None) or type(reason).__name__
