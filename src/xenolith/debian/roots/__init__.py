"""Root file systems for guests: from folders, tarballs and container images to an ext4 image, without privilege.

`tree` is a file system in memory, layer upon layer of tar archives; `oci` finds the layers of a container image; `ext4`
makes a disk image of a tree or of a folder; `bootstrap` has mmdebstrap install a Debian; `store` keeps the results.
"""


class RootError(Exception):
    """A root file system cannot be made; the text says why, and what to do."""
