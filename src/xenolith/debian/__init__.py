"""Debian as a guest: its packages, kernels and modules, and our initramfs for it.

Calling the package is `xenolith.debian()`, the configuration of such a guest.
"""

import sys

sys.modules[__name__].__class__ = sys.modules["xenolith"].CallablePackage
