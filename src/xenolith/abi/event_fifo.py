"""The FIFO event channel ABI as data (public/event_channel.h: event words, the control block)."""

from typing import Final

EVTCHN_FIFO_NR_CHANNELS: Final = 1 << 17
EVTCHN_FIFO_LINK_BITS: Final = 17
EVTCHN_FIFO_MAX_QUEUES: Final = 16  # by priority, 0 the highest
EVTCHN_FIFO_PRIORITY_DEFAULT: Final = 7
EVENT_WORDS_PER_PAGE: Final = 1024
EVENT_ARRAY_PAGES: Final = EVTCHN_FIFO_NR_CHANNELS // EVENT_WORDS_PER_PAGE

# Bits of an event word; the rest is the link, the next port of the queue.
EVTCHN_FIFO_PENDING: Final = 31
EVTCHN_FIFO_MASKED: Final = 30
EVTCHN_FIFO_LINKED: Final = 29
EVTCHN_FIFO_BUSY: Final = 28
LINK_MASK: Final = (1 << EVTCHN_FIFO_LINK_BITS) - 1

# The control block of a vCPU: u32 ready (a bit for each queue), u32, u32 head[16].
CONTROL_BLOCK_SIZE: Final = 72
CONTROL_BLOCK_HEADS: Final = 8
