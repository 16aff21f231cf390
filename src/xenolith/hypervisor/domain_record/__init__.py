"""What a domain is made of, and what becomes of each part when it travels: saved, cloned, relocated.

`fields` has every field of the objects that are a domain's state.  `domain.domain_state` gives plain data: numbers,
booleans, text, lists and dictionaries with text as keys, fit for JSON.  The fields' `kinds` write most of it; `vcpus`,
`ports` and `features` the rest, each with the reading beside the writing.  What `domain.load_domain` gets may have been
written by anybody.  It checks everything that a hypercall would have checked, and takes nothing about frames on trust
(`frames`).

Nothing in a record depends on the machine it was made on, nor on the domain's number there: ports of its own to
dom0 wait for dom0, and what it granted or offered to other domains is withdrawn, since their numbers mean others
elsewhere.
"""
