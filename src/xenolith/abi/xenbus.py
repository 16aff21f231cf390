"""The states of the xenbus handshake (public/io/xenbus.h): each half of a device writes its own."""

from enum import IntEnum


class XenbusState(IntEnum):
    UNKNOWN = 0  # the node is not there
    INITIALISING = 1
    INIT_WAIT = 2  # the back-end has said what it offers
    INITIALISED = 3  # the front-end has said where its rings are
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8
