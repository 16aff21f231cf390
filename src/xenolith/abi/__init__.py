"""The public Xen interface and the x86-64 facts it rests on, as data: no behaviour, no state."""
